"""The model: configuration, forward pass, losses and attention back-ends."""

from raychat.model.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
