"""The tokenizer: round trips, agreement with the trainer's own encoder, and what happens to damaged files."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import rustbpe

from raychat.data import tokenizer as module
from raychat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer
from raychat.errors import ConfigError, DataError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
DOCUMENTS = [(STDLIB / f"{name}.py").read_text() for name in ("argparse", "datetime", "heapq", "textwrap", "typing")]
VOCAB_SIZE = 1000
STRANGE = [
    "",
    " ",
    "It's 2024, don't you'll: 3.14159!\r\n\r\n\tdef f(x):\n\t    return x**2  \n",
    "Grüße aus 東京 — naïve café, Ελλάδα, привет, שלום, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, 👩‍👩‍👧‍👦\u200d\u0301\x00\x7f\ufeff",
    "a" * 3000 + " " * 3000 + "\n" * 50,
    "".join(chr(code) for code in range(1, 0x3000) if not 0xD800 <= code < 0xE000),
]


def silent(line):
    """Take a progress line and say nothing."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=VOCAB_SIZE, echo=silent)


@pytest.mark.parametrize("text", [*STRANGE, *DOCUMENTS], ids=range(len(STRANGE) + len(DOCUMENTS)))
def test_decoding_undoes_encoding_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.encode_numpy(text).tolist() == ids


def test_tiktoken_encodes_as_the_trainer_does(tokenizer):
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(d[:10_000] for d in DOCUMENTS), VOCAB_SIZE - 9, pattern=SPLIT_PATTERN)
    for text in [*DOCUMENTS, STRANGE[2], STRANGE[3]]:
        assert trained.encode(text) == tokenizer.encode(text)


def test_training_twice_in_two_processes_gives_the_same_tokenizer(tokenizer):
    code = (
        "import tests.test_tokenizer as t;"
        "print(t.train_tokenizer(t.DOCUMENTS, vocab_size=t.VOCAB_SIZE, echo=t.silent).sha256)"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer.sha256


def test_special_tokens_follow_the_merges_in_their_order(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tokenizer.special_tokens.values()) == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert tokenizer.bos_id == VOCAB_SIZE - 9
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.shape == (VOCAB_SIZE,)
    assert np.flatnonzero(tokenizer.token_bytes == 0).tolist() == list(tokenizer.special_tokens.values())
    assert tokenizer.decode([tokenizer.bos_id]) == "<|bos|>"


def test_names_of_special_tokens_in_text_are_plain_text(tokenizer):
    text = "a <|bos|> b" + "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


def test_numbers_are_split_into_at_most_two_digits(tokenizer):
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("20241231")]
    assert max(map(len, tokens)) <= 2


def test_a_cut_character_decodes_to_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("𝔘")[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_run_of_white_space_that_overflows_the_pattern_still_round_trips(tokenizer):
    """tiktoken gives up on it ("Max stack size exceeded for backtracking") unless it is cut."""
    text = " " * 1_200_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_arrays_are_16_bits_wide_while_ids_fit(tokenizer):
    assert tokenizer.encode_numpy("text").dtype == np.uint16
    ranks = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    wide = Tokenizer(ranks, SPLIT_PATTERN, {"<|bos|>": len(ranks)})
    assert wide.encode_numpy("text").dtype == np.uint32


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "made" / "here")
    loaded = Tokenizer.load(tmp_path / "made" / "here")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.special_tokens == tokenizer.special_tokens
    assert np.array_equal(loaded.token_bytes, tokenizer.token_bytes)
    assert loaded.encode(STRANGE[3]) == tokenizer.encode(STRANGE[3])
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"], "no temporary files are left"


