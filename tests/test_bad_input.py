"""What a tired person types: every mistake ends in one message that names it and says what to do, and leaves no mess."""

import importlib.util
import os
import re
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_corpus

from raychat import cli
from raychat.training.lease import Lease

ROOT = Path(__file__).resolve().parents[1]

# Flags as they are typed, what the message must name, and the remedy it must give.
FLAGS = [
    ("--dept 4", "Unrecognized options: --dept", "Perhaps you meant: --depth"),
    ("-depth 4", "Unrecognized options: -depth", "--help"),
    ("--learning-rate 0.1", "Unrecognized options: --learning-rate", "--help"),
    ("12", "Unrecognized options: 12", "--help"),
    ("--fp8 True", "Unrecognized options: True", "--help"),
    ("--depth", "Missing value for argument '--depth'", "--help"),
    ("--depth twelve", "parsing --depth: .*'twelve'", "--depth INT"),
    ("--depth 4.5", "parsing --depth: .*'4.5'", "--depth INT"),
    ("--num-iterations 1e3", "parsing --num-iterations: .*'1e3'", "--num-iterations INT"),
    ("--vocab-size 32k", "parsing --vocab-size: .*'32k'", "--vocab-size INT"),
    ("--matrix-lr 2e-2x", "parsing --matrix-lr", "--matrix-lr FLOAT"),
    ("--dtype fp16", "'fp16' for argument '--dtype'", "'float16'"),
    ("--device-type gpu", "'gpu' for argument '--device-type'", "'cuda'"),
    ("--compile yes", "'yes' for argument '--compile'", "'on'"),
    ("--packing bestfit", "'bestfit' for argument '--packing'", "'best-fit'"),
    ("--num-workers many", "parsing --num-workers", r"\{auto\}\|INT"),
    ("--save-every often", "parsing --save-every", r"\{auto\}\|INT"),
    ("--depth 0", "--depth must be above 0, got 0", "must be above 0"),
    ("--depth -12", "--depth must be above 0, got -12", "must be above 0"),
    ("--log-every 0", "--log-every must be above 0, got 0", "must be above 0"),
    ("--eval-every 0", "--eval-every .*got 0", "-1 to turn it off"),
    ("--save-every 0", "--save-every .*got 0", "-1 to turn it off"),
    ("--num-iterations 0", "--num-iterations .*got 0", "-1 to turn it off"),
    ("--matrix-lr -0.02", "--matrix-lr must be above 0, got -0.02", "must be above 0"),
    ("--matrix-lr nan", "--matrix-lr must be above 0, got nan", "must be above 0"),
    ("--target-flops inf", "--target-flops .*got inf", "-1 to turn it off"),
    ("--target-param-data-ratio 1e300", "--target-param-data-ratio .*got 1e\\+300", "at most 1e\\+06"),
    ("--weight-decay -0.1", "--weight-decay must be 0 or more, got -0.1", "0 or more"),
    ("--warmdown-ratio 65", "--warmdown-ratio .*got 65", "from 0 to 1"),
    ("--warmup-ratio 1.5", "--warmup-ratio .*got 1.5", "from 0 to 1"),
    ("--warmup-from 1", "--warmup-from .*got 1", "0.01 begins at a hundredth"),
    ("--adam-beta1 1", "--adam-beta1 .*got 1", "at least 0 and below 1"),
    ("--adam-beta2 95", "--adam-beta2 .*got 95", "at least 0 and below 1"),
    ("--short-window-ratio 0", "--short-window-ratio .*got 0", "above 0 and at most 1"),
    ("--window-pattern SLX", "--window-pattern 'SLX' has 'X'", "for example SSSL"),
    ("--window-pattern=", "--window-pattern '' has no letters", "for example SSSL"),
    ("--head-dim 33", "--head-dim must be even", "use 34"),
    ("--depth 1 --aspect-ratio 8 --head-dim 8", "--depth 1 x --aspect-ratio 8", "raise --aspect-ratio"),
    ("--depth 4 --num-kv-heads 3", "--num-kv-heads 3", "2 heads"),
    ("--vocab-size 100", "--vocab-size .*got 100", "at least 265"),
    ("--seed -1", "--seed .*got -1", "at least 0"),
    ("--seed 18446744073709551616", "--seed .*got 18446744073709551616", "below 2\\*\\*63"),
    ("--device-batch-size 48", "--device-batch-size 48 is impossible", "divide this batch: 1, 2, 4, 8, 16, 32, 64"),
    ("--total-batch-size 500000", "--total-batch-size 500,000 tokens", "Use 499,712 or 501,760"),
    ("--max-seq-len 1000", "sequences of 1,000 tokens \\(--max-seq-len\\)", "Use 1,048,000 or 1,049,000"),
    ("--eval-tokens 10", "--eval-tokens 10 is less", "one sequence of 2048 tokens"),
    ("--target-flops 1e9", "--target-flops pays for less than one step", "raise it, or lower --total-batch-size"),
    ("--target-param-data-ratio -1", "how long to train", "give --num-iterations, --target-flops or"),
    ("--warmup-steps 10 --warmup-ratio 0.1", "--warmup-steps 10 and --warmup-ratio 0.1", "give one of them"),
    ("--fresh --resume-from-step 100", "--fresh .*--resume-from-step", "give one of them"),
    ("--resume-from-step -2", "--resume-from-step .*got -2", "a step, or -1"),
    ("--preset dmeo", "no preset 'dmeo'", "did you mean demo"),
    ("--preset d4-cpu,a100", "no preset 'a100'", "did you mean a100_d10"),
    ("--preset demo.toml", "no preset 'demo.toml'", "did you mean demo"),
    ("--preset", "Missing value for argument '--preset'", "--help"),
    ("--budget-usd 10", "--budget-usd", "give --price-per-hour"),
    ("--price-per-hour -2", "--price-per-hour .*got -2", "-1 to turn it off"),
    ("--max-hours 0", "--max-hours .*got 0", "-1 to turn it off"),
    ("--num-workers 0", "--num-workers must be above 0, got 0", "must be above 0"),
    ("--num-workers 2 --min-workers 4", "--min-workers 4 is above --num-workers 2", "--num-workers"),
    ("--num-workers 999", "--num-workers 999 is more than the 512 sequences", "use at most 512"),
    ("--max-failures -1", "--max-failures .*got -1", "0 or more"),
    ("--keep-checkpoints 0", "--keep-checkpoints .*got 0", "must be above 0"),
    ("--num-data-shards 0", "--num-data-shards .*got 0", "-1 to turn it off"),
    ("--tok-max-chars 0", "--tok-max-chars .*got 0", "must be above 0"),
    ("--text-column=", "--text-column is empty", "for example text"),
    ("--model-tag ../d12", "--model-tag '../d12'", "for example d12-test"),
    ("--model-tag ..", "--model-tag '..'", "for example d12-test"),
    ("--run my/run", "--run 'my/run'", "for example d12-test"),
    ("--storage-path hdfs://host/runs", "--storage-path hdfs://", "begins with s3://"),
    ("--base-dir gs://bucket", "--base-dir 'gs://bucket'", "as --storage-path"),
    ("--max-preemptions -2", "--max-preemptions", "-1 for no limit"),
]

