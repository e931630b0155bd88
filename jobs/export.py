"""Export a trained model for other programs.

  python jobs/export.py --format huggingface --output d12-hf            the newest run's newest checkpoint
  python jobs/export.py --format both --output out --model-tag d12 --step 2000
  python jobs/export.py --format lineage --output out --path s3://bucket/runs/d12

lineage: model_*.pt, meta_*.json and tokenizer.pkl, as other implementations of the same mathematics load them, with
safetensors beside. huggingface: a directory that transformers loads with trust_remote_code.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.errors import ConfigError
from raychat.export.flags import ModelFlags
from raychat.uris import public_uri


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if not args.output or "://" in args.output:
        raise ConfigError(
            f"--output {public_uri(args.output)!r} is no folder of this machine, and exports are written to one: give it, "
            "and copy it to a bucket afterwards."
        )
    from raychat.export.write import export  # after the flags: torch takes seconds to load
    from raychat.training.device import DTYPES

    source = ModelFlags.of(args).find()
    print(f"model: {source.place}" + ("" if source.step is None else f" (step {source.step:,})"), flush=True)
    formats = ("lineage", "huggingface") if args.format == "both" else (args.format,)
    written = export(source, Path(args.output).absolute(), formats, dtype=DTYPES[args.dtype], echo=_echo)
    for one in written:
        print(f"written: {one.folder} (read back: logits differ by at most {one.difference:.1e})")
    print(f"next:    python jobs/sample.py --path {written[-1].folder} --prompt 'The largest city of Japan is'")
    if args.format != "lineage":
        print(f"         AutoModelForCausalLM.from_pretrained({str(written[-1].folder)!r}, trust_remote_code=True)")
    if args.format != "huggingface":
        print(f"         python jobs/pretrain.py --init-from {written[0].folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("lineage", "huggingface", "both"), required=True)
    parser.add_argument(
        "--output", required=True, help="folder to write, empty or absent; with both: one below it for each"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights: float32 loses nothing, bfloat16 is half the size (default: %(default)s)",
    )
    ModelFlags.add_to(parser)
    return parser


def _echo(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_job(main)