def test_saving_again_is_allowed_and_saving_another_is_not(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    tokenizer.save(tmp_path / "t")
    other = train_tokenizer(DOCUMENTS, vocab_size=500, echo=silent)
    with pytest.raises(DataError, match="different tokenizer"):
        other.save(tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").sha256 == tokenizer.sha256


def test_a_directory_that_holds_something_else_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="no tokenizer"):
            tokenizer.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_savers_at_once_leave_one_whole_tokenizer(tokenizer, tmp_path, monkeypatch):
    def overtaken(staging, directory):
        monkeypatch.undo()
        tokenizer.save(directory)
        return staging.rename(directory)

    monkeypatch.setattr(Path, "replace", overtaken)
    tokenizer.save(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert Tokenizer.load(tmp_path / "t").sha256 == tokenizer.sha256


def test_a_failed_save_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "META_FILE", "no/such/folder.json")
    with pytest.raises(FileNotFoundError):
        tokenizer.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("tokenizer.json", None, "no tokenizer in .*tokenizer.json is missing"),
        ("tokenizer.tiktoken", None, "no tokenizer in .*tokenizer.tiktoken is missing"),
        ("tokenizer.json", lambda b: b[: len(b) // 2], "cannot be read"),
        ("tokenizer.json", lambda b: b"[]", "does not say format"),
        ("tokenizer.json", lambda b: b.replace(b"tokenizer-1", b"tokenizer-9"), "does not say format"),
        ("tokenizer.json", lambda b: b.replace(b'"pattern"', b'"patter"'), "pattern"),
        ("tokenizer.json", lambda b: b.replace(b"{1,2}", b"{1,3}"), "digest"),
        ("tokenizer.json", lambda b: b.replace(b'"vocab_size": 1000', b'"vocab_size": 999'), "1000 tokens"),
        ("tokenizer.tiktoken", lambda b: b[: len(b) // 2], "line|digest"),
        ("tokenizer.tiktoken", lambda b: b.rsplit(b"\n", 2)[0] + b"\n", "digest|holds"),
        ("tokenizer.tiktoken", lambda b: b"", "256 bytes"),
        ("tokenizer.tiktoken", lambda b: b.replace(b" 300\n", b" 301\n"), "line 301 .* rank 300"),
        ("tokenizer.tiktoken", lambda b: b"?" + b, "line 1 "),
    ],
)
def test_damaged_files_are_refused_with_a_reason(tokenizer, tmp_path, file, damage, message):
    tokenizer.save(tmp_path / "t")
    path = tmp_path / "t" / file
    if damage is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(damage(before))
        assert path.read_bytes() != before
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "t")


def test_the_files_are_text_and_name_their_format(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    meta = json.loads((tmp_path / "t/tokenizer.json").read_text())
    assert set(meta) == {"format", "pattern", "special_tokens", "vocab_size", "sha256"}
    assert (tmp_path / "t/tokenizer.tiktoken").read_text(encoding="ascii").count("\n") == VOCAB_SIZE - 9


def test_a_corpus_too_small_for_the_vocabulary_names_one_that_works():
    with pytest.raises(DataError, match=r"Use --vocab-size (\d+)") as caught:
        train_tokenizer(["hello hello hello world"], echo=silent)
    works = int(str(caught.value).split("Use --vocab-size ")[1].split()[0])
    assert train_tokenizer(["hello hello hello world"], vocab_size=works, echo=silent).vocab_size == works


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text_at_all_is_refused(documents):
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(documents, vocab_size=300, echo=silent)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 265"):
        train_tokenizer(["text"], vocab_size=264, echo=silent)
    assert train_tokenizer(["text"], vocab_size=265, echo=silent).encode("A") == [65]


def test_caps_limit_what_training_sees():
    text = "".join(DOCUMENTS)
    capped = train_tokenizer([text[:3000], text[3000:]], vocab_size=400, max_chars=4000, doc_cap=2000, echo=silent)
    alone = train_tokenizer([text[:2000], text[3000:5000]], vocab_size=400, echo=silent)
    assert capped.sha256 == alone.sha256


def test_documents_are_read_only_as_far_as_the_cap():
    read = []
    source = (read.append(i) or "some words here " * 100 for i in range(1000))
    train_tokenizer(source, vocab_size=270, max_chars=5000, echo=silent)
    assert len(read) == 4


def test_an_error_of_the_corpus_surfaces_unchanged():
    def broken():
        yield "some text"
        raise DataError("line 3 is broken")

    with pytest.raises(DataError, match="line 3 is broken"):
        train_tokenizer(broken(), vocab_size=270, echo=silent)


def test_progress_counts_the_characters_seen():
    lines = []
    train_tokenizer(["ab " * 1000], vocab_size=266, echo=lines.append)
    assert "3,000 characters" in lines[-1]
