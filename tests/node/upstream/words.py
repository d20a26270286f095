"""A tokenizer of a few dozen words, written by hand: byte-level, each byte a token, some pairs merged."""

from __future__ import annotations

import json
from functools import cache
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS: Final = 0
EOS: Final = 1
_CONTROL: Final = ("<s>", "</s>", "<|user|>")


@cache
def tokenizer_json() -> bytes:
    """tokenizer.json with three control tokens, all bytes, and merges of common English pairs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "f"), ("Ġ", "the")]
    tokens = [*_CONTROL, *letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(_CONTROL))
    return made.to_str().encode()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json().decode())


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def decode(ids: list[int]) -> str:
    return str(tokenizer().decode(ids, skip_special_tokens=False))


def _words() -> tuple[str, ...]:
    """What the fake model can write: control tokens, printable ASCII, merges. Bytes above it would need partners."""
    vocab = json.loads(tokenizer_json())["model"]["vocab"]
    shown = []
    for text, number in sorted(vocab.items(), key=lambda item: item[1]):
        plain = text if number < len(_CONTROL) else str(tokenizer().decode([number]))
        shown.append(plain if plain.isascii() and plain else "?")
    return tuple(shown)


WORDS: Final = _words()
"""Token id -> its text; "?" for a byte that is no ASCII, which the fake model never writes on its own."""
