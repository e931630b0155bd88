"""The ledger: every second of a run stands in one account, whatever ended the run, and the accounts are the true ones."""

import random

import pytest

from raychat.tracking.ledger import Book, Ledger, ledger


class History:
    """A run that is acted out on a clock of its own, which books the truth beside the records it journals."""

    def __init__(self, log_every=1):
        self.now, self.log_every, self.records, self.nodes = 1000.0, log_every, [], 1
        self.truth = dict.fromkeys(Ledger().accounts(), 0.0)
        self.step = self.attempt = 0
        self.clock = self.saved_clock = 0.0
        self.saved_step, self.seen = 0, set()
        self.unsaved = 0.0
        self.node_s = 0.0

    def spend(self, account, seconds):
        self.now += seconds
        self.truth[account] += seconds
        self.node_s += seconds * self.nodes

    def event(self, kind, **fields):
        self.records.append({"event": kind, "time": self.now, **fields})

    def start(self, driver, nodes=1, startup=5.0):
        self.attempt += 1
        self.truth["productive_s"] -= self.unsaved
        self.truth["replayed_s"] += self.unsaved
        self.step, self.clock, self.unsaved = self.saved_step, self.saved_clock, 0.0
        self.nodes = nodes
        facts = {"resume_step": self.step, "productive_s": self.clock, "nodes": nodes, "replayed": 0}
        self.event("start", attempt=self.attempt, driver=driver, **facts)
        self.spend("startup_s", startup)
        self.fresh = True

    def train(self, steps, seconds=2.0):
        for _ in range(steps):
            self.spend("productive_s", seconds)
            self.clock += seconds
            self.unsaved += seconds
            step, self.step = self.step, self.step + 1
            if self.fresh:
                known = {"step_time_s": self.clock} if step % self.log_every == 0 else {}
                self.event("first_step", step=step, **known)
                self.fresh = False
            if step % self.log_every == 0 and step not in self.seen:  # a replayed step is not journaled again
                self.records.append(
                    {
                        "step": step,
                        "time": self.now,
                        "train/loss": 1.0,
                        "train/dt": seconds,
                        "time/productive": self.clock,
                    }
                )
                self.seen.add(step)

    def evaluate(self, seconds=3.0):
        self.spend("evaluation_s", seconds)
        self.records.append({"step": self.step, "time": self.now, "val/bpb": 1.0, "val/time_s": seconds})

    def save(self, stall=0.5):
        self.spend("checkpoint_stall_s", stall)
        self.saved_step, self.saved_clock, self.unsaved = self.step, self.clock, 0.0
        self.event("checkpoint", step=self.step, stall_s=stall, productive_s=self.clock)

    def fail(self, cause="crash", noticed_after=4.0):
        self.spend("startup_s" if self.fresh else "other_s", noticed_after)
        self.event("failure", cause=cause, step=self.step, error="x", step_time_s=self.clock)

    def wait(self, driver, seconds):
        self.event("waiting", wanted=2, there=1, driver=driver)
        self.nodes = min(self.nodes, 1)
        self.spend("waiting_s", seconds)

    def away(self, seconds):
        self.now += seconds

    def end(self, status="finished"):
        self.truth["productive_s"] -= self.unsaved
        self.truth["replayed_s"] += self.unsaved
        self.unsaved = 0.0
        self.event("end", status=status, step_time_s=self.clock, productive_s=self.saved_clock)

    def ledger(self, price=None):
        return ledger(self.records, price_per_hour=price)


def eventful(log_every=1, seed=0):
    """A history with everything in it: crashes, waits, drivers that die, machines that come and go."""
    rng, history, driver = random.Random(seed), History(log_every), 0
    for _ in range(8):
        history.start(f"d{driver}", nodes=rng.randint(1, 4), startup=rng.uniform(1, 9))
        for _ in range(rng.randint(0, 4)):
            history.train(rng.randint(1, 5), rng.uniform(0.1, 3))
            rng.choice([history.evaluate, history.save])()
        if rng.random() < 0.4:
            history.train(rng.randint(1, 4))
        if rng.random() < 0.4:
            history.end("stopped")
            history.away(rng.uniform(10, 1000))
            driver += 1
        else:
            history.fail(rng.choice(["crash", "preempted", "lost"]), rng.uniform(0, 30))
            history.spend("startup_s", rng.uniform(0, 3))
            if rng.random() < 0.5:
                history.wait(f"d{driver}", rng.uniform(0, 200))
    history.start(f"d{driver}")
    history.train(3)
    history.save()
    history.end()
    return history


def wall_of(records):
    """Seconds between neighbouring records of one driver, which is what a driver is known to have been at work."""
    wall, driver, last = 0.0, None, 0.0
    for record in records:
        if driver and record.get("driver", driver) == driver:
            wall += record["time"] - last
        driver, last = record.get("driver", driver), record["time"]
        if record.get("event") == "end":
            driver = None
    return wall


@pytest.mark.parametrize("seed", range(20))
def test_accounts_are_those_of_a_run_that_was_acted_out(seed):
    history = eventful(seed=seed)
    found = history.ledger(price=3.0)
    assert found.accounts() == pytest.approx(history.truth, abs=1e-6)
    assert found.node_s == pytest.approx(history.node_s)
    assert found.cost_usd == pytest.approx(3.0 * history.node_s / 3600)
    assert found.goodput == pytest.approx(history.truth["productive_s"] / found.wall_s)


