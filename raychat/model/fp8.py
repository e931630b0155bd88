"""Training matrices in 8-bit floating point through torchao, on GPUs that have it. Evaluation never runs in it.

The layers change, the parameters do not: names, values and the optimizer's view stay as they are.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from raychat.errors import ConfigError
from raychat.model.gpt import Linear

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MULTIPLE = 16  # the tensor cores' granularity
SMALLEST = 512  # below this the casts cost more than the product saves


def fp8_capable(device: torch.device) -> str | None:
    """None where fp8 training can run on `device`, else the reason why it cannot."""
    if device.type != "cuda":
        return f"fp8 needs a CUDA device, this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"fp8 needs compute capability 8.9 (Ada, Hopper or later), {torch.cuda.get_device_name(device)} has " + (
            ".".join(str(part) for part in capability)
        )
    if importlib.util.find_spec("torchao") is None:
        return "fp8 needs the package torchao, which is not installed"
    return None


def fp8_training(model: nn.Module, recipe: str = "tensorwise") -> int:
    """Swap the model's large matrices for fp8 layers of torchao's `recipe`; the number of layers swapped.

    Call it on materialised parameters, before `torch.compile`. A pass then needs a multiple of 16 tokens.
    Raises ConfigError when the recipe is unknown, the device cannot, or no matrix is large enough.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"--fp8-recipe={recipe} is unknown. Use one of {', '.join(RECIPES)}.")
    if reason := fp8_capable(next(model.parameters()).device):
        raise ConfigError(f"--fp8 cannot be used: {reason}. Leave --fp8 out; the run then trains in --dtype.")
    from torchao.float8 import Float8LinearConfig

    return convert(model, Float8LinearConfig.from_recipe_name(recipe))


def convert(model: nn.Module, config: "Float8LinearConfig") -> int:
    """Swap the layers that `takes_fp8` for torchao's of `config`; the number of layers swapped."""
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=takes_fp8, config=config)
    if not (count := len(_converted(model))):
        raise ConfigError(
            f"--fp8 changes nothing: no matrix has both sides >= {SMALLEST} and divisible by {MULTIPLE}. "
            "Leave --fp8 out, or use a larger --depth."
        )
    return count


def takes_fp8(module: nn.Module, name: str) -> bool:
    """Whether a layer is trained in fp8: the large matrices of the blocks, not lm_head and not the gates."""
    if not isinstance(module, Linear) or name.endswith(("lm_head", "ve_gate", "smear_gate")):
        return False
    sides = (module.in_features, module.out_features)
    return min(sides) >= SMALLEST and all(side % MULTIPLE == 0 for side in sides)


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes with its plain layers on the same parameters. A no-op without fp8."""
    swapped = _converted(model)
    for parent, name, layer in swapped:
        plain = Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight = layer.weight
        setattr(parent, name, plain)
    try:
        yield
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)


def _converted(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    # All matrices of the model are raychat's Linear; any other kind of nn.Linear was put there by a conversion.
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and not isinstance(child, Linear)
    ]
