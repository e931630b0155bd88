"""What a model remembers of the positions it has seen, so that the next pass computes the new ones only.

Layers with a left window keep `window + 1` positions, in a ring; the others keep all. Rows may have different lengths.
A pass reads and writes the cache through the methods of `past.Past`.

Legend: B rows, n new positions per row (padded on the right), S slots of a layer, H and Hkv heads, D channels per head.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raychat.errors import ConfigError
from raychat.model.attention import attend, attend_seen
from raychat.model.gpt import GPT

Result = TypeVar("Result")
GRAIN = 256  # positions by which the memory of a layer grows: a copy per 256 steps is little beside 256 reads


class KVCache:
    """Keys and values of every layer, and the last embedding of every row (which the smear mixes into the next one).

    Use it under `torch.no_grad()`: `model.hidden(idx, cache, counts)` continues every row and extends the cache. The
    first pass over empty rows gives the same bits as a pass without a cache. Memory grows with the longest row.

    Attributes:
        lengths: positions seen per row.
        capacity: positions that a row may have.
    """

    def __init__(self, model: GPT, rows: int, capacity: int | None = None) -> None:
        """Of `rows` empty rows for up to `capacity` positions (default: as many as the model's rotary tables reach).

        Raises:
            ConfigError: the model has fewer positions than `capacity`.
        """
        config, reach = model.config, model.cos.size(0)
        self.capacity = reach if capacity is None else capacity
        if not 0 < self.capacity <= reach:
            raise ConfigError(
                f"A row of {self.capacity:,} tokens does not fit the {reach:,} positions of a model trained on "
                f"--max-seq-len={config.sequence_len:,}. Ask for 1 to {reach:,}."
            )
        self.lengths = [0] * rows
        self._windows = config.windows()
        dtype, device = model.compute_dtype, model.lm_head.weight.device
        empty = torch.zeros(rows, 0, config.n_kv_head, config.head_dim, dtype=dtype, device=device)
        self._keys, self._values = [empty] * config.n_layer, [empty] * config.n_layer
        self._last = torch.zeros(rows, config.n_embd, dtype=dtype, device=device)
        self._pass = _Pass([], 0, [], device)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def repeat(self, n: int) -> "KVCache":
        """A new cache in which each row stands `n` times in a row, to be continued in `n` ways."""
        return self.select([row for row in range(len(self.lengths)) for _ in range(n)])

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A new cache of `rows` of this one, in that order; a row may come more than once."""
        chosen = copy.copy(self)
        chosen.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self._last.device)
        chosen._last = self._last[index]
        for kind in ("_keys", "_values"):
            slots = [chosen._slots(layer) for layer in range(len(self._windows))]
            setattr(chosen, kind, [t[index, :n] for t, n in zip(getattr(self, kind), slots, strict=True)])
        return chosen

    def joined(self, other: "KVCache") -> "KVCache":
        """A new cache of the rows of this one and then those of `other`, which is of the same model and capacity."""
        both = copy.copy(self)
        both.lengths = [*self.lengths, *other.lengths]
        both._last = torch.cat((self._last, other._last))
        for kind in ("_keys", "_values"):
            pairs = zip(getattr(self, kind), getattr(other, kind), strict=True)
            slots = [both._slots(layer) for layer in range(len(self._windows))]
            padded = [(_padded(a, n), _padded(b, n)) for (a, b), n in zip(pairs, slots, strict=True)]
            setattr(both, kind, [torch.cat(pair) for pair in padded])
        return both

    def begin(self, n: int, counts: Sequence[int] | None) -> Int[Tensor, "B n"]:
        """Make room for the first `counts` (default: all) of `n` new positions per row; the places of all of them.

        Places of the padding stay within the rotary tables and mean nothing.

        Raises:
            ConfigError: a row would be longer than `capacity`.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a KVCache keeps no gradients: call the model under torch.no_grad()")
        counts = [n] * len(self.lengths) if counts is None else list(counts)
        if len(counts) != len(self.lengths) or not all(0 <= count <= n for count in counts):
            raise ValueError(f"counts must hold 0 to {n} for each of {len(self.lengths)} rows, got {counts}")
        longest = max((a + b for a, b in zip(self.lengths, counts, strict=True)), default=0)
        if longest > self.capacity:
            raise ConfigError(
                f"A row of {longest:,} tokens does not fit a cache of {self.capacity:,} positions. "
                "Ask for fewer tokens, or shorten the prompt."
            )
        self._pass = _Pass(self.lengths, n, counts, self._last.device)
        for layer, keys in enumerate(self._keys):
            if keys.size(1) < (slots := self._slots(layer, longest)):
                self._keys[layer] = _padded(keys, slots)
                self._values[layer] = _padded(self._values[layer], slots)
        return self._pass.positions.clamp(max=self.capacity - 1)

    def shift(self, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B n C"]:
        """The embeddings one position before those of `x`; zero before the first one of a row."""
        before = torch.cat((self._last[:, None], x[:, :-1]), dim=1)
        if self._pass.whole:
            self._last = x[:, -1].clone()
        else:
            # Position c of (last, x) is the newest of a row with c new ones, and the old one of a row with none.
            rows = torch.arange(x.size(0), device=x.device)
            self._last = torch.cat((before[:, :1], x), dim=1)[rows, self._pass.counts]
        return before

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B n H D"],
        k: Float[Tensor, "B n Hkv D"],
        v: Float[Tensor, "B n Hkv D"],
        backend: str,
    ) -> Float[Tensor, "B n H D"]:
        """Attention of the new queries over everything they may see; keys and values of the pass are kept."""
        window, now = self._windows[layer], self._pass
        span = self.capacity if window is None else window + 1
        keys, values = self._keys[layer], self._values[layer]
        if now.fresh or (now.n > 1 and window is not None):
            if now.fresh:  # padding on the right of empty rows is seen by nobody
                y = attend(q, k, v, window, backend)
            else:  # the ring has no room for old and new at once
                old = min(span, max(now.starts))
                all_k, all_v = torch.cat((keys[:, :old], k), dim=1), torch.cat((values[:, :old], v), dim=1)
                y = attend_seen(q, all_k, all_v, now.seen_beside(span))
            self._write(layer, span, k, v)
            return y
        self._write(layer, span, k, v)
        used = min(span, max(now.ends))
        return attend_seen(q, keys[:, :used], values[:, :used], now.seen_within(span))

    def end(self) -> None:
        """The pass has been through every layer: the rows are longer now."""
        self.lengths = self._pass.ends

    def _write(self, layer: int, span: int, k: Tensor, v: Tensor) -> None:
        rows, offsets, slots = self._pass.places(span)
        self._keys[layer][rows, slots] = k[rows, offsets]
        self._values[layer][rows, slots] = v[rows, offsets]

    def _slots(self, layer: int, longest: int | None = None) -> int:
        """Slots that a layer needs for rows of `longest` positions (default: those it has)."""
        longest = max(self.lengths, default=0) if longest is None else longest
        window = self._windows[layer]
        return min(-(-longest // GRAIN) * GRAIN, self.capacity, self.capacity if window is None else window + 1)


def _once_per_span(method: Callable[["_Pass", int], Result]) -> Callable[["_Pass", int], Result]:
    """Remember results with the pass. Not functools.cache: a pass that holds itself keeps its masks until the collector
    comes by, on a GPU too.
    """

    @functools.wraps(method)
    def known(self: "_Pass", span: int) -> Result:
        key = method.__name__, span
        if key not in self._known:
            self._known[key] = method(self, span)
        return self._known[key]

    return known


class _Pass:
    """One pass: which positions are new, where a layer keeps them, and what the new queries see there.

    A layer that keeps `span` positions has position p in slot p modulo span. All arithmetic is on the CPU, where the
    lengths are; the results go to `device`, once for all layers of a span.
    """

    def __init__(self, starts: list[int], n: int, counts: list[int], device: torch.device) -> None:
        self.starts, self.n, self._device = starts, n, device
        self.ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self.fresh = not any(starts)
        self.whole = all(count == n for count in counts)
        self._start, self._count = torch.tensor(starts, dtype=torch.long), torch.tensor(counts, dtype=torch.long)
        self._position = self._start[:, None] + torch.arange(n)  # (B, n)
        self.positions = self._position.to(device)
        self._known: dict[tuple[str, int], Any] = {}

    @functools.cached_property
    def counts(self) -> Tensor:
        """New positions per row, on the device."""
        return self._count.to(self._device)

    @_once_per_span
    def places(self, span: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, offset in the pass, and slot of every new position that a layer keeps: the last `span` of each row."""
        offset = torch.arange(self.n)
        kept = (offset < self._count[:, None]) & (offset >= self._count[:, None] - span)
        rows, offsets = kept.nonzero(as_tuple=True)
        slots = (self._start[rows] + offsets) % span
        return rows.to(self._device), offsets.to(self._device), slots.to(self._device)

    @_once_per_span
    def seen_within(self, span: int) -> Tensor | None:
        """(B, n, S): what queries see of the slots once the new positions are in them; None: everything.

        Either n is 1, and a full ring holds just what the one query sees, or nothing was overwritten.
        """
        slot = torch.arange(min(span, max(self.ends)))
        seen = slot <= self._position[..., None]
        return None if seen.all() else seen.to(self._device)

    @_once_per_span
    def seen_beside(self, span: int) -> Tensor:
        """(B, n, S + n): what queries see of the old slots of a ring, and of the new positions beside them."""
        newest = self._start[:, None] - 1
        slot = torch.arange(min(span, max(self.starts)))
        held = newest - (newest - slot) % span  # (B, S): the position that a slot holds; negative: none
        old = (held >= 0)[:, None] & (self._position[..., None] - held[:, None] < span)
        lag = torch.arange(self.n)[:, None] - torch.arange(self.n)
        new = ((lag >= 0) & (lag < span)).expand(len(self.starts), -1, -1)
        return torch.cat((old, new), dim=2).to(self._device)


def _padded(t: Tensor, slots: int) -> Tensor:
    """The first `slots` slots of `t`, zeros where it has fewer: what is masked must still be finite."""
    if t.size(1) >= slots:
        return t[:, :slots]
    return torch.cat((t, t.new_zeros(t.size(0), slots - t.size(1), *t.shape[2:])), dim=1)
