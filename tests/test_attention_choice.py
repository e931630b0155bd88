"""The choice of an attention back-end on a GPU: with clocks that are set by hand, and files that are kept."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from gpu_choices import RESOLVED

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.model import attention, attention_kernels
from raychat.training import attention_choice, build, checkpoint
from raychat.training.attention_choice import Workload, seconds, with_attention
from raychat.training.device import resolve
from raychat.training.job import Job
from raychat.training.world import World

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Back-ends that this GPU has; a test may take some away."""
    refused = {"flash4": "not installed"}
    monkeypatch.setattr(attention_kernels, "why_not", lambda name, device, dtype: refused.get(name))
    monkeypatch.setattr(attention_kernels, "version", lambda name: "1.0")
    return refused


def config(tmp_path, **flags):
    """d4 of T=1024: three layers with windows of 256, one with full context."""
    return Config.from_flat({"depth": 4, "max_seq_len": 1024, "base_dir": str(tmp_path), **flags})


class Clock:
    """Milliseconds by back-end: for full context, and for windows."""

    def __init__(self, **ms):
        self.ms, self.asked = ms, []

    def __call__(self, name, work, window):
        self.asked.append((name, window))
        if name not in self.ms:
            raise RuntimeError(f"no kernel image\nfor {name}")
        return self.ms[name][0 if window is None else 1] / 1000


def choose(tmp_path, clock, lines=None, **flags):
    said = [] if lines is None else lines
    return with_attention(RESOLVED, config(tmp_path, **flags), CUDA, said.append, clock)


def test_the_fastest_over_all_layers_is_chosen_and_every_time_is_named(gpu, tmp_path):
    clock = Clock(flash3=(1.2, 0.5), flash2=(2, 1), varlen=(1.4, 0.6), sdpa=(3, 4))
    got = choose(tmp_path, clock)
    assert got.attention == "flash3"
    assert got.attention_reason == (
        "full context 1.2 ms; varlen 1.4, flash2 2, sdpa 3 | windows of 256 0.5 ms; varlen 0.6, flash2 1, sdpa 4"
        " | without flex: full context: no kernel image; flash4: not installed"
    )
    assert got.attention_warning == ""
    assert dataclasses.replace(got, attention="sdpa", attention_reason="") == RESOLVED


@pytest.mark.parametrize(
    ("ms", "backend"),
    [
        ({"sdpa": (1, 4), "varlen": (2, 0.5)}, "sdpa+varlen"),
        ({"sdpa": (1, 4), "varlen": (1.05, 0.5)}, "varlen"),  # one kernel, unless two save 3%
        ({"sdpa": (1, 1.1), "varlen": (0.5, 1.2)}, "varlen+sdpa"),
    ],
)
def test_full_context_and_windows_go_different_ways_where_it_pays(gpu, tmp_path, ms, backend):
    assert choose(tmp_path, Clock(**ms)).attention == backend


def test_a_model_without_windows_times_none(gpu, tmp_path):
    clock = Clock(sdpa=(1, 0.1), varlen=(2, 0.1))
    assert choose(tmp_path, clock, window_pattern="L").attention == "sdpa"
    assert {window for _, window in clock.asked} == {None}


def test_windows_that_cost_more_than_full_context_are_warned_of(gpu, tmp_path):
    got = choose(tmp_path, Clock(sdpa=(1, 1.8)))
    assert got.attention_warning == (
        "windows of 256 take 1.8 ms a layer here, full context 1 ms: install raychat[gpu], or use --window-pattern L"
    )


def test_what_was_timed_is_remembered_for_the_same_run_on_the_same_machine(gpu, tmp_path):
    first = choose(tmp_path, Clock(flash3=(1, 1), sdpa=(2, 2)))
    again = Clock(flash3=(9, 9), sdpa=(2, 2))
    assert choose(tmp_path, again) == first
    assert not again.asked
    assert choose(tmp_path, again, max_seq_len=2048).attention == "sdpa"
    gpu["varlen"] = "gone"  # other kernels than then
    assert choose(tmp_path, again).attention == "sdpa"


def test_a_device_that_was_full_is_timed_again(gpu, tmp_path):
    def full(name, work, window):
        if name != "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return 0.002

    assert choose(tmp_path, full).attention == "sdpa"
    assert choose(tmp_path, Clock(flash2=(1, 1), sdpa=(2, 2))).attention == "flash2"


@pytest.mark.parametrize("damage", ["", "{}", '{"key": 1}', "[]", "[1", "whole"])
def test_a_damaged_file_is_timed_again_and_written_anew(gpu, tmp_path, damage):
    choose(tmp_path, Clock(sdpa=(1, 1)))
    (path,) = (tmp_path / "attention").iterdir()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"seconds": [[None, 3]]}) if damage == "whole" else damage)
    lines = []
    assert choose(tmp_path, Clock(varlen=(1, 1)), lines).attention == "varlen"
    assert len(lines) == (damage != '{"key": 1}')
    assert choose(tmp_path, Clock()).attention == "varlen"


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(gpu, tmp_path):
    (tmp_path / "attention").write_text("a file where the folder should be")
    lines = []
    assert choose(tmp_path, Clock(sdpa=(1, 1)), lines).attention == "sdpa"
    assert "timed again next time" in lines[-1]