@pytest.mark.parametrize("seed", range(5))
def test_no_second_is_lost_or_invented_when_the_run_is_killed_at_any_record(seed):
    records = eventful(seed=seed).records
    for end in range(len(records) + 1):
        found = ledger(records[:end], price_per_hour=None)
        assert found.wall_s == pytest.approx(wall_of(records[:end]), abs=1e-6)
        assert min(found.accounts().values()) >= -1e-9


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_were_not_logged_count_all_the_same(seed):
    """Only the split between start-up and the rest may blur: how long an unlogged first step took is not journaled."""
    history = eventful(log_every=7, seed=seed)
    found = history.ledger()
    assert found.productive_s == pytest.approx(history.truth["productive_s"])
    assert found.replayed_s == pytest.approx(history.truth["replayed_s"])
    assert found.wall_s == pytest.approx(sum(history.truth.values()))


def test_going_back_further_than_the_last_attempt_began_makes_replayed_what_was_productive():
    history = History()
    history.start("a")
    history.train(4)
    history.save()
    early = history.saved_step, history.saved_clock
    history.train(4)
    history.save()
    history.end("stopped")
    assert (history.ledger().productive_s, history.ledger().replayed_s) == (16, 0)
    history.saved_step, history.saved_clock = early
    history.start("b")
    assert (history.ledger().productive_s, history.ledger().replayed_s) == (8, 8)


def test_rollback_in_an_attempt_makes_replayed_what_followed_the_checkpoint():
    history = History()
    history.start("a")
    history.train(4)
    history.save()
    history.train(3)
    history.event("rollback", from_step=4, bad_step=7, cursor=56, reason="nan")
    history.event("branch", from_step=4, driver="a")
    history.step, history.clock, history.seen = 4, 8.0, set(range(4))
    history.train(3)
    assert (history.ledger().productive_s, history.ledger().replayed_s) == (14, 6)
    assert history.ledger().wall_s == pytest.approx(5 + 10 * 2 + 0.5)


def test_rollback_to_the_beginning_leaves_nothing_productive():
    history = History()
    history.start("a")
    history.train(3)
    history.event("rollback", from_step=0, bad_step=3, cursor=24, reason="nan")
    assert (history.ledger().productive_s, history.ledger().replayed_s) == (0, 6)


def test_time_in_which_no_driver_was_there_costs_nothing():
    history = History()
    history.start("a")
    history.train(1)
    history.end("stopped")
    history.away(9999)
    history.event("branch", from_step=0)
    history.away(1)
    history.event("waiting", wanted=2, there=1, driver="b")
    history.away(100)
    history.start("b", startup=0)
    assert history.ledger().wall_s == 7 + 100
    assert history.ledger().waiting_s == 100
    assert history.ledger(price=3600).cost_usd == 7  # no machine is known to be there while the second one waits


def test_branch_of_a_driver_that_did_not_sign_it_counts_no_night_in_between():
    history = History()
    history.start("a")
    history.train(1)
    history.away(9999)  # killed
    history.event("branch", from_step=0)
    history.start("b", startup=0)
    assert history.ledger().wall_s == 7


def test_journal_of_before_the_ledger_gives_what_is_known():
    records = [
        {"event": "start", "time": 0.0, "attempt": 1, "driver": "a", "resume_step": 0, "replayed": 0},
        *({"step": step, "time": 10.0 + 2 * step, "train/loss": 1.0, "train/dt": 2.0} for step in range(5)),
        {"event": "checkpoint", "time": 18.0, "step": 3, "path": "x"},
        {"event": "start", "time": 30.0, "attempt": 2, "driver": "a", "resume_step": 3, "replayed": 2},
        *({"step": step, "time": 30.0 + 2 * step, "train/loss": 1.0, "train/dt": 2.0} for step in range(5, 8)),
        {"event": "end", "time": 44.0, "status": "finished"},
    ]
    found = ledger(records, price_per_hour=3600)
    assert found.wall_s == 44
    assert found.cost_usd == 44
    assert (found.productive_s + found.replayed_s, found.startup_s) == (20, 8 + 12 + 4)


def test_accounts_never_exceed_the_time_there_was():
    """Clocks that disagree (a step that claims 100 s in a second) are cut, and the sum still holds."""
    history = History()
    history.start("a", startup=1.0)
    history.now += 1
    history.records.append({"step": 0, "time": history.now, "time/productive": 100.0, "val/time_s": 50.0})
    found = history.ledger()
    assert found.wall_s == 2
    assert found.accounts()["productive_s"] == 2
    assert found.goodput == 1


def test_no_records_are_an_empty_ledger():
    assert ledger([], price_per_hour=1.0) == Ledger(cost_usd=0.0)
    assert Ledger().goodput is None
    assert Ledger().line().startswith("time: 0% productive")


def test_line_says_where_time_and_money_went():
    found = Ledger(productive_s=81, replayed_s=3, startup_s=9, checkpoint_stall_s=1, evaluation_s=6, cost_usd=1.234)
    assert found.line() == (
        "time: 81% productive, 3% replayed, 9% start-up, 1% checkpoints, 6% evaluation, 0% waiting, 0% other; $1.23"
    )


@pytest.mark.parametrize("seed", range(3))
def test_book_that_is_looked_into_at_every_record_comes_to_the_same(seed):
    records, book = eventful(seed=seed).records, Book()
    for number, record in enumerate(records, start=1):
        assert book.closed(2.0, last=record) == ledger(records[:number], price_per_hour=2.0)
        book.take(record)
        assert book.closed(2.0) == ledger(records[:number], price_per_hour=2.0)
