"""How the parameters of a model are dealt out to the ranks: raychat/optim/stacks.py in numbers, without torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from raychat.planning.scaling import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, ModelShape, has_value_embedding

SMALL = 1024  # elements below which a parameter of AdamW is one unit (raychat/optim/stacks.py)


@dataclass(frozen=True, kw_only=True)
class UnitStack:
    """`units` equal pieces of `rows` x `columns` elements, which one collective sends: whole matrices, or rows of a table."""

    units: int
    rows: int
    columns: int
    element_bytes: int
    muon: bool

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit, of its gradient as well: they have the same dtype."""
        return self.rows * self.columns * self.element_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state of one unit: two moments, or Muon's momentum with a value per row or column."""
        if not self.muon:
            return 2 * self.unit_bytes
        return self.unit_bytes + self.element_bytes * max(self.rows, self.columns)

    def share(self, workers: int) -> int:
        """Units of a rank: ceil(units / workers). The last ranks may have fewer, or none."""
        return -(-self.units // workers)

    def padded_bytes(self, workers: int) -> int:
        """Bytes that a collective of NCCL is given for it: units padded to equal shares, share * workers of them."""
        return self.share(workers) * workers * self.unit_bytes


def embedding_bytes(dtype: str) -> int:
    """Bytes of an element of the embeddings, which are kept in bfloat16 where that is computed in."""
    return 2 if dtype == "bfloat16" else 4


def unit_stacks(shape: ModelShape, dtype: str) -> Iterator[UnitStack]:
    """The stacks of a model of this shape, computing in `dtype`."""
    C, L, kv, rows = shape.n_embd, shape.n_layer, shape.n_kv_head * shape.head_dim, shape.padded_vocab
    value_layers = sum(has_value_embedding(layer, L) for layer in range(L))
    yield _table(rows, C, 4)  # lm_head
    yield _table(rows, C, embedding_bytes(dtype))  # wte
    for _ in range(value_layers):
        yield _table(rows, kv, embedding_bytes(dtype))
    for size in (L, L, SMEAR_CHANNELS, 1, 1):  # lambdas of residual and input, smear gate and lambda, backout
        yield UnitStack(units=1, rows=1, columns=size, element_bytes=4, muon=False)
    matrices = [(4 * C, C, L), (C, 4 * C, L), (shape.n_kv_head, VALUE_GATE_CHANNELS, value_layers)]
    matrices += [(C, C, 4 * L)] if kv == C else [(C, C, 2 * L), (kv, C, 2 * L)]
    for m, n, count in matrices:
        yield UnitStack(units=count, rows=m, columns=n, element_bytes=4, muon=True)


def padded_bytes(shape: ModelShape, dtype: str, workers: int) -> int:
    """Bytes that one reduce_scatter of all gradients is given: units padded to equal shares of the ranks."""
    return sum(stack.padded_bytes(workers) for stack in unit_stacks(shape, dtype))


def parameter_bytes(shape: ModelShape, dtype: str) -> int:
    """The same without padding: all parameters, or all gradients."""
    return sum(stack.units * stack.unit_bytes for stack in unit_stacks(shape, dtype))


def _table(rows: int, columns: int, element_bytes: int) -> UnitStack:
    whole = rows * columns < SMALL
    units, height = (1, rows) if whole else (rows, 1)
    return UnitStack(units=units, rows=height, columns=columns, element_bytes=element_bytes, muon=False)
