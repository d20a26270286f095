"""One piece of work for the scheduler: a text to be continued, or a text to be embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

from node.engine.adjust import Adjustment
from node.engine.grammar import Matcher
from node.engine.kv import SavedKv
from node.engine.sampler import Draw
from node.ports import EngineRequest, UnfitRequest, Urgency
from protocol.errors import TallyError
from protocol.options import JobOptions
from protocol.units import LEAF_TOKENS, Digest

RUN_AHEAD: Final = 2 * LEAF_TOKENS
"""Tokens made beyond what the consumer took before a stream pauses. Unit: tokens. One leaf waits for its voucher while
the next is made; doubling it doubles the work lost when a client walks away."""

RESUME_AT: Final = LEAF_TOKENS
"""A paused stream goes on when it is at most this far ahead. Unit: tokens. Pausing and resuming a whole leaf at a time
keeps the consumer from waking the engine for every token."""

NO_SEED: Final = bytes(32)


class EngineError(TallyError):
    """The engine stopped or failed while a stream was open. What was received stays valid; the rest will not come."""


class GrammarEnds(EngineError, UnfitRequest):
    """A stream's grammar cannot be followed any further."""


class Generation:
    """One generation. `taken` is written by the consumer's thread alone, all else by the scheduler's.

    `fed`: tokens whose keys and values are in the slot (or in `saved`). `goal`: tokens to be read as prompt before it
    decodes: the prompt, or after its keys and values were lost, all text but the last token. `slot` is -1 while waiting
    and after the end. `arrival`: its place in the order of arrival. `begun`: what the prefix cache holds of its text
    was loaded into its slot. `cached` is -1 until the prompt was looked up for the first time.
    """

    __slots__ = (
        "adjustment",
        "arrival",
        "begun",
        "cached",
        "ended",
        "fed",
        "goal",
        "heads",
        "kept",
        "last",
        "matcher",
        "output",
        "paused",
        "produced",
        "projection",
        "request",
        "saved",
        "secured",
        "slot",
        "stops",
        "taken",
        "total",
        "turn",
    )

    def __init__(self, request: EngineRequest, eos_ids: Sequence[int], matcher: Matcher | None = None) -> None:
        self.request, self.matcher = request, matcher
        self.stops = frozenset(request.options.stop_ids) | frozenset(eos_ids)
        self.slot = self.cached = -1
        self.fed = self.produced = self.taken = self.last = self.arrival = self.turn = self.secured = 0
        self.goal = len(request.prompt)
        self.paused = self.ended = self.begun = self.kept = False
        self.output: list[int] = []
        self.heads: tuple[Digest, ...] = ()
        self.projection: torch.Tensor | None = None
        self.adjustment: Adjustment | None = None
        self.saved: SavedKv | None = None
        self.total: torch.Tensor | None = None

    @property
    def embeds(self) -> bool:
        """Whether it is read for its hidden states and nothing is generated."""
        return not self.request.max_tokens

    @property
    def waiting(self) -> bool:
        return self.slot < 0 and not self.ended

    @property
    def reading(self) -> bool:
        """Whether text is still to be read before the next token can be made."""
        return self.fed < self.goal

    @property
    def secure(self) -> bool:
        """Whether its turn came by waiting and may not be taken away before it made `secured` tokens."""
        return self.produced < self.secured and not self.paused

    def may_run(self) -> bool:
        """False while it is too far ahead of its consumer. Stays paused until the consumer has caught up a leaf."""
        ahead = self.produced - self.taken
        self.paused = ahead > RESUME_AT if self.paused else ahead >= RUN_AHEAD
        return not self.paused

    def text(self, start: int, end: int) -> tuple[int, ...]:
        """Ids of prompt and output from `start` to `end`."""
        prompt = self.request.prompt
        if end <= len(prompt):
            return prompt[start:end]
        return (*prompt[start:], *self.output[max(0, start - len(prompt)) : end - len(prompt)])

    def draw(self) -> Draw:
        """How the next token is drawn; its absolute position is prompt length + tokens produced."""
        request, sampling = self.request, self.request.sampling
        position = len(request.prompt) + self.produced
        return Draw.at(request.seed, position, sampling.temperature_micro, sampling.top_p_micro, sampling.top_k)

    def forget(self) -> None:
        """Its keys and values are gone: read everything again, sums of an embedding included."""
        self.fed, self.begun, self.total = 0, False, None
        self.goal = len(self.request.prompt) + max(0, self.produced - 1)

    def pool(self, hidden: torch.Tensor) -> None:
        """Add rows of final-normed hidden states, [rows, hidden], to the sum that becomes the vector."""
        rows = hidden.float().sum(0)
        self.total = rows if self.total is None else self.total + rows

    def vector(self) -> bytes:
        """The unit vector of what was pooled, cut to the dimensions asked for: fp32, little-endian."""
        assert self.total is not None
        mean = self.total[: self.request.options.dimensions or None] / self.goal
        raw: bytes = F.normalize(mean, dim=0).cpu().numpy().astype("<f4").tobytes()
        return raw


def embedding(ids: tuple[int, ...], dimensions: int, urgency: Urgency) -> Generation:
    """A text to be embedded, as the scheduler takes it: it reads and makes no tokens."""
    options = JobOptions(dimensions=dimensions)
    return Generation(EngineRequest(ids, NO_SEED, 0, options=options, urgency=urgency), ())
