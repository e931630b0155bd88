"""What a step costs beside the passes when several GPUs share it: the exchange of gradients and parameters, and Muon.

The exchange is that of raychat/optim/exchange.py over NCCL: after the last backward pass one reduce_scatter for each stack
of parameters, after the update one all_gather, on units padded to equal shares. Nothing of it overlaps with computing: all
of its time counts. None of this was measured on GPUs; what a run measures (`--dry-run-steps`) stands over it.
"""

from dataclasses import dataclass

from raychat.planning.devices import DevicePeak
from raychat.planning.efficiency import OTHER_DTYPES
from raychat.planning.links import Links, find_links
from raychat.planning.ranges import Range
from raychat.planning.scaling import ModelShape
from raychat.planning.stacks import UnitStack, padded_bytes, parameter_bytes, unit_stacks
from raychat.planning.target import GPUS_A_MACHINE, Target

ZERO = Range.exactly(0.0)
POLAR_STEPS = 5  # of raychat/optim/muon.py
MUON_RATE = Range(0.25, 0.45, 0.65)  # share of the bf16 peak that products of a thousand rows and more reach, assumed
COPY_RATE = Range(0.5, 0.75, 0.9)  # share of a GPU's memory bandwidth that copies reach, assumed
LEAST_COMPUTE = 0.5  # of a step whose parts were measured together: more than half of it is taken to be the passes


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of one step by part. `total` is the step."""

    compute: Range
    """forward and backward passes, and the part of the update that is shared out evenly"""
    muon: Range
    """orthogonalization on the rank that has the most matrices"""
    exchange: Range
    """reduce_scatter, all_gather, and the copies into and out of their buffers"""
    sent_bytes: int
    """what each rank sends, and receives as well"""
    parameter_bytes: int
    """gradients, or parameters, as one rank holds them: what would be sent twice (n - 1) / n times without padding"""
    source: str

    @property
    def total(self) -> Range:
        """The whole step: its parts follow each other."""
        return self.compute + self.muon + self.exchange


def ring_bytes(payload: int, workers: int) -> float:
    """Bytes that each of n ranks sends in a reduce_scatter or an all_gather of `payload` bytes: payload (n - 1) / n.

    The lower bound for any algorithm, which a ring reaches (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """
    return payload * (workers - 1) / workers


def sent_bytes(shape: ModelShape, dtype: str, workers: int) -> int:
    """Bytes that each rank sends in a step: a reduce_scatter of the gradients and an all_gather of the parameters."""
    return round(2 * ring_bytes(padded_bytes(shape, dtype, workers), workers))


def exchange_seconds(shape: ModelShape, dtype: str, links: Links, *, workers: int, machines: int) -> Range:
    """Seconds of both collectives: 2 P (n - 1) / n / bus + 2 K (start + steps inside + steps between).

    P: padded bytes. K: stacks, each a collective. A ring has n - 1 steps, of which m - 1 lie between m machines: NCCL's own
    model (src/graph/tuning.cc).
    """
    if workers == 1:
        return ZERO
    collectives = 2 * sum(1 for _ in unit_stacks(shape, dtype))
    inside, between = workers - machines, machines - 1
    each = links.start_s + links.inside_s.scaled(inside) + links.between_s.scaled(between)
    return links.bus.under(sent_bytes(shape, dtype, workers)) + each.scaled(collectives)


def copy_seconds(shape: ModelShape, dtype: str, peak: DevicePeak, *, workers: int) -> Range:
    """Seconds of the copies: matrices into padded buffers, and all parameters out of them; each byte read and written."""
    if workers == 1:
        return ZERO
    stacked = sum(stack.padded_bytes(workers) for stack in unit_stacks(shape, dtype) if stack.muon)
    return COPY_RATE.scaled(peak.bandwidth).under(2 * (stacked + parameter_bytes(shape, dtype)))


def muon_flops(stack: UnitStack, workers: int) -> float:
    """FLOPs of Muon on the rank with the most matrices of `stack`: its share, which is never less than one matrix.

    A step of Polar Express on k x l, k <= l, is X X', its square and one more product with X: 4 k k l + 2 k k k.
    """
    k, l = sorted((stack.rows, stack.columns))  # noqa: E741
    return stack.share(workers) * POLAR_STEPS * (4.0 * k * k * l + 2.0 * k**3) if stack.muon else 0.0


def muon_seconds(shape: ModelShape, dtype: str, peak: DevicePeak, *, workers: int) -> Range:
    """Seconds of Muon's products on the rank with the most matrices."""
    flops = sum(muon_flops(stack, workers) for stack in unit_stacks(shape, dtype))
    return MUON_RATE.scaled(peak.flops).times(OTHER_DTYPES.get(dtype, Range.exactly(1.0))).under(flops)


def step_parts(step_s: Range, devices: int, shape: ModelShape, dtype: str, target: Target) -> StepParts:
    """The parts of a step on `target`, of which `step_s` is forecast at the rate per GPU that `devices` of them reached.

    Those lost time to their own exchange, in one machine: it is taken out, and that of the target comes in. `devices` 0:
    the rate is the target's own, and `step_s` the whole step.
    """
    here = _beside(shape, dtype, target, target.workers, target.machines)
    there = here
    if devices and (devices, 1) != (target.workers, target.machines):
        there = _beside(shape, dtype, target, devices, -(-devices // GPUS_A_MACHINE))
    # Seconds of a step on as many GPUs as were measured: each of them had more to compute.
    then_s = step_s.mid * target.workers / devices if devices else step_s.mid
    share = max(LEAST_COMPUTE, 1 - (there.muon.mid + there.exchange.mid) / then_s)
    return StepParts(
        compute=step_s.scaled(share),
        muon=here.muon,
        exchange=here.exchange,
        sent_bytes=here.sent_bytes,
        parameter_bytes=here.parameter_bytes,
        source=here.source,
    )


def _beside(shape: ModelShape, dtype: str, target: Target, workers: int, machines: int) -> StepParts:
    """All of a step but computing, on so many GPUs of the target's kind."""
    if target.peak is None:
        raise ValueError("a device without a peak")
    machine = target.machine.name if target.machine else ""
    links = find_links(target.gpu, workers=workers, machines=machines, machine=machine)
    copies = copy_seconds(shape, dtype, target.peak, workers=workers)
    return StepParts(
        compute=ZERO,
        muon=muon_seconds(shape, dtype, target.peak, workers=workers),
        exchange=exchange_seconds(shape, dtype, links, workers=workers, machines=machines) + copies,
        sent_bytes=sent_bytes(shape, dtype, workers),
        parameter_bytes=parameter_bytes(shape, dtype),
        source=links.source if workers > 1 else "",
    )
