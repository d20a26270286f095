"""Who runs in a step: continuous batching with chunked prefill over the decoder's slots. One thread, no waiting.

Each step feeds one row of every stream that decodes and up to PREFILL_TOKENS of the texts being read, the most urgent
first; a stream whose prompt is complete gets its first token in that same step. Occupied slots are always 0..n-1:
when a slot is let go, the last stream moves into it. When no slot is free and somebody more urgent waits, the least
urgent stream makes room: its keys and values are copied to the host bit for bit, or computed again when they do not
fit, and it goes on where it was. Whole blocks of salted texts go into the prefix cache and come back from it.

Contract: a step commits everything or nothing. Each stream ends with one outcome that is its last.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from node.engine import adjust
from node.engine.decoder import Batch, DecoderBase, Segment
from node.engine.generation import EngineError, Generation, GrammarEnds
from node.engine.pace import Pace
from node.engine.prefix_cache import PrefixCache
from node.engine.sampler import FINGERPRINT_BYTES, Sampler
from node.engine.waiting import WaitingRoom
from node.ports import EngineToken
from protocol.cache import BLOCK_TOKENS, block_heads, hit_limit
from protocol.transcript import LOGPROB_BYTES, ROUTING_BYTES
from protocol.units import Digest, FinishReason

PREFILL_TOKENS: Final = 256
"""Prompt tokens read per step, all streams together. Unit: tokens. Enough for matrix products at full speed; doubling
it doubles how long a long prompt holds up everybody else's next token."""

MIN_PREFILL_TOKENS: Final = 16
"""Where halving PREFILL_TOKENS for want of memory ends; it grows back by one a step. Unit: tokens. At half of it a
prompt takes twice as many steps to save memory that is small beside one stream's keys and values."""

_T = TypeVar("_T")

Outcome = tuple[Generation, EngineToken | bytes | EngineError]
"""What a step gave a stream: a token, the vector of an embedding, or why the stream cannot go on."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One step: who decodes, and what is read of which texts (`segments` and `reading` pair up)."""

    decoding: list[Generation]
    segments: list[Segment]
    reading: list[Generation]


@dataclass(frozen=True, slots=True)
class _Made:
    """What a step computed, not yet given to anybody. `sampled`: streams that get a token, in the order of the rest.

    `hidden`: of all rows of the batch. `raw`: FINGERPRINT_BYTES each. `routing`: 8 bytes each, b"" in a dense model.
    """

    hidden: torch.Tensor
    sampled: list[Generation]
    chosen: list[int]
    raw: bytes
    routing: list[bytes]
    alternatives: dict[int, tuple[tuple[int, bytes], ...]]


