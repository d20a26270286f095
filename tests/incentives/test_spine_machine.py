"""A channel under several jobs at once, with streams that break and sides that die anywhere, as a state machine.

Both sides run the core (work account, channel) over the twin of the journal, and messages travel through queues that
can be lost. Invariants I1 to I4 of incentives/channel.py are checked after every step, and besides:
  what is in memory is what the journal says; the client counts at least what the provider counts (so the provider
  never asks for more than the client will promise); the chain pays what was vouched for, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from incentives.channel import (
    ActionRelease,
    ActionReserve,
    ActionVouch,
    Channel,
    ContractReceiveSlot,
    ReceiveVoucher,
    apply,
)
from incentives.ledger import (
    ChannelKey,
    JobClosed,
    JobOpened,
    ReceiptIssued,
    ReceiptVouched,
    Record,
    Role,
    SlotSeen,
    VoucherReceived,
)
from protocol.eip712 import Domain, digest
from protocol.errors import Overspend
from protocol.messages import Accept, JobRequest, Voucher, WorkReceipt
from protocol.options import NO_OPTIONS, encode_options, options_hash
from protocol.tariff import Basis, worst_case_up
from protocol.transcript import Row
from protocol.units import (
    BPS,
    INCREMENT_TOKENS,
    LEAF_TOKENS,
    ZERO_DIGEST,
    Address,
    Digest,
    FinishReason,
    JobId,
    JobKind,
    Tier,
    Wei,
)
from protocol.work import Work, check_receipt
from tests.spine.lab import prices
from tests.twins.engine_twin import profile
from tests.twins.memory_store import MemoryStore

T = TypeVar("T")

DOMAIN = Domain(31337, Address(b"\x0e" * 20))
PROVIDER, CLIENT = Address(b"\x01" * 20), Address(b"\x02" * 20)
KEY = ChannelKey(PROVIDER, CLIENT)
TARIFF = prices(
    PROVIDER, ZERO_DIGEST, prompt_price=3, completion_price=10, reasoning_price=10, cached_price=1,
    standard_tpot_ms=100, standard_refund_bps=BPS // 2,
)  # fmt: skip
"""Few wei a token, so that deposits run out. A job that is slow gets half of its cost back, with its last receipt."""

BASIS, OPTIONS = Basis(), encode_options(NO_OPTIONS)
START = 1_800_000_000_000


@dataclass
class Half:
    """One side of a job. `acked`: wei at its last acknowledged receipt. `alive`: until its stream ended here."""

    work: Work
    acked: Wei = field(default=Wei(0))
    acked_tokens: int = 0
    alive: bool = True


@dataclass
class Job:
    """`receipt`, `voucher`: what is under way. `outstanding`: the receipt the provider waits for."""

    job_id: JobId
    client: Half
    provider: Half
    receipt: WorkReceipt | None = None
    voucher: tuple[int, Voucher] | None = None
    outstanding: WorkReceipt | None = None
    covered: bool = False


@dataclass
class Side:
    """A role's memory and its journal."""

    role: Role
    store: MemoryStore = field(default_factory=MemoryStore)
    channel: Channel = field(default_factory=lambda: Channel(KEY))


class SpineMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.client, self.provider = Side(Role.CLIENT), Side(Role.PROVIDER)
        for side in (self.client, self.provider):
            self.run(side.store.open())
        self.all: list[Job] = []
        self.now = START
        self.block = 0
        self.deposit = self.claimed = 0
        self.highest = {Role.CLIENT: 0, Role.PROVIDER: 0}
        self.deposit_more(2_000)

    def teardown(self) -> None:
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def write(self, side: Side, *records: Record) -> None:
        self.run(side.store.write(*records))

    # -------------------------------------------------------------------------------------------------------- chain

    @rule(wei=st.integers(1, 4_000))
    def deposit_more(self, wei: int) -> None:
        self.deposit += wei
        self._show_slot()

    @rule()
    def settle(self) -> None:
        """The provider's best voucher goes to the escrow, which pays up to the cumulative amount."""
        self.claimed = max(self.claimed, min(self.provider.channel.vouched, self.deposit))
        self._show_slot()

    def _show_slot(self) -> None:
        self.block += 1
        seen = SlotSeen(KEY, Address(b"\x03" * 20), Wei(self.deposit), Wei(self.claimed), 0, self.block)
        for side in (self.client, self.provider):
            self.write(side, seen)
            side.channel = apply(side.channel, ContractReceiveSlot(seen)).state

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds * 1000

    # --------------------------------------------------------------------------------------------------------- jobs

    @rule(target=jobs, prompt=st.integers(1, 40), tokens=st.integers(1, 150))
    def open(self, prompt: int, tokens: int) -> Job | None:  # type: ignore[return]
        request = self._request(prompt, tokens)
        job_id = JobId(digest(DOMAIN, request))
        first = worst_case_up(TARIFF, prompt, min(INCREMENT_TOKENS, tokens), BASIS)
        worst = worst_case_up(TARIFF, prompt, tokens, BASIS)
        try:
            held = Wei(max(first, min(worst, self.client.channel.free)))
            reserved = apply(self.client.channel, ActionReserve(job_id, held)).state
            self.provider.channel = apply(self.provider.channel, ActionReserve(job_id, first)).state
        except Overspend:
            return None
        self.client.channel = reserved
        accept = Accept(Digest(job_id), ZERO_DIGEST, ZERO_DIGEST, self.now)
        for side in (self.provider, self.client):
            self.write(side, JobOpened(side.role, job_id, request, b"s" * 65, accept, b"s" * 65, "twin", OPTIONS))
        start = Work.start(job_id, request, NO_OPTIONS, TARIFF, profile(), accept, ())
        halves = [Half(start) for _ in range(2)]
        job = Job(job_id, *halves)
        self.all.append(job)
        return job

    def _request(self, prompt: int, tokens: int) -> JobRequest:
        values: dict[str, Any] = dict.fromkeys(JobRequest.__dataclass_fields__, ZERO_DIGEST)
        values |= {"provider": PROVIDER, "client": CLIENT, "prompt_tokens": prompt, "max_tokens": tokens}
        values |= dict.fromkeys(("temperature_micro", "top_p_micro", "top_k"), 0)
        values |= {name: False for name in ("private", "is_private") if name in values}
        values |= {"kind": JobKind.GENERATE, "tier": Tier.STANDARD, "base_bps": BPS}
        values |= {"options_hash": options_hash(OPTIONS), "price_ceiling": 1 << 60, "deadline": START + 10**9}
        values |= {"client_nonce": len(self.all).to_bytes(32, "big")}
        return JobRequest(**values)

    @rule(job=jobs, count=st.integers(1, LEAF_TOKENS))
    def deliver(self, job: Job | None, count: int) -> None:
        """Tokens leave only while no receipt is outstanding and escrow for the increment is held."""
        if job is None or not (job.provider.alive and job.client.alive) or job.outstanding is not None:
            return
        count = min(count, job.provider.work.room)
        if not count or not self._reserved(job):
            return
        start = job.provider.work.completion_tokens
        rows = tuple(Row(3 + (start + i) % 50, b"\0\0", bytes(16)) for i in range(count))
        job.provider.work = job.provider.work.take(rows, self.now)
        job.client.work = job.client.work.take(rows, self.now)

    def _reserved(self, job: Job) -> bool:
        """Escrow for the increment under way is held, or can be."""
        if job.job_id in self.provider.channel.reserved:
            return True
        work = job.provider.work
        upto = min(work.request.max_tokens, work.completion_tokens + INCREMENT_TOKENS)
        worst = worst_case_up(TARIFF, work.request.prompt_tokens, upto, BASIS)
        try:
            held = ActionReserve(job.job_id, Wei(max(0, worst - job.provider.acked)))
            self.provider.channel = apply(self.provider.channel, held).state
        except Overspend:
            return False
        return True

    @rule(job=jobs, cancel=st.booleans())
    def issue(self, job: Job | None, cancel: bool) -> None:
        """A receipt when one is due: at a full leaf, at the last token, or because the client cancels."""
        if job is None or not job.provider.alive or job.outstanding is not None:
            return
        work = job.provider.work
        if work.completion_tokens == work.request.max_tokens:
            finish = FinishReason.LENGTH
        elif cancel and work.completion_tokens:
            finish = FinishReason.CANCELLED
        elif len(work.pending) == LEAF_TOKENS:
            finish = FinishReason.OPEN
        else:
            return
        at = 0 if finish is FinishReason.OPEN else self.now
        work, receipt = work.receipt(finish, at, self.provider.channel.vouched)
        self.write(self.provider, ReceiptIssued(digest(DOMAIN, receipt), receipt))
        job.provider.work = work.sealed(digest(DOMAIN, receipt))
        job.outstanding = receipt
        held = self.provider.channel.vouched
        if receipt.is_final and receipt.total <= job.provider.acked:  # a refund counts before the client can see it
            self._take_voucher(job, receipt, Voucher(PROVIDER, held))
            job.covered = True
        job.receipt = receipt if job.client.alive else None

    @rule(job=jobs)
    def recompute(self, job: Job | None) -> None:
        """The client gets a receipt, recomputes it, journals it with its voucher, and answers."""
        if job is None or job.receipt is None or not job.client.alive:
            return
        receipt, job.receipt = job.receipt, None
        work, receipt_digest = check_receipt(DOMAIN, job.client.work, receipt, receipt.finished_at or self.now)
        change = ActionVouch(job.job_id, job.client.acked, Wei(receipt.total))
        try:
            step = apply(self.client.channel, change)
        except Overspend:  # the provider cannot know of a promise that was lost on its way: the job ends here, unpaid
            assert self.client.channel.owed > self.provider.channel.owed
            self.stream_breaks(job)
            return
        voucher = Voucher(PROVIDER, step.state.vouched)
        self.write(self.client, ReceiptVouched(receipt_digest, receipt, b"s" * 65, voucher, ()))
        left = max(0, self.client.channel.reserved.get(job.job_id, 0) - max(0, receipt.total - job.client.acked))
        self.client.channel = step.state
        if left and not receipt.is_final:
            self.client.channel = apply(step.state, ActionReserve(job.job_id, Wei(left))).state
        job.client.work, job.client.acked = work, Wei(receipt.total)
        job.client.acked_tokens = receipt.completion_tokens
        job.voucher = (receipt.step, voucher) if job.provider.alive else None
        if receipt.is_final:
            self._close(self.client, job, job.client, FinishReason(receipt.finish_reason))

    @rule(job=jobs)
    def acknowledge(self, job: Job | None) -> None:
        """The provider gets a voucher."""
        if job is None or job.voucher is None or not job.provider.alive:
            return
        (step, voucher), job.voucher = job.voucher, None
        receipt = job.outstanding
        assert receipt is not None and step == receipt.step
        if not job.covered:
            self._take_voucher(job, receipt, voucher)  # no StaleVoucher, no Overspend in an honest run
        job.outstanding = None
        if receipt.is_final:
            self._close(self.provider, job, job.provider, FinishReason(receipt.finish_reason))

    @rule(job=jobs, increments=st.integers(1, 6), stage=st.sampled_from(["tokens", "receipt", "voucher", "counted"]))
    def runs_on(self, job: Job | None, increments: int, stage: str) -> None:
        """Whole increments, the last one only as far as `stage`; single rules above seldom come so deep."""
        for left in reversed(range(increments)):
            self.acknowledge(job)
            self.recompute(job)
            self.acknowledge(job)
            self.deliver(job, LEAF_TOKENS)
            if not left and stage == "tokens":
                return
            self.issue(job, cancel=False)
            if not left and stage == "receipt":
                return
            self.recompute(job)
            if not left and stage == "voucher":
                return
            self.acknowledge(job)

    @rule(tokens=st.integers(40, 150), slow=st.booleans(), stage=st.sampled_from(["receipt", "voucher"]))
    def a_whole_job_loses_its_end(self, tokens: int, slow: bool, stage: str) -> None:
        """A job runs to its last receipt, which is lost, or whose voucher is."""
        job = self.open(10, tokens)
        if job is None:
            return
        while job.provider.alive and job.provider.work.room and self._goes_on(job):
            pass
        if slow:
            self.time_passes(20)
        self.runs_on(job, 1, stage)
        self.stream_breaks(job)

    def _goes_on(self, job: Job) -> bool:
        """One increment; False when it was the last one or escrow ends."""
        before = job.provider.work.completion_tokens
        self.deliver(job, LEAF_TOKENS)
        if job.provider.work.completion_tokens in (before, job.provider.work.request.max_tokens):
            return False
        self.issue(job, cancel=False)
        self.recompute(job)
        self.acknowledge(job)
        return True

    def _take_voucher(self, job: Job, receipt: WorkReceipt, voucher: Voucher) -> None:
        change = ReceiveVoucher(job.job_id, job.provider.acked, Wei(receipt.total), Wei(voucher.cumulative))
        after = apply(self.provider.channel, change).state
        signature = voucher.cumulative.to_bytes(65, "big")
        self.write(self.provider, VoucherReceived(CLIENT, job.job_id, receipt.step, voucher, signature))
        self.provider.channel = after
        job.provider.acked, job.provider.acked_tokens = Wei(receipt.total), receipt.completion_tokens

    def _close(self, side: Side, job: Job, half: Half, reason: FinishReason) -> None:
        half.alive = False
        self.write(side, JobClosed(side.role, job.job_id, reason, half.acked, ""))
        side.channel = apply(side.channel, ActionRelease(job.job_id)).state

    # ------------------------------------------------------------------------------------------------------- faults

    @rule(job=jobs)
    def stream_breaks(self, job: Job | None) -> None:
        """What was under way is lost, and both sides give the job up."""
        if job is None:
            return
        job.receipt = job.voucher = None
        for side, half in ((self.client, job.client), (self.provider, job.provider)):
            if half.alive:
                self._close(side, job, half, FinishReason.ERROR)

    @rule(role=st.sampled_from(Role))
    def dies(self, role: Role) -> None:
        """kill -9, and a start from the journal; the other side's streams break."""
        side, other = (self.client, self.provider) if role is Role.CLIENT else (self.provider, self.client)
        for job in self.all:
            own, far = (job.client, job.provider) if role is Role.CLIENT else (job.provider, job.client)
            own.alive = False
            job.receipt = job.voucher = None
            if far.alive:
                self._close(other, job, far, FinishReason.ERROR)
        account = next(a for a in self.run(side.store.accounts(role)) if a.key == KEY)
        side.channel = Channel(KEY, account.deposit, account.claimed, account.exit_at, account.owed, account.vouched)
        for row in self.run(side.store.jobs(role, open_only=True)):
            self.write(side, JobClosed(role, row.job_id, FinishReason.ERROR, row.owed, ""))

    # --------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def i1_nothing_is_promised_beyond_the_deposit(self) -> None:
        for side in (self.client, self.provider):
            assert side.channel.vouched <= side.channel.deposit == self.deposit

    @invariant()
    def i2_vouchers_never_fall_and_cover_what_is_owed(self) -> None:
        for side in (self.client, self.provider):
            assert side.channel.owed <= side.channel.vouched
            assert self.highest[side.role] <= side.channel.vouched
            self.highest[side.role] = side.channel.vouched

    @invariant()
    def i3_nothing_is_served_past_escrow(self) -> None:
        """The provider holds escrow for all it delivers; a client's reservation is what it hopes to spend."""
        channel = self.provider.channel
        assert channel.owed + sum(channel.reserved.values()) <= channel.deposit

    @invariant()
    def i4_at_most_one_increment_of_a_job_is_at_risk(self) -> None:
        for job in self.all:
            delivered = job.client.work.completion_tokens
            assert delivered - job.provider.acked_tokens <= INCREMENT_TOKENS
            assert 0 <= job.client.acked_tokens - job.provider.acked_tokens <= INCREMENT_TOKENS or job.covered

    @invariant()
    def the_client_counts_at_least_what_the_provider_counts(self) -> None:
        assert self.provider.channel.vouched <= self.client.channel.vouched
        assert self.provider.channel.owed <= self.client.channel.owed

    @invariant()
    def memory_is_what_the_journal_says(self) -> None:
        for side in (self.client, self.provider):
            account = next(a for a in self.run(side.store.accounts(side.role)) if a.key == KEY)
            assert (account.owed, account.vouched) == (side.channel.owed, side.channel.vouched)
            assert account.owed == sum(row.owed for row in self.run(side.store.jobs(side.role)))

    @invariant()
    def the_chain_pays_what_was_vouched_for_once(self) -> None:
        assert self.claimed <= self.provider.channel.vouched <= self.deposit

    @precondition(lambda self: self.all)
    @rule()
    def a_restart_of_everybody_changes_no_sum(self) -> None:
        before = [(s.channel.owed, s.channel.vouched) for s in (self.client, self.provider)]
        for role in Role:
            self.dies(role)
        assert before == [(s.channel.owed, s.channel.vouched) for s in (self.client, self.provider)]


SpineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestSpine = SpineMachine.TestCase
