"""What was compiled goes with the run: to a machine of the same kind that has nothing, and nowhere else."""

import os
import tarfile

import pytest
from runs import run_here

from raychat.config import Config
from raychat.planning import recipe
from raychat.storage import Store
from raychat.tracking.journal import read_events
from raychat.training import compile_cache, device, loop
from raychat.training.compile_cache import VARIABLE, CompileCache, machine_mark


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that what a test sets is undone
    monkeypatch.delenv(VARIABLE)


@pytest.fixture
def run(tmp_path):
    return Store.of(tmp_path / "run")


def made(cache, **files):
    cache.use()
    for name, text in files.items():
        path = cache.folder / "ab" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_another_machine_of_the_kind_begins_with_what_the_first_one_compiled(tmp_path, run, monkeypatch):
    first = CompileCache(tmp_path / "one", run, "cpu")
    made(first, kernel="code", **{"kernel.lock": ""})
    assert os.environ[VARIABLE] == str(first.folder)
    assert first.ship() > 0
    assert first.ship() == 0  # it is there
    monkeypatch.delenv(VARIABLE)
    second = CompileCache(tmp_path / "two", run, "cpu")
    second.use()
    assert second.fetch()
    assert (second.folder / "ab" / "kernel").read_text() == "code"
    assert not (second.folder / "ab" / "kernel.lock").exists()
    assert not second.fetch()  # it has something now
    assert [path.name for path in second.folder.parent.iterdir()] == [second.folder.name]


def test_another_kind_of_machine_takes_nothing(tmp_path, run, monkeypatch):
    made(first := CompileCache(tmp_path / "one", run, "cpu"), kernel="code")
    first.ship()
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "cpuinfo").write_text("model name : another\nflags : avx2\n")
    monkeypatch.setattr(compile_cache, "CPUINFO", tmp_path / "cpuinfo")
    other = CompileCache(tmp_path / "two", run, "cpu")
    other.use()
    assert not other.fetch()
    assert machine_mark("cpu") != machine_mark("NVIDIA H100")


def test_a_folder_of_the_users_choice_is_left_alone(tmp_path, run, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    cache = CompileCache(tmp_path / "one", run, "cpu")
    cache.use()
    assert os.environ[VARIABLE] == str(tmp_path / "mine")
    assert not cache.fetch()
    assert cache.ship() == 0
    assert run.names() == []


@pytest.mark.parametrize("content", [b"", b"no archive", "outside"])
def test_what_is_damaged_or_reaches_outside_is_refused_and_leaves_nothing(tmp_path, run, content, monkeypatch):
    made(first := CompileCache(tmp_path / "one", run, "cpu"), kernel="code")
    first.ship()
    folder = run.child(compile_cache.FOLDER)
    (name,) = folder.names()
    if content == "outside":
        with tarfile.open(folder.path / name, "w:gz") as packed:
            packed.add(first.folder / "ab" / "kernel", arcname="../../kernel")
    else:
        folder.write_bytes(name, content)
    monkeypatch.delenv(VARIABLE)
    second = CompileCache(tmp_path / "two", run, "cpu")
    second.use()
    with pytest.raises(OSError, match="damaged"):
        second.fetch()
    assert list(second.folder.iterdir()) == []
    assert [path.name for path in second.folder.parent.iterdir()] == [second.folder.name]
    assert not (tmp_path / "kernel").exists()


@pytest.mark.parametrize(("asked", "first"), [("auto", 1), ("on", 0)])
def test_of_itself_a_cpu_compiles_at_the_second_step_and_a_resumed_run_at_once(own_config, monkeypatch, asked, first):
    compiled: list[int] = []

    class Recorder:
        def __init__(self, model):
            self.model = model

        def __call__(self, *inputs, **options):
            compiled.append(1)
            return self.model(*inputs, **options)

    monkeypatch.setattr(loop, "CompiledTraining", Recorder)
    monkeypatch.setattr(device, "chosen_compile", lambda asked, *rest: (True, asked))
    config = own_config(num_iterations=6, compile=asked, stop_at=3)
    ran = run_here(config)
    passes = -(-recipe(config).total_batch_size // config.model.max_seq_len // config.batch.device_batch_size)
    assert len(compiled) == (3 - first) * passes
    folder = Store.of(ran.run_dir).child(compile_cache.FOLDER)
    assert len(folder.names()) == 1  # what was compiled went to the run
    compiled.clear()
    run_here(Config.from_flat({"stop_at": -1}, base=config))
    assert len(compiled) == 3 * passes
    assert [event["step"] for event in read_events(ran.run_dir / "metrics.jsonl") if event["event"] == "compiled"] == (
        [1] if first else []
    )
