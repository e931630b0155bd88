"""--device-batch-size auto: what is tried, what is kept, what a CPU takes by its rule, and what plans say."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from gpu_choices import RESOLVED
from runs import after, run_here

from raychat.benchmark.options import prepared
from raychat.cli import parse
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.model import GPT
from raychat.planning import format_plan, make_plan
from raychat.planning.outlook import CPU_BATCH, settled
from raychat.planning.target import Target
from raychat.search.feasible import infeasible
from raychat.training import checkpoint, device_batch
from raychat.training.build import build_training
from raychat.training.device import resolve
from raychat.training.device_batch import NO_MORE, Fit, largest, with_device_batch
from raychat.training.memory import OutOfMemoryError
from raychat.training.pass_trial import CudaMeter, measured
from raychat.training.state import Signal
from raychat.training.world import World

GIB = 2**30
A100 = {"depth": 10, "device_batch_size": "auto", "gpu": "a100-40gb"}


@dataclass
class Device:
    """On which `fits` sequences fit; `asked` is what was tried."""

    fits: int
    asked: list[int]
    lasting: bool = True

    def attempt(self, size):
        self.asked.append(size)
        return "" if size <= self.fits else "ran out of memory"

    def measure(self, sizes, guess):
        return replace(largest(sizes, guess, self.attempt), lasting=self.lasting)


class Ranks(World):
    """Rank 0 of two, the other of which finds `other` where this one finds a fit."""

    other = Fit(4, "8 ran out of memory")

    def gather(self, value):
        return [value, self.other if isinstance(value, Fit) else value]

    def broadcast(self, value):
        return value


@pytest.fixture
def gpu(monkeypatch):
    """The memory of the GPU, in a list of one that a test may change."""
    memory = [40 * GIB]
    monkeypatch.setattr(device_batch, "memory_bytes", lambda resolved, world: memory[0])
    return memory


def choose(tmp_path, device, lines=None, *, resolved=RESOLVED, world=World(), **flags):  # noqa: B008  frozen
    config = Config.from_flat({**A100, "base_dir": str(tmp_path), **flags})
    return with_device_batch(resolved, config, world, device.measure, [].append if lines is None else lines.append)


@pytest.mark.parametrize("guess", [1, 2, 16, 64, 4096])
@pytest.mark.parametrize("fits", [1, 3, 8, 20, 64, 1000])
def test_the_largest_that_fits_is_found_from_any_guess(guess, fits):
    device, sizes = Device(fits, []), [1, 2, 4, 8, 16, 32, 64]
    found = largest(sizes, guess, device.attempt)
    assert found.size == max(size for size in sizes if size <= fits)
    assert found.why == (NO_MORE if found.size == 64 else f"{2 * found.size} ran out of memory")
    assert len(device.asked) == len(set(device.asked))


def test_a_right_guess_takes_three_tries():
    device = Device(16, [])
    largest([1, 2, 4, 8, 16, 32, 64], 16, device.attempt)
    assert device.asked == [8, 16, 32]


def test_when_not_one_sequence_fits_the_run_ends_with_advice(gpu, tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"not even one sequence .*\(1 ran out of memory\).*--grad-checkpoint"):
        choose(tmp_path, Device(0, []))
    assert not (tmp_path / "device_batch").exists()


def test_the_search_begins_at_half_of_the_forecast_and_says_what_did_not_fit(gpu, tmp_path):
    device, lines = Device(16, []), []
    found = choose(tmp_path, device, lines)
    assert device.asked == [16, 32]  # the forecast is 32
    assert (found.device_batch_size, found.device_batch_reason) == (16, "32 ran out of memory")
    assert lines == ["device batch: what fits is tried out (32 sequences by the forecast)"]


def test_what_fits_is_tried_once_for_a_model_on_a_device(gpu, tmp_path):
    first, again = choose(tmp_path, Device(16, [])), Device(8, [])
    assert choose(tmp_path, again) == first
    assert again.asked == []


@pytest.mark.parametrize(
    "other",
    [
        {"depth": 8},
        {"max_seq_len": 1024},
        {"grad_checkpoint": True},
        {"fp8": True},
        {"total_batch_size": 2**18},
        {"resolved": replace(RESOLVED, loss="chunked")},
        {"resolved": replace(RESOLVED, compile=False)},
        {"resolved": replace(RESOLVED, dtype="float32")},
        {"resolved": replace(RESOLVED, device_name="Another GPU")},
        {"world": Ranks(world_size=2, local_world_size=2)},
        {"memory": 80 * GIB},
    ],
    ids=str,
)
def test_another_run_or_device_is_tried_anew(gpu, tmp_path, other):
    known, again = choose(tmp_path, Device(16, [])), Device(8, [])
    gpu[0] = other.pop("memory", gpu[0])
    resolved = other.pop("resolved", known)  # as a run that is resumed has it from its checkpoint
    choose(tmp_path, again, resolved=resolved, **other)
    assert again.asked


@pytest.mark.parametrize("damage", ["", "{}", '{"key": 1}', "[]", "[1", "size"])
def test_a_damaged_file_is_tried_again_and_written_anew(gpu, tmp_path, damage):
    choose(tmp_path, Device(16, []))
    (path,) = (tmp_path / "device_batch").iterdir()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"size": 0}) if damage == "size" else damage)
    lines = []
    assert choose(tmp_path, Device(8, []), lines).device_batch_size == 8
    assert lines[0].startswith("warning")
    assert choose(tmp_path, Device(1, [])).device_batch_size == 8


def test_what_fits_beside_others_is_not_kept(gpu, tmp_path):
    choose(tmp_path, Device(4, [], lasting=False))
    assert choose(tmp_path, Device(16, [])).device_batch_size == 16


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(gpu, tmp_path):
    (tmp_path / "device_batch").write_text("a file where the folder should be")
    lines = []
    assert choose(tmp_path, Device(16, []), lines).device_batch_size == 16
    assert "tried again next time" in lines[-1]


def test_a_resumed_run_takes_what_its_checkpoint_has(gpu, tmp_path):
    first, again = choose(tmp_path / "a", Device(16, [])), Device(8, [])
    resumed = choose(tmp_path / "b", again, resolved=first)
    assert (resumed.device_batch_size, resumed.device_batch_reason, again.asked) == (16, "as before", [])
    asked_for = choose(tmp_path / "b", again, resolved=first, device_batch_size=4)
    assert (asked_for.device_batch_size, asked_for.device_batch_key, again.asked) == (4, "", [])


def test_all_ranks_take_the_smallest_of_any_rank(gpu, tmp_path):
    found = choose(tmp_path, Device(16, []), world=Ranks(world_size=2, local_world_size=2))
    assert (found.device_batch_size, found.device_batch_reason) == (4, "8 ran out of memory")


def test_a_cpu_tries_nothing_and_takes_what_its_plan_says(tmp_path):
    config = Config.from_flat(A100 | {"base_dir": str(tmp_path), "depth": 2, "device_type": "cpu", "gpu": ""})
    resolved = resolve(config, local_world_size=1)
    found = with_device_batch(resolved, config, World(), lambda sizes, guess: pytest.fail("tried"), pytest.fail)
    assert found.device_batch_size == make_plan(config)["batch"]["device_batch_size"]


@pytest.mark.parametrize(("gigabytes", "size"), [(64, CPU_BATCH), (7, 4), (0.1, 1), (None, 1)])
def test_the_rule_on_a_cpu_heeds_memory_and_ends_at_a_bound(gigabytes, size):
    config = Config.from_flat({"depth": 6, "device_batch_size": "auto", "dtype": "float32", "loss": "full"})
    memory = None if gigabytes is None else round(gigabytes * GIB)
    there = Target(
        device="cpu", gpu="cpu", peak=None, memory_bytes=memory, workers=1, machines=1, machine=None, cores=2
    )
    assert settled(config, there).batch.sequences == size


def test_a_plan_forecasts_the_number_and_says_so():
    left_open, plan = Config.from_flat(A100), make_plan(Config.from_flat(A100))
    size = plan["batch"]["device_batch_size"]
    assert size == plan["memory"]["largest_batch"] == 32
    explicit = make_plan(Config.from_flat({"device_batch_size": size}, base=left_open))
    assert plan | {"batch": plan["batch"] | {"by_forecast": False}} == explicit
    assert "--device-batch-size auto: 32 is a forecast; the run tries" in format_plan(plan)
    assert "a forecast" not in format_plan(explicit)


def test_a_search_refuses_what_does_not_fit_with_one_sequence():
    target = Target(
        device="cuda", gpu="x", peak=None, memory_bytes=8 * GIB, workers=1, machines=1, machine=None, cores=1
    )
    assert infeasible(Config.from_flat(A100 | {"depth": 4}), target) is None
    assert "GiB by the plan" in str(infeasible(Config.from_flat(A100 | {"depth": 32}), target))


def test_auto_is_a_value_on_the_command_line_and_a_typo_of_it_is_none(capsys):
    assert parse(["--device-batch-size", "auto"], prog="x", description="").batch.device_batch_size == "auto"
    with pytest.raises(SystemExit) as ended:
        parse(["--device-batch-size", "aut"], prog="x", description="")
    assert ended.value.code == 2
    with pytest.raises(ConfigError, match=r"device_batch_size = 'aut'.*'auto'"):
        Config.from_flat({"device_batch_size": "aut"})


def test_a_total_batch_is_whole_sequences_with_auto_too():
    assert Config.from_flat(A100 | {"total_batch_size": 3 * 2048})
    with pytest.raises(ConfigError, match="no whole number of sequences"):
        Config.from_flat(A100 | {"total_batch_size": 2047})


def test_the_benchmark_needs_a_total_batch_beside_auto():
    with pytest.raises(ConfigError, match=r"auto needs --total-batch-size"):
        prepared(Config.from_flat(A100), 1)
    given = Config.from_flat(A100 | {"total_batch_size": 2**15})
    assert prepared(given, 1).batch == given.batch


def test_a_run_with_auto_trains_like_one_with_the_number(own_config):
    left_open = own_config(device_batch_size="auto", model_tag="auto", save_every=2)
    first, explicit = run_here(left_open, after(2, Signal.STOP)), run_here(own_config(device_batch_size=8))
    found = checkpoint.read_meta(str(checkpoint_of(left_open)))
    assert (found["resolved"]["device_batch_size"], found["config"]["device_batch_size"]) == (8, 8)
    assert any(line.startswith("device batch: 8 sequences (by a rule") for line in first.lines)
    resumed = run_here(left_open)
    assert resumed.losses == explicit.losses
    assert json.loads((left_open.run_dir / "plan.json").read_bytes())["batch"]["device_batch_size"] == 8


def checkpoint_of(config):
    return max((config.run_dir / "checkpoints").glob("step_*"))


class Meter:
    """Of a device that `per_sequence` fills: what a pass of so many takes is told by hand."""

    total, room = 100 * GIB, 100 * GIB

    def __init__(self):
        self.largest = 0

    def begin(self):
        self.largest = 0

    def peak(self):
        return 10 * GIB + 5 * GIB * self.largest


@pytest.fixture
def small(tiny_config, monkeypatch):
    """A configuration, its recipe's passes counted in a meter, and sizes that were tried."""
    meter, forward, seen = Meter(), GPT.forward, []

    def counted(self, idx, *args, **kwargs):
        seen.append(len(idx))
        if len(idx) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        meter.largest = max(meter.largest, len(idx))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", counted)
    return tiny_config(device_batch_size="auto"), meter, seen


