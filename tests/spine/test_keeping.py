"""What both roles keep of a job, for how long, and how much either lets stand open before the other's stake."""

from __future__ import annotations

import asyncio

import pytest

from incentives.exposure import unsettled_cap
from incentives.ledger import Role
from incentives.settlement import SettlePolicy
from node.client.router import Router
from node.ports import JobFailed, JobSpec, JobVectors, NoProvider
from node.shredding import Shredder
from protocol.dossier import read_leaf
from protocol.messages import WorkReceipt
from protocol.options import JobOptions
from protocol.transcript import Transcript, prompt_hash
from protocol.units import WEI_PER_TALLY, JobId, JobKind, Wei
from tests.spine.lab import MODEL, Buyer, Market, Seller, idle, run, spec, until

NEVER = SettlePolicy(10**9, Wei(1000 * WEI_PER_TALLY), Wei(1))


async def both_keep(seller: Seller, buyer: Buyer, job_id: JobId) -> WorkReceipt:
    """Both halves hold the same content, and it is what the final receipt is over."""
    sold, bought = await seller.store.kept(Role.PROVIDER, job_id), await buyer.store.kept(Role.CLIENT, job_id)
    assert sold is not None and sold == bought
    job = await buyer.store.job(job_id)
    assert job is not None and prompt_hash(sold.salt, sold.prompt) == job.request.prompt_hash
    last = (await seller.store.receipts(role=Role.PROVIDER, job_id=job_id))[-1].receipt
    transcript = Transcript.start(job_id)
    for item in sold.content:
        embeds = job.request.kind == JobKind.EMBED
        transcript = transcript.extend_vector(item) if embeds else transcript.extend(read_leaf(item, routed=False))
    assert transcript.head == last.leaves_root
    return last


@pytest.mark.parametrize("tokens", [1, 32, 100])
async def test_both_keep_what_the_last_receipt_is_over(tokens: int) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(tokens))
        await idle(seller)
        assert (await both_keep(seller, buyer, done.job_ids[0])).completion_tokens == tokens


async def test_both_keep_the_vectors_of_an_embedding_job() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        job = JobSpec(MODEL, (1, 2, 3, 4, 5), 0, options=JobOptions(inputs=(2, 3)), kind=JobKind.EMBED)
        _, done, events = await run(buyer, job)
        await idle(seller)
        await both_keep(seller, buyer, done.job_ids[0])
        kept = await buyer.store.kept(Role.CLIENT, done.job_ids[0])
        assert kept is not None
        assert kept.content == tuple(v for event in events if isinstance(event, JobVectors) for v in event.vectors)


async def test_neither_keeps_anything_of_a_private_job() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(40, private=True))
        await idle(seller)
        assert await seller.store.kept(Role.PROVIDER, done.job_ids[0]) is None
        assert await buyer.store.kept(Role.CLIENT, done.job_ids[0]) is None


async def test_keeping_costs_no_write_of_its_own() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await run(buyer, spec(1))
        await idle(seller)
        counts = []
        for private in (True, False):
            before = seller.store.writes, buyer.store.writes  # type: ignore[attr-defined]
            await run(buyer, spec(96, private=private))
            await idle(seller)
            after = seller.store.writes, buyer.store.writes  # type: ignore[attr-defined]
            counts.append((after[0] - before[0], after[1] - before[1]))
        assert counts[0] == counts[1]


async def test_a_client_may_choose_to_keep_nothing_and_what_it_keeps_goes_in_time() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(10))
        await idle(seller)
        job_id = done.job_ids[0]
        clock = market.clock
        assert await Shredder(Role.CLIENT, 1, buyer.store, clock).shred_due() == 0
        clock.ahead_s += 3601
        assert await Shredder(Role.CLIENT, 1, buyer.store, clock).shred_due() == 1
        assert await buyer.store.kept(Role.CLIENT, job_id) is None
        assert await seller.store.kept(Role.PROVIDER, job_id) is not None, "its own promise is longer"
        clock.ahead_s -= 3601
        forgetful: Router = buyer.router
        object.__setattr__(forgetful._tools, "keeps_content", False)
        _, done, _ = await run(buyer, spec(10))
        assert await buyer.store.kept(Role.CLIENT, done.job_ids[0]) is None


# ------------------------------------------------------------------------------------------------------------ exposure

