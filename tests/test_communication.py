"""What GPUs send each other in a step, as the plan reckons it: against the exchange itself, and as laws."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from raychat.config import Config
from raychat.model import GPT, GPTConfig
from raychat.optim import MuonAdamW, exchange
from raychat.optim.exchange import Buckets, Exchange, Scatter
from raychat.optim.groups import parameter_groups
from raychat.optim.stacks import build_stacks
from raychat.planning import ModelShape, model_shape, param_counts
from raychat.planning.communication import exchange_seconds, muon_flops, ring_bytes, sent_bytes, step_parts
from raychat.planning.links import find_links
from raychat.planning.ranges import Range
from raychat.planning.stacks import UnitStack, padded_bytes, parameter_bytes, unit_stacks
from raychat.planning.target import Target, resolve_target

SMALL = {"depth": 3, "head_dim": 16, "aspect_ratio": 11, "num_kv_heads": 1, "vocab_size": 300, "max_seq_len": 16}
RATES = {"embedding_lr": 0.03, "unembedding_lr": 0.0008, "matrix_lr": 0.002, "scalar_lr": 0.05, "weight_decay": 0.28}
D24 = {"depth": 24, "gpu": "h100", "device_batch_size": 1}


def shape_of(**flags) -> ModelShape:
    return model_shape(Config.from_flat(SMALL | flags).model)


def model_of(shape: ModelShape, dtype: str) -> GPT:
    config = GPTConfig(
        sequence_len=shape.sequence_len,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_kv_head,
        n_embd=shape.n_embd,
        window_pattern="L",
    )
    model = GPT(config)
    model.set_compute_dtype(getattr(torch, dtype))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [{}, {"num_kv_heads": -1, "depth": 4, "vocab_size": 1000}], ids=["grouped", "full"])
def test_the_plan_deals_out_the_parameters_as_the_optimizer_does(flags, dtype):
    shape = shape_of(**flags)
    stacks = build_stacks(parameter_groups(model_of(shape, dtype), **RATES), world=3)
    made = sorted(
        (s.units, s.unit_shape.numel(), s.params[0].element_size(), s.group["kind"] == "muon", s.share) for s in stacks
    )
    planned = [(s.units, s.rows * s.columns, s.element_bytes, s.muon, s.share(3)) for s in unit_stacks(shape, dtype)]
    assert sorted(planned) == made
    assert sum(units * size for units, size, *_ in made) == param_counts(shape).total


def count(kind: str, dtype: str) -> tuple[int, int, int]:
    """Bytes that one step gives to the collectives of this rank, of gradients and of parameters; and those it writes."""
    counted = {"reduce": 0, "gather": 0}

    def counting(function, of, position):
        @functools.wraps(function)
        def call(*args, **kwargs):
            tensor: Tensor = args[position]
            counted[of] += tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return call

    exchange._reduce_scatter = counting(exchange._reduce_scatter, "reduce", 1)
    exchange._all_gather = counting(exchange._all_gather, "gather", 0)
    all_reduce, dist.broadcast = dist.all_reduce, counting(dist.broadcast, "gather", 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    used: Exchange = Scatter(rank) if kind == "scatter" else Buckets(rank, world)
    model = model_of(shape_of(), dtype)
    optimizer = MuonAdamW(parameter_groups(model, **RATES), used)
    rows = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(rank))
    model(rows[:, :-1], rows[:, 1:]).backward()
    dist.all_reduce(torch.ones(1))  # connections are there
    dist.all_reduce = counting(all_reduce, "reduce", 0)
    before = written()
    optimizer.reduce_gradients()
    counted["reduce"] -= 8  # the norm, in float64
    optimizer.apply_updates()
    return counted["reduce"], counted["gather"], written() - before


def written() -> int:
    """Bytes that this process has written so far, to sockets as well."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


@pytest.mark.parametrize("world", [2, 3])
def test_the_exchange_of_nccl_is_given_the_bytes_of_the_plan(world):
    """Every stack padded to equal shares, once as gradients and once as parameters; gloo carries it here, by its own ways."""
    shape = shape_of()
    padded = padded_bytes(shape, "bfloat16", world)
    for reduced, gathered, wrote in run_ranks(count, world, "scatter", "bfloat16"):
        assert (reduced, gathered) == (padded, padded)
        assert wrote >= sent_bytes(shape, "bfloat16", world)  # no algorithm sends less


