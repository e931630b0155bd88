"""The training loop and what it stands on, in plain PyTorch: the same under Ray Train, torchrun and a plain process."""
