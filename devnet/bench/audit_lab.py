"""Jobs served by an engine, honest or not, and looked at again by a replay: what the audit benchmark measures on.

Prompts are the demo model's held-out text; sampling is what people ask for. Every job has a seed of its own, so that a
run can be made again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import tokenizers
import torch

from devnet.bench.workload import SAMPLING
from incentives.evidence import SLASH_AT, Evidence, hard_fail
from incentives.verdicts import MAX_MARKS, VOID_MILLI, JobFinding, judge_output
from node.engine.engine import TorchEngine
from node.engine.generation import Generation
from node.engine.replay import TorchReplayer
from node.engine.scheduler import _Made
from node.ports import EngineRequest, EngineToken, ReplayRequest, Urgency
from protocol.messages import Profile
from protocol.transcript import Row
from protocol.units import AuditOutcome, JobId

HELD_OUT: Final = Path(__file__).parents[1] / "model" / "heldout.txt"
PROMPT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Served:
    """One job and what came out. `hidden`: [tokens, hidden] fp32, the states its fingerprints were made from."""

    request: EngineRequest
    tokens: tuple[EngineToken, ...]
    hidden: torch.Tensor

    @property
    def rows(self) -> tuple[Row, ...]:
        """As a transcript has them."""
        return tuple(Row(t.token_id, t.logprob, t.projection, t.routing) for t in self.tokens)


@dataclass(frozen=True, slots=True)
class Looked:
    """One job audited. `caught_at`: output tokens until that job alone condemns, 0 when it does not."""

    finding: JobFinding
    caught_at: int


class Jobs:
    """Numbered jobs over the held-out text of one model directory's tokenizer."""

    def __init__(self, model_dir: Path, prompt_tokens: int = PROMPT_TOKENS, output_tokens: int = OUTPUT_TOKENS) -> None:
        tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._text = tuple(tokenizer.encode(HELD_OUT.read_text()).ids)
        self._prompt, self._output = prompt_tokens, output_tokens

    def job(self, seed: int, number: int) -> EngineRequest:
        """Job `number` of the stream of jobs called `seed`."""
        name = hashlib.sha256(b"audit bench" + seed.to_bytes(8, "big") + number.to_bytes(8, "big")).digest()
        start = int.from_bytes(name[:8], "big") % (len(self._text) - self._prompt)
        return EngineRequest(self._text[start : start + self._prompt], name, self._output, SAMPLING)


@contextmanager
def recorded(engine: TorchEngine) -> Iterator[dict[bytes, list[torch.Tensor]]]:
    """By seed, the final hidden state of each token the started engine emits meanwhile."""
    scheduler = engine._scheduler
    assert scheduler is not None
    states: dict[bytes, list[torch.Tensor]] = {}
    sampler, newest = scheduler._sampler, [torch.empty(0)]
    fingerprints, emit = sampler.fingerprints, scheduler._emit

    def printed(logits: torch.Tensor, hidden: torch.Tensor, chosen: torch.Tensor, projections: torch.Tensor) -> bytes:
        newest[0] = hidden.float().clone()
        return fingerprints(logits, hidden, chosen, projections)

    def emitted(stream: Generation, made: _Made, row: int) -> object:
        states.setdefault(stream.request.seed, []).append(newest[0][row])
        return emit(stream, made, row)

    vars(sampler)["fingerprints"], vars(scheduler)["_emit"] = printed, emitted
    try:
        yield states
    finally:
        del vars(sampler)["fingerprints"], vars(scheduler)["_emit"]


async def serve(engine: TorchEngine, requests: Sequence[EngineRequest]) -> list[Served]:
    """All at once, as far as the engine's slots go."""

    async def one(request: EngineRequest) -> tuple[EngineToken, ...]:
        stream = await engine.submit(request)
        return tuple([token async for token in stream])

    with recorded(engine) as states:
        outputs = await asyncio.gather(*(one(request) for request in requests))
    return [
        Served(request, tokens, torch.stack(states[request.seed][: len(tokens)]))
        for request, tokens in zip(requests, outputs, strict=True)
    ]