def test_two_ranks_write_to_their_sockets_what_the_bound_says():
    """An all_reduce is a reduce_scatter and an all_gather, 2 P (n - 1) / n; the broadcasts send each parameter once."""
    whole = parameter_bytes(shape_of(), "bfloat16")
    ranks = run_ranks(count, 2, "buckets", "bfloat16")
    assert [found[:2] for found in ranks] == [(whole, whole)] * 2
    assert sum(wrote for *_, wrote in ranks) == pytest.approx(2 * 2 * ring_bytes(whole, 2) + whole, rel=0.01)


def d24(workers: int, **flags) -> tuple[ModelShape, Target]:
    config = Config.from_flat(D24 | {"num_workers": workers} | flags)
    return model_shape(config.model), resolve_target(config)


def parts_of(workers: int, step_s: float = 1.0, devices: int = 8, **flags):
    shape, target = d24(workers, **flags)
    return step_parts(Range.exactly(step_s), devices, shape, "bfloat16", target)


def test_one_gpu_sends_nothing_and_waits_for_nobody():
    found = parts_of(1, devices=1)
    assert found.sent_bytes == 0
    assert found.exchange == Range.exactly(0)
    assert found.total.mid == pytest.approx(1.0)
    assert found.source == ""


@pytest.mark.parametrize("workers", [2, 3, 8, 64, 512])
def test_a_rank_sends_twice_the_rings_share_of_what_is_padded(workers):
    shape, _ = d24(1)
    padded = padded_bytes(shape, "bfloat16", workers)
    assert sent_bytes(shape, "bfloat16", workers) == pytest.approx(2 * padded * (workers - 1) / workers, abs=1)
    assert padded >= parameter_bytes(shape, "bfloat16")
    assert padded_bytes(shape, "bfloat16", 1) == parameter_bytes(shape, "bfloat16")


def test_more_ranks_than_matrices_send_padding():
    """Of 24 matrices of a shape 512 ranks get one each, of which 488 are zeros."""
    wide = UnitStack(units=24, rows=4, columns=1, element_bytes=4, muon=True)
    assert [wide.padded_bytes(n) for n in (8, 24, 64, 512)] == [24 * 16, 24 * 16, 64 * 16, 512 * 16]
    shape, _ = d24(1)
    assert padded_bytes(shape, "bfloat16", 512) > 10 * parameter_bytes(shape, "bfloat16")


def test_more_gpus_exchange_longer_and_compute_shorter():
    found = [parts_of(n, 10 / n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    for fewer, more in zip(found, found[1:], strict=False):
        assert fewer.exchange.mid < more.exchange.mid
        assert fewer.compute.mid > more.compute.mid
        assert fewer.muon.mid >= more.muon.mid


def test_a_rate_that_was_measured_on_as_many_gpus_stays():
    """Eight H100s lost time to their own exchange, which is in what they reached."""
    found = parts_of(8)
    assert found.total.mid == pytest.approx(1.0)
    assert found.compute.mid < 1 - found.exchange.mid


def test_a_slower_link_takes_longer_by_as_much():
    shape, _ = d24(16)
    fast, slow = (find_links("h100", workers=16, machines=2, machine=name) for name in ("p5.48xlarge", "p4d.24xlarge"))
    assert slow.bus.mid == pytest.approx(fast.bus.mid / 8)
    sent = sent_bytes(shape, "bfloat16", 16)
    seconds = [exchange_seconds(shape, "bfloat16", links, workers=16, machines=2).mid for links in (fast, slow)]
    assert seconds[1] - seconds[0] == pytest.approx(sent / slow.bus.mid - sent / fast.bus.mid)


def test_a_network_is_no_faster_than_what_is_inside_a_machine():
    inside = find_links("h100", workers=8, machines=1)
    between = find_links("h100", workers=16, machines=2, machine="p5.48xlarge")
    assert between.bus.mid < inside.bus.mid
    slow = find_links("l4", workers=16, machines=2, machine="p5.48xlarge")  # PCIe is the narrower part
    assert slow.bus == find_links("l4", workers=8, machines=1).bus


def test_a_gpu_that_no_table_knows_is_taken_for_a_plain_one():
    assert "PCIe 4" in find_links("rtx-4090", workers=2, machines=1).source
    alone = find_links("rtx-4090", workers=2, machines=2)
    assert "PCIe" not in alone.source
    assert "assumed" in alone.source


def test_muon_is_shared_out_by_whole_matrices():
    stack = UnitStack(units=24, rows=6144, columns=1536, element_bytes=4, muon=True)
    one = muon_flops(stack, 24)
    assert one == 5 * (4 * 1536**2 * 6144 + 2 * 1536**3)
    assert [muon_flops(stack, n) / one for n in (1, 2, 5, 24, 512)] == [24, 12, 5, 1, 1]