PRESETS = [
    ("depth = \n", "preset .*mine.toml' is not valid TOML", "line 1"),
    ("\xff\xfe", "preset .*mine.toml' is not valid TOML", "utf-8"),
    ("dpeth = 4\n", "preset .*mine.toml'.*no setting 'dpeth'", "did you mean depth"),
    ("depth = '4'\n", "preset .*mine.toml'.*depth = '4' has the wrong type", "its default is 20"),
    ("[model]\ndepth = 4\n", "preset .*mine.toml'.*no setting 'model'", "did you mean model_tag"),
    ("dtype = 'half'\n", "preset .*mine.toml'.*dtype = 'half'", "use one of 'auto'"),
    ("matrix_lr = -1.0\n", "preset .*mine.toml'.*--matrix-lr", "must be above 0"),
]

Refusal = namedtuple("Refusal", "message lines")


@pytest.fixture(scope="module")
def pretrain():
    """jobs/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "jobs" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refusal(pretrain, monkeypatch, capsys):
    """Runs the job with flags that cannot work; gives its message in one line, and the lines before it."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYCHAT_BASE_DIR", "RAYCHAT_STORAGE_PATH"):
        monkeypatch.delenv(name, raising=False)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.run_job(pretrain.main)
        out, err = capsys.readouterr()
        message = " ".join(re.sub(r"[│╭╰╮╯─]|(?m:^[\s-]+$)", " ", err).split())  # without the parser's box
        assert end.value.code == 2, message
        assert len(re.findall("(?m:^error: )|For full helptext", err)) == 1, err  # ours or the parser's
        assert "Traceback" not in err
        return Refusal(message, out)

    return run


