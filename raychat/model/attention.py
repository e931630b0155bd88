"""Causal attention with an optional left window, on whatever kernel the device offers.

Every back-end computes the same function: query i sees the keys j with `0 <= i - j <= window`.
"""

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 128  # queries per block of the band: larger wastes masked work, smaller wastes calls


def attend(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T Hkv D"],
    v: Float[Tensor, "B T Hkv D"],
    window: int | None,
    backend: str = "sdpa",
) -> Float[Tensor, "B T H D"]:
    """Softmax attention of every query over itself and the `window` positions left of it (None: all of them).

    The scale is 1/sqrt(D). Hkv divides H: consecutive query heads share a key head. `backend` is a key of BACKENDS.
    """
    if window is not None and window >= q.size(1) - 1:
        window = None  # the window reaches the first position of every row
    return BACKENDS[backend](q, k, v, window)


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
    """The fastest back-end that works for `dtype` on `device`, and the reason in words (for the log)."""
    if device.type != "cuda":
        return "sdpa", f"flash attention needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", f"flash attention takes bfloat16 and float16, the compute dtype is {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "sdpa", f"flash attention needs compute capability 8.0, the device has {major}.{minor}"
    kernel = _flash_kernel(major)
    if kernel is None:
        return "sdpa", "flash-attn is not installed (pip install 'raychat[gpu]')"
    return "flash", f"{kernel.__module__} on compute capability {major}.{minor}"


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
    reach = -(-window // BLOCK)  # key blocks to the left that a query can see
    allowed = _band_mask(reach, window, q.device)
    keys, values = k.split(BLOCK, dim=2), v.split(BLOCK, dim=2)
    out = []
    for n, queries in enumerate(q.split(BLOCK, dim=2)):
        left = min(n, reach)
        mask = allowed[: queries.size(2), (reach - left) * BLOCK : reach * BLOCK + queries.size(2)]
        seen_k = torch.cat(keys[n - left : n + 1], dim=2)
        seen_v = torch.cat(values[n - left : n + 1], dim=2)
        out.append(F.scaled_dot_product_attention(queries, seen_k, seen_v, attn_mask=mask))
    return torch.cat(out, dim=2)


def _band_mask(reach: int, window: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which of the `reach` + 1 key blocks that end with a query block its queries see."""
    i = torch.arange(BLOCK, device=device)[:, None] + reach * BLOCK
    lag = i - torch.arange((reach + 1) * BLOCK, device=device)
    return (lag >= 0) & (lag <= window)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    major, _ = torch.cuda.get_device_capability(q.device)
    kernel = _flash_kernel(major)
    if kernel is None:
        raise RuntimeError("attention back-end flash: flash-attn is not installed; choose_backend says what is")
    y = kernel(q, k, v, causal=True, window_size=(-1 if window is None else window, 0))
    return y[0] if isinstance(y, tuple) else y  # some releases of version 3 return the log-sum-exp too


@functools.cache
def _flash_kernel(major: int) -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
    """`flash_attn_func` of flash-attn 3 (compute capability 9 only) or 2; None where neither can be imported."""
    for package in ("flash_attn_interface", "flash_attn") if major == 9 else ("flash_attn",):
        try:
            return importlib.import_module(package).flash_attn_func
        except ImportError:
            continue
    return None


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {"sdpa": _sdpa, "flash": _flash}