async def serve_preempting(engine: TorchEngine, requests: Sequence[EngineRequest]) -> list[Served]:
    """The first half as flexible work that the second half, urgent, displaces in the middle."""
    half = len(requests) // 2
    flexible = [replace(request, urgency=Urgency.FLEX) for request in requests[:half]]
    urgent = [replace(request, urgency=Urgency.PRIORITY) for request in requests[half:]]
    begun = asyncio.Event()

    async def one(request: EngineRequest) -> tuple[EngineToken, ...]:
        if request.urgency is Urgency.PRIORITY:
            await begun.wait()
        out = []
        async for token in await engine.submit(request):
            out.append(token)
            if request.urgency is Urgency.FLEX and len(out) == 4:
                begun.set()
        begun.set()
        return tuple(out)

    with recorded(engine) as states:
        outputs = await asyncio.gather(*(one(request) for request in (*flexible, *urgent)))
    return [
        Served(request, tokens, torch.stack(states[request.seed][: len(tokens)]))
        for request, tokens in zip((*flexible, *urgent), outputs, strict=True)
    ]


async def look(replayer: TorchReplayer, served: Served) -> Looked:
    """Audit one job: the stop rule, then every token."""
    request, rows = served.request, served.rows
    replay = await replayer.replay(ReplayRequest(request.prompt, rows, request.seed, request.sampling, request.options))
    job_id, ids = JobId(request.seed), [row.token_id for row in rows]
    early = [index for index in replay.ends if index < len(rows) - 1]
    if early:
        detail = f"output goes on after the stop token at {early[0]}"
        return Looked(JobFinding(job_id, AuditOutcome.FORGED, len(rows), detail=detail), early[0] + 2)
    profile = replayer.profile
    numbers = (replay.margins, replay.logprobs, replay.projections, replay.routing)
    finding = judge_output(profile, job_id, ids, *numbers)
    if finding.outcome is not AuditOutcome.IMPROBABLE:
        return Looked(finding, 0)
    marks: list[tuple[int, bool]] = []  # every flag, of which a finding tells the worst only
    for start in range(0, len(ids), MAX_MARKS):
        part = slice(start, start + MAX_MARKS)
        found = judge_output(profile, job_id, ids[part], *(values[part] for values in numbers)).marks  # type: ignore[arg-type]
        marks += [(start + mark.index, mark.margin_milli >= VOID_MILLI) for mark in found]
    return Looked(finding, _caught_at(profile, marks))


def _caught_at(profile: Profile, marks: Sequence[tuple[int, bool]]) -> int:
    """Length of the shortest beginning of an output whose flags, (index, void), condemn it."""
    voids = 0
    for flags, (index, void) in enumerate(marks, 1):
        voids += void
        if hard_fail(index + 1, flags, voids, profile.flag_ppm):
            return index + 1
    raise ValueError("a job that was condemned has a beginning that condemns it")


@dataclass(slots=True)
class Watched:
    """One provider's audits so far, every job a case of its own. `caught`: by which check, once it is.

    `tokens`: audited until then, of the last job no more than it took; `replayed` and `flags`: of whole jobs.
    """

    evidence: Evidence = field(default_factory=Evidence)
    tokens: int = 0
    replayed: int = 0
    jobs: int = 0
    flags: int = 0
    caught: str = ""

    def take(self, profile: Profile, looked: Looked) -> None:
        """With one more audited job."""
        found = looked.finding
        self.jobs += 1
        self.replayed += found.tokens
        self.flags += found.flags
        if looked.caught_at:
            self.tokens += looked.caught_at
            self.caught = "stop rule" if found.outcome is AuditOutcome.FORGED else "hard fail"
            return
        self.tokens += found.tokens
        self.evidence = self.evidence.after(found.tokens, found.flags, found.voids, profile.flag_ppm)
        if self.evidence.value >= SLASH_AT:
            self.caught = "evidence"
