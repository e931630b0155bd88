"""jobs/evaluate.py: what training found, found again from the checkpoint, as files, a table and in MLflow."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from core_bundles import write_bundle
from runs import run_here

from raychat.config import Config
from raychat.errors import ConfigError, DataError
from raychat.evaluation.core.reference import CORE_METRIC, GPT2
from raychat.tracking import mlflow_delivery, mlflow_shipper
from raychat.tracking.journal import read_journal
from raychat.training import examiner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from jobs import evaluate  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


@pytest.fixture(scope="module")
def ran(tiny_flags, prepared_base, bundle, tmp_path_factory):
    """A run that evaluated itself at its end, step 4, and left what MLflow needs."""
    runs = tmp_path_factory.mktemp("evaluated")
    changes = {
        "base_dir": str(prepared_base),
        "storage_path": str(runs),
        "core_bundle": str(bundle),
        "core_metric_every": 4,
        "core_metric_max_per_task": 6,
    }
    return run_here(Config.from_flat(tiny_flags | changes))


@pytest.fixture
def flags(ran):
    return ["--path", str(ran.run_dir), "--core-metric-max-per-task", "6", "--no-tracking"]


def results(ran):
    return ran.run_dir / "evaluations" / "step_00000004"


def last(ran, metric):
    return [record[metric] for record in ran.records if metric in record][-1]


def test_the_job_finds_what_training_found(ran, flags, capsys):
    assert evaluate.main(flags) == 0
    core = json.loads((results(ran) / "core.json").read_text())
    assert core["core_metric"] == last(ran, "core_metric")
    assert len(core["tasks"]["choosing"]["items"]) == 6
    bpb = json.loads((results(ran) / "bpb.json").read_text())
    assert bpb["val_bpb"] == pytest.approx(last(ran, "val/bpb"), rel=1e-6)
    assert (bpb["tokens"], bpb["step"], bpb["model"]) == (256, 4, "d2")
    samples = json.loads((results(ran) / "samples.json").read_text())
    assert all(sample["text"].startswith(sample["prompt"]) for sample in samples)
    rows = list(csv.DictReader((results(ran) / "core.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == ["choosing", "resolving", "continuing", "CORE"]
    assert float(rows[-1]["centered"]) == pytest.approx(core["core_metric"], abs=1e-6)
    shown = capsys.readouterr().out
    assert f"{CORE_METRIC['GPT-2 124M']:.4f}" in shown
    assert str(results(ran) / "core.csv") in shown


def test_the_batch_decides_the_size_of_passes_and_no_verdict(ran, flags, tmp_path, monkeypatch):
    asked, evaluate_core, items = [], examiner.evaluate_core, []

    def noted(*args, batch_tokens, **options):
        asked.append(batch_tokens)
        return evaluate_core(*args, batch_tokens=batch_tokens, **options)

    monkeypatch.setattr(examiner, "evaluate_core", noted)
    for size in (1, 32):
        batch = ["--device-batch-size", str(size), "--output", str(tmp_path / str(size)), "--eval", "core"]
        assert evaluate.main([*flags, *batch]) == 0
        tasks = json.loads((tmp_path / str(size) / "core.json").read_text())["tasks"].values()
        items.append([(item["line"], item["predicted"], item["correct"]) for task in tasks for item in task["items"]])
    assert asked == [32, 32 * 32]  # of a model that was trained on rows of 32 tokens
    assert items[0] == items[1]


def test_the_table_names_the_published_figures_beside_tasks_that_have_some(ran, flags, bundle, tmp_path, capsys):
    place = tmp_path / "renamed"
    write_bundle(place)
    for name in ("core.yaml", "eval_meta_data.csv"):
        (place / name).write_text(
            (place / name).read_text().replace("choosing,", "piqa,").replace("label: choosing", "label: piqa")
        )
    evaluate.main([*flags, "--eval", "core", "--core-bundle", str(place), "--output", str(tmp_path / "out")])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("piqa ")]
    assert line.split()[3:] == [f"{value:.4f}" for value in GPT2["piqa"].centered]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"core.json", "core.csv"}


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--eval", "core,quality"], ConfigError, "'quality'"),
        (["--eval", ","], ConfigError, "--eval is empty"),
        (["--num-workers", "0"], ConfigError, "--num-workers 0"),
        (["--step", "3"], ConfigError, "--step 3"),
        (["--tokens", "/nowhere"], DataError, "--tokens /nowhere"),
        (["--core-bundle", "/nowhere"], ConfigError, "/nowhere"),
        (["--output", __file__], ConfigError, "--output"),
        (["--output", f"{__file__}/below"], ConfigError, "--output"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(flags, more, error, words, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", None)
    with pytest.raises(error, match=words):
        evaluate.main([*flags, *more])


def test_a_reader_that_has_gone_takes_no_result_with_it(flags, tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "show", gone)
    with pytest.raises(BrokenPipeError):
        evaluate.main([*flags, "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"core.json", "core.csv", "bpb.json", "samples.json"}


def test_rows_of_another_tokenizer_are_refused(ran, flags, prepared_base, tmp_path):
    folder = prepared_base / "tokens" / json.loads((ran.run_dir / "config.json").read_text())["data_fingerprint"]
    other = tmp_path / "tokens"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["spec"]["tokenizer_sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate.main([*flags, "--eval", "bpb", "--tokens", str(other)])


@pytest.mark.mlflow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed database:ResourceWarning")
def test_results_reach_the_mlflow_run_of_the_checkpoint(ran, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    facts = {"run_name": "tiny", "params": {}, "tags": {}}
    shipper = mlflow_shipper.MLflowShipper(ran.run_dir, tracking_uri=uri, experiment="e", **facts, echo=print)
    shipper.start()
    shipper.finish("FINISHED", [], 60.0)
    flags = ["--path", str(ran.run_dir), "--core-metric-max-per-task", "6", "--eval", "core,bpb"]
    assert evaluate.main(flags) == 0
    client = mlflow_delivery.open_client(uri)
    run_id = shipper.run_id
    assert client.get_metric_history(run_id, "core/choosing")[-1].step == 4
    assert client.get_metric_history(run_id, "val/bpb")[-1].value == pytest.approx(last(ran, "val/bpb"), rel=1e-6)
    there = client.list_artifacts(run_id, "evaluations/step_00000004")
    assert {Path(artifact.path).name for artifact in there} == {"core.json", "core.csv", "bpb.json"}
    assert f"MLflow: logged to the run tiny ({run_id})" in capsys.readouterr().out
    evaluate.main([*flags, "--eval", "bpb", "--tracking-uri", "sqlite:////proc/nowhere/mlflow.db"])
    assert "warning:" in capsys.readouterr().out  # and no error
    assert read_journal(ran.run_dir / "metrics.jsonl") == ran.records  # the journal is the run's own


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try:\n    runpy.run_path('jobs/evaluate.py', run_name='__main__')\n"
        "except SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
