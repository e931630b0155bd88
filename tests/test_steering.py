"""A search between its strategy and Tune, with runs that only leave their summaries: nothing is lost, nothing made twice."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from raychat.errors import DataError
from raychat.on_ray.steering import Steering, describe, figures, remaining_s
from raychat.on_ray.trial_process import TrialEnd, TrialOrder
from raychat.search.book import Book
from raychat.search.spec import SearchSpec
from raychat.search.strategy import make_strategy
from raychat.search.trial import Outcome, Trial
from raychat.tracking.journal import Journal
from raychat.tracking.summary import Summary


class Site:
    """Stands for all that runs trials: gives the next order, and lets it end with a loss that its settings decide."""

    def __init__(self, folder: Path, spec: SearchSpec, concurrency: int = 2) -> None:
        self.spec, self.lines, self.ordered, self.stopped = spec, [], [], False
        self.book = Book.open(folder, spec)
        self.steering = Steering(
            strategy=make_strategy(spec),
            book=self.book,
            orders=self,
            stop_asked=lambda: self.stopped,
            concurrency=concurrency,
            echo=self.lines.append,
        )

    def config(self, trial):
        return self.spec.config(trial)

    def order(self, trial, config):
        return TrialOrder(tag=trial.tag, command=(), place=config.run_uri, log=Path("log"), folder=Path())

    def finish(self, tag: str, **values) -> None:
        """The run of `tag` ends."""
        config = self.steering.open[tag]
        leave(config.run_dir, **({"val_bpb": 1 + config.optim.matrix_lr} | values))
        self.steering.ended(tag, TrialEnd(exit_code=0))

    def go(self, most: int = 1000) -> None:
        """Start and finish trials, the oldest first, until `most` have ended or nothing is left."""
        ended = 0
        while ended < most:
            while len(self.steering.open) < self.steering.concurrency and (order := self.steering.next()):
                self.ordered.append(order.tag)
            if not self.steering.open:
                return
            self.finish(next(iter(self.steering.open)))
            ended += 1


def leave(run_dir: Path, status="finished", **values) -> None:
    """What a run leaves when it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_dir / "metrics.jsonl")
    journal.event("start", attempt=1)
    journal.event("end", status=status)
    journal.close()
    Summary(status=status, **({"wall_time_s": 60.0, "step": 4, "num_iterations": 4} | values)).write(
        run_dir / "summary.json"
    )


@pytest.fixture
def open_site():
    """Opens sites, and closes their books at the end."""
    with contextlib.ExitStack() as stack:

        def opened(*args, **options):
            made = Site(*args, **options)
            stack.callback(made.book.close)
            return made

        yield opened


@pytest.fixture
def spec(tiny_flags, tmp_path):
    def make(**changes):
        base = tiny_flags | {"base_dir": str(tmp_path / "base")}
        space = {"matrix_lr": [0.01, 0.02, 0.03, 0.04]}
        settings = {
            "name": "s",
            "scheduler": "none",
            "noise_repeats": 0,
            "confirm_seeds": 0,
            "base": base,
            "space": space,
        }
        return SearchSpec(**(settings | changes))

    return make


def results(book: Book) -> dict:
    return {book.contents.trials[tag].arm: outcome.val_bpb for tag, outcome in book.done.items()}


def test_every_configuration_of_a_grid_runs_once(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec())
    site.go()
    assert sorted(site.ordered) == sorted(site.book.done)
    assert len(site.ordered) == 4
    assert sorted(results(site.book).values()) == [1.01, 1.02, 1.03, 1.04]
    assert site.steering.next() is None


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_search_that_was_killed_comes_to_the_same_end(open_site, spec, tmp_path, after):
    whole = open_site(tmp_path / "whole", spec())
    whole.go()
    first = open_site(tmp_path / "killed", spec())
    first.go(after)
    first.book.close()
    again = open_site(tmp_path / "killed", spec())
    assert set(again.steering.open) == set()
    again.go()
    assert results(again.book) == results(whole.book)
    finished = set(first.ordered[:after])
    assert finished.isdisjoint(again.ordered), "a finished trial ran again"


