"""The forecast of the data: exact where token shards are there, else a labelled estimate, and never from the text."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from conftest import write_corpus

from raychat import cli
from raychat.config import Config
from raychat.data import climbmix
from raychat.data.prepare import make_in_process, open_corpus, prepare
from raychat.errors import ConfigError
from raychat.planning import format_plan, make_plan, recipe
from raychat.planning.data import forecast_data
from raychat.planning.files import local_files, text_chars
from raychat.planning.ranges import Range
from raychat.planning.requests import begun, request_of
from raychat.planning.text import assumed_share, auto_packing, best_fit_share, chars_per_token, climbmix_files

SHARED = Path(__file__).resolve().parents[2] / "shared"


def silent(line):
    """Take a line and say nothing."""


def prepared(config):
    return prepare(config, with_gpus=False, maker=make_in_process, echo=silent)


def forecast(config, **options):
    return forecast_data(config, recipe(config), **options)


@pytest.fixture
def a100_d10(tmp_path):
    """The documents' run: 1,500 steps of 524,288 tokens on 18 files of climbmix."""
    flags = {"base_dir": str(tmp_path)}
    return lambda **changes: Config.from_flat(flags | changes, base=cli.load_presets("a100_d10"))


@pytest.fixture
def own_corpus(tmp_path):
    """A corpus that the test may change."""
    return write_corpus(tmp_path / "own")


def test_the_documents_run_needs_12_to_16_files_before_packing_and_more_after_it(a100_d10):
    data = forecast(a100_d10())
    assert data.tokens_needed == 786_432_000
    assert (data.shards_by["unpacked"].low, data.shards_by["unpacked"].high) == (12, 16)
    assert (data.shards_by["best-fit"].low, data.shards_by["best-fit"].high) == (13, 19)
    assert data.shards_by["keep"] == data.shards_by["unpacked"]
    assert not data.exact
    assert data.packing_reason.startswith("best-fit may deliver 731M to 1,080M tokens; decided by the first documents")
    assert data.source == "estimate: 17 training files of 250M characters, 3.5 to 5.0 characters a token"


def test_the_documents_17_files_are_enough_only_where_packing_loses_nothing(a100_d10):
    """ "18 shards (17 train) guarantees single-epoch even at 5 chars/token" leaves out what best-fit crops."""
    data = forecast(a100_d10())
    assert data.shards_there == 17
    assert data.tokens_by["best-fit"].low == pytest.approx(17 * 50e6 * 0.86, rel=1e-3)
    assert data.tokens_by["best-fit"].high == pytest.approx(17 * 250e6 / 3.5 * 0.89, rel=1e-3)
    assert data.tokens_by["best-fit"].low < data.tokens_needed < data.tokens_by["keep"].low
    best_fit = forecast(a100_d10(packing="best-fit"))
    assert best_fit.epochs.includes(1.0)
    assert forecast(a100_d10(packing="keep")).epochs.high < 1.0


def test_the_number_of_shards_counts_the_one_that_validates(a100_d10):
    assert forecast(a100_d10(num_data_shards=2)).shards_there == 1
    enough = climbmix_files(786_432_000)
    assert climbmix.shards_needed is climbmix_files
    assert forecast(a100_d10(num_data_shards=-1)).shards_there == enough - 1 == 19


@pytest.mark.parametrize("packing", ["best-fit", "keep"])
def test_what_is_prepared_is_forecast_to_the_token(tiny_config, packing):
    config = tiny_config(packing=packing)
    before = forecast(config)
    assert not before.exact
    assert not before.tokens_ready
    manifest = prepared(config).manifest
    data = forecast(config)
    assert data.exact
    assert data.tokens_ready
    assert data.tokenizer_ready
    assert data.fingerprint == manifest.fingerprint
    assert data.tokens_there == Range.exactly(manifest.rows("train") * 32)
    assert data.epochs.mid == recipe(config).tokens / data.tokens_there.mid
    tokens_in = sum(shard.tokens_in for shard in manifest.split("train"))
    assert data.kept[packing] == Range.exactly(manifest.rows("train") * 33 / tokens_in)
    assert data.shards_there == 2


def test_an_estimate_from_other_rows_of_the_same_text_includes_what_is_counted_then(tiny_config):
    config, longer = tiny_config(), tiny_config(max_seq_len=64)
    prepared(config)
    before = forecast(longer)
    assert not before.exact
    assert before.tokenizer_ready
    prepared(longer)
    assert before.tokens_there.includes(forecast(longer).tokens_there.mid)


