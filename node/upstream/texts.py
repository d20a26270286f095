"""Text and token ids of one tokenizer, exactly or not at all: for servers that take or give text only. No IO.

A prompt is put into text only if that text encodes to the very same ids, so that the server reads what was paid for,
and nobody's text turns into a control token on the way. Text that comes back becomes the one token that spells it, or
what the tokenizer makes of it, and always decodes to the very same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tokenizers import Tokenizer

from node.upstream.http import UpstreamError

CONTEXT_IDS: Final = 4
"""How many earlier tokens a new one is decoded behind, since tokenizers treat the first of a text otherwise."""

LONGEST_TOKEN: Final = 64
"""Longest token looked for where a text is cut by hand. Unit: characters. Longer ones are runs of blanks or rules,
which shorter ones spell too."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Texts:
    """One tokenizer.json. `special`: ids of its control tokens. Raises: ValueError when it is none."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._tokenizer = _load(tokenizer_json)
        self._plain = _load(tokenizer_json)
        self._plain.encode_special_tokens = True  # as the text they are
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special = frozenset(
            number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._anchor = self._anchor_ids()
        self._spelled = self._spellings()

    def said(self, token_ids: Sequence[int]) -> str:
        """The text that encodes to exactly these ids, control tokens by their names.

        Raises: ValueError when there is none: a server that takes only text would read another prompt.
        """
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        if tuple(self._tokenizer.encode(text, add_special_tokens=False).ids) != tuple(token_ids):
            raise ValueError(
                "this prompt cannot be put into text exactly, and the server behind this provider takes only text: "
                "write the names of control tokens otherwise, or choose a provider that computes itself"
            )
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of text as the tokenizer reads it, control tokens by their names."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def named(self, text: str) -> int | None:
        """The one token that spells `text`, where it is known which."""
        return self._spelled.get(text)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Ids of text in which nothing is a control token."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add behind `before`, or behind a letter when there is none."""
        decode = self._tokenizer.decode
        before = before or self._anchor
        head = decode(list(before), skip_special_tokens=False)
        return decode([*before, *ids], skip_special_tokens=False)[len(head) :]

    def reader(self) -> Reader:
        """For the pieces of one answer."""
        return Reader(self)

    def _anchor_ids(self) -> list[int]:
        """A letter's token, to decode others behind: a first token may lose its blank."""
        for letter in ("a", "0", "."):
            ids = self._tokenizer.encode(letter, add_special_tokens=False).ids[-1:]
            if ids and self._tokenizer.decode(ids, skip_special_tokens=False) == letter:
                return [int(ids[0])]
        return []

    def _spellings(self) -> dict[str, int]:
        """Text -> the one token that spells it inside a text. Of several the one the tokenizer would choose, else the
        last: a byte's own token stands before the letters."""
        ids = [number for number in range(self.size) if number not in self.special]
        head = len(self._tokenizer.decode(self._anchor, skip_special_tokens=False))
        texts = self._tokenizer.decode_batch([[*self._anchor, number] for number in ids], skip_special_tokens=False)
        found: dict[str, list[int]] = {}
        for number, text in zip(ids, (text[head:] for text in texts), strict=True):
            if text and REPLACEMENT not in text:
                found.setdefault(text, []).append(number)
        letter = self._tokenizer.decode(self._anchor, skip_special_tokens=False)
        out = {}
        for text, numbers in found.items():
            chosen = numbers[-1]
            if len(numbers) > 1:
                last = self._tokenizer.encode(letter + text, add_special_tokens=False).ids[-1]
                chosen = last if last in numbers else chosen
            out[text] = chosen
        return out


class Reader:
    """Pieces of text into ids, in order; all ids so far always decode to all text so far."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._last: tuple[int, ...] = ()

    def push(self, piece: str) -> tuple[int, ...]:
        """Ids of a piece. Raises: UpstreamError when no ids decode to it."""
        if not piece:
            return ()
        for ids in self._ways(piece):
            if ids and self._texts.behind(self._last, ids) == piece:
                self._last = (*self._last, *ids)[-CONTEXT_IDS:]
                return ids
        raise UpstreamError("the upstream server wrote text that its tokenizer here cannot express exactly")

    def _ways(self, piece: str) -> Iterator[tuple[int, ...]]:
        """Ids that may spell the piece, the likeliest to be the server's own first."""
        one = self._texts.named(piece)
        if one is not None:
            yield (one,)
        yield self._texts.encode_plain(piece)
        yield self._cut(piece)

    def _cut(self, piece: str) -> tuple[int, ...]:
        """The longest tokens that spell the piece from its start on; () when there are none. For tokenizers that read a
        text's first word otherwise than one inside it."""
        out = []
        at = 0
        while at < len(piece):
            for end in range(min(len(piece), at + LONGEST_TOKEN), at, -1):
                number = self._texts.named(piece[at:end])
                if number is not None:
                    out.append(number)
                    at = end
                    break
            else:
                return ()
        return tuple(out)


def _load(tokenizer_json: bytes) -> Tokenizer:
    """Raises: ValueError."""
    try:
        made = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as exc:  # tokenizers raises bare Exception for whatever its Rust side refuses
        raise ValueError(f"the tokenizer cannot be used: {exc}") from exc
    made.no_truncation()
    made.no_padding()
    return made
