"""A marketplace that plays a script: what providers would do, without providers."""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from node.ports import (
    JobDone,
    JobEvent,
    JobPaid,
    JobSpec,
    JobStarted,
    JobTokens,
    JobVectors,
    MarketEntry,
    ModelCard,
    NoProvider,
)
from protocol.errors import TallyError
from protocol.messages import Tariff
from protocol.units import BPS, Address, Digest, FinishReason, JobId, JobKind, Verifiability, Wei

PROVIDER = Address(b"\xaa" * 20)
WEI_PER_TOKEN = 5
STOPPED = FinishReason.STOP


@dataclass(frozen=True)
class Start:
    """A provider accepts; a second one in a script is a failover."""

    provider: Address = PROVIDER


@dataclass(frozen=True)
class Say:
    """Tokens arrive in one batch; an increment is vouched for when `paid`. `likeliest`: the same at every place."""

    token_ids: tuple[int, ...]
    paid: bool = True
    likeliest: tuple[tuple[int, float], ...] = ()


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
    """The final receipt. `cached`, `reasoning`: tokens of these kinds. `refund`: wei, for a missed promise."""

    reason: FinishReason = STOPPED
    cached: int = 0
    reasoning: int = 0
    refund: int = 0


@dataclass(frozen=True)
class Embed:
    """A vector for each text that was asked for."""


DIMENSIONS = 8


def vector_of(text: tuple[int, ...], dimensions: int = 0) -> bytes:
    """A unit vector that follows from the text, fp32 little-endian."""
    digest = hashlib.sha256(repr(text).encode()).digest()
    raw = [byte - 127.5 for byte in digest[: dimensions or DIMENSIONS]]
    length = math.sqrt(sum(number * number for number in raw))
    return struct.pack(f"<{len(raw)}f", *(number / length for number in raw))


Step = Start | Say | Hold | Fail | Finish | Embed


def tariff(**changes: int) -> Tariff:
    """Five wei a token, one for a request, every tier at x1."""
    values: dict[str, int] = dict.fromkeys(Tariff.__dataclass_fields__, 0) | {
        "sequence": 1,
        "prompt_price": 2,
        "cached_price": 1,
        "completion_price": WEI_PER_TOKEN,
        "reasoning_price": WEI_PER_TOKEN,
        "embedding_price": 3,
        "per_request": 1,
        "flex_bps": BPS,
        "standard_bps": BPS,
        "priority_bps": BPS,
        "long_context_threshold": 1 << 20,
        "long_context_bps": BPS,
        "privacy_bps": BPS,
        "base_min_bps": BPS,
        "base_max_bps": BPS,
        "valid_from": 1_700_000_000,
        "valid_until": 1_900_000_000,
    }
    return Tariff(**{**values, "provider": PROVIDER, "profile_id": b"\x11" * 32} | changes)  # type: ignore[arg-type]


class FakeMarketplace:
    """Plays `script` for every job. `specs`: jobs asked for. `closed`: how many were closed before their end."""

    def __init__(self, card: ModelCard, script: Sequence[Step] = (), *, max_output: int = 2048) -> None:
        self.cards = {card.model: card}
        self.script = tuple(script)
        self.max_output = max_output
        self.tariff = tariff()
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
                tariff=self.tariff,
                slots=4,
                load_bps=0,
                max_context=card.max_context,
                max_output=self.max_output,
                region="",
                expires_at=1_900_000_000,
                profile=card.profile_id,
                verifiability=Verifiability.REPLAY,
                base_bps=BPS,
            )
            for card in self.cards.values()
        ]

    async def card(self, model: str) -> ModelCard:
        if self.card_error is not None:
            raise self.card_error
        if model not in self.cards:
            raise NoProvider(f"nobody offers {model!r}.")
        return self.cards[model]

    async def card_of(self, profile: Digest) -> ModelCard:
        for card in self.cards.values():
            if card.profile_id == profile:
                return card
        raise NoProvider(f"nobody offers profile 0x{profile.hex()}.")

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
                    yield JobStarted(jobs[-1], provider, self.tariff, failover=len(jobs) > 1)
                case Say(token_ids, paid, likeliest):
                    tokens += len(token_ids)
                    alternatives = tuple(likeliest[: spec.options.alternatives] for _ in token_ids)
                    yield JobTokens(token_ids, tuple(-0.5 for _ in token_ids), alternatives if likeliest else ())
                    if paid:
                        yield JobPaid(Wei(tokens * WEI_PER_TOKEN))
                case Embed():
                    assert spec.kind is JobKind.EMBED and sum(spec.options.inputs) == len(spec.prompt)
                    at = 0
                    for length in spec.options.inputs:
                        text = spec.prompt[at : at + length]
                        at += length
                        yield JobVectors((vector_of(text, spec.options.dimensions),))
                case Hold(go, reached):
                    reached.set()
                    await go.wait()
                case Fail(error):
                    raise error
                case Finish(reason, cached, reasoning, refund):
                    yield JobDone(
                        finish=reason,
                        prompt_tokens=len(spec.prompt),
                        cached_tokens=cached,
                        completion_tokens=tokens,
                        reasoning_tokens=reasoning,
                        ste_micro=tokens * 1000,
                        cost=Wei(tokens * WEI_PER_TOKEN + 1),
                        refund=Wei(refund),
                        job_ids=tuple(jobs),
                        receipts=tuple(Digest(hashlib.sha256(job).digest()) for job in jobs),
                    )