@pytest.fixture
def refusal_of_run(refusal, tiny_flags, prepared_base, tmp_path, monkeypatch):
    """As `refusal`, of the smallest run whose data are prepared, with the flags given instead of its own.

    Its runs go to `tmp_path/runs`. Ray must not be asked for anything: a refusal comes before.
    """
    from raychat.data.prepare import make_in_process
    from raychat.on_ray.driver import LazyCluster

    def too_late(self):
        raise AssertionError("the cluster was asked for before the refusal")

    monkeypatch.setattr(LazyCluster, "connected", too_late)
    monkeypatch.setattr(LazyCluster, "make_shards", lambda self, tasks: make_in_process(tasks))

    def run(**changes):
        flags = tiny_flags | {"base_dir": prepared_base, "storage_path": tmp_path / "runs"} | changes
        return refusal(*as_arguments(flags))

    return run


def as_arguments(flags):
    """Settings as they are typed."""
    return [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in flags.items()
        if value is not False
    ]


def check(refused, named, remedy):
    assert re.search(named, refused.message), refused.message
    assert re.search(remedy, refused.message), refused.message


def assert_nothing_half(*folders):
    """No temporary or hidden file, no lease of a driver that is gone, no checkpoint, no shard without its sidecar."""
    for folder in folders:
        for path in folder.rglob("*"):
            assert not path.name.startswith("."), path
            assert ".tmp" not in path.name, path
            assert path.name != "lease.json", path
            assert path.suffix != ".arrow" or path.with_suffix(".json").exists(), path
            assert not path.name.startswith("step_"), path


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize(("flags", "named", "remedy"), FLAGS, ids=[case[0] for case in FLAGS])
def test_a_wrong_flag_is_refused(refusal, tmp_path, flags, named, remedy, dry_run):
    args = flags.split(" ")
    extra = ["--base-dir", tmp_path / "base"] if "--base-dir" not in args else []
    refused = refusal(*extra, *(["--dry-run"] if dry_run else []), *args)
    check(refused, named, remedy)
    assert refused.lines == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "named", "remedy"), PRESETS, ids=[case[0] for case in PRESETS])
def test_a_wrong_preset_file_is_refused(refusal, tmp_path, content, named, remedy):
    (tmp_path / "mine.toml").write_bytes(content.encode("latin-1"))
    check(refusal("--preset", tmp_path / "mine.toml", "--base-dir", tmp_path / "base", "--dry-run"), named, remedy)
    assert not (tmp_path / "base").exists()


def parquet(path, table):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), path)


def spoil(folder, name, content, documents=40):
    """A corpus of jsonl files in which one file has other content."""
    write_corpus(folder, documents=documents)
    (folder / name).write_bytes(content)


def truncated_parquet(folder):
    for name in ("a", "b"):
        parquet(folder / f"{name}.parquet", {"text": ["some text"] * 500})
    os.truncate(folder / "a.parquet", 300)


def other_column(folder):
    for name in ("a", "b"):
        parquet(folder / f"{name}.parquet", {"body": ["some text"] * 5, "id": range(5)})


def numbers(folder):
    for name in ("a", "b"):
        parquet(folder / f"{name}.parquet", {"text": range(5)})


def mixed(folder):
    write_corpus(folder)
    (folder / "more.txt").write_text("text")


def few_words(folder):
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("only a few words\n")


