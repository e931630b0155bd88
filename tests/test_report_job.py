"""jobs/report.py on the directories of runs and searches, as training and searching leave them."""

import csv
import json
import re
from pathlib import Path

import pytest

from jobs.report import find, main, read
from raychat.config import Config
from raychat.errors import ConfigError, DataError
from raychat.search.book import Book, search_dir
from raychat.search.report.command import pretrain_command
from raychat.search.report.run_files import RunFiles, at_work, curve_of, interruption_of, outcome_of
from raychat.search.spec_file import read_spec
from raychat.search.trial import Outcome, Trial
from raychat.tracking.summary import Summary

BASE = {"preset": "d4-cpu", "depth": 4, "price_per_hour": 3.6, "num_iterations": 6}
BATCH = 1000


def record(time: float, **values) -> dict:
    return {"time": time, **values}


def event(time: float, kind: str, driver: str = "a", **values) -> dict:
    return {"event": kind, "time": time, "driver": driver, **values}


def steps(first: int, last: int, begin: float) -> list[dict]:
    """Steps of 10 seconds, the first of them done at `begin`."""
    return [
        record(
            begin + 10 * n,
            step=step,
            **{"train/loss": 5.0 - step / 10, "train/dt": 10.0, "time/productive": 10.0 * (step + 1)},
        )
        for n, step in enumerate(range(first, last))
    ]


def start(time: float, driver: str, resume: int) -> dict:
    clock = 10.0 * resume
    return event(
        time, "start", driver, attempt=1, resume_step=resume, replayed=0, nodes=1, productive_s=clock, world_size=1
    )


PREEMPTED = [
    event(1000, "journal", version=1),
    start(1000, "a", 0),
    record(1005, step=0, **{"val/bpb": 4.0, "val/time_s": 5.0}),
    event(1020, "first_step", step=0, step_time_s=10.0),
    *steps(0, 3, 1020),
    event(1042, "checkpoint", step=2, stall_s=0.0, productive_s=20.0),
    event(1050, "failure", cause="preempted", step_time_s=30.0),
    event(1056, "branch", from_step=2),
    start(1060, "a", 2),
    event(1080, "first_step", step=2, step_time_s=30.0),
    *steps(2, 6, 1080),
    record(1110, step=6, **{"val/bpb": 2.0, "val/time_s": 0.0}),
    event(1110, "end", status="finished", productive_s=60.0),
]
"""Six steps; the third is lost 30 seconds before it is made again."""


FORECAST = {
    "num_iterations": 6,
    "step": 6,
    "measured": False,
    "time_s": {"low": 80.0, "mid": 100.0, "high": 120.0, "actual": 110.0, "off_percent": 10.0},
}


def make_run(base_dir: Path, tag: str, *, journal: list[dict] = PREEMPTED, summary: bool = True, **settings) -> Path:
    """A run directory under `base_dir`."""
    folder = base_dir / "runs" / tag
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    flat = Config.from_flat({**BASE, "model_tag": tag, "base_dir": str(base_dir), **settings}).flat()
    facts = {"config": flat, "recipe": {"total_batch_size": BATCH, "num_iterations": 6}, "data_fingerprint": "abc"}
    (folder / "config.json").write_text(json.dumps(facts))
    money = {"price": 3.6, "price_source": "--price-per-hour", "price_as_of": "as given", "machine": ""}
    (folder / "plan.json").write_text(json.dumps({"money": money, "model": {"parameters": {"scaling": 123}}}))
    if summary:
        Summary(
            status="finished", step=6, num_iterations=6, tokens=6 * BATCH, val_bpb=2.0, wall_time_s=110.0, cost_usd=0.11,
            tok_per_sec=100.0, preemptions=1, replayed_s=10.0, peak_memory_bytes=540_000_000, forecast=FORECAST,
        ).write(folder / "summary.json")  # fmt: skip
    return folder


