"""Let a trained model write: continue prompts from the command line, or from the terminal, line by line.

  python jobs/sample.py --prompt "The largest city of Japan is"      the newest run of the base directory
  python jobs/sample.py --model-tag d12 --step 2000                  then type; Ctrl-C stops a text, Ctrl-D ends
  python jobs/sample.py --path exported/d12 --temperature 0 < prompts.txt

Every prompt begins a new document: the model was trained on documents, not to answer, and does not know earlier prompts.
Texts go to stdout as they come, everything else to stderr.
"""

import argparse
import codecs
import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.errors import ConfigError
from raychat.export.flags import ModelFlags

if TYPE_CHECKING:  # --help does not wait for torch
    from raychat.export.source import Loaded
    from raychat.model.generation import Sampling

DEFAULT_TOKENS = 256
# What a terminal would obey instead of showing.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}")


def main(args: Sequence[str]) -> int:
    """Load the model, then write."""
    options = parser().parse_args(args)
    from raychat.model.generation import Sampling  # after --help: torch takes seconds to load

    if options.num_samples < 1:
        raise ConfigError(f"--num-samples {options.num_samples} asks for nothing: use 1 or more.")
    top_k = None if options.top_k == -1 else options.top_k
    sampling = Sampling(temperature=options.temperature, top_k=top_k, top_p=options.top_p, seed=options.seed)
    writer = Writer(load(options), sampling, options.max_tokens, options.num_samples)
    if options.prompt:
        for prompt in options.prompt:
            writer.write(prompt)
    else:
        converse(writer)
    return 0


def load(options: argparse.Namespace) -> "Loaded":
    """The model that the flags name, ready to write."""
    import torch

    from raychat.model.generation import cast_matrices_
    from raychat.training.device import DTYPES, device_type

    device = torch.device(device_type(options.device_type))
    source = ModelFlags.of(options).find()
    loaded = source.load(device, DTYPES.get(options.dtype))
    cast_matrices_(loaded.model)
    dtype = str(loaded.model.compute_dtype).removeprefix("torch.")
    at = "" if source.step is None else f", step {source.step}"
    note(f"model: {source.name}{at} ({source.place}) | {device}, {dtype}")
    return loaded


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python jobs/sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--prompt", action="append", help="text to continue; may be given again; default: read stdin line by line")
    add("--max-tokens", type=int, help=f"length of a text; default: {DEFAULT_TOKENS}, or as many as fit")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; default: %(default)s")
    add("--top-k", type=int, default=50, help="draw from the k likeliest tokens, -1: all; default: %(default)s")
    add("--top-p", type=float, default=1.0, help="... that together have this probability; default: %(default)s")
    add("--seed", type=int, default=42, help="the same seed writes the same text; default: %(default)s")
    add("--num-samples", type=int, default=1, help="texts per prompt, made in one batch; default: %(default)s")
    add(
        "--device-type",
        default="",
        choices=["", "cuda", "cpu", "mps"],
        help="default: cuda where there is one, else cpu",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32", "float16"],
        help="compute dtype; auto: that of the run",
    )
    ModelFlags.add_to(made)
    return made


class Writer:
    """Continues prompts on stdout, and says on stderr how fast."""

    def __init__(self, loaded: "Loaded", sampling: "Sampling", max_tokens: int | None, num_samples: int) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._sampling, self._max_tokens, self._num_samples = sampling, max_tokens, num_samples
        # Words of a conversation, which pretraining has not seen.
        self._never = set(loaded.tokenizer.special_tokens.values()) - {loaded.tokenizer.bos_id}

    def write(self, prompt: str) -> None:
        """The prompt with its continuations. The first is written as it comes, the others when it is done.

        Raises:
            ConfigError: the prompt is too long for the model.
        """
        from raychat.model.generation import generate

        bos, count = self._tokenizer.bos_id, self._num_samples
        ids = [bos, *self._tokenizer.encode(prompt)]
        room = self._model.cos.size(0) - len(ids)
        max_tokens = min(DEFAULT_TOKENS, max(room, 1)) if self._max_tokens is None else self._max_tokens
        steps = generate(self._model, [ids] * count, max_tokens, self._sampling, stop={bos}, never=self._never)
        show(prompt)
        texts, clock = [[] for _ in range(count)], [time.perf_counter()]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may need several tokens
        try:
            for tokens in steps:
                for text, token in zip(texts, tokens, strict=True):
                    text += [] if token is None else [token]
                if (newest := tokens[0]) is not None:
                    show(decoder.decode(self._tokenizer.decode_bytes([newest])))
                clock.append(time.perf_counter())
        finally:  # Ctrl-C leaves what was written, and the terminal at the beginning of a line
            show(decoder.decode(b"", final=True) + "\n")
        for number, text in enumerate(texts[1:], start=2):
            show(f"--- {number} of {count}\n{prompt}{self._tokenizer.decode(text)}\n")
        note(speed(count * len(ids), [len(text) for text in texts], clock))


def speed(prompt_tokens: int, lengths: Sequence[int], clock: Sequence[float]) -> str:
    """Tokens per second of reading the prompts and of writing texts of `lengths`.

    `clock` has the times of the start and of every step; the first step reads the prompts and gives the first tokens.
    """
    if len(clock) == 1:
        return "the model ends the document with the prompt: no text follows"
    told = f"prompt: {prompt_tokens:,} tokens, {prompt_tokens / (clock[1] - clock[0]):,.0f} tok/s"
    told += f" | text: {sum(lengths):,} tokens"
    if later := sum(length - 1 for length in lengths if length):
        told += f", {later / (clock[-1] - clock[1]):,.0f} tok/s"
    return told


def converse(writer: Writer) -> None:
    """Continue what is typed, or what a pipe holds, line by line. Ctrl-C stops a text, and at a prompt the program."""
    if sys.stdin is None:
        raise ConfigError(
            "There is nothing to continue: stdin is closed. Give --prompt, or a file with prompts on stdin."
        )
    typed = sys.stdin.isatty()
    for line in typed_lines() if typed else (line.rstrip("\r\n") for line in sys.stdin):
        if not line:
            continue
        try:
            writer.write(line)
        except KeyboardInterrupt:
            if not typed:
                raise
            note("stopped")
        except ConfigError as error:
            if not typed:
                raise
            note(f"error: {error}")


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is there
    ask = "> "
    while True:
        if not sys.stdout.isatty():  # the texts go to a file, where the sign would be among them
            print(ask, end="", file=sys.stderr, flush=True)
        try:
            yield input(ask if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
            return


def show(text: str) -> None:
    """Write to stdout at once; to a terminal without what it would obey."""
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text
        sys.stdin.reconfigure(errors="replace")
    cli.run_job(main)
