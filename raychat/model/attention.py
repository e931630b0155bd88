"""Causal attention with an optional left window, on whatever kernel the device offers.

Every back-end computes the same function: query i sees the keys j with `0 <= i - j <= window`.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from raychat.errors import ConfigError
from raychat.model import attention_kernels

BLOCK = 128  # queries per block of the band: larger wastes masked work, smaller wastes calls


def attend(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T Hkv D"],
    v: Float[Tensor, "B T Hkv D"],
    window: int | None,
    backend: str = "sdpa",
) -> Float[Tensor, "B T H D"]:
    """Softmax attention of every query over itself and the `window` positions left of it (None: all of them).

    The scale is 1/sqrt(D). Hkv divides H: consecutive query heads share a key head. `backend` is a key of BACKENDS, or two
    of them as `a+b`: a for full context, b for windows.
    """
    if window is not None and window >= q.size(1) - 1:
        window = None  # the window reaches the first position of every row
    full, windowed = parts(backend)
    return BACKENDS[full if window is None else windowed](q, k, v, window)


def attend_seen(
    q: Float[Tensor, "B n H D"],
    k: Float[Tensor, "B S Hkv D"],
    v: Float[Tensor, "B S Hkv D"],
    seen: Bool[Tensor, "B n S"] | None,
) -> Float[Tensor, "B n H D"]:
    """Softmax attention of every query over the keys that `seen` marks for it, at least one (None: all of them).

    Query heads that share a key head are stacked as if they were queries: no key is copied, on any kernel.
    """
    (B, n, H, D), Hkv = q.shape, k.size(2)
    groups = H // Hkv
    q = q.view(B, n, Hkv, groups, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, groups * n, D)
    mask = None if seen is None else seen[:, None].repeat(1, 1, groups, 1)  # (B, 1, groups * n, S)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.view(B, Hkv, groups, n, D).permute(0, 3, 1, 2, 4).reshape(B, n, H, D)


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What suits passes of any length on `device`, by a rule, and the reason in words (for the log).

    The rule knows flash attention and SDPA. For the passes of a run there may be better: `training.attention_choice`.
    """
    if device.type != "cuda":
        return "sdpa", f"flash attention needs CUDA, the device is {device.type}"
    major = torch.cuda.get_device_capability(device)[0]
    names = ["flash4", "flash2"] if major >= 10 else ["flash3", "flash2"] if major == 9 else ["flash2"]
    refused = refusals(names, device, dtype)
    for name in names:
        if name not in refused:
            return name, f"version {attention_kernels.version(name)} is installed"
    return "sdpa", in_words(refused)


def refusals(names: Iterable[str], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which of the back-ends `names` cannot train in `dtype` on `device`, and why."""
    reasons: dict[str, str | None] = {}
    for name in names:
        if name not in BACKENDS:
            reasons[name] = "unknown"
        elif name != "sdpa":
            reasons[name] = attention_kernels.why_not(name, device, dtype)
    return {name: reason for name, reason in reasons.items() if reason}


def in_words(reasons: Mapping[str, str]) -> str:
    """`a, b: why; c: why`."""
    return "; ".join(
        f"{', '.join(name for name, why in reasons.items() if why == reason)}: {reason}"
        for reason in dict.fromkeys(reasons.values())
    )


def prepare(backend: str, device: torch.device, *, T: int, windows: set[int | None]) -> None:
    """Import and make what `backend` needs, before anything is compiled. Raises ConfigError when it is not there."""
    for name in parts(backend):
        if name != "sdpa":
            try:
                attention_kernels.prepare(name, device, T=T, windows=windows)
            except ConfigError as error:
                raise ConfigError(f"Attention back-end {name} is not on this machine: {error}.") from error


def admitted(asked: str) -> list[str]:
    """The back-ends that `--attention` lets a run choose from: all, or those whose name begins with it."""
    return [name for name in BACKENDS if asked == "auto" or name.startswith(asked)]


def admits(asked: str, backend: str) -> bool:
    """Whether `backend` is what `--attention` asks for."""
    return all(part in admitted(asked) for part in parts(backend))


def parts(backend: str) -> tuple[str, str]:
    """The keys of BACKENDS that compute full context and windows in `backend`: `a`, or `a+b`."""
    full, _, windowed = backend.partition("+")
    return full, windowed or full


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    if window is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
    else:
        y = _band(q, k, v, window)
    return y.transpose(1, 2)


def _band(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Windowed attention as a row of small dense ones: each block of queries with the blocks of keys it can see.

    One call with a T x T mask would be simpler, but computes all of T x T and is slower than no window at all.
    Blocks are cut by `split` and joined by `cat` because their gradients cost one copy each; the gradient of
    an overlapping slice would be a tensor of the full length per block.
    """
    if (groups := q.size(1) // k.size(1)) > 1:
        # The masked CUDA kernels take no grouped heads.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    block = _block_size(window, q.dtype)
    reach = -(-window // block)  # key blocks to the left that a query can see
    allowed = _band_mask(block, reach, window, q.device)
    keys, values = k.split(block, dim=2), v.split(block, dim=2)
    out = []
    for n, queries in enumerate(q.split(block, dim=2)):
        left = min(n, reach)
        mask = allowed[: queries.size(2), (reach - left) * block : reach * block + queries.size(2)]
        seen_k = torch.cat(keys[n - left : n + 1], dim=2)
        seen_v = torch.cat(values[n - left : n + 1], dim=2)
        out.append(F.scaled_dot_product_attention(queries, seen_k, seen_v, attn_mask=mask))
    return torch.cat(out, dim=2)


def _block_size(window: int, dtype: torch.dtype) -> int:
    """Queries per block: more waste masked work, fewer waste calls, which weigh more where products are quicker."""
    return BLOCK if dtype is torch.float32 or window < 4 * BLOCK else 2 * BLOCK


def _band_mask(block: int, reach: int, window: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which of the `reach` + 1 key blocks that end with a query block its queries see."""
    i = torch.arange(block, device=device)[:, None] + reach * block
    lag = i - torch.arange((reach + 1) * block, device=device)
    return (lag >= 0) & (lag <= window)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if torch.is_grad_enabled():
        return attention_kernels.flex(q, k, v, window)
    return _sdpa(q, k, v, window)  # passes without gradients have many lengths, and flex is compiled again for each


BACKENDS: dict[str, attention_kernels.Kernel] = {**attention_kernels.KERNELS, "flex": _flex, "sdpa": _sdpa}
