"""The model: configuration, forward pass, losses and attention back-ends."""

from raychat.model.gpt import GPT
from raychat.model.shapes import GPTConfig

__all__ = ["GPT", "GPTConfig"]