def test_what_cannot_be_is_an_outcome_and_never_starts(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec(space={"device_batch_size": [2, 3]}))
    site.go()
    found = {site.book.contents.trials[tag].arm: outcome for tag, outcome in site.book.done.items()}
    assert found["device_batch_size=3"].status == "infeasible"
    assert "device-batch-size 3" in found["device_batch_size=3"].reason
    assert len(site.ordered) == 1


def test_data_that_cannot_be_prepared_make_a_trial_infeasible(open_site, spec, tmp_path, monkeypatch):
    site = open_site(tmp_path / "search", spec())

    def refuse(trial):
        raise DataError("no such corpus")

    monkeypatch.setattr(site, "config", refuse)
    site.go()
    assert site.ordered == []
    assert {outcome.reason for outcome in site.book.done.values()} == {"no such corpus"}


def test_a_search_that_is_told_to_stop_starts_nothing_and_keeps_its_runs_open(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec())
    order = site.steering.next()
    site.stopped = True
    assert site.steering.next() is None
    leave(site.steering.open[order.tag].run_dir, status="stopped")
    site.steering.ended(order.tag, TrialEnd(exit_code=0, told=True))
    assert site.book.done == {}
    site.book.close()
    again = open_site(tmp_path / "search", spec())
    assert again.steering.next().tag == order.tag
    assert again.lines[-1] == f"{order.tag} started: baseline (seed 42), goes on"


def test_a_run_that_had_finished_when_it_was_told_to_stop_is_done(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec())
    order = site.steering.next()
    leave(site.steering.open[order.tag].run_dir, val_bpb=1.5)
    site.steering.ended(order.tag, TrialEnd(exit_code=0, told=True))
    assert site.book.done[order.tag].val_bpb == 1.5


def test_failures_are_outcomes_and_the_search_goes_on(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec())
    order = site.steering.next()
    site.steering.crashed(order.tag, "gone")
    assert (site.book.done[order.tag].status, site.book.done[order.tag].reason) == ("failed", "gone")
    site.go()
    assert len(site.book.done) == 4


def test_hours_that_are_over_start_nothing_more(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec(max_hours=1e-9))
    site.go()
    assert site.ordered == []


def test_lines_say_what_a_person_needs(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec(base=spec().base | {"price_per_hour": 1.0}, budget_usd=9.0))
    site.steering.next()
    site.finish("s-000", cost_usd=0.25, val_bpb=1.25)
    assert site.lines[0] == "s-000 started: baseline (seed 42)"
    assert site.lines[1].startswith("s-000 finished: baseline (seed 42): val_bpb 1.2500, 1m00s, $0.25; 1 done")
    assert "$0.25 spent of $9.00" in site.lines[1]


def test_time_to_come_is_that_of_runs_of_the_same_rung():
    def trial(number, rung):
        return Trial(number=number, tag=f"{number}", title="", settings={}, arm="", seed=1, rung=rung)

    known = {str(number): trial(number, rung) for number, rung in enumerate((0.5, 1.0, 1.0, 0.5))}
    done = {"0": Outcome(status="finished", wall_s=10.0), "1": Outcome(status="finished", wall_s=30.0)}
    waiting = [known["2"], known["3"]]
    assert remaining_s(waiting, known, done, concurrency=1) == 40.0
    assert remaining_s(waiting, known, done, concurrency=8) == 20.0
    assert remaining_s(waiting, known, {}, concurrency=1) is None


def test_descriptions():
    trial = Trial(number=0, tag="s-000", title="depth 3", settings={}, arm="a", seed=7, rung=0.25, role="noise")
    assert describe(trial) == "depth 3 (seed 7, rung 0.25, noise)"
    assert describe(dataclasses.replace(trial, rung=1.0, role="trial")) == "depth 3 (seed 7)"
    assert figures(Outcome(status="failed")) == ""
    assert figures(Outcome(status="failed", reason="why")) == ": why"


def test_the_book_holds_plain_values(open_site, spec, tmp_path):
    site = open_site(tmp_path / "search", spec())
    site.go()
    lines = [json.loads(line) for line in (tmp_path / "search" / "book.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("ended") == 4
