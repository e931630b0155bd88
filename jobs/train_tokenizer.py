"""Train the tokenizer of a run and nothing else, and say how well it compresses text that it was not trained on.

  python jobs/train_tokenizer.py --corpus my/texts --vocab-size 8192
  python jobs/train_tokenizer.py --corpus my/texts --vocab-size 8192 --tokenizer mine     kept under that name

A tokenizer that is there already is not trained again. Flags are those of jobs/pretrain.py.
"""

import contextlib
import sys
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.planning import format_plan, make_plan, recipe

SAMPLE_BYTES = 10_000_000


def main(args: list[str]) -> int:
    """Parse, and print the plan or train the tokenizer."""
    config = cli.parse(args, prog="python jobs/train_tokenizer.py", description=__doc__ or "")
    if config.run.dry_run:
        print(format_plan(make_plan(config)))
        return 0
    recipe(config)  # refuses what cannot be before anything is read
    from raychat.data.corpus import iter_documents  # after the checks: ray and torch take seconds to load
    from raychat.data.prepare import check_writable, ensure_tokenizer, open_corpus
    from raychat.data.tokenizer import Tokenizer
    from raychat.on_ray.driver import LazyCluster

    check_writable(config.base_dir)
    with contextlib.ExitStack() as stack:
        with_gpus = LazyCluster(config, stack, echo).has_gpus()
    corpus = open_corpus(config, with_gpus=with_gpus, echo=echo)
    folder = ensure_tokenizer(config, corpus, echo=echo)
    tokenizer = Tokenizer.load(folder)
    documents = size = tokens = 0
    for text in iter_documents(corpus.val, text_column=corpus.text_column):
        documents, size = documents + 1, size + len(text.encode())
        tokens += len(tokenizer.encode_numpy(text))
        if size >= SAMPLE_BYTES:
            break
    echo(f"vocabulary: {tokenizer.vocab_size:,} tokens")
    echo(f"compression: {size / tokens:.3f} bytes per token on {documents:,} documents of the validation split")
    echo(f"tokenizer: {folder}")
    return 0


def echo(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_job(main)
