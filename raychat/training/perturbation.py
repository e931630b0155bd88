"""`--perturbation`: a repeat that differs from its original by rounding alone.

Where hardware is deterministic, a repeat with the same seed is identical and says nothing about noise. The smallest
change of the initial weights grows, step by step, into the spread that rounding alone can cause.
"""

import torch

from raychat.model import GPT


@torch.no_grad()
def perturb(model: GPT, number: int) -> None:
    """Move one channel of every row of the token embedding to the next value of its dtype; which one, `number` decides.

    The embedding, because it is stored in the compute dtype: the last bit of a float32 matrix is lost in its cast.
    """
    rows = model.get_parameter("transformer.wte.weight")
    generator = torch.Generator().manual_seed(number)
    channel = torch.randint(rows.size(1), (rows.size(0), 1), generator=generator).to(rows.device)
    values = rows.gather(1, channel)
    rows.scatter_(1, channel, torch.nextafter(values, torch.full_like(values, torch.inf)))
