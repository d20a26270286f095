"""A model's tokenizer, loaded so that no text from outside can ever become one of its control tokens.

A Hugging Face tokenizer looks for its added tokens by their text, wherever that text came from. Here every control
token is renamed to an unguessable name before the tokenizer is built; ids stay as they are. Whoever knows the
name (the chat template's own output, see text.py) can place the token, and a prompt that merely contains
`<|im_end|>` is read as the ten characters it is. Switching special tokens off for the user's parts and encoding part by
part would do the same for `special` tokens only, and would break the merges across part borders that the model
was trained with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from protocol.errors import TallyError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a tokenizer with byte fallback names its 256 byte tokens. They spell text, so they are never control tokens."""


class CardUnusable(TallyError):
    """The model card's tokenizer or template cannot be used; nothing was sent or paid."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What text.py needs of a tokenizer.

    `encoder`: knows the control tokens by `secret_names` only. `decoder`: the tokenizer as published.
    `secret_names`: control token's text -> its name in `encoder`. `silent_ids`: ids that are never shown as text.
    `byte_tokens`: id -> byte, for tokenizers that fall back to bytes. `size`: the highest id, plus one.
    `spelled`: regular expressions matching each control token where the published tokenizer would match it.
    """

    encoder: Tokenizer
    decoder: Tokenizer
    secret_names: dict[str, str]
    spelled: tuple[str, ...]
    control_ids: frozenset[int]
    silent_ids: frozenset[int]
    byte_level: bool
    byte_tokens: dict[int, int]
    size: int


def load_vocabulary(tokenizer_json: bytes, eos_ids: tuple[int, ...], nonce: str) -> Vocabulary:
    """Build both tokenizers. `nonce`: unguessable lower-case letters and digits, kept in this process.

    Raises: CardUnusable when the JSON is no tokenizer.
    """
    try:
        document = msgspec.json.decode(tokenizer_json)
        # A tokenizer file may carry the truncation it was trained with; it would silently cut a paid prompt.
        document["truncation"] = document["padding"] = None
        added = document["added_tokens"]
        control = [token for token in added if _is_control(token, document["model"])]
        names = {token["content"]: f"tally{nonce}{index:06d}end" for index, token in enumerate(control)}
        ids = {token["content"]: int(token["id"]) for token in control}
        spelled = tuple(_pattern(token) for token in sorted(control, key=lambda token: -len(token["content"])))
        special = frozenset(int(token["id"]) for token in added if token["special"])
        decoder = _tokenizer(document)
        encoder = _tokenizer(_renamed(document, names))
        kinds = _kinds(document["decoder"])
    except (msgspec.DecodeError, UnicodeError, KeyError, TypeError, AttributeError, ValueError) as exc:
        raise CardUnusable(_unusable(f"{type(exc).__name__}: {exc}")) from exc
    if any(encoder.token_to_id(name) != ids[text] for text, name in names.items()):
        raise CardUnusable(_unusable("an added token's id is not the one its file states"))
    return Vocabulary(
        encoder=encoder,
        decoder=decoder,
        secret_names=names,
        spelled=spelled,
        control_ids=frozenset(ids.values()),
        silent_ids=special | frozenset(eos_ids),
        byte_level="ByteLevel" in kinds,
        byte_tokens=_byte_tokens(decoder) if "ByteFallback" in kinds else {},
        size=1 + max(decoder.get_vocab(with_added_tokens=True).values(), default=-1),
    )


def _unusable(reason: str) -> str:
    return (
        f"the model card's tokenizer cannot be used ({reason[:200]}). Nothing was sent or paid. "
        "Choose another model, or tell its provider that the tokenizer.json it publishes is broken."
    )


def _tokenizer(document: dict[str, Any]) -> Tokenizer:
    """Raises: ValueError."""
    try:
        return Tokenizer.from_str(msgspec.json.encode(document).decode())
    except Exception as exc:  # tokenizers raises bare Exception for whatever its Rust side refuses
        raise ValueError(str(exc)) from exc


def _is_control(token: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether an added token means something to the model beyond its letters.

    The `special` flag alone is not enough: published tokenizers leave it off for role markers, tool calls and
    fill-in-the-middle tokens. Runs of blanks and plain words are text, and so is what the model's merges spell anyway.
    """
    content = token["content"]
    if _BYTE_TOKEN.fullmatch(content):
        return False
    if token["special"]:
        return True
    if all(character.isalnum() or character.isspace() or character == "▁" for character in content):
        return False
    return not any("".join(_pair(merge)) == content for merge in model.get("merges", ()))


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _pattern(token: dict[str, Any]) -> str:
    spelled = re.escape(token["content"])
    return rf"(?<!\w){spelled}(?!\w)" if token["single_word"] else spelled


def _renamed(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same tokenizer with every control token under its secret name, in the model's own vocabulary too.

    Without the latter, models that look whole words up (WordLevel, Unigram, BPE with ignore_merges) would still
    find a control token under its public text. For the same reason merges that would spell one are left out.
    """
    model = dict(document["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [_pair(merge) for merge in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if pair[0] not in names and pair[1] not in names and "".join(pair) not in names
        ]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in document["added_tokens"]]
    return {**document, "added_tokens": added, "model": model}


def _kinds(decoder: dict[str, Any] | None) -> frozenset[str]:
    """The kinds of decoder a tokenizer chains."""
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset[str]().union(*(_kinds(part) for part in decoder["decoders"]))
    return frozenset({decoder["type"]})


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Token id -> the byte it stands for."""
    matches = ((_BYTE_TOKEN.fullmatch(text), number) for text, number in tokenizer.get_vocab().items())
    return {number: int(match[1], 16) for match, number in matches if match}