@pytest.mark.parametrize("steps", [1, 4, 8, 16, 64, 400])
def test_the_plan_expects_the_packing_that_the_run_will_have(tiny_config, tmp_path, steps):
    base = {"packing": "auto", "base_dir": str(tmp_path / "shared-base")}
    prepared(tiny_config(**base, num_iterations=4))
    config = tiny_config(**base, num_iterations=steps)
    data = forecast(config)
    assert data.packing == prepared(config).manifest.spec.packing
    assert "tokens by the first 80 documents" in data.packing_reason


def test_a_run_that_goes_on_is_expected_to_keep_its_packing(tiny_config):
    config = tiny_config(packing="auto")
    data = prepared(config)
    (config.run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    content = {"config": config.public(), "data_fingerprint": data.manifest.fingerprint}
    (config.run_dir / "config.json").write_text(json.dumps(content))
    longer = tiny_config(packing="auto", num_iterations=400)
    assert (forecast(longer).packing, forecast(longer).packing_reason) == ("best-fit", "the run began with it")
    for record in data.manifest.folder.glob("request-*.json"):  # as an earlier version left it
        record.unlink()
    old = forecast(longer)
    assert (old.fingerprint, old.exact) == (data.manifest.fingerprint, True)
    assert old.source.endswith(", files not compared")


def test_a_corpus_that_changed_is_no_longer_exact(tiny_config, own_corpus):
    config = tiny_config(corpus=str(own_corpus))
    prepared(config)
    was = forecast(config).tokens_there.mid
    part = own_corpus / "part-0.jsonl"
    part.write_text(part.read_text() * 2)
    data = forecast(config)
    assert not data.exact
    assert data.fingerprint is None
    assert "made before the corpus changed" in data.source
    prepared(config)
    assert data.tokens_there.includes(forecast(config).tokens_there.mid)
    assert forecast(config).tokens_there.mid > 1.3 * was


@pytest.mark.parametrize("change", ["another file", "one file less", "touched"])
def test_whatever_happens_to_the_files_is_noticed(tiny_config, own_corpus, change):
    write_corpus(own_corpus / "more", files=4)
    config = tiny_config(corpus=str(own_corpus))
    prepared(config)
    assert forecast(config).exact
    if change == "another file":
        (own_corpus / "more" / "part-3.jsonl").rename(own_corpus / "part-3.jsonl")
    elif change == "one file less":
        (own_corpus / "part-0.jsonl").unlink()
    else:
        (own_corpus / "part-0.jsonl").touch()
    assert not forecast(config).exact


@pytest.mark.parametrize(
    "change", [{"vocab_size": 310}, {"tok_doc_cap": 100}, {"num_data_shards": 2}, {"text_column": "other"}]
)
def test_the_shards_of_other_settings_are_not_taken_for_these(tiny_config, change):
    prepared(tiny_config())
    data = forecast(tiny_config(**change))
    assert not data.exact
    assert "token shards" not in data.source


def test_shards_that_were_deleted_do_not_count(tiny_config):
    config = tiny_config()
    (prepared(config).manifest.folder / "manifest.json").unlink()
    assert not forecast(config).tokens_ready


def test_empty_files_are_no_number_of_epochs(tiny_config, own_corpus):
    """The run refuses them, and says what to do; the plan must not end in a division by zero."""
    for part in own_corpus.iterdir():
        part.write_text("")
    config = tiny_config(corpus=str(own_corpus))
    data = forecast(config)
    assert data.epochs is data.shards_needed is None
    assert "epochs" not in format_plan(make_plan(config))


@pytest.mark.parametrize(
    ("corpus", "number", "message"),
    [
        ("embedded", 1, "leaves no file of --corpus embedded to train on, since the last one validates. Use 2 or more"),
        ("climbmix", 1, "Use 2 or more"),
        ("climbmix", 6544, "is more than the 6,543 files of climbmix"),
    ],
)
def test_a_number_of_files_that_the_run_would_refuse_is_refused(tiny_config, corpus, number, message):
    with pytest.raises(ConfigError, match=message):
        forecast(tiny_config(corpus=corpus, num_data_shards=number))


def test_a_damaged_record_is_passed_over(tiny_config):
    config = tiny_config()
    [record] = prepared(config).manifest.folder.glob("request-*.json")
    for text in ("", "[]", "{}", '{"format": 1, "request": {}, "train": 3, "val": {}}'):
        record.write_text(text)
        assert not forecast(config).exact


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/texts", "gs://none/*.parquet"])
def test_files_elsewhere_are_unknown_and_not_asked_for(tiny_config, uri):
    data = forecast(tiny_config(corpus=uri, packing="auto"))
    assert data.tokens_there is data.epochs is data.shards_needed is data.shards_there is data.corpus_chars is None
    assert data.kept == {"best-fit": None, "keep": None}
    assert data.source.startswith("unknown: ")
    assert data.as_dict()["tokens_there"] is None


def test_a_record_holds_no_credentials(tiny_config):
    config = tiny_config(corpus="s3://key:hidden@bucket/texts?secret_key=hidden")
    assert "hidden" not in json.dumps(request_of(config, 1, None, with_gpus=False))


def test_the_embedded_corpus_is_estimated_before_it_is_made(tiny_config):
    data = forecast(tiny_config(corpus=""), with_gpus=False)
    assert (data.corpus, data.shards_there) == ("embedded", 8)
    assert data.tokens_there.low < data.tokens_there.mid < data.tokens_there.high
    assert forecast(tiny_config(corpus=""), with_gpus=True).corpus == "climbmix"


@pytest.mark.parametrize(
    ("corpus", "changes"),
    [
        ("", {}),
        ("", {"num_data_shards": 2}),
        ("/part-[01]*", {}),
        ("/part-*.jsonl", {"num_data_shards": 3}),
        ("", {"val_corpus": "part-0.jsonl"}),
        ("/part-0.jsonl", {"val_corpus": "part-1.jsonl"}),
        ("", {"val_corpus": "part-0.jsonl", "num_data_shards": 2}),
    ],
)
def test_a_listing_finds_the_files_that_the_run_will_open(tiny_config, own_corpus, corpus, changes):
    for other in ("notes.md", ".part-9.jsonl", "part-5.jsonl.part"):
        (own_corpus / other).write_text("none of the corpus")
    changes = changes | ({"val_corpus": str(own_corpus / changes["val_corpus"])} if "val_corpus" in changes else {})
    config = tiny_config(corpus=f"{own_corpus}{corpus}", **changes)
    opened = open_corpus(config, with_gpus=False, echo=silent)
    listed = local_files(config.data.corpus, config.data.val_corpus, config.data.num_data_shards, config.base_dir)
    assert [(source.name, source.size) for source in opened.train] == [mark[:2] for mark in listed.train]
    assert [(source.name, source.size) for source in opened.val] == [mark[:2] for mark in listed.val]


def test_sizes_of_files_say_how_much_text_there_is(own_corpus):
    names = sorted(own_corpus.iterdir())
    chars = sum(len(json.loads(line)["text"]) for name in names for line in name.read_text().splitlines())
    assert text_chars((name.name, name.stat().st_size, 0) for name in names).includes(chars)
    corpus = SHARED / "data" / "corpus"
    if corpus.exists():  # 38,455,170 bytes of text by its readme
        sizes = [(path.name, path.stat().st_size, 0) for path in corpus.glob("*.parquet")]
        assert text_chars(sizes).includes(38_455_170)


def test_what_is_assumed_of_text_includes_what_was_measured():
    """English books, news and proposals of 5,613 characters, tokenized and packed with four vocabularies."""
    measured = {512: (2.03, 0.605), 2048: (3.04, 0.764), 8192: (3.90, 0.832), 32768: (4.52, 0.879)}
    for vocab_size, (ratio, kept_at_2048) in measured.items():
        assert chars_per_token(vocab_size).includes(ratio)
        assert best_fit_share(2048, Range.exactly(5613 / ratio)).includes(kept_at_2048)
    assert chars_per_token(32768) == Range(3.5, 4.5, 5.0)
    assert assumed_share("climbmix", 2048, chars_per_token(32768)) == Range(0.86, 0.87, 0.89)


def test_best_fit_keeps_more_of_a_longer_context_and_of_shorter_documents():
    shares = [best_fit_share(T, Range(600, 800, 1000)) for T in (16, 64, 256, 1024, 4096, 2**20)]
    for part in ("low", "mid", "high"):
        assert sorted(values := [getattr(share, part) for share in shares]) == values
        assert 0 < values[0] < values[-1] <= 1


def test_automatic_packing_wants_a_margin():
    assert auto_packing(1000, 950, 0.05) == "best-fit"
    assert auto_packing(1000, 951, 0.05) == "keep"


def test_dozens_of_manifests_take_no_time(tiny_config):
    config = tiny_config()
    folder = prepared(config).manifest.folder
    [record] = folder.glob("request-*.json")
    for number in range(60):
        other = folder.with_name(f"{number:016d}")
        other.mkdir()
        (other / "manifest.json").write_text("{}")
        (other / record.name).write_text(record.read_text().replace(folder.name, other.name))
    before = time.process_time()
    assert forecast(config).exact
    assert time.process_time() - before < 0.1


def test_the_plain_values_are_json(tiny_config):
    config = tiny_config()
    prepared(config)
    assert begun(config) is None
    plain = json.loads(json.dumps(forecast(config).as_dict()))
    assert plain["tokens_there"] == forecast(config).tokens_there.as_list()
    assert {field.name for field in dataclasses.fields(forecast(config))} <= plain.keys()
