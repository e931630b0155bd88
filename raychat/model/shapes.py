"""The shapes of a GPT: what a model is told when it is made."""

from dataclasses import dataclass

from raychat.errors import ConfigError
from raychat.planning.scaling import SMEAR_CHANNELS, VOCAB_MULTIPLE, has_value_embedding, window_sizes


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shapes of a GPT. Raises ConfigError for shapes that cannot exist."""

    sequence_len: int = 2048
    """positions per training row (T)"""
    vocab_size: int = 32768
    """tokens that exist; the matrices have `padded_vocab` rows"""
    n_layer: int = 20
    """blocks"""
    n_head: int = 10
    """query heads"""
    n_kv_head: int = 10
    """key and value heads; divides n_head"""
    n_embd: int = 1280
    """channels (C)"""
    window_pattern: str = "SSSL"
    """attention window per block, tiled over the blocks: S short, L full context; the last block is always L"""
    short_window_ratio: float = 0.25
    """short window as a share of sequence_len, rounded up to a multiple of 128 positions"""

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_embd < SMEAR_CHANNELS:
            raise ConfigError(
                f"n_embd must be at least {SMEAR_CHANNELS} (the smear gate reads them), got {self.n_embd}."
            )
        if self.n_embd % (2 * self.n_head):
            raise ConfigError(
                f"n_embd={self.n_embd} does not split into n_head={self.n_head} heads of an even number of channels. "
                f"Use n_embd={-(-self.n_embd // (2 * self.n_head)) * 2 * self.n_head}, or another n_head."
            )
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}.")
        if unknown := sorted(set(self.window_pattern.upper()) - set("SL")):
            raise ConfigError(
                f"--window-pattern={self.window_pattern} holds {', '.join(unknown)}; it may hold only S (short) and L (full)."
            )
        if not self.window_pattern:
            raise ConfigError("--window-pattern is empty. Use L (full context everywhere) or a pattern such as SSSL.")
        if not 0 < self.short_window_ratio <= 1:
            raise ConfigError(f"--short-window-ratio must be above 0 and at most 1, got {self.short_window_ratio}.")

    @property
    def head_dim(self) -> int:
        """Channels per head (D)."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embeddings and of lm_head."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def windows(self) -> list[int | None]:
        """Left window of each block in positions; None is full context."""
        T = self.sequence_len
        sizes = window_sizes(self.window_pattern, self.n_layer, T, self.short_window_ratio)
        return [None if size >= T else size for size in sizes]

    def has_value_embed(self, layer: int) -> bool:
        """Every other block adds a value embedding, the last one included."""
        return has_value_embedding(layer, self.n_layer)
