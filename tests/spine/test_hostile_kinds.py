"""What a hostile or unlucky peer tries with kinds, options, rights and caches: it costs that peer, and nobody else."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from incentives.ledger import Role
from node.client.attempt import Attempt
from node.jobstream import JobStream
from node.ports import EngineRequest, JobFailed, JobTokens, JobVectors, NoProvider
from protocol.errors import Refused
from protocol.frames import Ack
from protocol.options import JobOptions
from protocol.units import INCREMENT_TOKENS, FinishReason, JobKind
from tests.spine.lab import Buyer, Market, Seller, idle, run, spec
from tests.spine.test_metering import PROMPT, texts, thinking
from tests.spine.test_reservations import reserve
from tests.twins.engine_twin import EOS, EngineTwin


async def running(buyer: Buyer, *sellers: Seller) -> Seller:
    """Whoever serves the buyer's newest job."""
    newest = (await buyer.store.jobs(Role.CLIENT))[-1]
    return next(seller for seller in sellers if seller.wallet.address == newest.request.provider)


# --------------------------------------------------------------------------------------------------------- reservations


async def test_a_holder_that_breaks_the_protocol_at_each_end_gets_no_more_than_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(reserved_discount_bps=5_000), await market.buyer()
        right = await reserve(market, seller, buyer)
        send = JobStream.send

        async def spoil(self: JobStream, *outgoing: Any) -> None:
            await send(self, *(structs.replace(f, signature=bytes(65)) if isinstance(f, Ack) else f for f in outgoing))

        monkeypatch.setattr(JobStream, "send", spoil)
        with pytest.raises(Refused, match="fits again in"):
            for _ in range(5):
                await run(buyer, spec(40, reservation=right))
                await idle(seller)


async def test_a_reservation_does_not_widen_who_may_take_the_job() -> None:
    async with Market() as market:
        seller, other = await market.seller(), await market.seller()
        buyer = await market.buyer()
        right = await reserve(market, seller, buyer, 10**6)
        with pytest.raises(NoProvider, match="reservation"):
            await run(buyer, spec(10, reservation=right, only=frozenset({other.wallet.address})))
        await run(buyer, spec(10, reservation=right, only=frozenset({seller.wallet.address})))
        assert await other.store.jobs(Role.PROVIDER) == []


# ----------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize(
    "vector",
    [
        struct.pack("<16f", *([math.nan] * 16)),
        struct.pack("<16f", math.inf, *([0.0] * 15)),
        struct.pack("<16f", *([0.0] * 16)),
        struct.pack("<16f", *([1.0] * 16)),
        struct.pack("<f", 1.0),
    ],
)
async def test_a_vector_that_is_no_unit_vector_of_the_first_ones_size_is_neither_shown_nor_paid(
    vector: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Market() as market:
        _, buyer = await market.seller(), await market.buyer()
        honest = EngineTwin.vector

        def lie(self: EngineTwin, token_ids: Any, size: int = 16) -> bytes:
            return vector if len(token_ids) == 5 else honest(self, token_ids, size)

        monkeypatch.setattr(EngineTwin, "vector", lie)
        seen: list[bytes] = []
        with pytest.raises(JobFailed):
            async for event in buyer.router.run(texts(4, 5)):
                seen += event.vectors if isinstance(event, JobVectors) else ()
        assert vector not in seen and buyer.accounts.spent == 0


async def test_texts_that_hold_a_reasoning_marker_are_embedded_like_any_others() -> None:
    async with Market() as market:
        seller = await market.seller(engine=thinking(EngineTwin(), 3000, 3001))
        buyer = await market.buyer()
        job = spec(0, (5, 3000, 6), kind=JobKind.EMBED, options=JobOptions(inputs=(3,)))
        _, done, events = await run(buyer, job)
        vectors = [vector for event in events if isinstance(event, JobVectors) for vector in event.vectors]
        assert vectors == [seller.engine.vector((5, 3000, 6))] and done.reasoning_tokens == 0


# ------------------------------------------------------------------------------------------------- ends and failover


class EndlessEngine(EngineTwin):
    """Ends its text with the first increment and says that it goes on."""

    def token(self, seed: bytes, position: int) -> int:
        return EOS if position == 4 + INCREMENT_TOKENS - 1 else 50

    async def _generate(self, request: EngineRequest) -> Any:
        async for token in super()._generate(request):
            yield replace(token, finish=FinishReason.OPEN)
        yield replace(token, token_id=50)


async def test_an_interim_receipt_after_the_end_of_the_text_is_not_paid() -> None:
    """Vouched for, it would make a continuation write on after the end."""
    async with Market() as market:
        await market.seller(engine=EndlessEngine())
        buyer = await market.buyer()
        with pytest.raises(JobFailed, match="finish_reason"):
            await run(buyer, spec(100))
        assert buyer.accounts.spent == 0


async def test_reasoning_is_counted_over_all_the_providers_of_a_text() -> None:
    async with Market() as market:
        sellers = []
        for _ in range(2):
            engine = thinking(EngineTwin(), 3000, 3001)
            engine.token = lambda seed, position: {6: 3000, 60: 3001}.get(position, 50)  # type: ignore[method-assign]
            sellers.append(await market.seller(engine=engine))
        buyer = await market.buyer()
        got, stopped = 0, False
        async for event in buyer.router.run(spec(80)):
            if isinstance(event, JobTokens):
                got += len(event.token_ids)
                if got > 40 and not stopped:
                    stopped = True
                    await (await running(buyer, *sellers)).transport.stop()
        assert stopped and got == 80 and len(event.job_ids) == 2  # type: ignore[union-attr]
        assert event.reasoning_tokens == 60 - 6 + 1  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------- cache


async def test_a_cache_salt_in_a_private_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        monkeypatch.setattr(Attempt, "_cache_salt", lambda self: b"s" * 32)
        for job in (spec(3, PROMPT, private=True), texts(40)):
            with pytest.raises((Refused, NoProvider, JobFailed)):
                await run(buyer, job)
        assert seller.engine.read == 0 and buyer.accounts.spent == 0
