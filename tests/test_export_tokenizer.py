"""Tokenizers of other programs: written so that they give the same ids, read without running anything."""

import json
import pickle
import random
import sysconfig
from pathlib import Path
from unittest.mock import patch

import pytest
import tiktoken
import tokenizers

from raychat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer
from raychat.data.unpickle import unpickled
from raychat.errors import DataError
from raychat.export.lineage import write_tokenizer
from raychat.export.tokenizer_json import byte_letters, tokenizer_json

SHARED = Path(__file__).resolve().parents[2] / "shared"
MEGABYTES = 10


@pytest.fixture(scope="module")
def code() -> list[str]:
    """Source files of the standard library, 6 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-d]*/*.py")
    )
    texts, size = [], 0
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > 6e6:
            break
    return texts


@pytest.fixture(scope="module")
def tokenizer(code) -> Tokenizer:
    """Of 4,096 tokens, trained on a part of the code."""
    return train_tokenizer(code[::8], vocab_size=4096, max_chars=300_000, echo=lambda line: None)


@pytest.fixture(scope="module")
def fast(tokenizer) -> tokenizers.Tokenizer:
    """The same in Hugging Face's form."""
    made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    made.encode_special_tokens = True
    return made


def scrambled(rng: random.Random, length: int) -> str:
    """Text of the kinds that split patterns treat apart: spaces, digits of several scripts, contractions, anything."""
    kinds = (
        lambda: chr(rng.randrange(32, 127)),
        lambda: rng.choice(" \t\n\r\u00a0\u2003\u3000\x85"),
        lambda: rng.choice("0123456789\u00b2\u00bd\u0663\u096a"),
        lambda: rng.choice(("'s", "'LL", "'\u017f", "aa", "ab", "--", "==", "er", "  ")),
        lambda: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
    )
    return "".join(rng.choice(kinds)() for _ in range(length))


def test_ten_megabytes_of_prose_code_and_noise_have_the_same_ids(tokenizer, fast, code):
    """Equal in every document: digits, white space and merges alike."""
    rng = random.Random(0)
    noise = [scrambled(rng, rng.randrange(1, 1500)) for _ in range(600)]
    runs = ["a" * n + " " * n + "=" * n + "\n" * n for n in range(1, 150)]
    letters = ["".join(rng.choices("esrt", k=rng.randrange(1, 60))) for _ in range(3000)]
    texts = code + noise + runs + letters + prose(MEGABYTES - 6.5)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if (SHARED / "data" / "corpus").exists():
        assert size > MEGABYTES * 1e6
    theirs = fast.encode_batch(texts, add_special_tokens=False)
    different = [text for text, their in zip(texts, theirs, strict=True) if their.ids != tokenizer.encode(text)]
    assert different == []


def prose(megabytes: float) -> list[str]:
    """English text from the corpus, where it is."""
    import pyarrow.parquet as pq

    texts, size = [], 0
    for file in sorted((SHARED / "data" / "corpus").glob("*.parquet")):
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist():
            texts.append(text)
            size += len(text)
            if size > megabytes * 1e6:
                return texts
    return texts


def test_bos_comes_first_unless_special_tokens_are_left_out(tokenizer, fast):
    assert fast.encode("some words").ids == [tokenizer.bos_id, *tokenizer.encode("some words")]
    assert [fast.token_to_id(name) for name in SPECIAL_TOKENS] == list(tokenizer.special_tokens.values())


def test_ids_decode_to_the_same_text(tokenizer, fast):
    for text in ("naïve café — 1234 日本語 🚀\n\n\tdef f(x):", " leading", "trailing "):
        assert fast.decode(tokenizer.encode(text)) == text == tokenizer.decode(tokenizer.encode(text))


def test_bytes_have_letters_of_their_own():
    assert sorted(byte_letters()) == list(range(256))
    assert len(set(byte_letters().values())) == 256


class TestPickles:
    def test_pickle_of_the_lineage_is_loaded_by_tiktoken_and_by_raychat(self, tokenizer, tmp_path):
        write_tokenizer(tmp_path / "tokenizer", tokenizer)
        content = (tmp_path / "tokenizer" / "tokenizer.pkl").read_bytes()
        theirs = pickle.loads(content)
        assert isinstance(theirs, tiktoken.Encoding)
        assert theirs.encode_ordinary("some words, 1234") == tokenizer.encode("some words, 1234")
        assert theirs.encode_single_token("<|bos|>") == tokenizer.bos_id
        assert unpickled(content, "it").sha256 == tokenizer.sha256

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol_is_read_or_refused_and_none_is_run(self, tokenizer, protocol):
        """Before 3, bytes and objects are made by functions that are not on the list."""
        content = pickle.dumps(encoding(tokenizer), protocol)
        if protocol < 3:
            with pytest.raises(DataError, match=r"it asks for (copy_reg|_codecs)\."):
                unpickled(content, "it")
        else:
            assert unpickled(content, "it").sha256 == tokenizer.sha256

    @pytest.mark.parametrize("place", ["alone", "within"])
    def test_pickle_that_would_run_a_program_is_refused_and_not_run(self, tokenizer, tmp_path, place):
        bad = Program(tmp_path / "ran")
        if place == "within":
            good = encoding(tokenizer)
            good._special_tokens = {"<|bos|>": bad}
            bad = good
        with pytest.raises(
            DataError, match=r"it asks for .*\. It must be a pickled tiktoken Encoding and nothing else"
        ):
            unpickled(pickle.dumps(bad), "it")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"special_tokens": {}}, "has no <|bos|>"),
            ({"special_tokens": {"<|bos|>": 999}}, "ids are not 0 to"),
            ({"special_tokens": {"<|bos|>": True}}, "ids are not 0 to"),
            ({"special_tokens": {b"<|bos|>": 256}}, "its special tokens no text"),
            ({"mergeable_ranks": {"a": 0}}, "tokens are not bytes"),
            ({"mergeable_ranks": {b"a": 0}, "special_tokens": {"<|bos|>": 1}}, "lacks some of the 256 bytes"),
            ({"pat_str": None}, "no encoding with its own vocabulary"),
            ({"pat_str": "((("}, "is not used as a tokenizer"),
        ],
    )
    def test_what_is_no_whole_vocabulary_is_refused(self, change, problem):
        parts = {
            "name": "it",
            "pat_str": SPLIT_PATTERN,
            "mergeable_ranks": {bytes([byte]): byte for byte in range(256)},
            "special_tokens": {"<|bos|>": 256},
        }
        assert unpickled(pickled(parts), "it").vocab_size == 257
        with pytest.raises(DataError, match=problem):
            unpickled(pickled(parts | change), "it")

    @pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps(7), pickle.dumps({"name": "x"})])
    def test_other_files_are_refused(self, content):
        with pytest.raises(DataError, match="is not used as a tokenizer"):
            unpickled(content, "it")

    def test_encoding_by_its_name_is_refused(self):
        """tiktoken would fetch it from the network."""
        with pytest.raises(DataError, match="no encoding with its own vocabulary"):
            unpickled(pickled("gpt2"), "it")


def pickled(state) -> bytes:
    """A pickle of tiktoken's Encoding with any state."""
    with patch.object(tiktoken.Encoding, "__getstate__", lambda self: state):
        return pickle.dumps(tiktoken.Encoding.__new__(tiktoken.Encoding))


class Program:
    """Asks, when it is unpickled, for a file to be made."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name="it",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.ranks)},
        special_tokens=tokenizer.special_tokens,
    )
