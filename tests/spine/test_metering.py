"""What is counted and charged beyond prompt and completion: kinds, cache hits, reasoning, routing, tiers, free."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from typing import Any

import pytest

from incentives.ledger import Role
from node.ports import (
    JobDone,
    JobEvent,
    JobFailed,
    JobSpec,
    JobTokens,
    JobVectors,
    NoProvider,
    ReceiptRow,
    Urgency,
)
from protocol.cache import BLOCK_TOKENS, block_heads, prompt_head
from protocol.errors import Refused
from protocol.messages import WorkReceipt
from protocol.options import JobOptions, decode_options, options_hash
from protocol.units import BPS, WEI_PER_TALLY, ZERO_DIGEST, FinishReason, JobKind, Tier, Verifiability, Wei
from protocol.work import Work
from tests.spine.lab import MODEL, Buyer, Market, idle, run, spec, until
from tests.spine.test_endings import TOKEN, settle
from tests.twins.engine_twin import EngineTwin, profile

PROMPT = tuple(range(10, 110))
READ, HIT = 10**10, 10**9


async def final(buyer: Buyer, job_id: bytes) -> WorkReceipt:
    rows: list[ReceiptRow] = await buyer.store.receipts(role=Role.CLIENT, job_id=job_id, final_only=True)  # type: ignore[arg-type]
    (row,) = rows
    return row.receipt


async def last_receipt(buyer: Buyer, done: JobDone) -> WorkReceipt:
    return await final(buyer, done.job_ids[-1])


# ----------------------------------------------------------------------------------------------------------- embeddings


def texts(*lengths: int, **options: Any) -> JobSpec:
    prompt = tuple(range(3, 3 + sum(lengths)))
    return spec(0, prompt, kind=JobKind.EMBED, options=JobOptions(inputs=lengths, **options))


async def test_an_embedding_job_is_read_text_by_text_and_paid_at_its_own_price() -> None:
    async with Market() as market:
        seller = await market.seller(embedding_price=7, completion_price=10**12, per_request=11)
        buyer = await market.buyer()
        job = texts(4, 30, 1)
        _, done, events = await run(buyer, job)
        vectors = [vector for event in events if isinstance(event, JobVectors) for vector in event.vectors]
        prompt = job.prompt
        assert vectors == [seller.engine.vector(ids) for ids in (prompt[:4], prompt[4:34], prompt[34:])]
        receipt = await last_receipt(buyer, done)
        assert (receipt.kind, receipt.is_final, receipt.step) == (JobKind.EMBED, True, 1)
        assert (receipt.prompt_tokens, receipt.completion_tokens, receipt.cached_tokens) == (35, 0, 0)
        assert receipt.ste_micro > 0 and receipt.leaves_root != ZERO_DIGEST
        assert done.finish is FinishReason.STOP
        assert await settle(seller) == done.cost == 35 * 7 + 11


async def test_dimensions_cut_the_vectors() -> None:
    async with Market() as market:
        await market.seller()
        buyer = await market.buyer()
        _, _, events = await run(buyer, texts(4, 4, dimensions=5))
        sizes = {len(vector) for event in events if isinstance(event, JobVectors) for vector in event.vectors}
        assert sizes == {20}


@pytest.mark.parametrize(
    "job",
    [
        texts(4, dimensions=17),
        spec(0, (1, 2, 3), kind=JobKind.EMBED, options=JobOptions(inputs=(2,))),
        spec(0, (1, 2, 3), kind=JobKind.EMBED, options=JobOptions(inputs=(3, 0))),
        spec(0, (1, 2, 3), kind=JobKind.EMBED),
        spec(5, (1, 2, 3), options=JobOptions(inputs=(3,))),
        texts(4, min_tokens=1),
    ],
)
async def test_an_embedding_job_that_does_not_add_up_is_refused_unpaid(job: JobSpec) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        with pytest.raises(Refused):
            await run(buyer, job)
        assert buyer.accounts.spent == 0 and await seller.store.jobs(Role.PROVIDER) == []


async def test_a_provider_that_dies_between_vectors_is_followed_by_one_that_gives_the_rest() -> None:
    async with Market() as market:
        first, second = await market.seller(), await market.seller()
        buyer = await market.buyer()
        got: list[bytes] = []
        stopped = False
        async for event in buyer.router.run(texts(4, 5, 6)):
            if isinstance(event, JobVectors):
                got += event.vectors
                if not stopped:
                    stopped = True
                    jobs = await buyer.store.jobs(Role.CLIENT)
                    who = next(s for s in (first, second) if not jobs or s.wallet.address == jobs[-1].request.provider)
                    await who.transport.stop()
        ids = texts(4, 5, 6).prompt
        assert got == [first.engine.vector(part) for part in (ids[:4], ids[4:9], ids[9:])]


# ------------------------------------------------------------------------------------------------------------ batch


async def test_batch_work_runs_at_the_flex_price_behind_everything_else() -> None:
    async with Market() as market:
        seller = await market.seller(flex_bps=BPS // 2)
        buyer = await market.buyer()
        seen: list[Urgency] = []
        submit = seller.engine.submit

        async def watched(request: Any) -> Any:
            seen.append(request.urgency)
            return await submit(request)

        seller.engine.submit = watched  # type: ignore[method-assign]
        _, done, _ = await run(buyer, spec(40, kind=JobKind.BATCH, tier=Tier.FLEX))
        receipt = await last_receipt(buyer, done)
        assert (receipt.kind, receipt.tier) == (JobKind.BATCH, Tier.FLEX) and seen == [Urgency.BATCH]
        assert await settle(seller) == done.cost == (4 * READ + 40 * TOKEN) // 2


async def test_batch_work_that_waits_for_its_turn_is_not_taken_for_a_stall() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer(stall_s=0.2)
        gate = asyncio.Event()

        async def pace(at: int) -> None:
            await gate.wait()

        seller.engine.pace = pace
        batch = asyncio.create_task(run(buyer, spec(5, kind=JobKind.BATCH, tier=Tier.FLEX)))
        await until(lambda: seller.provider.server.running == 1)
        with pytest.raises(JobFailed, match="sent nothing"):
            await run(buyer, spec(5))
        gate.set()
        tokens, _, _ = await batch
        assert len(tokens) == 5


# ------------------------------------------------------------------------------------------------------- prefix cache


async def test_a_hit_is_priced_as_cached_and_the_receipt_proves_which_prefix() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, first, _ = await run(buyer, spec(10, PROMPT))
        _, second, _ = await run(buyer, spec(10, (*PROMPT, 7, 8)))
        a, b = await last_receipt(buyer, first), await last_receipt(buyer, second)
        assert (a.cached_tokens, b.cached_tokens) == (0, 96) and a.is_kept and b.is_kept
        assert b.cache_head == a.prompt_head == b.prompt_head != ZERO_DIGEST
        assert second.cached_tokens == 96
        assert await settle(seller) == first.cost + second.cost
        assert second.cost == 96 * HIT + 6 * READ + 10 * TOKEN


async def test_a_cache_is_never_shared_between_payers_or_salts_and_private_jobs_have_none() -> None:
    async with Market() as market:
        await market.seller()
        one, other = await market.buyer(), await market.buyer()
        hits = []
        for buyer, job in [
            (one, spec(3, PROMPT)),
            (other, spec(3, PROMPT)),
            (one, spec(3, PROMPT, cache_salt=b"s" * 32)),
            (one, spec(3, PROMPT, private=True)),
            (one, spec(3, PROMPT)),
        ]:
            _, done, _ = await run(buyer, job)
            hits.append(done.cached_tokens)
        assert hits == [0, 0, 0, 0, 96]


async def test_a_promised_hit_that_is_charged_in_full_is_not_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(cache_ttl_s=600), await market.buyer()
        _, first, _ = await run(buyer, spec(10, PROMPT))
        seller.engine._held.clear()  # evicted, against the promise
        with pytest.raises(JobFailed, match="cached_tokens"):
            await run(buyer, spec(10, (*PROMPT, 7, 8)))
        assert buyer.accounts.spent == first.cost


async def test_an_eviction_that_breaks_no_promise_is_a_miss_like_any_other() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(cache_ttl_s=600), await market.buyer()
        await run(buyer, spec(10, PROMPT))
        seller.engine._held.clear()
        market.clock.ahead_s += 601
        await seller.provider.offering.renew()
        await buyer.router._directory.refresh()
        _, done, _ = await run(buyer, spec(10, PROMPT))
        assert done.cached_tokens == 0


async def test_a_provider_that_invents_a_hit_it_cannot_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()

        def look_up(self: EngineTwin, request: Any) -> tuple[int, bool]:
            return 31, True

        monkeypatch.setattr(EngineTwin, "_look_up", look_up)
        with pytest.raises((JobFailed, Refused, NoProvider)):
            await run(buyer, spec(10, PROMPT))
        assert buyer.accounts.spent == 0 == await settle(seller)


async def test_both_sides_hash_the_same_blocks() -> None:
    salt = b"q" * 32
    heads = block_heads(salt, PROMPT)
    assert len(heads) == 1 + len(PROMPT) // BLOCK_TOKENS and prompt_head(heads) == heads[-1]


# ----------------------------------------------------------------------------------------------- reasoning and routing


def thinking(engine: EngineTwin, start: int, end: int) -> EngineTwin:
    engine.profile = replace(profile(b"thinks"), reasoning_start=start, reasoning_end=end)
    return engine


async def test_reasoning_tokens_are_counted_by_the_markers_and_priced_apart() -> None:
    async with Market() as market:
        engine = thinking(EngineTwin(), 3000, 3001)
        script = [3000, 50, 51, 3001, 60, 61]
        engine.token = lambda seed, position: script[(position - 4) % 6]  # type: ignore[method-assign]
        seller = await market.seller(engine=engine, reasoning_price=5 * TOKEN)
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(6))
        assert done.reasoning_tokens == 4
        assert await settle(seller) == done.cost == 4 * READ + 2 * TOKEN + 4 * 5 * TOKEN


async def test_a_template_that_opens_the_block_makes_the_first_token_reasoning() -> None:
    async with Market() as market:
        engine = thinking(EngineTwin(), 3000, 3001)
        engine.token = lambda seed, position: [50, 3001, 60][(position - 4) % 3]  # type: ignore[method-assign]
        await market.seller(engine=engine)
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(3, (5, 6, 7, 3000)))
        assert done.reasoning_tokens == 2


async def test_a_mixture_of_experts_commits_to_its_routing() -> None:
    async with Market() as market:
        engine = EngineTwin()
        engine.profile = replace(profile(b"moe"), moe_layers=2, experts=4, experts_chosen=1)
        seller, buyer = await market.seller(engine=engine), await market.buyer()
        _, done, _ = await run(buyer, spec(40))
        receipt = await last_receipt(buyer, done)
        assert receipt.routing_root != ZERO_DIGEST and await settle(seller) == done.cost


async def test_without_routing_evidence_a_mixture_of_experts_is_not_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        engine = EngineTwin()
        engine.profile = replace(profile(b"moe"), moe_layers=2, experts=4, experts_chosen=1)
        monkeypatch.setattr("tests.twins.engine_twin.routing_fingerprint", lambda experts: b"")
        await market.seller(engine=engine)
        buyer = await market.buyer()
        with pytest.raises((JobFailed, Refused)):
            await run(buyer, spec(40))
        assert buyer.accounts.spent == 0


# ------------------------------------------------------------------------------------------------ options and failover


async def test_options_are_signed_and_kept_by_both_sides() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        options = JobOptions(stop_ids=(9,), min_tokens=3, frequency_milli=-200, presence_milli=1500, alternatives=3)
        _, done, events = await run(buyer, spec(40, options=options))
        for store in (buyer.store, seller.store):
            job = await store.job(done.job_ids[0])
            assert job is not None and options_hash(job.options) == job.request.options_hash
            assert decode_options(job.options) == options
        shown = [event for event in events if isinstance(event, JobTokens)]
        assert all(len(likeliest) == 3 for event in shown for likeliest in event.alternatives)
        assert all(len(event.alternatives) == len(event.token_ids) for event in shown)


async def test_a_continuation_says_how_much_of_its_prompt_is_output() -> None:
    async with Market() as market:
        first, second = await market.seller(), await market.seller()
        buyer = await market.buyer()
        job = spec(100, options=JobOptions(min_tokens=80, frequency_milli=500))
        tokens: list[int] = []
        events: list[JobEvent] = []
        stopped = False
        async for event in buyer.router.run(job):
            events.append(event)
            if isinstance(event, JobTokens):
                tokens += event.token_ids
                if len(tokens) > 40 and not stopped:
                    stopped = True
                    jobs = await buyer.store.jobs(Role.CLIENT)
                    running = next(s for s in (first, second) if s.wallet.address == jobs[-1].request.provider)
                    await running.transport.stop()
        assert stopped and len(tokens) == 100
        done = events[-1]
        assert isinstance(done, JobDone) and len(done.job_ids) == 2
        child = await buyer.store.job(done.job_ids[1])
        assert child is not None
        options = decode_options(child.options)
        assert options.continued == child.request.prompt_tokens - 4 > 0
        assert (options.min_tokens, options.frequency_milli) == (80, 500)


# ---------------------------------------------------------------------------------------------------- tiers and free


async def test_a_tier_without_a_price_is_not_sold() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(priority_bps=0), await market.buyer()
        with pytest.raises(NoProvider, match="no price for the priority tier"):
            await run(buyer, spec(10, tier=Tier.PRIORITY))
        assert await seller.store.jobs(Role.PROVIDER) == [] and buyer.accounts.spent == 0


async def test_a_free_sheet_serves_a_client_without_a_wallet_or_channel() -> None:
    async with Market() as market:
        zero = dict.fromkeys(("prompt_price", "cached_price", "completion_price", "reasoning_price"), 0)
        seller = await market.seller(**zero)
        buyer = await market.buyer(tally=0)
        tokens, done, _ = await run(buyer, spec(100))
        assert len(tokens) == 100 and done.cost == 0
        await idle(seller)
        (job,) = await seller.store.jobs(Role.PROVIDER)
        assert job.closed is FinishReason.LENGTH and job.steps == 4, "each increment was receipted all the same"
        assert await settle(seller) == 0


async def test_an_interim_receipt_cannot_change_its_mind_about_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await run(buyer, spec(3, PROMPT))
        honest = Work.receipt

        def forgetful(self: Work, finish: FinishReason, at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
            if self.step == 1 and self.request.provider == seller.wallet.address and not self.accepted_seen:
                self = replace(self, cached_tokens=0)
            return honest(self, finish, at, vouched)

        monkeypatch.setattr(Work, "receipt", forgetful)
        with pytest.raises(JobFailed, match="cached_tokens"):
            await run(buyer, spec(100, PROMPT))


def test_the_unit_of_an_embedding_is_fp32_little_endian() -> None:
    vector = EngineTwin().vector((1, 2, 3))
    assert sum(x * x for x in struct.unpack("<16f", vector)) == pytest.approx(1.0)


async def test_a_deposit_covers_what_a_hit_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reservation is for the worst case: nothing cached. What a hit saves stays the client's."""
    async with Market() as market:
        _, buyer = await market.seller(), await market.buyer(deposit=WEI_PER_TALLY)
        await run(buyer, spec(3, PROMPT))
        await run(buyer, spec(3, PROMPT))
        (channel,) = buyer.accounts.channels()
        await until(lambda: not channel.reserved)
        assert channel.owed == channel.vouched


