"""Pretraining of GPT models on Ray: one dial, `--depth`; everything else follows from scaling laws."""

__version__ = "0.1.0"
