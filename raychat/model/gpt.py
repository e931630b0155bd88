"""The model, read top to bottom: attention, MLP, block, GPT.

What differs from a textbook GPT: rotary positions, QK-norm, RMSNorm without weights, relu^2, no biases, untied embedding
and head, left windows on most layers, value embeddings with a gate on every other layer, a smear of the previous token's
embedding, learned mixing of the residual stream with its beginning, its middle taken out before the head, capped logits.

Legend: B rows, T positions, C = n_embd channels, H heads, Hkv key and value heads, D channels per head, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raychat.errors import ConfigError
from raychat.model.attention import attend
from raychat.model.loss import LOSSES, Reduction, softcapped_logits
from raychat.model.past import Past
from raychat.model.shapes import GPTConfig
from raychat.planning.scaling import SMEAR_CHANNELS, VALUE_GATE_CHANNELS

ROTARY_BASE = 100_000
ROTARY_REACH = 10  # the tables serve up to this many times sequence_len positions
NORM_EPS = 2.0**-23  # float32's machine epsilon, in every dtype
COMPUTE_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and cast to its input's dtype for the product."""

    def __init__(self, in_features: int, out_features: int, device: str | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, device=device)

    def reset_parameters(self) -> None:
        """Nothing: `GPT.init_weights` fills all parameters."""

    def forward(self, input: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        return F.linear(input, self.weight.to(input.dtype))


class Embedding(nn.Embedding):
    """A look-up table whose rows `GPT.init_weights` fills."""

    def reset_parameters(self) -> None:
        """Nothing: `GPT.init_weights` fills all parameters."""


def norm(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """RMSNorm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(
    x: Float[Tensor, "B T H D"], cos: Float[Tensor, "*places 1 half"], sin: Float[Tensor, "*places 1 half"]
) -> Float[Tensor, "B T H D"]:
    """Rotary position embedding; the pairs are (channel m, channel m + D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with QK-norm and, on some layers, a gated value embedding."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.layer, self.window = layer, config.windows()[layer]
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)
        if config.has_value_embed(layer):
            self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        value_embed: Float[Tensor, "B T Ckv"] | None,
        rotary: tuple[Tensor, Tensor],
        backend: str,
        past: Past | None = None,
    ) -> Float[Tensor, "B T C"]:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1)
        k = self.c_k(x).view(B, T, self.n_kv_head, -1)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1)
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, Hkv)
            v = v + gate[..., None] * value_embed.view_as(v)
        q, k = 1.2 * norm(rotate(q, *rotary)), 1.2 * norm(rotate(k, *rotary))
        y = attend(q, k, v, self.window, backend) if past is None else past.attend(self.layer, q, k, v, backend)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Two matrices with relu^2 between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each reading the normed residual stream and adding to it.

    The stream x that they read has a share of its beginning x0 mixed in first.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        x0: Float[Tensor, "B T C"],
        shares: tuple[Tensor, Tensor],
        value_embed: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        backend: str,
        past: Past | None = None,
    ) -> Float[Tensor, "B T C"]:
        x = shares[0] * x + shares[1] * x0
        x = x + self.attn(norm(x), value_embed, rotary, backend, past)
        return x + self.mlp(norm(x))


def stem(
    embedded: Float[Tensor, "B T C"], smear_lambda: Float[Tensor, "1"], gate: Float[Tensor, "1 channels"]
) -> Float[Tensor, "B T C"]:
    """What the first block reads: the normed embedding, with a gated share of the position before mixed into each."""
    x = norm(embedded)
    share = smear_lambda.to(x.dtype) * torch.sigmoid(F.linear(x[:, 1:, :SMEAR_CHANNELS], gate.to(x.dtype)))
    return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)


def through_block(block: nn.Module, *inputs: Any) -> Float[Tensor, "B T C"]:
    """One block on its inputs."""
    return block(*inputs)


def tail(
    x: Float[Tensor, "B T C"], middle: Float[Tensor, "B T C"], backout_lambda: Float[Tensor, "1"]
) -> Float[Tensor, "B T C"]:
    """What the head reads: the stream without its middle, normed."""
    return norm(x - backout_lambda.to(x.dtype) * middle)


