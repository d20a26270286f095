"""Who runs in a step: continuous batching with chunked prefill over the decoder's slots. One thread, no waiting.

Each step feeds one row of every stream that decodes and up to PREFILL_TOKENS of the prompts being read, in order of
arrival; a stream whose prompt is complete gets its first token in that same step. Occupied slots are always
0..n-1: when a slot is let go, the last stream moves into it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import torch

from node.engine.decoder import Batch, Decoder, Segment
from node.engine.sampler import FINGERPRINT_BYTES, Draw, Sampler
from node.ports import EngineRequest, EngineToken
from protocol.transcript import LOGPROB_BYTES
from protocol.units import LEAF_TOKENS, FinishReason

PREFILL_TOKENS: Final = 256
"""Prompt tokens read per step, all streams together. Unit: tokens. Enough for matrix products at full speed; doubling
it doubles how long a long prompt holds up everybody else's next token."""

RUN_AHEAD: Final = 2 * LEAF_TOKENS
"""Tokens made beyond what the consumer took before a stream pauses. Unit: tokens. One leaf waits for its voucher while
the next is made; doubling it doubles the work lost when a client walks away."""

RESUME_AT: Final = LEAF_TOKENS
"""A paused stream goes on when it is at most this far ahead. Unit: tokens. Pausing and resuming a whole leaf at a time
keeps the consumer from waking the engine for every token."""


class Generation:
    """One generation. `taken` is written by the consumer's thread alone, all else by the scheduler's.

    `fed`: tokens whose keys and values are in the slot. `slot` is -1 while waiting and after the end.
    """

    __slots__ = ("ended", "fed", "last", "paused", "produced", "projection", "request", "slot", "stops", "taken")

    def __init__(self, request: EngineRequest, eos_ids: Sequence[int]) -> None:
        self.request = request
        self.stops = frozenset(request.stop_ids) | frozenset(eos_ids)
        self.slot = -1
        self.fed = self.produced = self.taken = self.last = 0
        self.paused = self.ended = False
        self.projection: torch.Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self.slot < 0 and not self.ended

    def may_run(self) -> bool:
        """False while it is too far ahead of its consumer. Stays paused until the consumer has caught up a leaf."""
        ahead = self.produced - self.taken
        self.paused = ahead > RESUME_AT if self.paused else ahead >= RUN_AHEAD
        return not self.paused

    def draw(self) -> Draw:
        """How the next token is drawn; its absolute position is prompt length + tokens produced."""
        request, sampling = self.request, self.request.sampling
        position = len(request.prompt) + self.produced
        return Draw.at(request.seed, position, sampling.temperature_micro, sampling.top_p_micro, sampling.top_k)


class Scheduler:
    """Streams, slots and steps."""

    def __init__(self, decoder: Decoder, sampler: Sampler) -> None:
        self._decoder, self._sampler = decoder, sampler
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # index = slot
        self.tokens_total = 0

    @property
    def active(self) -> int:
        """Slots occupied."""
        return len(self._running)

    def submit(self, stream: Generation) -> None:
        self._waiting.append(stream)

    def cancel(self, stream: Generation) -> None:
        """Forget a stream, letting go of its slot. Idempotent."""
        if stream.slot >= 0:
            self._release(stream)
        elif not stream.ended:
            self._waiting.remove(stream)
        stream.ended = True

    def cancel_all(self) -> None:
        for stream in [*self._running, *self._waiting]:
            self.cancel(stream)

    def has_work(self) -> bool:
        """Whether a step would do anything now."""
        if self._waiting and len(self._running) < self._decoder.slots:
            return True
        return any(s.fed < len(s.request.prompt) or s.may_run() for s in self._running)

    def step(self) -> list[tuple[Generation, EngineToken]]:
        """Run one forward; the tokens it gave, at most one a stream. A stream's last token has a finish reason."""
        while self._waiting and len(self._running) < self._decoder.slots:
            self._admit(self._waiting.popleft())
        decoding = [s for s in self._running if s.fed >= len(s.request.prompt) and s.may_run()]
        segments, reading = self._segments()
        if not decoding and not segments:
            return []
        batch = Batch(
            slots=[s.slot for s in decoding],
            ids=[s.last for s in decoding],
            positions=[s.fed for s in decoding],
            segments=segments,
        )
        hidden = self._decoder.forward(batch).hidden
        rows, sampled = list(range(len(decoding))), decoding
        row = len(decoding)
        for stream, part in zip(reading, segments, strict=True):
            row += len(part.ids)
            stream.fed += len(part.ids)
            if stream.fed == len(stream.request.prompt):
                rows.append(row - 1)
                sampled = [*sampled, stream]
        for stream in decoding:
            stream.fed += 1
        if not sampled:
            return []
        return self._sample(sampled, hidden if len(rows) == len(hidden) else hidden[rows])

    def _admit(self, stream: Generation) -> None:
        stream.slot = len(self._running)
        stream.projection = self._sampler.projection(stream.request.seed)
        self._running.append(stream)

    def _segments(self) -> tuple[list[Segment], list[Generation]]:
        """What is read of which prompts in this step."""
        budget = PREFILL_TOKENS
        segments, reading = [], []
        for stream in self._running:
            prompt = stream.request.prompt
            if budget and stream.fed < len(prompt):
                ids = prompt[stream.fed : stream.fed + budget]
                budget -= len(ids)
                segments.append(Segment(stream.slot, stream.fed, ids))
                reading.append(stream)
        return segments, reading

    def _sample(self, streams: list[Generation], hidden: torch.Tensor) -> list[tuple[Generation, EngineToken]]:
        logits = self._decoder.logits(hidden)
        chosen = self._sampler.choose(logits, [s.draw() for s in streams])
        projections = torch.stack([s.projection for s in streams if s.projection is not None])
        raw = self._sampler.fingerprints(logits, hidden, chosen, projections)
        out = []
        for i, (stream, token_id) in enumerate(zip(streams, chosen.tolist(), strict=True)):
            stream.last = token_id
            stream.produced += 1
            finish = FinishReason.OPEN
            if token_id in stream.stops:
                finish = FinishReason.STOP
            elif stream.produced == stream.request.max_tokens:
                finish = FinishReason.LENGTH
            at = i * FINGERPRINT_BYTES
            logprob, projection = raw[at : at + LOGPROB_BYTES], raw[at + LOGPROB_BYTES : at + FINGERPRINT_BYTES]
            out.append((stream, EngineToken(token_id, logprob, projection, finish)))
            if finish is not FinishReason.OPEN:
                self._release(stream)
                stream.ended = True
        self.tokens_total += len(out)
        return out

    def _release(self, stream: Generation) -> None:
        """Let go of a slot; the stream in the last occupied slot moves into it."""
        last = self._running.pop()
        if last is not stream:
            self._decoder.kv.move(last.slot, stream.slot, last.fed)
            last.slot = stream.slot
            self._running[last.slot] = last
        stream.slot = -1
        stream.projection = None