class Scheduler:
    """Streams, slots and steps. `saved_bytes`: host memory for displaced streams."""

    def __init__(
        self,
        decoder: DecoderBase,
        sampler: Sampler,
        saved_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decoder, self._sampler, self._clock = decoder, sampler, clock
        self._cache = PrefixCache(decoder.kv.pool_blocks, clock)
        self._waiting = WaitingRoom()
        self._running: list[Generation] = []  # index = slot
        self._saved_room = saved_bytes
        self._turns = 0
        self._stacked_of: list[Generation] = []
        self._stacked = torch.empty(0)
        self.chunk = PREFILL_TOKENS
        self.pace = Pace()
        self.tokens_total = self.prompt_total = self.cached_total = self.preempted_total = 0

    @property
    def active(self) -> int:
        """Slots occupied."""
        return len(self._running)

    def submit(self, stream: Generation) -> None:
        request, options = stream.request, stream.request.options
        if request.salt:
            stream.heads = block_heads(request.salt, request.prompt)
        spec, device = self._decoder.spec, self._decoder.device
        stream.adjustment = adjust.adjustment(options, request.prompt, stream.stops, stream.matcher, spec.vocab, device)
        self._waiting.arrive(stream)

    def cancel(self, stream: Generation) -> None:
        """Forget a stream, letting go of its slot. Idempotent."""
        if stream.slot >= 0:
            self._release(stream)
        elif not stream.ended:
            self._waiting.leave(stream)
            self._end(stream)

    def cancel_all(self) -> None:
        for stream in [*self._running, *self._waiting.all()]:
            self.cancel(stream)

    def has_work(self) -> bool:
        """Whether a step would do anything now."""
        if len(self._waiting) and (len(self._running) < self._decoder.slots or self._victim() is not None):
            return True
        return any(stream.reading or stream.may_run() for stream in self._running)

    def step(self) -> list[Outcome]:
        """Run one forward; what it gave, at most one outcome a stream.

        Raises: whatever torch raises, but for a lack of memory, which ends at most one stream.
        """
        self._fill_slots()
        plan = self._plan()
        if not plan.decoding and not plan.segments:
            return []
        started = self._clock()
        try:
            made = self._compute(plan)
        except (RuntimeError, MemoryError) as exc:
            if not out_of_memory(exc):
                raise
            return self._make_do(plan, exc)
        outcomes = self._commit(plan, made)
        self.chunk = min(PREFILL_TOKENS, self.chunk + 1)
        read = sum(len(part.ids) for part in plan.segments)
        self.pace.stepped(self._clock() - started, len(plan.decoding), read)
        return outcomes

    # ----------------------------------------------------------------------------------------------- slots and turns

    def _fill_slots(self) -> None:
        while len(self._waiting):
            if len(self._running) < self._decoder.slots:
                self._admit(self._waiting.take())
                continue
            victim = self._victim()
            if victim is None:
                return
            stream = self._waiting.most_urgent()
            self._waiting.leave(stream)
            self._displace(victim)
            self._waiting.went(stream)
            self._admit(stream)

    def _victim(self) -> Generation | None:
        """Who makes room for the most urgent one waiting: of the least urgent below it, who got a slot last."""
        urgency = self._waiting.most_urgent().request.urgency
        below = [stream for stream in self._running if stream.request.urgency < urgency and not stream.secure]
        return min(below, key=lambda stream: (stream.request.urgency, -stream.turn), default=None)

    def _admit(self, stream: Generation) -> None:
        self._turns += 1
        stream.turn = self._turns
        stream.slot = len(self._running)
        if not stream.embeds:
            stream.projection = self._sampler.projection(stream.request.seed)
        self._running.append(stream)
        if stream.saved is not None:
            self._decoder.kv.restore(stream.slot, stream.saved)
            self._saved_room += stream.saved.bytes
            stream.saved = None

    def _displace(self, stream: Generation) -> None:
        """Take a stream's slot; it waits at its old place and will go on from here."""
        size = stream.fed * self._decoder.kv.token_bytes
        self._keep(stream)
        if 0 < size <= self._saved_room:
            stream.saved = _if_memory_lasts(lambda: self._decoder.kv.save(stream.slot, stream.fed))
        if stream.saved is not None:
            self._saved_room -= stream.saved.bytes
        else:
            stream.forget()
        self._vacate(stream)
        self._waiting.come_back(stream)
        self.preempted_total += 1

    def _release(self, stream: Generation) -> None:
        """The end of a stream that had a slot."""
        self._keep(stream)
        self._vacate(stream)
        self._end(stream)

    def _end(self, stream: Generation) -> None:
        stream.ended = True
        if stream.saved is not None:
            self._saved_room += stream.saved.bytes
            stream.saved = None
        if stream.kept:
            self._cache.unpin(stream.heads, stream.request.hold_s)

    def _vacate(self, stream: Generation) -> None:
        """Let go of a slot; the stream in the last occupied slot moves into it."""
        last = self._running.pop()
        if last is not stream:
            self._decoder.kv.move(last.slot, stream.slot, last.fed)
            last.slot = stream.slot
            self._running[last.slot] = last
        stream.slot = -1
        stream.projection = None

    # ------------------------------------------------------------------------------------------------- prefix cache

    def _begin(self, stream: Generation) -> bool:
        """Load what the cache holds of a text into its slot. False: wait, somebody is just reading more of it."""
        if stream.begun:
            return True
        limit = hit_limit(stream.goal + bool(stream.produced)) // BLOCK_TOKENS
        if stream.heads:
            if self._read_by_others(stream) > self._cache.count(stream.heads, limit):
                return False
            blocks = self._cache.find(stream.heads, limit)
            stream.fed = _if_memory_lasts(lambda: self._load(stream, blocks)) or 0
        stream.begun = True
        if stream.cached < 0:
            stream.cached = stream.fed
            self.prompt_total += len(stream.request.prompt)
            self.cached_total += stream.cached
        return True

    def _load(self, stream: Generation, blocks: list[int]) -> int:
        """Copy a prefix from the cache; how many tokens."""
        self._decoder.kv.load_blocks(stream.slot, blocks)
        return len(blocks) * BLOCK_TOKENS

    def _read_by_others(self, stream: Generation) -> int:
        """Blocks that a stream no less urgent, reading now, will leave in the cache for this one."""
        most = 0
        for other in self._running:
            ahead = other.begun and other.reading and other.request.urgency >= stream.request.urgency
            if ahead and other.heads[:1] == stream.heads[:1]:
                limit = min(len(other.heads), len(stream.heads), hit_limit(stream.goal) // BLOCK_TOKENS + 1)
                most = max(most, next((k - 1 for k in range(limit) if other.heads[k] != stream.heads[k]), limit - 1))
        return most

    def _keep(self, stream: Generation) -> None:
        """Put the whole blocks of a salted text, as far as it is in the slot, into the cache."""
        if not stream.heads or stream.fed < BLOCK_TOKENS:
            return
        heads: Sequence[Digest] = stream.heads[: stream.fed // BLOCK_TOKENS + 1]
        if stream.fed >= len(stream.heads) * BLOCK_TOKENS:
            heads = block_heads(stream.request.salt, stream.text(0, stream.fed))
        for at, block in self._cache.add(heads):
            self._decoder.kv.store_block(stream.slot, at * BLOCK_TOKENS, block)

    # --------------------------------------------------------------------------------------------------------- a step

    def _plan(self) -> _Plan:
        decoding = [stream for stream in self._running if not stream.reading and stream.may_run()]
        readers = [stream for stream in self._running if stream.reading]
        readers.sort(key=lambda stream: (-stream.request.urgency, stream.arrival))
        budget = self.chunk
        segments, reading = [], []
        for stream in readers:
            if not budget:
                break
            if not self._begin(stream):
                continue
            ids = stream.text(stream.fed, min(stream.goal, stream.fed + budget))
            budget -= len(ids)
            segments.append(Segment(stream.slot, stream.fed, ids))
            reading.append(stream)
        return _Plan(decoding, segments, reading)

    def _compute(self, plan: _Plan) -> _Made:
        """Everything that may fail for want of memory. Changes no stream."""
        forward = self._decoder.forward(
            Batch(
                slots=[stream.slot for stream in plan.decoding],
                ids=[stream.last for stream in plan.decoding],
                positions=[stream.fed for stream in plan.decoding],
                segments=plan.segments,
            )
        )
        sampled, rows = plan.decoding, list(range(len(plan.decoding)))
        row = len(rows)
        for stream, part in zip(plan.reading, plan.segments, strict=True):
            row += len(part.ids)
            if part.start + len(part.ids) == stream.goal and not stream.produced and not stream.embeds:
                rows.append(row - 1)
                sampled = [*sampled, stream]
        if not sampled:
            return _Made(forward.hidden, [], [], b"", [], {})
        plain = sum(stream.adjustment is None for stream in sampled)
        if plain < len(sampled):  # those to be adjusted last, so that the others' logits are touched by nothing
            order = sorted(range(len(sampled)), key=lambda i: sampled[i].adjustment is not None)
            sampled, rows = [sampled[i] for i in order], [rows[i] for i in order]
        same = len(rows) == len(forward.hidden) and plain in (0, len(sampled))
        hidden = forward.hidden if same else forward.hidden[rows]
        routing = forward.routing if same or forward.routing is None else forward.routing[rows]
        logits = self._decoder.logits(hidden)
        chosen = self._choose(sampled, plain, logits)
        raw = self._sampler.fingerprints(logits, hidden, chosen, self._projections(sampled))
        return _Made(
            forward.hidden,
            sampled,
            chosen.tolist(),
            raw,
            routing_bytes(routing, len(sampled)),
            self._likeliest(sampled, logits),
        )

    def _projections(self, sampled: list[Generation]) -> torch.Tensor:
        """[rows, hidden] uint8, stacked again only when other streams are sampled than in the step before."""
        if sampled != self._stacked_of:
            self._stacked = torch.stack([stream.projection for stream in sampled if stream.projection is not None])
            self._stacked_of = sampled
        return self._stacked

    def _choose(self, sampled: list[Generation], plain: int, logits: torch.Tensor) -> torch.Tensor:
        """[rows] int64. The first `plain` rows are drawn from the logits as they are."""
        draws = [stream.draw() for stream in sampled]
        if plain == len(sampled):
            return self._sampler.choose(logits, draws)
        adjustments = [stream.adjustment for stream in sampled[plain:] if stream.adjustment is not None]
        bias = adjust.bias(adjustments, self._decoder.spec.vocab, self._decoder.device)
        adjusted = self._sampler.choose(logits[plain:], draws[plain:], bias)
        return torch.cat((self._sampler.choose(logits[:plain], draws[:plain]), adjusted)) if plain else adjusted

    def _likeliest(self, sampled: list[Generation], logits: torch.Tensor) -> dict[int, tuple[tuple[int, bytes], ...]]:
        """Row -> alternatives, for the rows that want any."""
        wanted = {i: s.request.options.alternatives for i, s in enumerate(sampled) if s.request.options.alternatives}
        if not wanted:
            return {}
        found = self._sampler.alternatives(logits[list(wanted)], max(wanted.values()))
        return {i: pairs[:count] for (i, count), pairs in zip(wanted.items(), found, strict=True)}

    def _commit(self, plan: _Plan, made: _Made) -> list[Outcome]:
        outcomes: list[Outcome] = []
        row = len(plan.decoding)
        for stream, part in zip(plan.reading, plan.segments, strict=True):
            end = row + len(part.ids)
            stream.fed += len(part.ids)
            if stream.embeds:
                stream.pool(made.hidden[row:end])
            if not stream.reading:
                outcomes += self._has_read(stream)
            row = end
        for stream in plan.decoding:
            stream.fed += 1
        for i, stream in enumerate(made.sampled):
            outcomes.append((stream, self._emit(stream, made, i)))
        for stream, outcome in outcomes:
            if not isinstance(outcome, EngineToken) or outcome.finish is not FinishReason.OPEN:
                self._release(stream)
        self.tokens_total += len(made.sampled)
        return outcomes

    def _has_read(self, stream: Generation) -> list[Outcome]:
        """All of a text is in its slot: remember it, and give an embedding its vector."""
        if not stream.kept and not stream.produced:
            self._keep(stream)
            stream.kept = self._cache.pin(stream.heads)
        return [(stream, stream.vector())] if stream.embeds else []

    def _emit(self, stream: Generation, made: _Made, row: int) -> EngineToken | EngineError:
        """Give a stream its token."""
        adjustment, token_id = stream.adjustment, made.chosen[row]
        if adjustment is not None:
            if adjustment.error:
                return GrammarEnds(f"the grammar could not be followed any further: {adjustment.error}")
            adjustment.take(token_id)
            stream.adjustment = None if adjustment.idle else adjustment
        stream.last = token_id
        stream.output.append(token_id)
        stream.produced += 1
        finish = FinishReason.OPEN
        if token_id in stream.stops:
            finish = FinishReason.STOP
        elif stream.produced == stream.request.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not FinishReason.OPEN:
            self.pace.ended(stream.produced, stream.request.max_tokens)
        at = row * FINGERPRINT_BYTES
        return EngineToken(
            token_id,
            made.raw[at : at + LOGPROB_BYTES],
            made.raw[at + LOGPROB_BYTES : at + FINGERPRINT_BYTES],
            finish,
            stream.cached,
            stream.kept,
            made.routing[row],
            made.alternatives.get(row, ()),
        )

    def _make_do(self, plan: _Plan, exc: BaseException) -> list[Outcome]:
        """A step found no memory. Read less at a time; when that is at its end, one stream ends and the rest go on."""
        if plan.segments and self.chunk > MIN_PREFILL_TOKENS:
            self.chunk //= 2
            return []
        stream = min(
            plan.reading or plan.decoding, key=lambda stream: (stream.request.urgency, -stream.fed, -stream.turn)
        )
        self._release(stream)
        return [(stream, EngineError(f"the engine has too little memory for this stream ({exc}); others go on"))]


def out_of_memory(exc: BaseException) -> bool:
    """Whether torch, on any device, or Python could not get memory. CPU allocations fail as plain RuntimeErrors."""
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(exc)


def _if_memory_lasts(copy: Callable[[], _T]) -> _T | None:
    """What a copy gave that can be done without; None when there was no memory for it."""
    try:
        return copy()
    except (RuntimeError, MemoryError) as exc:
        if not out_of_memory(exc):
            raise
        return None


def routing_bytes(routing: torch.Tensor | None, rows: int) -> list[bytes]:
    """What protocol.transcript.routing_fingerprint gives each row."""
    if routing is None:
        return [b""] * rows
    ids = routing.cpu().numpy().astype(">u2")
    return [hashlib.sha256(row.tobytes()).digest()[:ROUTING_BYTES] for row in ids]
