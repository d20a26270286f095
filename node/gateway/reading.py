"""A generation taken apart while it comes: what the model thought, what it says, which functions it calls.

Reasoning is told from text by token ids, the profile's own markers, by the same count that the receipt carries; calls
are told from text by their form (tool_text.py). However the tokens are batched, the parts join to the same whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from node.gateway.detokenise import Detokeniser, TextStream, Token, TokenText
from node.gateway.tool_text import CallDelta, CallReader, ToolForm
from node.gateway.vocabulary import Vocabulary
from protocol.metering import Reasoning


@dataclass(frozen=True, slots=True)
class Reading:
    """How one generation is read. `reasoning`: the profile's markers, and whether a block is open at the beginning.

    `stops`: stop strings of the text; `free`: tokens before they count. `hidden`: ids that are no text, stop ids.
    `form`, `names`: how calls are written and of which functions, None where none are looked for. `prefilled`: the
    prompt ends with the form's own beginning of a call. `parallel`: there may be several calls.
    """

    reasoning: Reasoning
    stops: tuple[str, ...] = ()
    free: int = 0
    hidden: frozenset[int] = frozenset()
    form: ToolForm | None = None
    names: frozenset[str] = frozenset()
    prefilled: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """What a batch of tokens brought: thought, said, called; and the tokens that begin in what was said."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    tokens: tuple[TokenText, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.reasoning or self.text or self.calls or self.tokens)


class Reader:
    """One generation's parts as they come."""

    def __init__(self, vocabulary: Vocabulary, reading: Reading) -> None:
        form = reading.form
        markers = (form.opener, form.closer) if form else ()
        shown = {vocabulary.decoder.token_to_id(marker) for marker in markers if marker}
        self._text = TextStream(
            vocabulary,
            reading.stops,
            free=reading.free,
            shown=frozenset(number for number in shown if number is not None),
            hidden=reading.hidden,
        )
        self._thought = Detokeniser(vocabulary, hidden=reading.hidden)
        self._reasoning = reading.reasoning
        self._calls = (
            CallReader(form, reading.names, prefilled=reading.prefilled, parallel=reading.parallel) if form else None
        )

    @property
    def stopped(self) -> bool:
        """Whether nothing that still comes is wanted: a stop string, or the one call that was allowed, is complete."""
        return self._text.stopped is not None or (self._calls is not None and self._calls.over)

    @property
    def called(self) -> bool:
        """Whether the model called a function."""
        return self._calls is not None and self._calls.calls > 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens in reasoning blocks so far, markers included, as receipts count them."""
        return self._reasoning.tokens

    def push(self, tokens: Sequence[Token]) -> Part:
        """Take tokens in order. Those after a stop are ignored."""
        thought: list[str] = []
        out: list[str | CallDelta] = []
        begun: list[TokenText] = []
        for token in tokens:
            if self.stopped:
                break
            before, self._reasoning = self._reasoning, self._reasoning.take((token.id,))
            if self._reasoning.tokens == before.tokens:
                piece = self._text.push((token,))
                out += self._read(piece.text)
                begun += piece.tokens
            else:
                self._text.free -= 1
                if token.id not in (self._reasoning.start, self._reasoning.end):
                    thought.append(self._thought.push(token.id)[0])
        return _part("".join(thought), out, begun)

    def finish(self) -> Part:
        """What was held back, now that the generation is over."""
        piece = self._text.finish()
        out = self._read(piece.text) + (self._calls.finish() if self._calls else [])
        return _part(self._thought.finish(), out, piece.tokens)

    def _read(self, text: str) -> list[str | CallDelta]:
        return self._calls.push(text) if self._calls is not None else [text]


def _part(thought: str, out: list[str | CallDelta], tokens: Sequence[TokenText]) -> Part:
    """One part of what came, with the pieces of each call put together."""
    calls: list[CallDelta] = []
    for item in out:
        if isinstance(item, str):
            continue
        if item.name is None and calls:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + item.arguments)
        else:
            calls.append(item)
    return Part(thought, "".join(item for item in out if isinstance(item, str)), tuple(calls), tuple(tokens))
