"""From the pieces a server sends to engine tokens: counted, named, and ended exactly once. Pure.

Two forms. Where the server names its tokens, each is passed on at once. Where it sends text, pieces become ids that
spell them, and one token is held back, because such a server may end a text without saying so in its last piece. A
text that ended by its end-of-text token gets that token as its last, as a receipt's STOP demands: the model did choose
it, the server merely does not show it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from node.ports import EngineRequest, EngineToken
from node.upstream.http import UpstreamError
from node.upstream.probe import Abilities
from node.upstream.reading import Named, Piece
from node.upstream.texts import Texts
from protocol.transcript import pack_fp16
from protocol.units import FinishReason

UNKNOWN_LOGPROB: Final = struct.pack(">e", float("nan"))
"""What stands for a logprob that the server did not give: no number, which nobody can take for one."""

NO_PROJECTION: Final = bytes(16)
"""No server shows its hidden states."""


class Writing:
    """One answer. `eos_ids`: the first is the token that an end of text stands for."""

    def __init__(self, request: EngineRequest, able: Abilities, texts: Texts, eos_ids: Sequence[int]) -> None:
        self._able, self._texts, self._eos_ids = able, texts, tuple(eos_ids)
        self._reader = texts.reader()
        self._stops = frozenset(request.options.stop_ids) | frozenset(eos_ids)
        self._max_tokens = request.max_tokens
        self._least = max(0, request.options.min_tokens - request.options.continued)
        self._alternatives = request.options.alternatives
        self._held: EngineToken | None = None
        self.produced = 0
        self.over = False

    def push(self, piece: Piece) -> list[EngineToken]:
        """Tokens that a piece makes certain. Raises: UpstreamError."""
        if self._able.ids_out:
            out = self._named(piece)
        else:
            ids = self._reader.push(piece.text)
            known = piece.logprobs is not None and len(piece.logprobs) == len(ids)
            rows = piece.logprobs if known and piece.logprobs is not None else (None,) * len(ids)
            out = [token for number, value in zip(ids, rows, strict=True) for token in self._add(number, value, ())]
        if piece.finish and not self.over:
            out += self._finish(piece.finish)
        return out

    def end(self) -> None:
        """The server closed its stream. Raises: UpstreamError when the text had not ended: that is a break, no end."""
        if not self.over:
            raise UpstreamError(f"the upstream server closed its stream after {self.produced} tokens without ending it")

    def _named(self, piece: Piece) -> list[EngineToken]:
        ids = piece.ids
        if ids is None:
            raise UpstreamError("the upstream server stopped naming its tokens in the middle of an answer")
        if any(number >= self._texts.size for number in ids):
            raise UpstreamError("the upstream server named a token that the tokenizer does not have")
        values = piece.logprobs if piece.logprobs is not None else (None,) * len(ids)
        if None in values and self._able.checkable:
            raise UpstreamError("the upstream server left out a logprob that this provider's offer promises")
        tops = piece.tops if piece.tops else ((),) * len(ids)
        rows = zip(ids, values, tops, strict=True)
        return [token for number, value, top in rows for token in self._add(number, value, top)]

    def _add(self, number: int, logprob: float | None, tops: Sequence[tuple[Named, float]]) -> list[EngineToken]:
        if self.over:
            return []
        finish = FinishReason.OPEN
        if number in self._stops:
            if self.produced < self._least:
                raise UpstreamError("the upstream server ended a text before the fewest tokens it was asked for")
            finish = FinishReason.STOP
        elif self.produced + 1 == self._max_tokens:
            finish = FinishReason.LENGTH
        self.produced += 1
        self.over = finish is not FinishReason.OPEN
        token = EngineToken(
            number,
            UNKNOWN_LOGPROB if logprob is None else pack_fp16([logprob]),
            NO_PROJECTION,
            finish,
            alternatives=self._likeliest(tops),
        )
        if self._able.ids_out:
            return [token]
        held, self._held = self._held, None if self.over else token
        out = [] if held is None else [held]
        return [*out, token] if self.over else out

    def _likeliest(self, tops: Sequence[tuple[Named, float]]) -> tuple[tuple[int, bytes], ...]:
        rows = [
            (name, pack_fp16([value])) for name, value in tops if isinstance(name, int) and 0 <= name < self._texts.size
        ]
        return tuple(rows[: self._alternatives])

    def _finish(self, reason: str) -> list[EngineToken]:
        """The server says that the text is over, and no token of it said so."""
        if reason == "stop":
            if self._able.checkable:
                raise UpstreamError("the upstream server ended a text at a token that the model's files do not name")
            return self._add(self._eos_ids[0], None, ())
        held, self._held = self._held, None
        if reason == "length" and held is not None:
            self.over = True
            return [EngineToken(held.token_id, held.logprob, held.projection, FinishReason.LENGTH)]
        raise UpstreamError(
            f"the upstream server ended a text after {self.produced} of {self._max_tokens} tokens ({reason[:20]!r})"
        )
