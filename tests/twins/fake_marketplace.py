"""A marketplace that plays a script: what providers would do, without providers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from node.ports import (
    JobDone,
    JobEvent,
    JobPaid,
    JobSpec,
    JobStarted,
    JobTokens,
    MarketEntry,
    ModelCard,
    NoProvider,
)
from protocol.errors import TallyError
from protocol.messages import Tariff
from protocol.units import Address, Digest, FinishReason, JobId, Wei

PROVIDER = Address(b"\xaa" * 20)
WEI_PER_TOKEN = 5
STOPPED = FinishReason.STOP


@dataclass(frozen=True)
class Start:
    """A provider accepts; a second one in a script is a failover."""

    provider: Address = PROVIDER


@dataclass(frozen=True)
class Say:
    """Tokens arrive in one batch; an increment is vouched for when `paid`."""

    token_ids: tuple[int, ...]
    paid: bool = True


@dataclass(frozen=True)
class Hold:
    """Nothing happens until `go` is set. `reached` is set when the script gets here."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    reached: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Fail:
    error: Exception


@dataclass(frozen=True)
class Finish:
    """The final receipt. `cached`, `reasoning`: tokens of these kinds."""

    reason: FinishReason = STOPPED
    cached: int = 0
    reasoning: int = 0


Step = Start | Say | Hold | Fail | Finish


def tariff() -> Tariff:
    ones = [1] * 22
    return Tariff(
        PROVIDER, 1, b"\x11" * 32, 2, 1, WEI_PER_TOKEN, WEI_PER_TOKEN, *ones[:17], 1_700_000_000, 1_900_000_000
    )


class FakeMarketplace:
    """Plays `script` for every job. `specs`: jobs asked for. `closed`: how many were closed before their end."""

    def __init__(self, card: ModelCard, script: Sequence[Step] = (), *, max_output: int = 2048) -> None:
        self.cards = {card.model: card}
        self.script = tuple(script)
        self.max_output = max_output
        self.specs: list[JobSpec] = []
        self.closed = 0
        self.was_closed = asyncio.Event()
        self.card_error: TallyError | None = None

    async def market(self) -> list[MarketEntry]:
        return [
            MarketEntry(
                model=card.model,
                provider=PROVIDER,
                peer_id="peer",
                tariff=tariff(),
                slots=4,
                load_bps=0,
                max_context=card.max_context,
                max_output=self.max_output,
                region="",
                expires_at=1_900_000_000,
            )
            for card in self.cards.values()
        ]

    async def card(self, model: str) -> ModelCard:
        if self.card_error is not None:
            raise self.card_error
        if model not in self.cards:
            raise NoProvider(f"nobody offers {model!r}.")
        return self.cards[model]

    async def status(self) -> dict[str, object]:
        return {"peers": 3, "channels": []}

    async def run(self, spec: JobSpec) -> AsyncIterator[JobEvent]:
        self.specs.append(spec)
        ended = False
        try:
            async for event in self._play(spec, len(self.specs)):
                ended = isinstance(event, JobDone)
                yield event
        except Exception:
            ended = True
            raise
        finally:
            if not ended:
                self.closed += 1
                self.was_closed.set()

    async def _play(self, spec: JobSpec, number: int) -> AsyncIterator[JobEvent]:
        jobs: list[JobId] = []
        tokens = 0
        for step in (Start(), *self.script):
            match step:
                case Start(provider):
                    jobs.append(JobId(hashlib.sha256(bytes([number, len(jobs)])).digest()))
                    yield JobStarted(jobs[-1], provider, tariff(), failover=len(jobs) > 1)
                case Say(token_ids, paid):
                    tokens += len(token_ids)
                    yield JobTokens(token_ids, tuple(-0.5 for _ in token_ids))
                    if paid:
                        yield JobPaid(Wei(tokens * WEI_PER_TOKEN))
                case Hold(go, reached):
                    reached.set()
                    await go.wait()
                case Fail(error):
                    raise error
                case Finish(reason, cached, reasoning):
                    yield JobDone(
                        finish=reason,
                        prompt_tokens=len(spec.prompt),
                        cached_tokens=cached,
                        completion_tokens=tokens,
                        reasoning_tokens=reasoning,
                        ste_micro=tokens * 1000,
                        cost=Wei(tokens * WEI_PER_TOKEN + 1),
                        refund=Wei(0),
                        job_ids=tuple(jobs),
                        receipts=tuple(Digest(hashlib.sha256(job).digest()) for job in jobs),
                    )