JOB = 100
PRICE = 10**16
"""Wei a token: a job of a hundred costs one TALLY, of which a stake of 100 covers 33."""


async def test_a_job_beyond_what_the_stake_covers_goes_elsewhere_and_says_why() -> None:
    async with Market() as market:
        seller = await market.seller(policy=NEVER, completion_price=PRICE, reasoning_price=PRICE)
        buyer = await market.buyer(deposit=40 * WEI_PER_TALLY)
        cap = unsettled_cap(Wei(100 * WEI_PER_TALLY))
        accounts = buyer.accounts
        await run(buyer, spec(JOB, price_ceiling=Wei(2 * WEI_PER_TALLY)))
        await idle(seller)
        open_now = accounts.channel(seller.wallet.address).vouched
        now = market.clock.monotonic()
        fits = Wei(cap - open_now)
        assert await accounts.too_exposed(seller.wallet.address, fits, now) is None
        reason = await accounts.too_exposed(seller.wallet.address, Wei(fits + 1), now)
        assert reason is not None and str(cap) in reason and "unsettled" in reason
        market.world.head.state.stakes[seller.wallet.address] = WEI_PER_TALLY
        market.clock.ahead_s += 61
        with pytest.raises(NoProvider, match="unsettled work"):
            await run(buyer, spec(JOB, price_ceiling=Wei(2 * WEI_PER_TALLY)))
        other = await market.seller(completion_price=2 * PRICE, reasoning_price=2 * PRICE)
        buyer.router._directory._bootstrap += (other.peer,)  # type: ignore[attr-defined]
        await buyer.router._directory.refresh()
        _, done, _ = await run(buyer, spec(JOB, price_ceiling=Wei(3 * WEI_PER_TALLY)))
        assert done.completion_tokens == JOB and accounts.channel(other.wallet.address).vouched > 0


async def test_what_was_settled_is_exposed_no_more() -> None:
    async with Market() as market:
        seller = await market.seller(policy=NEVER, completion_price=PRICE, reasoning_price=PRICE)
        buyer = await market.buyer(deposit=4 * WEI_PER_TALLY)
        await run(buyer, spec(JOB, price_ceiling=Wei(2 * WEI_PER_TALLY)))
        await idle(seller)
        market.world.head.state.stakes[seller.wallet.address] = 4 * WEI_PER_TALLY
        worst, now = Wei(WEI_PER_TALLY), market.clock.monotonic() + 61
        assert await buyer.accounts.too_exposed(seller.wallet.address, worst, now) is not None
        await seller.provider.settler.settle_due(everything=True)
        assert await buyer.accounts.too_exposed(seller.wallet.address, worst, now) is None


async def test_a_provider_settles_before_its_stake_no_longer_covers_what_is_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Market() as market:
        seller = await market.seller(policy=NEVER, completion_price=PRICE, reasoning_price=PRICE)
        buyer = await market.buyer(deposit=4 * WEI_PER_TALLY)
        await run(buyer, spec(JOB, price_ceiling=Wei(2 * WEI_PER_TALLY)))
        await idle(seller)
        provider = seller.provider
        await provider.staking.look()
        assert (await provider.status())["stake_covers"] is True
        market.world.head.state.stakes[seller.wallet.address] = 2 * WEI_PER_TALLY
        await provider.staking.look()
        assert provider.staking.status()["stake_wei"] == str(2 * WEI_PER_TALLY)
        assert "Raise provider.stake" in caplog.text
        await until(lambda: provider.settler.totals.batches == 1)


# --------------------------------------------------------------------------------------------------------------- epochs


async def test_a_job_that_outlasts_its_epoch_s_window_is_aborted_and_paid_so_far() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        cut = asyncio.Event()
        epochs = seller.provider.epochs
        ends = market.clock.now_ms() + 3_600_000
        epochs.cut_ms = lambda accepted_ms: ends  # type: ignore[method-assign]

        async def pace(index: int) -> None:
            if index == 40:
                await until(lambda: buyer.accounts.channel(seller.wallet.address).vouched > 0)
                market.clock.ahead_s += 3_601
                await cut.wait()

        seller.engine.pace = pace
        with pytest.raises(JobFailed, match="epoch it belongs to"):
            await run(buyer, spec(JOB, deadline_s=80_000.0))
        cut.set()
        await idle(seller)
        (job,) = await seller.store.jobs(Role.PROVIDER)
        assert job.steps == 1 and job.owed > 0
