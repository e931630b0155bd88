"""Serve a model over HTTP: OpenAI-compatible completions, and a page to try it.

  python jobs/serve.py                               the newest checkpoint of the newest run, at http://127.0.0.1:8000
  python jobs/serve.py --model-tag d12 --port 8080
  python jobs/serve.py --path exports/d12 --host 0.0.0.0 --api-key-file key.txt

It listens on this machine only, unless --host says otherwise, which needs an API key. Ctrl-C stops it.
"""

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.checks import require
from raychat.export.flags import ModelFlags

KEY_VARIABLE = "RAYCHAT_API_KEY"


def main(args: list[str]) -> int:
    """Parse, find the model, and serve it until interrupted."""
    given = parser().parse_args(args)
    require(
        all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))),
        "Ray Serve is not installed: pip install 'raychat[serve]' (or 'ray[serve]', beside what is there).",
    )
    from raychat.on_ray import serving  # after the parser: ray and torch take seconds to load

    file = given.api_key_file
    key = os.environ.pop(KEY_VARIABLE, "")  # out of the environment that the processes of Ray inherit
    settings = serving.Settings(
        host=given.host,
        port=given.port,
        api_key=serving.read_key(file) if file else key,
        max_batch=given.max_batch,
        max_tokens=given.max_tokens,
        num_replicas=given.num_replicas,
        device_type=given.device_type,
        dtype=given.dtype,
        address=given.address,
    )
    source = ModelFlags.of(given).find()
    key_hint = f"$(cat {shlex.quote(str(file))})" if file else f"${KEY_VARIABLE}"
    serving.run(source, settings, key_hint=key_hint, echo=lambda text: print(text, flush=True))
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ModelFlags.add_to(made)
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine only"
    )
    made.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    made.add_argument("--api-key-file", type=Path, help=f"file with the key that clients need; default: {KEY_VARIABLE}")
    made.add_argument("--max-batch", type=int, default=16, help="completions at once per replica; default: %(default)s")
    made.add_argument("--max-tokens", type=int, default=1024, help="most tokens of a completion; default: %(default)s")
    made.add_argument("--num-replicas", type=int, default=1, help="processes that hold the model; default: %(default)s")
    made.add_argument("--device-type", default="", help="cuda, cpu or mps; default: cuda where the cluster has GPUs")
    made.add_argument("--dtype", default="auto", help="bfloat16, float32 or float16; default: as the model was trained")
    made.add_argument("--address", default="", help="Ray cluster, host:port; default: a new one on this machine")
    return made


if __name__ == "__main__":
    cli.run_job(main)
