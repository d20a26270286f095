"""What a hostile or unlucky peer tries with kinds, options, rights and caches: it costs that peer, and nobody else."""

from __future__ import annotations

import asyncio
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from incentives.ledger import Role
from node.client.attempt import Attempt
from node.jobstream import JobStream
from node.ports import (
    EngineRequest,
    InsufficientFunds,
    JobFailed,
    JobStarted,
    JobTokens,
    JobVectors,
    NoProvider,
    UnfitRequest,
)
from protocol.errors import Refused
from protocol.frames import Ack
from protocol.options import JobOptions
from protocol.units import INCREMENT_TOKENS, WEI_PER_TALLY, FinishReason, JobKind, Tier, Verifiability, Wei
from tests.spine.lab import Buyer, Market, Seller, idle, run, spec
from tests.spine.test_endings import TOKEN, settle
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
        seller, buyer = await market.seller(), await market.buyer()
        seller.cheats = True
        honest = EngineTwin.vector

        def lie(self: EngineTwin, token_ids: Any, size: int = 16) -> bytes:
            return vector if len(token_ids) == 5 else honest(self, token_ids, size)

        monkeypatch.setattr(EngineTwin, "vector", lie)
        seen: list[bytes] = []
        with pytest.raises(JobFailed):
            async for event in buyer.router.run(texts(4, 5)):
                seen += event.vectors if isinstance(event, JobVectors) else ()
        assert vector not in seen and buyer.accounts.spent == 0


async def test_no_more_is_embedded_at_once_than_a_payer_may_cost_that_vanishes() -> None:
    async with Market() as market:
        seller = await market.seller()
        buyer = await market.buyer()
        with pytest.raises(Refused, match="8192 tokens together"):
            await run(buyer, spec(0, (5,) * 8_193, kind=JobKind.EMBED, options=JobOptions(inputs=(4_096, 4_096, 1))))
        assert seller.engine.read == 0 and buyer.accounts.spent == 0
        await run(buyer, spec(0, (5,) * 8_192, kind=JobKind.EMBED, options=JobOptions(inputs=(4_096, 4_096))))


async def test_a_vector_that_no_frame_holds_is_refused_before_it_is_computed() -> None:
    async with Market() as market:
        engine = EngineTwin()
        engine.hidden_size = 16_384
        seller, buyer = await market.seller(engine=engine), await market.buyer()
        with pytest.raises(Refused, match="up to 15360 dimensions"):
            await run(buyer, texts(4))
        assert engine.read == 0 and await seller.store.jobs(Role.PROVIDER) == []
        _, done, _ = await run(buyer, texts(4, dimensions=16))
        assert done.finish is FinishReason.STOP


async def test_texts_that_hold_a_reasoning_marker_are_embedded_like_any_others() -> None:
    async with Market() as market:
        seller = await market.seller(engine=thinking(EngineTwin(), 3000, 3001))
        buyer = await market.buyer()
        job = spec(0, (5, 3000, 6), kind=JobKind.EMBED, options=JobOptions(inputs=(3,)))
        _, done, events = await run(buyer, job)
        vectors = [vector for event in events if isinstance(event, JobVectors) for vector in event.vectors]
        assert vectors == [seller.engine.vector((5, 3000, 6))] and done.reasoning_tokens == 0


# ------------------------------------------------------------------------------------------------- ends and failover


class StuckEngine(EngineTwin):
    """Finds after each 20 tokens that the grammar leads nowhere."""

    async def _generate(self, request: EngineRequest) -> Any:
        before = self.emitted
        async for token in super()._generate(request):
            if self.emitted > before + 20:
                raise UnfitRequest("the grammar could not be followed any further")
            yield token


async def test_a_grammar_that_breaks_off_before_each_receipt_buys_nothing_for_long() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(engine=StuckEngine()), await market.buyer()
        with pytest.raises(InsufficientFunds):
            for _ in range(8):
                with pytest.raises(JobFailed, match="could not be followed"):
                    await run(buyer, spec(64, tuple(range(10, 2_010)), private=True))
                await idle(seller)
        assert 2_000 <= seller.engine.read <= 4 * 2_000
        (last, *_) = [job.closed for job in await seller.store.jobs(Role.PROVIDER)]
        assert last is FinishReason.ERROR


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


class ChattyEngine(EngineTwin):
    """Serves through another server, and in its second increment reports more alternatives than were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.verifiability = Verifiability.LOGPROB

    async def _generate(self, request: EngineRequest) -> Any:
        before = self.emitted
        async for token in super()._generate(request):
            many = 3 if self.emitted - before == INCREMENT_TOKENS + 8 else 1
            yield replace(token, alternatives=((1, bytes(2)),) * many)


async def test_tokens_that_were_not_shown_are_not_continued_after() -> None:
    async with Market() as market:
        await market.seller(engine=ChattyEngine(), completion_price=TOKEN // 2)
        honest = EngineTwin()
        honest.verifiability = Verifiability.LOGPROB
        await market.seller(engine=honest)
        buyer = await market.buyer()
        tokens, done, events = await run(buyer, spec(100, options=JobOptions(alternatives=1)))
        assert len([event for event in events if isinstance(event, JobStarted)]) == 2
        assert len(tokens) == 100 == done.completion_tokens, "no hole in the text"


async def test_a_limit_above_every_amount_is_no_providers_fault() -> None:
    async with Market() as market:
        _, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(10, price_ceiling=Wei(1 << 100)))
        assert done.cost and not buyer.router._failures()


async def test_jobs_of_every_kind_at_once_on_one_channel_come_out_to_the_wei() -> None:
    async with Market() as market:
        terms = {"reserved_discount_bps": 2_500, "flex_bps": 5_000, "embedding_price": 10**9, "per_request": 13}
        seller = await market.seller(engine=EngineTwin(slots=64), **terms)
        buyer = await market.buyer(deposit=10 * WEI_PER_TALLY)
        right = await reserve(market, seller, buyer, 10**6)
        jobs = []
        for i in range(6):
            jobs += [spec(40 + i, PROMPT), texts(4, 5 + i), spec(33, reservation=right), spec(10, PROMPT, private=True)]
            jobs.append(spec(50, kind=JobKind.BATCH, tier=Tier.FLEX))
        outcomes = await asyncio.gather(*(run(buyer, job) for job in jobs))
        await idle(seller)
        total = sum(done.cost for _, done, _ in outcomes)
        assert buyer.accounts.spent == total == await settle(seller)
        for channel in (
            buyer.accounts.channel(seller.wallet.address),
            seller.provider.books.channel(buyer.accounts.session.address),
        ):
            assert channel.owed == total and not channel.reserved


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


async def test_a_provider_that_lost_its_cache_in_a_restart_charges_what_it_promised() -> None:
    """Else each of its next receipts would be evidence against it, and none of them paid."""
    async with Market() as market:
        seller, buyer = await market.seller(cache_ttl_s=600), await market.buyer()
        _, first, _ = await run(buyer, spec(10, PROMPT))
        await idle(seller)
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        keys = (seller.wallet, seller.node_key)
        again = await market.seller(cache_ttl_s=600, store=seller.store, keys=keys, engine=EngineTwin())
        await buyer.router._directory.refresh()
        _, second, _ = await run(buyer, spec(10, (*PROMPT, 7, 8)))
        assert again.engine.hit == 0 and second.cached_tokens == 96
        assert buyer.accounts.spent == first.cost + second.cost
        _, third, _ = await run(buyer, spec(10, tuple(reversed(PROMPT))))
        assert third.cached_tokens == 0, "what was not promised is charged in full"
