"""Shapes of a raychat model, as transformers reads them from config.json."""

from typing import Any

from transformers import PretrainedConfig


class RaychatConfig(PretrainedConfig):
    """See raychat.model.GPTConfig, whose names these are; transformers' usual names work too."""

    model_type = "raychat"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        sequence_len: int = 2048,
        vocab_size: int = 32768,
        n_layer: int = 20,
        n_head: int = 10,
        n_kv_head: int = 10,
        n_embd: int = 1280,
        window_pattern: str = "SSSL",
        short_window_ratio: float = 0.25,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.window_pattern, self.short_window_ratio = window_pattern, short_window_ratio
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