def call(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`: the way to a part of the model, in whose place training may go to a compiled one."""
    return function(*inputs)


class GPT(nn.Module):
    """A GPT with initialised parameters, or, built under `torch.device("meta")`, with none.

    A model built on meta becomes real by `to_empty(device=...)` and then `init_weights(seed)` or `load_state_dict`.
    The keys of `state_dict()` are names that other implementations of the same mathematics read.

    Settings that may change at any time: `attention_backend` (a key of `attention.BACKENDS`), `loss_impl` ("full" or
    "chunked") and `grad_checkpoint` (in training keep only each block's input and compute the rest again in the backward
    pass: the same numbers, less memory, a third more time). `set_compute_dtype` comes before the optimizer is built.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.loss_impl = "full"
        self.grad_checkpoint = False
        self.compute_dtype = torch.float32
        C = config.n_embd
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": Embedding(config.padded_vocab, C), "h": blocks})
        self.value_embeds = nn.ModuleDict(
            {
                str(i): Embedding(config.padded_vocab, config.n_kv_head * config.head_dim)
                for i in range(config.n_layer)
                if config.has_value_embed(i)
            }
        )
        self.lm_head = Linear(C, config.padded_vocab)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self._fill_rotary()
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed=0)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> "GPT":
        """Parameters without values on `device`; the rotary tables, which no checkpoint holds, are computed."""
        super().to_empty(device=device, recurse=recurse)
        self._fill_rotary()
        return self

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`. Embeddings are stored in it (float16: in float32), everything else in float32."""
        if dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"--dtype={dtype} is not supported. Use bfloat16, float32 or float16.")
        self.compute_dtype = dtype
        for table in (self.transformer["wte"], *self.value_embeds.values()):
            table.to(torch.float32 if dtype is torch.float16 else dtype)
        self._fill_rotary()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill all parameters. Each has its own random stream, drawn in float32 and then cast: the values depend on
        `seed`, the parameter's name and the kind of device, not on order, dtype or number of workers."""
        for name, param in self.named_parameters():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(param.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
            value = torch.empty_like(param, dtype=torch.float32)
            self._draw(name, value, generator)
            param.copy_(value)

    def _draw(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        s = (3 / self.config.n_embd) ** 0.5  # a uniform variable on (-s, s) has standard deviation 1/sqrt(C)
        depth_share = torch.arange(self.config.n_layer) / max(self.config.n_layer - 1, 1)  # 0 first block, 1 last
        role = "value_embeds" if name.startswith("value_embeds.") else name.removesuffix(".weight").split(".")[-1]
        match role:
            case "wte":
                value.normal_(0, 0.8, generator=generator)
            case "lm_head":
                value.normal_(0, 0.001, generator=generator)
            case "c_q" | "c_k" | "c_v" | "value_embeds":
                value.uniform_(-s, s, generator=generator)
            case "c_fc":
                value.uniform_(-0.4 * s, 0.4 * s, generator=generator)
            case "smear_gate" | "ve_gate":
                value.uniform_(0, 0.02, generator=generator)
            case "c_proj" | "smear_lambda":
                value.zero_()
            case "backout_lambda":
                value.fill_(0.2)
            case "resid_lambdas":
                value.copy_(1.15 - 0.10 * depth_share)
            case "x0_lambdas":
                value.copy_(0.20 - 0.15 * depth_share)

    def _fill_rotary(self) -> None:
        half = self.config.head_dim // 2
        device = self.lm_head.weight.device
        positions = torch.arange(ROTARY_REACH * self.config.sequence_len, dtype=torch.float32, device=device)
        frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = positions[:, None] * frequencies
        self.register_buffer("cos", angles.cos().to(self.compute_dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.compute_dtype), persistent=False)

    def hidden(
        self,
        idx: Int[Tensor, "B T"],
        cache: Past | None = None,
        counts: Sequence[int] | None = None,
        call: Callable[..., Tensor] = call,
    ) -> Float[Tensor, "B T C"]:
        """The normed residual stream in front of the head, in the compute dtype.

        With a `cache` the rows continue those in it, and are added to it. Of row b the first `counts[b]` tokens are
        real (default: all), the rest is padding whose result means nothing. `call` calls the parts of the model.
        """
        dtype = self.compute_dtype
        rotary = self._rotary(idx.size(1), cache, counts)
        embedded = self.transformer["wte"](idx).to(dtype)
        if cache is None:
            x = call(stem, embedded, self.smear_lambda, self.smear_gate.weight)
        else:
            x = self._smear_on(norm(embedded), cache)
        x0 = x.view_as(x)  # compiled, a block whose inputs are one object would be another kind of block
        resid, x0_share = self.resid_lambdas.to(dtype).unbind(), self.x0_lambdas.to(dtype).unbind()
        middle = x
        recompute = self.grad_checkpoint and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer["h"].children()):
            layer = (call, i, block, x, x0, (resid[i], x0_share[i]), idx, rotary, self.attention_backend, cache)
            if recompute:  # nothing here is random, so no state of a generator has to be kept
                x = checkpoint(self._layer, *layer, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._layer(*layer)
            if i == self.config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.end()
        return call(tail, x, middle, self.backout_lambda)

    def _layer(
        self,
        call: Callable[..., Tensor],
        i: int,
        block: nn.Module,
        x: Tensor,
        x0: Tensor,
        shares: tuple[Tensor, Tensor],
        idx: Tensor,
        *context: Any,
    ) -> Float[Tensor, "B T C"]:
        """Block `i` on its value embedding and its `shares` of x and x0; `context`: what else the block takes."""
        value_embed = self.value_embeds[str(i)](idx).to(x.dtype) if self.config.has_value_embed(i) else None
        return call(through_block, block, x, x0, shares, value_embed, *context)

    def _rotary(self, T: int, cache: Past | None, counts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions of a pass: (T, 1, half), or with a cache (B, T, 1, half)."""
        if cache is not None:
            positions = cache.begin(T, counts)
            return self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        if self.cos.size(0) < T:
            raise ConfigError(
                f"A row of {T:,} tokens is longer than the {self.cos.size(0):,} positions of a model trained on "
                f"--max-seq-len={self.config.sequence_len:,}. Use shorter rows."
            )
        return self.cos[:T, None], self.sin[:T, None]

    def _smear_on(self, x: Float[Tensor, "B T C"], cache: Past) -> Float[Tensor, "B T C"]:
        """As `stem`, on rows that go on: the position before the first is in the cache."""
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * cache.shift(x)

    def forward(
        self,
        idx: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        reduction: Reduction = "mean",
        cache: Past | None = None,
        counts: Sequence[int] | None = None,
    ) -> Float[Tensor, "..."]:
        """Without `targets` float32 logits (B, T, V), else the cross entropy in nats.

        Targets of -1 do not count. `reduction` "none" gives (B, T) with 0 there. `cache` and `counts`: see `hidden`.
        """
        x = self.hidden(idx, cache, counts)
        if targets is None:
            return softcapped_logits(x, self.lm_head.weight, self.config.vocab_size)
        return LOSSES[self.loss_impl](x, self.lm_head.weight, targets, self.config.vocab_size, reduction)

    def window_sizes(self) -> list[int]:
        """Left window of each block in positions; full context counts as sequence_len."""
        return [self.config.sequence_len if w is None else w for w in self.config.windows()]

    def num_params(self) -> dict[str, int]:
        """Parameters by group, and their total. Padded rows count; gates of the blocks are among the matrices."""
        counts = dict.fromkeys(("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars"), 0)
        for name, param in self.named_parameters():
            if name.startswith("transformer.h."):
                group = "transformer_matrices"
            else:
                group = name.removeprefix("transformer.").split(".")[0]
            counts[group if group in counts else "scalars"] += param.numel()
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token: 6 per weight of a product, and attention over the whole window.

        Attention counts as if no pair were masked, which is how the lineage reports MFU. Look-ups count nothing.
        """
        counts = self.num_params()
        weights = counts["transformer_matrices"] + counts["lm_head"] + self.smear_gate.weight.numel()
        seen = sum(min(w, self.config.sequence_len) for w in self.window_sizes())
        return 6 * weights + 12 * self.config.n_head * self.config.head_dim * seen