async def test_a_text_that_cannot_be_repeated_goes_on_where_the_caller_has_it() -> None:
    """Providers that serve through another server: the second one's draws are not the first one's."""
    async with Market() as market:
        first, second = await market.seller(engine=upstream(100)), await market.seller(engine=upstream(200))
        buyer = await market.buyer()
        held = asyncio.Event()

        async def pace(at: int) -> None:
            if at >= 40:
                await held.wait()

        first.engine.pace = second.engine.pace = pace
        tokens: list[int] = []
        cut = 0
        async for event in buyer.router.run(spec(100)):
            if isinstance(event, JobTokens):
                tokens += event.token_ids
                if len(tokens) == 40 and not cut:
                    cut = len(tokens)
                    job = (await buyer.store.jobs(Role.CLIENT))[-1]
                    running = next(s for s in (first, second) if s.wallet.address == job.request.provider)
                    held.set()
                    await running.transport.stop()
        assert len(tokens) == 100 and cut == 40
        assert len(set(tokens[:cut])) == len(set(tokens[cut:])) == 1 and tokens[0] != tokens[-1]
        parent, child = sorted(await buyer.store.jobs(Role.CLIENT), key=lambda job: job.opened_at_ms)
        assert child.request.prompt_tokens == 4 + cut, "what was delivered is not asked for again"
        assert parent.owed + child.owed == buyer.accounts.spent


async def test_of_two_profiles_under_one_name_the_one_that_can_be_checked_is_bought() -> None:
    """Whichever was seen first, and though the other is cheaper and served by more."""
    for order in ((0, 1, 1), (1, 1, 0)):
        async with Market() as market:
            for cheap in order:
                engine = upstream(7) if cheap else EngineTwin()
                engine.profile = profile(b"another's weights") if cheap else engine.profile
                await market.seller(engine=engine, completion_price=TOKEN // (2 if cheap else 1))
            buyer = await market.buyer()
            card = await buyer.router.card(MODEL)
            assert card.profile == EngineTwin().profile
            _, done, _ = await run(buyer, spec(5))
            assert done.cost == 4 * READ + 5 * TOKEN


def upstream(token: int) -> EngineTwin:
    engine = EngineTwin()
    engine.verifiability = Verifiability.NONE
    engine.token = lambda seed, position: token  # type: ignore[method-assign]
    return engine