# How the corpus is made, other settings, what the message must name, and the remedy it must give.
CORPORA = {
    "missing": (lambda folder: None, {}, "there is no {corpus}", "Give as the corpus a directory"),
    "empty folder": (Path.mkdir, {}, "{corpus} holds no .parquet", "Give a directory"),
    "mixed kinds": (mixed, {}, r"{corpus} mixes .*\(jsonl, txt\)", r"Give a glob .*{corpus}/\*.jsonl"),
    "single file": (
        lambda folder: write_corpus(folder, files=1),
        {},
        "--corpus {corpus} is a single file",
        "--val-corpus",
    ),
    "empty file": (
        lambda folder: spoil(folder, "part-1.jsonl", b""),
        {},
        "{corpus}/part-1.jsonl is empty",
        "Remove it",
    ),
    "no documents": (
        lambda folder: [spoil(folder, "part-0.jsonl", b'{"text": ""}\n'), (folder / "part-1.jsonl").unlink()],
        {},
        "no text in {corpus}/part-0.jsonl",
        "Check --corpus and --text-column",
    ),
    "no such key": (write_corpus, {"text_column": "body"}, "part-0.jsonl, line 1: no key 'body'", "--text-column"),
    "no such column": (other_column, {}, "a.parquet has no column 'text'", "columns are body, id: .*--text-column"),
    "no text in column": (numbers, {}, "'text' of {corpus}/a.parquet holds int64", "--text-column"),
    "truncated parquet": (truncated_parquet, {}, "{corpus}/a.parquet is not a parquet file", "Copy it again"),
    "not UTF-8": (
        lambda folder: spoil(folder, "part-0.jsonl", b'{"text": "ok"}\n{"text": "\xff\xfe"}\n'),
        {},
        "{corpus}/part-0.jsonl, line 2, byte 11",
        "Convert the corpus to UTF-8",
    ),
    "not JSON": (
        lambda folder: spoil(folder, "part-0.jsonl", b'{"text": "ok"}\n{"text": "cut\n'),
        {},
        "{corpus}/part-0.jsonl, line 2: not a JSON object",
        "one whole object",
    ),
    "too small for the vocabulary": (
        lambda folder: write_corpus(folder, documents=3),
        {"vocab_size": 20_000},
        "--vocab-size=20000 cannot be reached",
        r"Use --vocab-size \d+ or less",
    ),
    "too small for a row": (
        few_words,
        {"vocab_size": 265},
        "split of corpus .* no row of 33 tokens",
        "--max-seq-len",
    ),
    "too few rows": (
        lambda folder: write_corpus(folder, documents=1),
        {"max_seq_len": 128, "total_batch_size": 1024, "eval_tokens": 1024},
        r"packs into \d rows, fewer than the 8 lanes",
        "use more text",
    ),
    "more files than there are": (
        write_corpus,
        {"num_data_shards": 9},
        "--num-data-shards=9 .* 3 files",
        "Use 3 or less",
    ),
    "one file of them": (write_corpus, {"num_data_shards": 1}, "--num-data-shards=1 leaves no file", "Use 2 or more"),
    "all of it validates": (
        write_corpus,
        {"val_corpus": "{corpus}"},
        "--val-corpus {corpus} takes every file",
        "Give other files",
    ),
    "missing validation": (
        write_corpus,
        {"val_corpus": "{corpus}-val"},
        "there is no {corpus}-val",
        "Give as the corpus",
    ),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_that_cannot_be_used_is_refused(refusal_of_run, tmp_path, case):
    make, changes, named, remedy = CORPORA[case]
    corpus, base = tmp_path / "corpus", tmp_path / "base"
    make(corpus)
    changes = {name: str(value).format(corpus=corpus) for name, value in changes.items()}
    refused = refusal_of_run(base_dir=base, corpus=corpus, **changes)
    check(
        refused, named.replace("{corpus}", re.escape(str(corpus))), remedy.replace("{corpus}", re.escape(str(corpus)))
    )
    assert_nothing_half(base)
    assert not (tmp_path / "runs").exists()


def test_a_corpus_of_a_misspelt_name_is_refused_with_the_names_there_are(refusal_of_run, tmp_path):
    check(refusal_of_run(corpus="embeded"), "there is no .*/embeded", "embedded or climbmix")


def tokenizer_of(base):
    """The one tokenizer of a base directory."""
    return next((base / "tokenizers").iterdir())


def test_a_tokenizer_of_another_vocabulary_is_refused(refusal_of_run, prepared_base):
    refused = refusal_of_run(tokenizer=tokenizer_of(prepared_base), vocab_size=400)
    check(refused, "has 300 tokens and --vocab-size is 400", "give --vocab-size 300, or another --tokenizer")


def test_a_tokenizer_folder_that_is_missing_is_refused(refusal_of_run, tmp_path):
    check(refusal_of_run(tokenizer=tmp_path / "absent"), f"no tokenizer in {tmp_path}/absent", "leave --tokenizer out")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken"])
def test_a_damaged_tokenizer_is_refused(refusal_of_run, prepared_base, tmp_path, name):
    copy = shutil.copytree(tokenizer_of(prepared_base), tmp_path / "damaged")
    os.truncate(copy / name, 50)
    check(refusal_of_run(tokenizer=copy), f"tokenizer in {copy} cannot be used", "Copy it again .* train it anew")


@pytest.mark.parametrize(("flag", "names"), [("base_dir", "--base-dir"), ("storage_path", "--storage-path")])
def test_a_folder_that_cannot_be_written_to_is_refused(refusal_of_run, tmp_path, flag, names):
    """A path through a regular file, which not even root can write to."""
    (tmp_path / "file").write_text("")
    refused = refusal_of_run(**{flag: tmp_path / "file" / "below"})
    check(refused, f"{tmp_path}/file/below.* cannot be written to", names)


def test_a_full_disk_is_refused_before_training(refusal_of_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check(refusal_of_run(), f"{tmp_path}/runs/d2 has 0.00 GB free", "free some space, or give a --storage-path")
    assert_nothing_half(tmp_path / "runs")


@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_token_shard_that_is_not_whole_is_refused(refusal_of_run, prepared_base, tmp_path, harm):
    base = shutil.copytree(prepared_base, tmp_path / "base")
    shard = next(base.rglob("train-000001.arrow"))
    if harm == "truncated":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    refused = refusal_of_run(base_dir=base)
    check(refused, f"Token shard {shard} (has 100 bytes|is missing)", f"delete {shard.parent}/manifest.json")


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_manifest_of_shards_is_refused(refusal_of_run, prepared_base, tmp_path, content):
    base = shutil.copytree(prepared_base, tmp_path / "base")
    manifest = next(base.rglob("manifest.json"))
    manifest.write_text(content)
    check(refusal_of_run(base_dir=base), f"{manifest} is damaged", "delete the folder")


@pytest.mark.parametrize("uri", ["ftp://host/runs", "./mlruns", "file:///tmp/mlruns", "sqlite://", "127.0.0.1:5000"])
@pytest.mark.parametrize("where", ["flag", "environment"])
def test_a_tracking_uri_that_mlflow_cannot_use_is_refused(refusal_of_run, monkeypatch, uri, where, tmp_path):
    if where == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        refused = refusal_of_run(run="tracked")
    else:
        refused = refusal_of_run(run="tracked", tracking_uri=uri)
    check(refused, f"tracking URI '{re.escape(uri)}' cannot be used", "sqlite:////absolute/path/mlflow.db")
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there_is_refused_before_anything_is_prepared(refusal_of_run, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = refusal_of_run(device_type="cuda", base_dir=tmp_path / "base")
    check(refused, "--device-type cuda: torch sees no CUDA device", "--device-type cpu")
    assert list(tmp_path.iterdir()) == []


def test_fp8_without_a_gpu_is_refused_before_anything_is_prepared(refusal_of_run, tmp_path):
    check(refusal_of_run(fp8=True, base_dir=tmp_path / "base"), "--fp8: fp8 needs a CUDA device", "Leave --fp8 out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 500])
def test_a_step_without_a_checkpoint_is_refused(refusal_of_run, tmp_path, step):
    refused = refusal_of_run(resume_from_step=step)
    check(refused, f"--resume-from-step {step}: {tmp_path}/runs/d2/checkpoints holds no checkpoint", "leave it out")
    assert_nothing_half(tmp_path / "runs")


def test_a_step_that_is_none_of_those_kept_is_refused_with_those(refusal_of_run, tmp_path):
    for step in (10, 20):
        (tmp_path / "runs" / "d2" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    check(refusal_of_run(resume_from_step=15), "--resume-from-step 15: .*checkpoints", "holds the steps 10, 20")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_driver_on_a_live_run_is_refused(refusal_of_run, tmp_path, fresh):
    run_dir = tmp_path / "runs" / "d2"
    live = Lease(run_dir)
    live.acquire()
    refused = refusal_of_run(fresh=fresh)
    check(refused, f"Another driver is training in {run_dir}: process {os.getpid()}", "another --model-tag")
    assert [path.name for path in run_dir.iterdir()] == ["lease.json"]
    live.release()
    assert list(run_dir.iterdir()) == []  # it was still its own


def test_a_journal_of_a_newer_format_is_refused(refusal_of_run, tmp_path):
    journal = tmp_path / "runs" / "d2" / "metrics.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"event": "journal", "version": 99, "time": 0}\n')
    check(refusal_of_run(), f"{journal} has journal format 99", "use the raychat that wrote it")
    assert_nothing_half(tmp_path / "runs")


@pytest.mark.parametrize(
    ("address", "named", "remedy"),
    [
        ("127.0.0.1:1", "no Ray cluster at '127.0.0.1:1'", "ray start --head"),
        ("ray://127.0.0.1:1", "no Ray cluster at 'ray://127.0.0.1:1'", "leave both out"),
        ("127.0.0.1", "--address '127.0.0.1' is no address", "give host:port"),
        ("lokal", "--address 'lokal' is no address", "or auto"),
        ("127.0.0.1:99999", "no Ray cluster at '127.0.0.1:99999'", "correct --address"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(refusal, tiny_flags, tmp_path, address, named, remedy):
    """Ray itself would try for minutes. With data to be made, the cluster is asked for before the run begins."""
    flags = tiny_flags | {"base_dir": tmp_path / "base", "address": address}
    start = time.monotonic()
    check(refusal(*as_arguments(flags)), named, remedy)
    assert time.monotonic() - start < 20
    assert_nothing_half(tmp_path / "base")
    assert not (tmp_path / "base" / "runs").exists()
