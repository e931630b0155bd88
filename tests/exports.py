"""A small checkpoint to export, of a model in which everything that a layout may forget is different from its start."""

import json
from pathlib import Path

import torch

from raychat.config import Config
from raychat.data.tokenizer import train_tokenizer
from raychat.export.source import Source, find_source
from raychat.optim import build_optimizer
from raychat.training import saver
from raychat.training.build import build_model
from raychat.training.device import resolve
from raychat.training.world import World

CPU = torch.device("cpu")
STEP = 7


def make_source(base: Path, **changes) -> Source:
    """The checkpoint of step 7 of a run `tiny` in `base`, with a tokenizer of 300 tokens."""
    tokenizer = train_tokenizer(
        ["some words and some other words, and 1234 numbers"] * 9 + [Path(__file__).read_text()],
        vocab_size=300,
        echo=lambda line: None,
    )
    shape = {"depth": 2, "aspect_ratio": 24, "head_dim": 12, "num_kv_heads": 2, "max_seq_len": 512, "vocab_size": 300}
    run = {"model_tag": "tiny", "base_dir": str(base), "window_pattern": "SL", "dtype": "float32", "device_type": "cpu"}
    config = Config.from_flat({**shape, **run, "corpus": "/private/folder/texts", "num_iterations": STEP, **changes})
    model = build_model(config, resolve(config, local_world_size=1), CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    meta = {
        "config": config.public(),
        "fingerprint": "0123456789abcdef",
        "tokenizer_sha256": tokenizer.sha256,
        "lanes": 1,
        "attempt": 1,
        "step": STEP,
        "world_size": 1,
        "state": {"step": STEP, "rows_consumed": 70, "val_bpb": 1.25, "val_step": STEP, "total_training_time_s": 5.0},
        "resolved": {"dtype": "float32", "hardware": "cpu, 1 threads"},
    }
    saver.save(config.run_dir / "checkpoints", model, build_optimizer(model), meta, World())
    tokenizer.save(config.run_dir / "tokenizer")
    (config.run_dir / "config.json").write_text(json.dumps({"config": config.public()}))
    return find_source(path=str(config.run_dir))


def probe(source: Source) -> torch.Tensor:
    """Ids (2, 300) of the vocabulary, longer than the windows of the model."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(source.gpt_config.vocab_size, (2, 300), generator=generator)
