"""The drill's own arithmetic: what strikes when, what counts as equal, and that damage is damage."""

import csv
import json
import random
import subprocess
import sys
import time

import pytest
import torch
from runs import run_here
from safetensors.torch import save_file

from raychat.errors import ConfigError
from raychat.on_ray.drill import measure, report
from raychat.on_ray.drill.disk import FILE_BYTES, FileLimit
from raychat.on_ray.drill.drill import Settings
from raychat.on_ray.drill.faults import Injected, flip_bit, tear
from raychat.on_ray.drill.schedule import ELASTIC, KINDS, Fault, schedules
from raychat.on_ray.drill.watch import JournalView, LostRunError, Run
from raychat.training import checkpoint


def planned(**changes):
    return schedules(**({"kinds": KINDS, "rounds": 3, "seed": 7, "step_s": 0.2, "save_every": 10} | changes))


def test_the_schedule_is_a_function_of_its_seed():
    assert planned() == planned()
    assert planned(kinds=tuple(reversed(KINDS))) == planned()
    assert planned(seed=8) != planned()


def test_every_round_holds_each_fault_once_and_elastic_ones_have_a_run_of_their_own():
    steady, elastic = planned()
    assert (steady.name, elastic.name) == ("steady", "elastic")
    for schedule, kinds in ((steady, set(KINDS) - set(ELASTIC)), (elastic, set(ELASTIC))):
        struck = [fault.kind for fault in schedule.faults]
        for first in range(0, len(struck), len(kinds)):
            assert set(struck[first : first + len(kinds)]) == kinds
        assert len(struck) == 3 * len(kinds)
    assert [schedule.name for schedule in planned(kinds=("node-kill",))] == ["elastic"]


def test_between_two_faults_there_is_time_for_a_save_and_for_what_lasts():
    """A hang of 30 s is 150 steps of 0.2 s, and 300 of 0.1 s."""
    for step_s, least in ((0.2, 150), (0.1, 300)):
        (schedule,) = planned(kinds=("tracking-hang",), step_s=step_s)
        steps = [fault.step for fault in schedule.faults] + [schedule.steps]
        assert all(b - a >= least + 20 for a, b in zip(steps, steps[1:], strict=False))
        assert steps[0] > 20


@pytest.mark.parametrize("changes", [{"kinds": ("earthquake",)}, {"kinds": ()}, {"rounds": 0}, {"step_s": 0.0}])
def test_a_drill_that_cannot_be_planned_is_refused(changes):
    with pytest.raises(ConfigError, match="--faults|--rounds"):
        planned(**changes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"faults": ("node-kill",), "work_dir": "/shared"}, "--allow-node-kill"),
        ({"faults": ("disk-full",), "work_dir": "/shared"}, "a disk that others use"),
        ({"faults": ("worker-kill",)}, "--work-dir"),
    ],
)
def test_the_cluster_of_others_is_not_broken_unasked(given, said):
    with pytest.raises(ConfigError, match=said):
        Settings(address="10.0.0.1:6379", **given)
    assert not {"node-kill", "disk-full"} & set(Settings(address="10.0.0.1:6379", work_dir="/shared").kinds)


@pytest.fixture(scope="module")
def trained(tiny_flags, tmp_path_factory):
    """A folder of two checkpoints."""
    from raychat.config import Config

    base = tmp_path_factory.mktemp("drill") / "base"
    ran = run_here(Config.from_flat(tiny_flags | {"base_dir": str(base), "save_every": 2, "eval_every": -1}))
    return ran.run_dir / "checkpoints"


@pytest.mark.parametrize("damage", [flip_bit, tear])
@pytest.mark.parametrize("salt", range(4))
def test_damage_is_found_and_the_one_before_is_taken(trained, tmp_path, damage, salt):
    root = tmp_path / "checkpoints"
    subprocess.run(["cp", "-r", trained, root], check=True)
    newest, before = checkpoint.steps(root)
    said = []
    what = damage(root / checkpoint.folder_name(newest), random.Random(salt))
    assert "safetensors" in what
    found = checkpoint.newest(root, echo=said.append)
    assert found is not None
    assert found.step == before
    assert checkpoint.folder_name(newest) in said[0]


def curve(seed: int, steps: int = 200) -> dict[int, float]:
    rng = random.Random(seed)
    return {step: 5.0 - step / 100 + rng.gauss(0, 0.1) for step in range(steps)}


def test_losses_of_the_same_rows_are_told_from_those_of_other_rows():
    plain = curve(1)
    rounded = {step: loss * (1 + 1e-4) for step, loss in plain.items()}
    one_late = {step: plain[step + 1] for step in range(199)}
    assert measure.alike(plain, plain, exact=True)
    assert not measure.alike(rounded, plain, exact=True)
    assert measure.alike(rounded, plain, exact=False)
    assert not measure.alike(one_late, plain, exact=False)
    assert not measure.alike({500: 1.0}, plain, exact=False)