def test_report_of_a_run_is_written_into_its_folder(tmp_path, capsys):
    folder = make_run(tmp_path, "d4")
    assert main(["d4", "--base-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "d4 reached val_bpb 2.0000 in 1m50s for $0.11.",
        *(str(folder / name) for name in ("report.html", "report.md", "trials.csv")),
    ]
    report = (folder / "report.md").read_text()
    assert "1 restart, 1 of them by preemption" in report
    assert "| wall time | 1m40s | 1m20s | 2m00s | 1m50s | +10% |" in report
    assert next(csv.DictReader((folder / "trials.csv").read_text().splitlines()))["val_bpb"] == "2.0"


def test_report_of_a_search_says_what_its_book_says(tmp_path):
    spec = read_spec({"name": "lr", "base": {**BASE, "base_dir": str(tmp_path)}, "space": {"matrix_lr": [0.02, 0.04]}})
    with Book.open(search_dir(tmp_path, "lr"), spec) as book:
        for number, settings in enumerate(({}, {"matrix_lr": 0.04})):
            arm = spec.arm(settings)
            tag = f"lr-{number:03d}"
            made = Trial(number=number, tag=tag, title=arm.title, settings=arm.settings, arm=arm.name, seed=42)
            book.propose(made)
            make_run(tmp_path, tag)
            if not number:
                book.end(tag, Outcome(status="finished", val_bpb=2.0, wall_s=110.0, cost_usd=0.11))
    contents = read(find("lr", tmp_path))
    assert [(run.trial.tag, run.status) for run in contents.runs] == [("lr-000", "finished"), ("lr-001", "waiting")]
    assert [curve.tag for curve in contents.curves] == ["lr-000"]
    assert [(forecast.number, forecast.title) for forecast in contents.forecasts] == [(0, "baseline")]
    assert contents.ledger["productive_s"] == pytest.approx(120)
    assert main(["lr", "--base-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md", "trials.csv"]


def test_an_unknown_name_is_refused_with_near_ones(tmp_path):
    make_run(tmp_path, "d4-baseline")
    with pytest.raises(ConfigError, match=r"no search or run 'd4-baselin' .*d4-baseline"):
        find("d4-baselin", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        read(tmp_path / "empty")


def test_a_damaged_file_is_named(tmp_path):
    folder = make_run(tmp_path, "d4")
    (folder / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json is no JSON"):
        read(folder)


def test_a_run_that_has_not_ended_has_a_report(tmp_path):
    folder = make_run(tmp_path, "d4", journal=PREEMPTED[:7], summary=False)
    contents = read(folder)
    assert contents.sentence == "d4 was interrupted; the same command goes on with it: 3 of 6 steps done."
    assert contents.runs[0].outcome is None


def test_curves_follow_the_surviving_branch_and_pay_for_the_lost_one(tmp_path):
    curve = curve_of(RunFiles(make_run(tmp_path, "d4")), title="d4", arm="d4")
    assert curve is not None
    assert [point.tokens for point in curve.loss] == [BATCH * n for n in range(1, 7)]
    assert [point.hours * 3600 for point in curve.loss] == pytest.approx([20, 30, 80, 90, 100, 110])
    assert [point.dollars for point in curve.val_bpb] == pytest.approx([0.005, 0.11])


def test_time_between_two_drivers_is_nobodys(tmp_path):
    gap = [event(0, "start", "a"), event(10, "end", "a"), event(5000, "start", "b"), event(5007, "end", "b")]
    assert [seconds for _, seconds in at_work(gap)] == [0, 10, 10, 17]


def test_an_interruption_costs_what_it_lost_and_the_way_back(tmp_path):
    files = RunFiles(make_run(tmp_path, "d4"))
    found = interruption_of([files])
    assert found is not None
    assert (found.preemptions, found.restarts) == (1, 1)
    assert found.starting_s == pytest.approx(30)  # from the failure at 1050 to the first step at 1080
    assert found.replayed_s == pytest.approx(files.ledger.replayed_s)
    assert found.cost_usd == pytest.approx((found.starting_s + found.replayed_s) * 0.11 / 110)


@pytest.mark.parametrize(
    ("error", "status"), [("CUDA out of memory. Tried to allocate 8 GB", "OOM"), ("no space left", "failed")]
)
def test_a_failed_run_says_why(tmp_path, error, status):
    folder = make_run(tmp_path, "d4", summary=False)
    Summary(status="failed", error=f"Traceback\n{error}").write(folder / "summary.json")
    outcome = outcome_of(RunFiles(folder))
    assert outcome is not None
    assert (outcome.status, outcome.reason) == (status, error)


def test_the_command_makes_the_same_configuration_again(monkeypatch):
    from raychat import cli

    for values in (BASE, {**BASE, "depth": 5, "fp8": True, "corpus": "my texts"}, {"depth": 7, "matrix_lr": 0.033}):
        preset = cli.load_presets(str(values.get("preset", "")))
        config = Config.from_flat({k: v for k, v in values.items() if k != "preset"}, preset)
        command = pretrain_command(config.flat(), tag="again")
        args = [arg.strip("'") for arg in re.findall(r"'[^']*'|\S+", command)[2:]]
        again = cli.parse(args, prog="", description="").flat()
        assert again == config.flat() | {"model_tag": "again"}


def sweep(base_dir, name, depth, *, fingerprint="d1", **base):
    """A sweep over two budgets of one depth, by its book."""
    settings = {**BASE, "base_dir": str(base_dir), "target_flops": 1e13, "num_iterations": -1, "depth": depth} | base
    spec = read_spec(
        {
            "name": name,
            "base": settings,
            "space": {"target_flops": [1e13, 1e14]},
            "scheduler": "none",
            "noise_repeats": 0,
        }
    )
    with Book.open(search_dir(base_dir, name), spec) as book:
        for number, budget in enumerate((1e13, 1e14)):
            arm, tag = spec.arm({"target_flops": budget}), f"{name}-{number:03d}"
            book.propose(Trial(number=number, tag=tag, title=arm.title, settings=arm.settings, arm=arm.name, seed=42))
            make_run(base_dir, tag)
            config = base_dir / "runs" / tag / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"data_fingerprint": fingerprint}))
            size = depth * 1_000_000
            tokens = int(budget / 6 / size)
            book.end(tag, Outcome(status="finished", val_bpb=2.0 - depth / 10, parameters=size, tokens=tokens))
    return search_dir(base_dir, name)


def test_a_law_is_made_from_the_runs_of_several_sweeps(tmp_path):
    small, large = (sweep(tmp_path, name, depth) for name, depth in (("small", 2), ("large", 4)))
    alone, together = read(small), read(small, [large])
    assert [[len(optimum.points) for optimum in found.fit.optima] for found in (alone, together)] == [[1, 1], [2, 2]]
    assert len(together.runs) == 2  # the table stays that of the search
    assert main(["small", "--with", "large", "--base-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 0


def test_runs_that_differ_in_more_than_their_size_make_no_law(tmp_path):
    small = sweep(tmp_path, "small", 2)
    with pytest.raises(ConfigError, match="matrix_lr 0.02 and 0.03"):
        read(small, [sweep(tmp_path, "faster", 4, matrix_lr=0.03)])
    with pytest.raises(ConfigError, match="data differ .d1, d2"):
        read(small, [sweep(tmp_path, "elsewhere", 4, fingerprint="d2")])
    make_run(tmp_path, "alone")
    with pytest.raises(ConfigError, match="alone is a run"):
        read(find("alone", tmp_path), [small])
