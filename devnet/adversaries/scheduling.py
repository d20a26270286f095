"""Schedulers that draw tokens otherwise than their jobs say, or let a cheaper model write them.

`Speculating` is the honest one among them too: coupled speculation, whose drafts are kept where the big model draws the
very same token, changes nothing that anybody could see. Sources: Leviathan et al. 2023; the coupling by shared Gumbel
noise: Daliri, Musco, Suresh 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from node.engine.decoder import Batch, DecoderBase, Segment
from node.engine.generation import EngineError, Generation
from node.engine.sampler import Draw, Sampler
from node.engine.scheduler import Outcome, Scheduler, _Made, routing_bytes
from node.ports import EngineToken
from protocol.sampling import MICRO
from protocol.units import FinishReason

DRAFT_TOKENS: Final = 8
"""Tokens drafted before the big model reads them. Unit: tokens. Usual in practice; doubling it wastes more drafts."""

DrawRule = Callable[[Generation, Draw], Draw]
PickRule = Callable[[Sequence[Generation], torch.Tensor, torch.Tensor], torch.Tensor]


class CrookedScheduler(Scheduler):
    """Draws by `draw` and gives what `pick` makes of it. Streams with penalties or grammars are served honestly."""

    def __init__(
        self, decoder: DecoderBase, sampler: Sampler, saved_bytes: int, draw: DrawRule, pick: PickRule
    ) -> None:
        super().__init__(decoder, sampler, saved_bytes)
        self._draw, self._pick = draw, pick

    def _choose(self, sampled: list[Generation], plain: int, logits: torch.Tensor) -> torch.Tensor:
        if plain < len(sampled):
            return super()._choose(sampled, plain, logits)
        draws = [self._draw(stream, stream.draw()) for stream in sampled]
        return self._pick(sampled, logits, self._sampler.choose(logits, draws))


class Speculating(Scheduler):
    """A draft model writes ahead, the big model reads it in one go and judges each token.

    Its own token stands where the draft's score lacks more than `tolerance` logits. Fingerprints are all the big
    model's.
    """

    def __init__(
        self, decoder: DecoderBase, sampler: Sampler, saved_bytes: int, draft: DecoderBase, tolerance: float
    ) -> None:
        super().__init__(decoder, sampler, saved_bytes)
        self._draft, self._tolerance = draft, tolerance
        self._drafted: dict[Generation, int] = {}  # tokens in the draft's keys and values
        self.drafts_total = self.kept_total = 0

    def _vacate(self, stream: Generation) -> None:
        self._drafted.pop(stream, None)
        last = self._running[-1]
        if last is not stream and last in self._drafted:
            self._draft.kv.move(last.slot, stream.slot, self._drafted[last])
        super()._vacate(stream)

    def step(self) -> list[Outcome]:
        """One reading step, or one round of drafts: then several outcomes a stream, in order."""
        self._fill_slots()
        ready = [stream for stream in self._running if not stream.reading and stream.may_run()]
        if not ready or any(stream.reading or stream.adjustment for stream in self._running):
            return super().step()
        drafts = self._write(ready)
        return self._judge(ready, drafts)

    # ------------------------------------------------------------------------------------------------- the draft model

    def _write(self, ready: list[Generation]) -> list[list[int]]:
        """What the draft model continues each stream with."""
        wanted = [min(DRAFT_TOKENS, s.request.max_tokens - s.produced - 1) for s in ready]
        drafts: list[list[int]] = [[] for _ in ready]
        live = [i for i, count in enumerate(wanted) if count > 0]
        if not live:
            return drafts
        segments = []
        for i in live:
            start = self._drafted.get(ready[i], 0)
            segments.append(Segment(ready[i].slot, start, ready[i].text(start, ready[i].fed + 1)))
        hidden = self._draft.forward(Batch([], [], [], segments)).hidden
        ends = torch.tensor([len(part.ids) for part in segments]).cumsum(0) - 1
        hidden = hidden[ends]
        while True:
            draws = [_at(ready[i], len(drafts[i])) for i in live]
            for i, token in zip(live, self._sampler.choose(self._draft.logits(hidden), draws).tolist(), strict=True):
                drafts[i].append(token)
            live = [i for i in live if len(drafts[i]) < wanted[i]]
            if not live:
                return drafts
            hidden = self._draft.forward(
                Batch(
                    [ready[i].slot for i in live],
                    [drafts[i][-1] for i in live],
                    [ready[i].fed + len(drafts[i]) for i in live],
                )
            ).hidden

    # --------------------------------------------------------------------------------------------------- the big model

    def _judge(self, ready: list[Generation], drafts: list[list[int]]) -> list[Outcome]:
        """Read the drafts, keep or correct them, and give every stream its tokens."""
        segments = [Segment(s.slot, s.fed, (s.last, *draft)) for s, draft in zip(ready, drafts, strict=True)]
        forward = self._decoder.forward(Batch([], [], [], segments))
        logits = self._decoder.logits(forward.hidden)
        draws = [_at(s, j) for s, draft in zip(ready, drafts, strict=True) for j in range(len(draft) + 1)]
        own = self._sampler.choose(logits, draws).tolist()
        rows: list[int] = []
        sampled: list[Generation] = []
        tokens: list[int] = []
        row = 0
        for stream, draft in zip(ready, drafts, strict=True):
            made = self._settled(stream, draft, own[row : row + len(draft) + 1], logits, draws, row)
            rows += range(row, row + len(made))
            sampled += [stream] * len(made)
            tokens += made
            row += len(draft) + 1
        hidden, logits = forward.hidden[rows], logits[rows]
        signs = torch.stack([stream.projection for stream in sampled if stream.projection is not None])
        raw = self._sampler.fingerprints(logits, hidden, torch.tensor(tokens), signs)
        routing = None if forward.routing is None else forward.routing[rows]
        made_rows = _Made(
            hidden, sampled, tokens, raw, routing_bytes(routing, len(rows)), self._likeliest(sampled, logits)
        )
        return self._give(ready, drafts, made_rows)

    def _settled(
        self, stream: Generation, draft: list[int], own: list[int], logits: torch.Tensor, draws: list[Draw], row: int
    ) -> list[int]:
        """The tokens this stream gets: drafts as far as they are kept, then one of the big model's own."""
        out: list[int] = []
        for j, honest in enumerate(own):
            token = honest
            if j < len(draft):
                self.drafts_total += 1
                if draft[j] == honest or self._near(logits[row + j], draws[row + j], draft[j]):
                    token = draft[j]
                    self.kept_total += 1
            out.append(token)
            if j == len(draft) or token != draft[j] or token in stream.stops:
                break
        return out

    def _near(self, logits: torch.Tensor, draw: Draw, token: int) -> bool:
        """Whether a token other than the best is kept."""
        if not 0 < self._tolerance < math.inf:
            return self._tolerance > 0
        scores = logits
        if draw.temperature_micro:
            scores = logits + draw.temperature_micro / MICRO * self._sampler.noise([draw.keys])[0]
        return float(scores.max() - scores[token]) <= self._tolerance

    def _give(self, ready: list[Generation], drafts: list[list[int]], made: _Made) -> list[Outcome]:
        before = {stream: stream.fed for stream in ready}
        outcomes: list[Outcome] = []
        for i, stream in enumerate(made.sampled):
            stream.fed += 1
            outcomes.append((stream, self._emit(stream, made, i)))
        for stream, draft in zip(ready, drafts, strict=True):
            if draft:
                self._drafted[stream] = min(before[stream] + len(draft), stream.fed)
        for stream, outcome in outcomes:
            if _is_last(outcome):
                self._release(stream)
        self.tokens_total += len(outcomes)
        return outcomes


def _is_last(outcome: EngineToken | bytes | EngineError) -> bool:
    return not isinstance(outcome, EngineToken) or outcome.finish is not FinishReason.OPEN


def _at(stream: Generation, ahead: int) -> Draw:
    """How the token `ahead` of the next one is drawn."""
    request, sampling = stream.request, stream.request.sampling
    position = len(request.prompt) + stream.produced + ahead
    return Draw.at(request.seed, position, sampling.temperature_micro, sampling.top_p_micro, sampling.top_k)
