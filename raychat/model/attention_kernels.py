"""Attention kernels that a machine may or may not have: FlashAttention 2 to 4, torch's variable-length kernel, FlexAttention.

`load` makes one ready, before anything is compiled: imports cannot be part of a compiled graph. Nothing is downloaded.
Shapes and windows are those of `attention.attend`.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raychat.errors import ConfigError

Kernel = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]

FLASH_MODULES = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn"}
CAPABILITY = 8  # smallest major one: tensor cores that multiply bfloat16
HALF = (torch.bfloat16, torch.float16)
FLEX_BLOCK = 128  # of the block mask: what FlexAttention's kernels want

_loaded: dict[str, Any] = {}  # by name of the kernel, what its package offers
_masks: dict[tuple[int, int | None, torch.device], Any] = {}  # FlexAttention's block masks, by (T, window, device)


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernel `name` may train in `dtype` on `device`, else the reason why it cannot. Loads it."""
    if device.type != "cuda":
        return (
            f"has no backward pass on {device.type}" if name == "flex" else f"needs CUDA, the device is {device.type}"
        )
    if name != "flex" and dtype not in HALF:
        return f"takes bfloat16 and float16, the compute dtype is {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if name != "flex" and major < CAPABILITY:
        return f"needs compute capability {CAPABILITY}.0, the device has {major}.{minor}"
    try:
        load(name)
    except ConfigError as error:
        return str(error)
    return None


def load(name: str) -> None:
    """Import what the kernel `name` needs. Raises ConfigError with the reason when this Python has it not."""
    if name in _loaded:
        return
    try:
        _loaded[name] = _imported(name)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if name in FLASH_MODULES and f"{FLASH_MODULES[name]}.".startswith(f"{error.name}."):
            raise ConfigError("not installed") from error
        raise ConfigError(f"cannot be imported: {error}") from error
    except Exception as error:  # a wheel for another torch or CUDA fails in many ways
        raise ConfigError(f"cannot be imported: {error}") from error


def prepare(name: str, device: torch.device, *, T: int, windows: set[int | None]) -> None:
    """Make everything that the kernel `name` needs for rows of `T` tokens. Raises ConfigError when it is not there."""
    load(name)
    if name == "flex":
        for window in windows:
            _block_mask(T, window, device)


def version(name: str) -> str:
    """Of the package that a loaded kernel comes from; torch's own go by torch's."""
    module = importlib.import_module(FLASH_MODULES[name]) if name in FLASH_MODULES else torch
    return str(getattr(module, "__version__", "?"))


def flash(name: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """`flash_attn_func` of one of the packages. Window (W, 0) means W + 1 keys, as here."""
    unlimited = None if name == "flash4" else -1
    y = _of(name)(q, k, v, causal=True, window_size=(unlimited if window is None else window, 0))
    return y[0] if isinstance(y, tuple) else y  # 4, and some releases of 3, return the log-sum-exp too


def varlen(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """torch's own kernel for packed sequences, all of them of length T."""
    B, T = q.shape[:2]
    # One arange is cheaper than a cache that a compiled graph would have to guard.
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    grouped = {"enable_gqa": True} if k.size(2) != q.size(2) else {}
    y = _of("varlen")(
        *(t.flatten(0, 1) for t in (q, k, v)),
        *(starts, starts, T, T),
        window_size=(-1 if window is None else window, 0),
        **grouped,
    )
    return y.unflatten(0, (B, T))


def flex(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlexAttention with the band as a block mask, compiled on its own where nothing around it is."""
    mask = _block_mask(q.size(1), window, q.device)
    plain, compiled = _of("flex")
    kernel = plain if torch.compiler.is_compiling() else compiled
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return kernel(*heads_first, block_mask=mask, enable_gqa=k.size(2) != q.size(2)).transpose(1, 2)


KERNELS: dict[str, Kernel] = {
    **{name: partial(flash, name) for name in FLASH_MODULES},
    "varlen": varlen,
    "flex": flex,
}


def _of(name: str) -> Any:
    if name not in _loaded:
        load(name)
    return _loaded[name]


def _imported(name: str) -> Any:
    if name in FLASH_MODULES:
        return importlib.import_module(FLASH_MODULES[name]).flash_attn_func
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention, torch.compile(flex_attention, dynamic=False)
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise ConfigError(f"that of torch {torch.__version__} knows no windows")
    return varlen_attn


def _block_mask(T: int, window: int | None, device: torch.device) -> Any:
    key = (T, window, device)
    if key not in _masks:
        from torch.nn.attention.flex_attention import create_block_mask

        reach = T if window is None else window

        def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j <= reach)

        _masks[key] = create_block_mask(seen, None, None, T, T, device=str(device), BLOCK_SIZE=FLEX_BLOCK)
    return _masks[key]
