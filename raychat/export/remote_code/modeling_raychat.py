"""A raychat model for transformers: torch and transformers are all it needs. One file, so that it can be read whole.

What differs from a textbook GPT: rotary positions, QK-norm, RMSNorm without weights, relu^2, no biases, untied embedding
and head, left windows on most layers, value embeddings with a gate on every other layer, a smear of the previous token's
embedding, learned mixing of the residual stream with its beginning, its middle taken out before the head, capped logits.

Legend: B rows, T positions, C channels, H heads, D channels per head, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_raychat import RaychatConfig  # noqa: TID252 - the two files are copied to a folder of any name

ROTARY_BASE, NORM_EPS = 100_000, 2.0**-23
SMEAR_CHANNELS, GATE_CHANNELS = 24, 12
WINDOW_MULTIPLE, VOCAB_MULTIPLE = 128, 64
LOGIT_CAP = 15


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D); the pairs are channels m and m + D/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def has_value_embedding(layer: int, layers: int) -> bool:
    """Every other layer, the last one included."""
    return layer % 2 == (layers - 1) % 2


class Attention(nn.Module):
    """Causal self-attention with QK-norm, a left window on some layers, a gated value embedding on others."""

    def __init__(self, config: RaychatConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        C, D = config.n_embd, config.n_embd // config.n_head
        self.window = _window(config, layer)
        self.c_q = nn.Linear(C, config.n_head * D, bias=False)
        self.c_k = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_v = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = nn.Linear(GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self, x: Tensor, value_embed: Tensor | None, rotary: tuple[Tensor, Tensor], real: Tensor | None
    ) -> Tensor:
        """`real` (B, T) is true where there is a token and no padding; None: everywhere."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1)
        k = self.c_k(x).view(B, T, self.n_kv_head, -1)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1)
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, Hkv)
            v = v + gate[..., None] * value_embed.view_as(v)
        q, k = 1.2 * norm(rotate(q, *rotary)), 1.2 * norm(rotate(k, *rotary))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        groups = self.n_head // self.n_kv_head
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = self._mask(T, real, x.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _mask(self, T: int, real: Tensor | None, device: torch.device) -> Tensor | None:
        """Which keys each query sees, (B or 1, 1, T, T); None: all of those before it."""
        if real is None and self.window >= T - 1:
            return None
        lag = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
        seen = ((lag >= 0) & (lag <= self.window))[None, None]
        if real is not None:
            seen = seen & (real[:, None, None] | (lag == 0))  # padding sees itself: a softmax over nothing is no number
        return seen


class MLP(nn.Module):
    """Two matrices with relu^2 between them."""

    def __init__(self, config: RaychatConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each reading the normed residual stream and adding to it."""

    def __init__(self, config: RaychatConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, value_embed: Tensor | None, rotary: tuple[Tensor, Tensor], real: Tensor | None
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(norm(x), value_embed, rotary, real)
        return x + self.mlp(norm(x))


class RaychatForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. It keeps no cache: every generated token costs a pass over the whole context."""

    config_class = RaychatConfig
    _no_split_modules = ["Block"]

    def __init__(self, config: RaychatConfig) -> None:
        super().__init__(config)
        C = config.n_embd
        rows = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        kv_width = config.n_kv_head * (C // config.n_head)
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, C), "h": blocks})
        layers = [i for i in range(config.n_layer) if has_value_embedding(i, config.n_layer)]
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, kv_width) for i in layers})
        self.lm_head = nn.Linear(C, rows, bias=False)
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose rows beyond the vocabulary are padding."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Float32 logits (B, T, V) of `input_ids` (B, T), of the last `logits_to_keep` positions alone if that is not 0.

        `attention_mask` (B, T) is 0 at padding. With `labels`, which are shifted here and of which -100 does not count, also
        the mean cross entropy in nats; of a part of a larger batch, the share that is its part of the mean over the
        `num_items_in_batch` labels of the whole, as transformers' Trainer expects it.
        """
        if use_cache or past_key_values is not None:
            raise ValueError(
                "This model keeps no cache of keys and values: call it, and generate(), with use_cache=False."
            )
        x = self._hidden(input_ids, _real(attention_mask))
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the logits of all positions: leave logits_to_keep out.")
            reduction = "mean" if num_items_in_batch is None else "sum"
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction=reduction)
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _hidden(self, idx: Tensor, real: Tensor | None) -> Tensor:
        x = norm(self.transformer["wte"](idx))
        x = x0 = middle = self._smear(x, real)
        rotary = self._rotary(idx.size(1), x)
        for i, block in enumerate(self.transformer["h"].children()):
            value_embed = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0, value_embed, rotary, real)
            if i == self.config.n_layer // 2:
                middle = x
        return norm(x - self.backout_lambda * middle)

    def _smear(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Mix into each position a gated share of the one before it, where that is no padding."""
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        if real is not None:
            gate = gate * real[:, :-1, None]
        return torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)

    def _rotary(self, T: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, D/2), computed in float32."""
        half = self.config.n_embd // self.config.n_head // 2
        positions = torch.arange(T, dtype=torch.float32, device=x.device)
        frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angles = (positions[:, None] * frequencies)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _window(config: RaychatConfig, layer: int) -> int:
    """Positions to the left of a query that it sees besides itself."""
    full = 10**9  # rows may be longer than those of the training
    letter = config.window_pattern.upper()[layer % len(config.window_pattern)]
    if letter == "L" or layer == config.n_layer - 1:
        return full
    T = config.sequence_len
    short = math.ceil(T * config.short_window_ratio / WINDOW_MULTIPLE) * WINDOW_MULTIPLE
    return short if short < T else full


def _real(attention_mask: Tensor | None) -> Tensor | None:
    """The mask as booleans, or None where it hides nothing."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()