def test_a_fault_answers_for_what_happens_until_the_next_one():
    plain = {step: float(step) for step in range(20)}
    records = [{"step": s, "time": 100.0 + s, "train/loss": float(s), "train/dt": 0.5} for s in range(20)]
    records[15]["train/loss"] = 3.0
    records += [{"event": "start", "time": 107.5, "replayed": 3}, {"event": "start", "time": 113.5, "replayed": 4}]
    faults = [
        Injected(Fault("driver-kill", 5, 0), at=105.5, since=105.5, detected=107.0, resumed=108.0),
        Injected(Fault("node-drain", 11, 0), at=111.5, since=112.5, resumed=114.0, note="rank 1"),
    ]
    first, second = measure.rows("steady", faults, records, plain)
    assert (first.detected_s, first.resumed_s, first.replayed, first.equal) == (1.5, 2.5, 3, True)
    assert (second.detected_s, second.resumed_s, second.replayed, second.equal) == (None, 1.5, 4, False)
    assert first.goodput == pytest.approx(6 * 0.5 / 6.0)


def test_weights_are_equal_only_bit_for_bit(tmp_path):
    def weights(name, values):
        folder = tmp_path / name / "checkpoints" / checkpoint.folder_name(3)
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor(values)}, folder / checkpoint.MODEL)
        return tmp_path / name

    plain = weights("plain", [1.0, 2.0])
    assert measure.weights_distance(weights("same", [1.0, 2.0]), plain, 3) == 0
    assert measure.weights_distance(weights("other", [1.0, 2.5]), plain, 3) == 0.5
    assert measure.weights_distance(weights("nan", [1.0, float("nan")]), plain, 3) > 0
    assert measure.weights_distance(weights("shape", [1.0]), plain, 3) > 0


def test_the_rows_of_every_checkpoint_are_those_of_its_steps(trained):
    assert measure.rows_in_order(trained, 8) is None
    assert "rows were consumed instead of" in str(measure.rows_in_order(trained, 7))


def test_the_table_says_the_same_on_the_console_and_in_a_file(tmp_path):
    rows = [
        measure.Row("steady", "bit-flip", 30, 1.25, 12.0, 4, True, 0.5, "bit flipped"),
        measure.Row("elastic", "node-kill", 60, None, None, 0, False, 0.25, ""),
    ]
    lines = report.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == list(report.cells(rows[0]))
    assert report.cells(rows[1])[3:7] == ("-", "-", "0", "NO")
    report.write(tmp_path / "t.md", rows, ["a fact"])
    assert (tmp_path / "t.md").read_text() == report.table(rows) + "\n\n- a fact\n"
    report.write(tmp_path / "t.csv", rows, [])
    first, second = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (first["resumed_s"], second["resumed_s"], second["equal"]) == ("12.0", "", "False")


def test_each_fault_has_its_median_over_the_rounds():
    def row(fault, detected_s, resumed_s):
        return measure.Row("steady", fault, 1, detected_s, resumed_s, 0, True, 1.0, "")

    rows = [row("worker-kill", 1.0, 9.0), row("tracking-hang", None, None), row("worker-kill", 3.0, 7.0)]
    rows += [row("worker-kill", None, 20.0), row("disk-full", 2.0, None)]
    assert report.medians(rows) == [
        "worker-kill: noticed after 2.0s, back after 9.0s (median of 3)",
        "disk-full: noticed after 2.0s (median of 1)",
    ]


def test_a_limit_makes_large_writes_fail_until_it_is_lifted(tmp_path):
    """The process learns of it as of a full disk, by an error and not by a signal that ends it."""
    code = (
        "import sys\n"
        "for _ in sys.stdin:\n"
        "    try:\n"
        f"        open({str(tmp_path / 'file')!r}, 'wb').write(bytes({2 * FILE_BYTES}))\n"
        "        print('written', flush=True)\n"
        "    except OSError as error:\n"
        "        print(type(error).__name__, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def write() -> str:
            child.stdin.write("\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        assert write() == "written"
        limit = FileLimit([child.pid])
        limit.fill()
        assert write() == "OSError"
        limit.lift()
        assert write() == "written"
        child.stdin.close()


def test_a_journal_is_read_as_it_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    view = JournalView(path)
    assert view.look() == []
    lines = [
        {"event": "start", "time": 1.0},
        {"step": 0, "time": 2.0, "train/loss": 3.0},
        {"event": "first_step", "time": 2.5, "step": 0},
        {"event": "start", "time": 4.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "first_')
    assert view.look() == lines
    assert (view.steps, view.first_step_after(0.0), view.first_step_after(3.0)) == (1, 2.5, None)
    with path.open("a") as file:
        file.write('step", "time": 9.0}\n')
    view.look()
    assert view.first_step_after(3.0) == 9.0


@pytest.fixture
def scripted(tmp_path):
    """A run whose driver is a given Python program."""
    runs = []

    def start(code: str) -> Run:
        run = Run([sys.executable, "-c", code], {}, tmp_path / "run", tmp_path / "output")
        runs.append(run)
        run.start()
        return run

    yield start
    for run in runs:
        run.close()


def test_a_driver_that_gives_up_is_a_lost_run(scripted):
    run = scripted("print('no more machines'); raise SystemExit(1)")
    with pytest.raises(LostRunError, match="the driver ended with 1 before the next step"):
        run.wait_for(lambda: None, "the next step", 30)
    assert run.wait_for(lambda: None, "the next step", 30, may_end=True) is None
    deadline = time.monotonic() + 30
    while run.said_after(0.0, "no more") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run.last_words() == "no more machines"


def test_a_driver_that_stands_still_is_a_lost_run(scripted):
    run = scripted("import time; time.sleep(600)")
    with pytest.raises(LostRunError, match="the next step: not within 0.2s"):
        run.wait_for(lambda: None, "the next step", 0.2)
    run.kill()
    assert run.exit_code == -9
