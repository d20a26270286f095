"""From a stream of token ids to text that may be shown: whole characters, no control tokens, nothing past a stop.

However the ids are cut into batches, the pieces join to the same text, and that text is `TextCodec.decode` of all
ids, cut before the first stop string. Held back is only what the next token could still change: an unfinished UTF-8
sequence (at most 3 bytes) and an unfinished stop string.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from node.gateway.vocabulary import Vocabulary


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2, `bytes_to_unicode`): the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have come, as it would have read. `logprob`: natural logarithm."""

    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as it reads. `data`: its bytes (perhaps part of a character). `offset`: characters of text before it.
    `logprob`: natural logarithm. `alternatives`: the likeliest tokens at its place, likeliest first."""

    token_id: int
    data: bytes
    logprob: float
    offset: int
    alternatives: tuple[Alternative, ...] = ()

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token as it arrived. `alternatives`: (token id, logprob), likeliest first."""

    id: int
    logprob: float = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown now, and the tokens that begin in it."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()


class Detokeniser:
    """Token ids in, text out, one token at a time. Each call costs the same however long the stream is.

    `shown`: control tokens whose text is wanted all the same. `hidden`: tokens that are no text here.
    """

    def __init__(
        self, vocabulary: Vocabulary, shown: frozenset[int] = frozenset(), hidden: frozenset[int] = frozenset()
    ) -> None:
        self._vocabulary = vocabulary
        self._silent = (vocabulary.silent_ids - shown) | hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None

    def push(self, token_id: int) -> tuple[str, bytes]:
        """The text that became certain, and the token's own bytes (b"" for tokens that are not shown)."""
        if token_id in self._silent:
            return "", b""
        data = self.spell(token_id)
        if self._vocabulary.byte_level or token_id in self._vocabulary.byte_tokens:
            return self._utf8.decode(data), data
        held = self._utf8.decode(b"", final=True)  # a character of the text ends an unfinished byte sequence
        self._previous = token_id
        return held + data.decode(), data

    def spell(self, token_id: int) -> bytes:
        """The bytes that a token would add here, also one that is not shown."""
        if self._vocabulary.byte_level:
            return self._byte_level(token_id)
        if token_id in self._vocabulary.byte_tokens:
            return bytes((self._vocabulary.byte_tokens[token_id],))
        return self._spelled(token_id).encode("utf-8", "replace")

    def finish(self) -> str:
        """What was held back: U+FFFD when the stream ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _byte_level(self, token_id: int) -> bytes:
        text = self._vocabulary.decoder.id_to_token(token_id)
        if text is None:  # an id between the tokenizer's and the model's vocabulary size spells nothing
            return b""
        try:
            return bytes(_BYTES[character] for character in text)
        except KeyError:  # an added token is stored as it reads, not in the byte alphabet
            return str(text).encode("utf-8", "replace")

    def _spelled(self, token_id: int) -> str:
        """What the token adds to the text after its predecessor; decoders treat the first token of a text apart."""
        decoder, previous = self._vocabulary.decoder, self._previous
        if previous is None:
            return str(decoder.decode([token_id], skip_special_tokens=False))
        before = str(decoder.decode([previous], skip_special_tokens=False))
        both = str(decoder.decode([previous, token_id], skip_special_tokens=False))
        if both.startswith(before):
            return both[len(before) :]
        return str(decoder.decode([token_id], skip_special_tokens=False))


class StopFilter:
    """Lets text pass up to the first stop string that is completed; keeps back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. Nothing any more once one matched."""
        if self.matched is not None:
            return ""
        held = self._held + text
        # The first to be complete wins, as if the text came one character at a time; the longer one among equals.
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            _end, start, self.matched = min(found)
            self._held = ""
            return held[:start]
        keep = next((n for n in range(min(self._longest - 1, len(held)), 0, -1) if self._begins(held[-n:])), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back and never became a stop string."""
        held, self._held = self._held, ""
        return held

    def _begins(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


class TextStream:
    """One generation's text as it comes. `stopped`: the stop string that ended it, if one did.

    `free`: how many tokens come before stop strings count. `shown`, `hidden`: as in Detokeniser.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str] = (),
        *,
        free: int = 0,
        shown: frozenset[int] = frozenset(),
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._detokeniser = Detokeniser(vocabulary, shown, hidden)
        self._filter = StopFilter(stops)
        self.free = free
        self._waiting: deque[TokenText] = deque()
        self._decoded = 0
        self._shown = 0

    @property
    def stopped(self) -> str | None:
        return self._filter.matched

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Take tokens in order. Those after a completed stop string are ignored."""
        texts: list[str] = []
        for token in tokens:
            if self.stopped is not None:
                break
            likeliest = tuple(Alternative(self._detokeniser.spell(other), at) for other, at in token.alternatives)
            text, data = self._detokeniser.push(token.id)
            if data:
                self._waiting.append(TokenText(token.id, data, token.logprob, self._decoded, likeliest))
            self._decoded += len(text)
            texts.append(text if self.free > 0 else self._filter.push(text))
            self.free -= 1
        return self._release("".join(texts))

    def finish(self) -> Piece:
        """The stream ended: what was held back is text after all, unless a stop string ended it."""
        if self.stopped is not None:
            return Piece()
        last = self._detokeniser.finish()
        self._decoded += len(last)
        text = self._filter.push(last)
        return self._release(text + self._filter.finish(), last=self.stopped is None)

    def _release(self, text: str, *, last: bool = False) -> Piece:
        self._shown += len(text)
        tokens: list[TokenText] = []
        while self._waiting and (last or self._waiting[0].offset < self._shown):
            tokens.append(self._waiting.popleft())
        return Piece(text, tuple(tokens))