def test_one_kind_may_be_asked_for(gpu, tmp_path):
    clock = Clock(flash3=(2, 2), flash2=(1, 1), sdpa=(0.1, 0.1))
    assert choose(tmp_path, clock, attention="flash").attention == "flash2"
    assert {name for name, _ in clock.asked} == {"flash3", "flash2"}
    assert choose(tmp_path, clock, attention="sdpa") == RESOLVED


def test_a_kind_that_raises_here_is_refused_with_its_reason(gpu, tmp_path):
    with pytest.raises(ConfigError, match=r"--attention varlen: .*full context.*no kernel image.*--attention auto"):
        choose(tmp_path, Clock(sdpa=(1, 1)), attention="varlen")
    assert choose(tmp_path, Clock(varlen=(1, 1)), attention="varlen").attention == "varlen"  # it is tried again


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("flash", "flash4, flash3, flash2: needs CUDA"),
        ("varlen", "varlen: needs CUDA"),
        ("flex", "flex: has no backward pass on cpu"),
    ],
)
def test_a_cpu_refuses_what_it_cannot_train_with(asked, reason):
    with pytest.raises(ConfigError, match=f"--attention {asked}: .*{reason}.*--attention auto"):
        resolve(Config.from_flat({"attention": asked, "device_type": "cpu"}), local_world_size=1)


def test_a_cpu_times_nothing(tmp_path):
    run = config(tmp_path, device_type="cpu")
    mine = resolve(run, local_world_size=1)
    assert mine.attention == "sdpa"
    assert with_attention(mine, run, torch.device("cpu"), pytest.fail) == mine


def test_the_timed_pass_is_that_of_the_run_with_fewer_rows(tmp_path):
    run = config(tmp_path, device_batch_size=64, num_kv_heads=1)
    assert Workload.of(run, "bfloat16") == Workload(
        rows=32, T=1024, n_head=2, n_kv_head=1, head_dim=128, windows=(256, 256, 256, None), dtype="bfloat16"
    )
    assert Workload.of(config(tmp_path, device_batch_size=2), "float32").rows == 2


WORK = Workload(rows=2, T=40, n_head=2, n_kv_head=1, head_dim=8, windows=(5, None), dtype="float32")


def test_a_back_end_with_other_numbers_is_left_out(monkeypatch):
    """Here one that sees a key more than it should."""
    clock = partial(seconds, device=torch.device("cpu"))
    monkeypatch.setitem(attention.BACKENDS, "wide", lambda q, k, v, window: attention.attend(q, k, v, window and 6))
    monkeypatch.setattr(attention_kernels, "prepare", lambda name, device, **sizes: None)
    timings = attention_choice.measured(["sdpa", "wide"], WORK, clock)
    assert set(timings.seconds[None]) == {"sdpa", "wide"}
    assert set(timings.seconds[5]) == {"sdpa"}
    assert "windows of 5: its numbers differ" in timings.left_out["wide"]


def test_timing_leaves_the_random_stream_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert seconds("sdpa", WORK, 5, device=torch.device("cpu")) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def resumed(gpu, monkeypatch, tmp_path):
    """What a run on the GPU goes on with, whose checkpoint was trained with `kept`."""
    monkeypatch.setattr(build, "resolve", lambda config, local_world_size: RESOLVED)
    clock = Clock(varlen=(1, 1), sdpa=(2, 2))
    timed = lambda resolved, config, device, echo: with_attention(resolved, config, device, echo, clock)  # noqa: E731
    monkeypatch.setattr(build, "with_attention", timed)

    def go_on(kept, lines, **flags):
        stored = dataclasses.asdict(dataclasses.replace(RESOLVED, attention=kept, loss="chunked"))
        monkeypatch.setattr(checkpoint, "read_meta", lambda place: {"resolved": stored})
        run = config(tmp_path, **flags)
        job = Job(
            config=run.flat(),
            tokens_dir="",
            tokenizer_dir="",
            checkpoint="there",
            attempt=2,
            attempt_started=0.0,
            wall_before_s=0.0,
            lease_holder="",
            journal_offset=0,
        )
        return build._agree_on_machine(run, job, World(), lambda event: lines.append(event.text))

    return go_on


def test_a_resumed_run_keeps_the_back_end_of_its_checkpoint(resumed):
    lines = []
    assert resumed("flash3+sdpa", lines).attention == "flash3+sdpa"
    assert resumed("flash2", lines, attention="flash").attention == "flash2"
    assert lines == []


def test_a_resumed_run_whose_kernel_is_gone_chooses_anew_and_says_so(gpu, resumed):
    gpu["flash3"] = "not installed"
    lines = []
    got = resumed("flash3", lines)
    assert (got.attention, got.loss) == ("varlen", "chunked")  # the other choices stay
    assert lines == ["the checkpoint was trained with attention flash3 (flash3: not installed): it is chosen anew"]


def test_a_resumed_run_may_ask_for_another_back_end(resumed):
    assert resumed("flash3", [], attention="varlen").attention == "varlen"
