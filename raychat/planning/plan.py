"""The plan of a run: what `--dry-run` prints and every run writes to `plan.json`. Exact arithmetic, no torch, no data."""

from typing import Any

from raychat.config import Config
from raychat.planning import scaling


def make_plan(config: Config) -> dict[str, Any]:
    """Model, batch, rates, horizon and cost of `config`, as plain values. Raises ConfigError for what cannot be."""
    shape = scaling.model_shape(config.model)
    counts = scaling.param_counts(shape)
    recipe = scaling.recipe(config)
    T = shape.sequence_len
    rows = recipe.total_batch_size // T
    scale, width_scale = recipe.lr_scale, (shape.n_embd / 768) ** -0.5
    optim = config.optim
    return {
        "model": {
            "depth": shape.n_layer,
            "model_dim": shape.n_embd,
            "heads": shape.n_head,
            "kv_heads": shape.n_kv_head,
            "head_dim": shape.head_dim,
            "max_seq_len": T,
            "vocab_size": shape.vocab_size,
            "padded_vocab": shape.padded_vocab,
            "windows": list(shape.windows),
            "parameters": {
                "wte": counts.wte,
                "value_embeds": counts.value_embeds,
                "lm_head": counts.lm_head,
                "transformer_matrices": counts.transformer_matrices,
                "scalars": counts.scalars,
                "total": counts.total,
                "scaling": counts.scaling,
            },
            "flops_per_token": recipe.flops_per_token,
        },
        "batch": {
            "total_batch_size": recipe.total_batch_size,
            "rows": rows,
            "device_batch_size": config.batch.device_batch_size,
            "tokens_per_pass": config.batch.device_batch_size * T,
            "passes_on_one_device": rows // config.batch.device_batch_size,
            "device_batch_sizes_that_divide": [2**k for k in range(rows.bit_length()) if rows % 2**k == 0],
        },
        "rates": {
            "lr_scale": scale,
            "matrix_lr": optim.matrix_lr * scale,
            "embedding_lr": optim.embedding_lr * scale * width_scale,
            "unembedding_lr": optim.unembedding_lr * scale * width_scale,
            "scalar_lr": optim.scalar_lr * scale,
            "weight_decay": recipe.weight_decay,
            "warmup_steps": scaling.warmup_steps(config, recipe.num_iterations),
        },
        "horizon": {
            "num_iterations": recipe.num_iterations,
            "tokens": recipe.tokens,
            "tokens_per_scaling_param": recipe.tokens / counts.scaling,
            "flops": recipe.flops,
        },
    }


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a person reads it."""
    model, batch, rates, horizon = plan["model"], plan["batch"], plan["rates"], plan["horizon"]
    params = model["parameters"]
    return "\n".join(
        [
            f"model     depth {model['depth']}, width {model['model_dim']}, {model['heads']} heads of {model['head_dim']}, "
            f"context {model['max_seq_len']:,}, vocabulary {model['vocab_size']:,}",
            f"          {params['total']:,} parameters: blocks {params['transformer_matrices']:,}, "
            f"lm_head {params['lm_head']:,}, wte {params['wte']:,}, "
            f"value embeddings {params['value_embeds']:,}, scalars {params['scalars']:,}",
            f"          {params['scaling']:,} scaling parameters, {model['flops_per_token']:.4g} FLOPs per token",
            f"batch     {batch['total_batch_size']:,} tokens = {batch['rows']:,} sequences a step, "
            f"{batch['device_batch_size']} a pass ({batch['passes_on_one_device']} passes on one device)",
            f"          device batch sizes that divide: {', '.join(map(str, batch['device_batch_sizes_that_divide']))}",
            f"rates     matrix {rates['matrix_lr']:.4g}, embedding {rates['embedding_lr']:.4g}, "
            f"unembedding {rates['unembedding_lr']:.4g}, scalar {rates['scalar_lr']:.4g} (scaled by {rates['lr_scale']:.4g}); "
            f"weight decay {rates['weight_decay']:.4g}; warm-up {rates['warmup_steps']} steps",
            f"horizon   {horizon['num_iterations']:,} iterations, {horizon['tokens']:,} tokens "
            f"({horizon['tokens_per_scaling_param']:.1f} per scaling parameter), {horizon['flops']:.4g} FLOPs",
        ]
    )
