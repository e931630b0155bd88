"""Which way imports point, seen from fresh processes: what a module loads, and that loading has no effects."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import raychat

ROOT = Path(raychat.__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "raychat").rglob("*.py")
    if path.name != "__main__.py" and path.parent.name != "remote_code"  # which exported models carry with them
)
EDGE = ("raychat.on_ray", "raychat.tracking.mlflow")
CORE = [name for name in MODULES if not name.startswith(EDGE)]
FRONT = [
    name for name in CORE if name.startswith(("raychat.planning", "raychat.cli", "raychat.config", "raychat.checks"))
]


def python(code, *args):
    """The last line that `code` prints, as JSON, and everything that it wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


def loaded_after(code, *args):
    """Top-level packages that are loaded after `code` has run."""
    tail = "\nimport json, sys\nprint(); print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    return set(python(code + tail, *args)[0])


def imports(names):
    return "".join(f"import {name}\n" for name in names)


def test_the_core_is_all_but_the_edge():
    assert len(CORE) > 40
    assert {"raychat.training.loop", "raychat.model.gpt", "raychat.tracking.journal", "raychat.data.order"} <= set(CORE)


def test_the_core_loads_neither_ray_nor_mlflow():
    loaded = loaded_after(imports([*CORE, "raychat.training.__main__"]))
    assert "torch" in loaded
    assert loaded.isdisjoint({"ray", "mlflow"})


def test_the_front_door_loads_no_torch():
    loaded = loaded_after(imports(FRONT))
    assert "raychat" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "pyarrow", "ray", "mlflow"})


TRAINING = ("pretrain", "prepare_data", "train_tokenizer")


@pytest.mark.parametrize(
    ("job", "flags"),
    [(job, flags) for job in TRAINING for flags in (["--help"], ["--preset", "demo", "--dry-run"])]
    + [("serve", ["--help"])],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_help_and_dry_run_load_neither_torch_nor_ray(job, flags, tmp_path):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
    )
    start = f"import sys; sys.argv = [{f'jobs/{job}.py'!r}, *{flags!r}, '--base-dir', {str(tmp_path)!r}]\n"
    assert loaded_after(start + code).isdisjoint({"torch", "ray", "mlflow", "numpy"})


def test_a_dry_run_answers_at_once(tmp_path):
    """In about 0.3 s of processor time; torch alone would take seconds."""
    before = os.times()
    subprocess.run(
        [sys.executable, "jobs/pretrain.py", "--dry-run", "--base-dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


EFFECTS = """
import importlib, json, os, sys, threading
others, names = json.loads(sys.argv[1])
for name in others:
    importlib.import_module(name)
sys.stdout.flush()
marks = dict(os.environ), threading.active_count(), sys.stdout.write("MARK"), sys.stderr.write("MARK"), os.getcwd()
for name in names:
    importlib.import_module(name)
changed = {key for key in os.environ.keys() | marks[0].keys() if os.environ.get(key) != marks[0].get(key)}
print("MARK")
sys.stderr.write("MARK")
print(json.dumps([sorted(changed), threading.active_count() - marks[1], os.getcwd() == marks[4]]))
"""
# Loaded before the modules of raychat are: what other packages do when they are imported is not ours.
OTHERS = [
    "torch",
    "torch.distributed",
    "ray",
    "ray.data",
    "ray.train",
    "ray.train.torch",
    "ray.util",
    "pyarrow.parquet",
]


def test_importing_any_module_has_no_effects():
    (environment, threads, same_place), done = python(EFFECTS, json.dumps([OTHERS, MODULES]))
    assert environment == []
    assert threads == 0
    assert same_place
    assert done.stdout.split("MARK")[1].strip() == ""
    assert done.stderr.split("MARK")[1] == ""


def test_the_import_contracts_name_modules_that_exist():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {module for contract in contracts for module in contract.get("source_modules", [])}
    assert named <= set(MODULES)
    top = {".".join(name.split(".")[:2]) for name in CORE} - {"raychat", "raychat.tracking"}
    assert top <= named  # a new part of the core comes under the contract
