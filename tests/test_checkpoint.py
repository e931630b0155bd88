"""A checkpoint is whole or absent, what is damaged is noticed, and it does not depend on how many ranks wrote it."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from saves import meta, trained

from raychat.errors import CheckpointError
from raychat.training import checkpoint, saver
from raychat.training.world import World


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """A root with a checkpoint of step 2 that two ranks wrote, for tests that read it."""
    root = tmp_path_factory.mktemp("two")
    run_ranks(_save_rank, 2, root)
    return root


def save_here(root, step: int = 2, val_bpb: float | None = None):
    model, optimizer = trained()
    return saver.save(root, model, optimizer, meta(step, val_bpb), World()).path


def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path):
    model, optimizer = trained()
    path = saver.save(tmp_path, model, optimizer, meta(2), World())
    other, its = trained(steps=1, seed=5)
    checkpoint.verify(path).load(other, its)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    mine, theirs = optimizer.owned_state(), its.owned_state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key][1], theirs[key][1]) for key in mine)
    assert its.step_count == optimizer.step_count == 2


def test_only_the_named_files_are_there_and_no_pickle(tmp_path):
    names = sorted(path.name for path in save_here(tmp_path).iterdir())
    assert names == [
        "COMMITTED.json",
        "MANIFEST.rank00000.json",
        "checkpoint.json",
        "model.safetensors",
        "optim-00000-of-00001.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


FILES = [
    "model.safetensors",
    "optim-00000-of-00001.safetensors",
    "checkpoint.json",
    "MANIFEST.rank00000.json",
    "COMMITTED.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_every_kind_of_damage_to_every_file_is_noticed_and_named(tmp_path, name, harm):
    file = save_here(tmp_path) / name
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-3] ^= 16  # in the payload: safetensors itself loads such a file without a word
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(file.parent)


@pytest.mark.parametrize("name", ["MANIFEST.rank00000.json", "COMMITTED.json", "checkpoint.json"])
def test_no_flipped_byte_of_a_small_file_passes(tmp_path, name):
    file = save_here(tmp_path) / name
    good = file.read_bytes()
    for position in range(0, len(good), 37):
        file.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.verify(file.parent)


@pytest.mark.parametrize(("other", "told"), [({"tag": "else"}, "step 2 of attempt 1 of else"), ({"step": 4}, "step 4")])
@pytest.mark.parametrize("name", ["MANIFEST.rank00000.json", "COMMITTED.json"])
def test_files_of_another_run_or_step_are_noticed_and_named(tmp_path, name, other, told):
    """Both checkpoints are good; only together they are not one."""
    here = save_here(tmp_path / "here")
    model, optimizer = trained()
    there = saver.save(tmp_path / "there", model, optimizer, meta(**{"step": 2, **other}), World()).path
    shutil.copy(there / name, here / name)
    with pytest.raises(CheckpointError, match=f"{name} belongs to .*{told}"):
        checkpoint.verify(here)


def test_weights_of_another_save_of_the_same_step_are_noticed(tmp_path):
    here = save_here(tmp_path / "here")
    model, optimizer = trained(seed=3)
    there = saver.save(tmp_path / "there", model, optimizer, meta(2), World()).path
    for name in ("model.safetensors", "MANIFEST.rank00000.json"):
        shutil.copy(there / name, here / name)
    with pytest.raises(CheckpointError, match=r"MANIFEST.rank00000.json (is damaged|has)"):
        checkpoint.verify(here)


@pytest.mark.parametrize("name", ["MANIFEST.rank00001.json", "optim-00001-of-00002.safetensors"])
def test_missing_file_of_a_rank_is_noticed(tmp_path, of_two_ranks, name):
    path = shutil.copytree(of_two_ranks / "step_00000002", tmp_path / "step_00000002")
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(path)


def test_newest_good_checkpoint_is_found_behind_damaged_ones(tmp_path):
    save_here(tmp_path, 2)
    save_here(tmp_path, 4)
    newest = save_here(tmp_path, 6)
    (newest / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "step_00000004" / "checkpoint.json").unlink()
    told = []
    found = checkpoint.newest(tmp_path, echo=told.append)
    assert found is not None
    assert found.step == 2
    assert len(told) == 2
    assert "step_00000006" in told[0]


def test_newest_of_nothing_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", echo=print) is None


def test_checkpoint_is_never_written_over(tmp_path):
    first = save_here(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert save_here(tmp_path) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_orphans_are_deleted_and_nothing_else(tmp_path):
    """What killed saves leave is of no use; what a person put there may be."""
    save_here(tmp_path, 2)
    for name in (".step_00000004.0123.tmp", ".step_00000004.tmp", "damaged-1", ".hidden", "notes.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.prune_orphans(tmp_path) == [".step_00000004.0123.tmp", ".step_00000004.tmp"]
    assert sorted(os.listdir(tmp_path)) == [".hidden", "damaged-1", "notes.tmp", "step_00000002"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, bpb in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 1.4), (5, None)):
        save_here(tmp_path, step, bpb)
    assert checkpoint.prune(tmp_path, keep_last=2) == [3, 1]
    assert checkpoint.steps(tmp_path) == [5, 4, 2]


def test_a_checkpoint_that_was_saved_before_its_evaluation_can_be_the_best(tmp_path):
    """Later ones say what it was worth, also when the latest evaluation is another."""
    model, optimizer = trained()
    for step, state in (
        (1, {"val_step": 1, "val_bpb": 2.0, "min_val_step": 1, "min_val_bpb": 2.0}),
        (2, {"val_step": 1, "val_bpb": 2.0, "min_val_step": 1, "min_val_bpb": 2.0}),  # evaluated afterwards: 1.0
        (3, {"val_step": 2, "val_bpb": 1.0, "min_val_step": 2, "min_val_bpb": 1.0}),
        (5, {"val_step": 4, "val_bpb": 1.5, "min_val_step": 2, "min_val_bpb": 1.0}),
    ):
        saver.save(tmp_path, model, optimizer, meta(step) | {"state": state}, World())
    assert checkpoint.prune(tmp_path, keep_last=1) == [3, 1]
    assert checkpoint.steps(tmp_path) == [5, 2]


def test_room_is_made_oldest_first_but_of_neither_the_newest_nor_the_best(tmp_path):
    for step, bpb in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 1.4)):
        save_here(tmp_path, step, bpb)
    left = []
    while checkpoint.make_room(tmp_path):
        left.append(checkpoint.steps(tmp_path))
    assert left == [[4, 3, 2], [4, 2]]
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000004"]


def test_rollback_moves_later_checkpoints_aside(tmp_path):
    for step in (1, 2, 3):
        save_here(tmp_path, step)
    assert checkpoint.set_aside_after(tmp_path, 1, "abandoned-4") == [3, 2]
    assert checkpoint.steps(tmp_path) == [1]
    assert sorted(os.listdir(tmp_path / "abandoned-4")) == ["step_00000002", "step_00000003"]


def _save_rank(root) -> str:
    model, optimizer = trained()
    world = World(dist.get_rank(), dist.get_world_size())
    return saver.save(root, model, optimizer, meta(2), world).uri


def _load_rank(path) -> tuple:
    model, optimizer = trained(steps=1, seed=7)
    checkpoint.verify(path).load(model, optimizer)
    return {name: tensor.sum().item() for name, tensor in model.state_dict().items()}, optimizer.owned_state()


@pytest.mark.parametrize("writers", [2, 3])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers):
    paths = set(run_ranks(_save_rank, writers, tmp_path))
    assert len(paths) == 1
    path = tmp_path / "step_00000002"
    assert str(path) in paths
    assert len(list(path.glob("optim-*.safetensors"))) == writers
    model, optimizer = trained(steps=0)
    checkpoint.verify(path).load(model, optimizer)
    whole = optimizer.owned_state()
    for readers in (2, 3):
        seen = dict.fromkeys(whole, 0)
        for _, owned in run_ranks(_load_rank, readers, path):
            for key, (first, tensor) in owned.items():
                assert torch.equal(tensor, whole[key][1][first : first + len(tensor)])
                seen[key] += len(tensor)
        assert seen == {key: len(tensor) for key, (_, tensor) in whole.items()}  # every row has exactly one owner


def test_optimizer_files_of_ranks_add_up_to_the_whole_state(of_two_ranks):
    _, optimizer = trained(steps=0)
    elements = sum(tensor.numel() for _, tensor in optimizer.owned_state().values())
    files = [load_file(path) for path in (of_two_ranks / "step_00000002").glob("optim-*.safetensors")]
    assert sum(tensor.numel() for file in files for tensor in file.values()) == elements
    assert all(file for file in files)


def test_moving_aside_twice_under_one_name_loses_nothing(tmp_path):
    """An attempt that died before it was counted leaves its name to the next."""
    for _ in range(2):
        save_here(tmp_path, 3)
        checkpoint.set_aside_after(tmp_path, 1, "damaged-2")
    assert sorted(os.listdir(tmp_path / "damaged-2")) == ["step_00000003", "step_00000003.2"]


def test_state_that_is_not_there_is_named(tmp_path):
    path = save_here(tmp_path)
    found = checkpoint.verify(path)
    manifest = path / "MANIFEST.rank00000.json"
    content = json.loads(manifest.read_text())
    del content["slices"]["lm_head.weight/exp_avg"]
    manifest.write_text(json.dumps(content))
    model, optimizer = trained(steps=0)
    with pytest.raises(CheckpointError, match="lm_head.weight/exp_avg"):
        found.load(model, optimizer)
