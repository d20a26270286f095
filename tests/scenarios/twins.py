"""The stage in memory: the real roles over the twins of network, chain, store and engine, in one process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from incentives.ledger import ChannelKey, Role
from incentives.settlement import SettlePolicy
from node.gateway import errors
from node.gateway.errors import ApiError
from node.ports import JobDone, JobSpec, JobStarted, JobTokens
from protocol.errors import TallyError
from protocol.messages import WorkReceipt
from protocol.units import FinishReason, JobId, Tier, Wei
from protocol.work import Work as Account
from tests.scenarios import vocabulary as v
from tests.spine.lab import MODEL, Buyer, Market, Seller, expected, until
from tests.twins.engine_twin import EngineTwin

TIERS = {"default": Tier.STANDARD, "priority": Tier.PRIORITY, "flex": Tier.FLEX}
STALL_S = 2.0
"""Silence taken for a stall. Unit: s. Above the deadline that one scenario lets pass."""


@dataclass
class Reading:
    """One job as its reader has it."""

    spec: JobSpec
    tokens: list[int] = field(default_factory=list)
    first: JobId | None = None
    done: JobDone | None = None
    error: ApiError | None = None
    task: asyncio.Task[None] | None = None


class TwinStage:
    """`async with TwinStage() as stage`."""

    def __init__(self) -> None:
        self.market = Market()
        self.sellers: dict[str, Seller] = {}
        self.buyers: dict[str, Buyer] = {}
        self.jobs: dict[str, Reading] = {}
        self._before: dict[tuple[str, str], int] = {}
        self._lies: dict[bytes, int] = {}
        self._patches: list[Any] = []

    async def __aenter__(self) -> TwinStage:
        await self.market.__aenter__()
        self._let_lie()
        for name, factor in ((v.PROVIDER, 1), (v.OTHER, v.DEARER)):
            self.sellers[name] = await self._seller(factor)
        self.buyers[v.CLIENT] = await self.market.buyer(stall_s=STALL_S)
        return self

    async def __aexit__(self, *exc: object) -> None:
        import node.provider.server as server

        server.Work = Account  # type: ignore[misc]
        for reading in self.jobs.values():
            if reading.task is not None:
                reading.task.cancel()
        self.market.world.down = False
        for seller in self.market.sellers:
            seller.cheats = seller.wallet.address in self._lies
        await self.market.__aexit__(*exc)

    async def _seller(self, factor: int, **old: Any) -> Seller:
        return await self.market.seller(
            policy=SettlePolicy(0, Wei(0), Wei(1)),
            prompt_price=factor * v.PROMPT_PRICE,
            cached_price=factor * v.PROMPT_PRICE // 10,
            completion_price=factor * v.TOKEN_PRICE,
            reasoning_price=factor * v.TOKEN_PRICE,
            priority_ttft_ms=v.TTFT_MS,
            priority_tpot_ms=v.TPOT_MS,
            standard_refund_bps=v.REFUND_BPS,
            priority_refund_bps=v.REFUND_BPS,
            **old,
        )

    def _let_lie(self) -> None:
        import node.provider.server as server

        lies = self._lies

        class Tempted(Account):
            def receipt(self, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Account, WorkReceipt]:
                work, receipt = super().receipt(finish, finished_at, vouched)
                step = lies.get(self.request.provider, 0)
                return work, replace(receipt, total=receipt.total + 1) if step and receipt.step >= step else receipt

            @classmethod
            def start(cls, *args: Any) -> Account:
                work = Account.start(*args)
                return cls(**{name: getattr(work, name) for name in Account.__dataclass_fields__})

        server.Work = Tempted  # type: ignore[misc]

    async def _claimed(self, seller: str, buyer: str) -> int:
        if buyer not in self.buyers:
            return 0
        key = ChannelKey(self.sellers[seller].wallet.address, self.buyers[buyer].accounts.session.address)
        self.market.world.down, down = False, self.market.world.down
        try:
            slot = await self.sellers[v.OTHER].chain.slot(key)
        finally:
            self.market.world.down = down
        return slot.claimed if slot else 0

    async def begin(self) -> None:
        self.jobs.clear()
        for seller in self.sellers:
            for buyer in self.buyers:
                self._before[seller, buyer] = await self._claimed(seller, buyer)

    async def rest(self) -> None:
        for buyer in self.buyers.values():
            await buyer.router.stop()
            assert not await buyer.store.jobs(Role.CLIENT, open_only=True)
        for seller in self.sellers.values():
            await until(lambda seller=seller: not seller.provider.server.running)
            assert not await seller.store.jobs(Role.PROVIDER, open_only=True)

    # ------------------------------------------------------------------------------------------------- what they do

    async def act_hold(self, step: v.Hold) -> None:
        gate = asyncio.Event()

        async def pace(index: int) -> None:
            if index >= step.at:
                await gate.wait()

        engine = self.sellers[step.who].engine
        engine.pace, engine.gate = pace, gate  # type: ignore[attr-defined]

    async def act_release(self, step: v.Release) -> None:
        engine = self.sellers[step.who].engine
        engine.pace = None
        engine.gate.set()  # type: ignore[attr-defined]

    async def act_lie(self, step: v.Lie) -> None:
        self._lies[self.sellers[step.who].wallet.address] = step.step

    async def act_purse(self, step: v.Purse) -> None:
        purse = v.Work(step.tokens).at_least()
        self.buyers[v.POOR] = await self.market.buyer(tally=purse, deposit=purse, stall_s=STALL_S)

    async def act_ask(self, step: v.Ask) -> None:
        spec = JobSpec(MODEL, step.prompt, step.tokens, tier=int(TIERS[step.tier]), deadline_s=step.deadline_s)
        reading = self.jobs[step.job] = Reading(spec)
        reading.task = asyncio.create_task(self._follow(self.buyers[step.by], reading))

    async def _follow(self, buyer: Buyer, reading: Reading) -> None:
        """As the gateway does: a prompt that leaves no room is refused before anything is sent."""
        try:
            card = await buyer.router.card(MODEL)
            if len(reading.spec.prompt) >= card.max_context:
                raise errors.context_exceeded(len(reading.spec.prompt), card.max_context, "prompt")
            async for event in buyer.router.run(reading.spec):
                if isinstance(event, JobStarted):
                    reading.first = reading.first or event.job_id
                elif isinstance(event, JobTokens):
                    reading.tokens.extend(event.token_ids)
                elif isinstance(event, JobDone):
                    if event.finish not in (FinishReason.LENGTH, FinishReason.STOP):
                        raise errors.from_finish(event.finish)
                    reading.done = event
        except TallyError as exc:
            reading.error = errors.from_tally(exc)
        except ApiError as exc:
            reading.error = exc

    async def act_cancel(self, step: v.Cancel) -> None:
        task = self.jobs[step.job].task
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def act_crash(self, step: v.Crash) -> None:
        party = self.sellers.get(step.who) or self.buyers[step.who]
        await self.market.network.kill(party.transport.peer_id)
        if isinstance(party, Seller):
            tasks, party.provider._tasks = party.provider._tasks, []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: not party.provider.server.running)
        else:
            for reading in self.jobs.values():
                if reading.task is not None:
                    await asyncio.wait({reading.task})
            await party.router.stop()

    async def act_restart(self, step: v.Restart) -> None:
        if step.who in self.sellers:
            old = self.sellers[step.who]
            await old.store.close()
            factor = v.DEARER if step.who == v.OTHER else 1
            self.sellers[step.who] = await self._seller(
                factor, store=old.store, keys=(old.wallet, old.node_key), engine=EngineTwin()
            )
            for buyer in self.buyers.values():
                for checked in self.sellers[step.who].provider.offering._directory.offers():
                    await buyer.router._directory.consider(checked.envelope)  # type: ignore[attr-defined]
        else:
            gone = self.buyers[step.who]
            await gone.store.close()
            self.market.sellers[:] = list(self.sellers.values())
            self.buyers[step.who] = await self.market.buyer(
                store=gone.store, session=gone.accounts.session, stall_s=STALL_S
            )

    async def act_freeze(self, step: v.Freeze) -> None:
        self.market.network.freeze(self.sellers[step.who].transport.peer_id)

    async def act_thaw(self, step: v.Thaw) -> None:
        self.market.network.heal()

    async def act_chain_down(self, step: v.ChainDown) -> None:
        self.market.world.down = True

    async def act_chain_up(self, step: v.ChainUp) -> None:
        self.market.world.down = False

    # --------------------------------------------------------------------------------------------- what is expected

    async def act_expect_tokens(self, step: v.ExpectTokens) -> None:
        await until(lambda: len(self.jobs[step.job].tokens) >= step.at_least)

    async def act_expect_running(self, step: v.ExpectRunning) -> None:
        await until(lambda: self.sellers[step.who].provider.server.running > 0)
        await asyncio.sleep(step.for_s)  # time itself is what the step is about

    async def act_expect_vouched(self, step: v.ExpectVouched) -> None:
        factor = v.DEARER if step.who == v.OTHER else 1
        before = sum(self._before.get((step.who, buyer), 0) for buyer in self.buyers)
        books = self.sellers[step.who].provider.books
        await until(
            lambda: sum(c.vouched for c, _ in books.channels()) - before >= v.Work(step.tokens).at_least(factor)
        )

    async def act_expect_finish(self, step: v.ExpectFinish) -> None:
        reading = self.jobs[step.job]
        assert (reading.task is not None and reading.first is not None) or await self._ended(reading) is None
        await self._ended(reading)
        assert reading.error is None, str(reading.error)
        assert reading.done is not None and reading.done.finish is FinishReason[step.reason.upper()]
        assert len(reading.tokens) == reading.done.completion_tokens == step.tokens
        assert bool(reading.done.refund) == step.refunded
        assert reading.first is not None
        job = await self.buyers[v.CLIENT].store.job(reading.first)
        assert job is not None
        assert reading.tokens == expected(self.sellers[v.OTHER].engine, job.accept.seed, reading.spec)

    async def _ended(self, reading: Reading) -> None:
        assert reading.task is not None
        async with asyncio.timeout(20):
            await asyncio.wait({reading.task})

    async def act_expect_error(self, step: v.ExpectError) -> None:
        reading = self.jobs[step.job]
        await self._ended(reading)
        assert reading.error is not None, "it ended well"
        assert reading.error.code == step.code, str(reading.error)
        assert len(reading.tokens) >= step.after

    async def act_expect_chain(self, step: v.ExpectChain) -> None:
        from node.app import chain_status

        party = self.sellers.get(step.who) or self.buyers[step.who]
        assert (await chain_status(party.chain))["reachable"] is step.reachable

    async def act_expect_evidence(self, step: v.ExpectEvidence) -> None:
        store, first = self.buyers[v.CLIENT].store, self.jobs[step.job].first
        assert first is not None
        assert any([await store.get_value(f"evidence/{first.hex()}/{n}") for n in range(1, 6)])

    async def act_must_pay(self, step: v.MustPay) -> None:
        factor = v.DEARER if step.to == v.OTHER else 1
        low, high = (sum(getattr(work, end)(factor) for work in step.work) for end in ("at_least", "at_most"))
        paid = 0
        async with asyncio.timeout(10):
            while True:
                books = self.sellers[step.to].provider.books
                quiet = not self.sellers[step.to].provider.server.running
                if quiet and all(c.unclaimed <= 0 for c, _ in books.channels()):
                    break
                self.sellers[step.to].provider.settler.wake()
                await asyncio.sleep(0.005)
        paid = await self._claimed(step.to, step.by) - self._before.get((step.to, step.by), 0)
        assert low <= paid <= high, f"paid {paid} wei, not {low} to {high}"