def trained(config):
    from raychat.planning import recipe

    resolved = replace(resolve(config, local_world_size=1), compile=False)
    return lambda: build_training(config, recipe(config), resolved, torch.device("cpu"))


def test_real_passes_are_tried_twice_until_memory_is_short(small):
    config, meter, seen = small
    fit = measured(config, trained(config), [1, 2, 4, 8, 16, 32], 8, rank_rows=16, meter=meter)
    # 16 take 90 GiB of 100, which is all that is planned with; the single pass of 16 is the whole step of a rank
    assert fit == Fit(16, "32 ran out of memory")
    assert seen == [4, 4, 8, 8, 16, 32]


def test_a_peak_above_the_share_to_plan_with_does_not_fit(small):
    config, meter, _ = small
    meter.room = 90 * GIB
    fit = measured(config, trained(config), [1, 2, 4, 8, 16], 8, rank_rows=64, meter=meter)
    assert fit == Fit(8, "16 took 90.0 GiB, of which 81.0 are planned with")
    meter.room = 60 * GIB  # others have the rest
    assert measured(config, trained(config), [1, 2], 2, rank_rows=64, meter=meter).lasting is False


def test_other_errors_of_a_pass_are_told(small, monkeypatch):
    config, meter, _ = small

    def broken(self, idx, *args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        measured(config, trained(config), [1, 2], 2, rank_rows=8, meter=meter)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_was_tried_fits_and_leaves_nothing_behind(tiny_config):
    from raychat.planning import recipe

    config, device = tiny_config(device_type="cuda", device_batch_size="auto"), torch.device("cuda", 0)
    resolved = resolve(config, local_world_size=1)
    meter, before = CudaMeter(device), torch.cuda.memory_allocated(device)
    make = lambda: build_training(config, recipe(config), resolved, device)  # noqa: E731
    assert measured(config, make, [1, 2, 4, 8], 8, rank_rows=8, meter=meter).size == 8
    assert torch.cuda.memory_allocated(device) == before
