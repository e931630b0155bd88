"""Decoding with the cache against a whole forward pass per token, in turns in one process; prints a table in Markdown.

  python tests/benchmarks/generation.py [ROUNDS]

d4 with T = 256 and 32,768 tokens, windows SSSL; a prompt of 56 tokens and 200 greedy ones after it; float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raychat.model import GPT, GPTConfig
from raychat.model.generation import LIKELIEST, Generator, Sampling

CONFIG = GPTConfig(sequence_len=256, vocab_size=32768, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
PROMPT, TOKENS = 56, 200


def lively() -> GPT:
    """A model that writes something else with every token: at its initialisation the blocks add nothing."""
    model, generator = GPT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_proj" in name or name == "lm_head.weight":
                param.normal_(0, 2 * param.size(-1) ** -0.5, generator=generator)
    return model.eval()


@torch.inference_mode()
def naive(model: GPT, prompt: list[int]) -> tuple[list[int], float]:
    """The tokens, and tokens per second after the first."""
    ids = list(prompt)
    for step in range(TOKENS):
        if step == 1:
            start = time.perf_counter()
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[PROMPT:], (TOKENS - 1) / (time.perf_counter() - start)


def cached(model: GPT, prompt: list[int], rows: int = 1, sampling: Sampling = LIKELIEST) -> tuple[list[int], float]:
    """The tokens of the first row, and those of all rows per second after the first step."""
    generator = Generator(model)
    for _ in range(rows):
        first = generator.add(prompt, TOKENS, sampling)
    tokens = [generator.step()[first]]
    start = time.perf_counter()
    while generator.rows:
        tokens.append(generator.step()[first])
    return tokens, rows * (TOKENS - 1) / (time.perf_counter() - start)


def main() -> None:
    """Every way once per round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=5, help="default: %(default)s")
    rounds = parser.parse_args().rounds
    model = lively()
    prompt = torch.randint(CONFIG.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    ways: dict[str, Callable[[], tuple[list[int], float]]] = {
        "naive, 1 row": lambda: naive(model, prompt),
        "cached, 1 row": lambda: cached(model, prompt),
        "cached, 1 row, top_k=50": lambda: cached(model, prompt, sampling=Sampling(top_k=50)),
        "cached, 1 row, top_p=0.9": lambda: cached(model, prompt, sampling=Sampling(top_p=0.9)),
        "cached, 8 rows": lambda: cached(model, prompt, rows=8),
        "cached, 32 rows": lambda: cached(model, prompt, rows=32),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        texts = {}
        for way, run in ways.items():
            texts[way], speed = run()
            speeds[way].append(speed)
        if texts["naive, 1 row"] != texts["cached, 1 row"]:
            raise SystemExit("the texts differ")
    base = statistics.median(speeds["naive, 1 row"])
    out = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "| | tok/s | range | |",
        "|---|--:|--:|--:|",
    ]
    for way, values in speeds.items():
        middle = statistics.median(values)
        out.append(f"| {way} | {middle:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {middle / base:.1f}x |")
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
