"""Copied into Hugging Face directories, where transformers runs it. It imports nothing of raychat, nor raychat it."""
