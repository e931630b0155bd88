"""A tokenizer as Hugging Face's `tokenizer.json`: the same ids for every text.

tiktoken merges the neighbours whose *union* has the lowest rank, whichever two pieces they are; `tokenizers` merges the
listed pair that comes first. So every way to cut a token into two tokens is listed, in the order of the token's rank. A
piece of text that is a token as a whole is taken whole by both (`ignore_merges`).
"""

from typing import Any

from raychat.data.tokenizer import Tokenizer

# Bytes that stand for themselves in tokenizer.json; the others get letters from 256 on. The table is GPT-2's.
PLAIN = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of tokenizer.json. Encoding puts BOS first, unless it is told to add no special tokens."""
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for rank, token in enumerate(tokenizer.ranks)}
    bos = "<|bos|>"
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, whole],
            "pair": [start, whole, other],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [["".join(letters[byte] for byte in part) for part in pair] for pair in _merges(tokenizer.ranks)],
        },
    }


def _added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The special tokens in the order of their ids."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": name, **plain, "special": True}
        for name, number in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in tokenizer.json."""
    rest = (byte for byte in range(256) if byte not in PLAIN)
    return {byte: chr(byte) for byte in PLAIN} | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def _merges(ranks: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order of the rank of what they make."""
    known = set(ranks)
    return [
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
