"""The channel against a model that is told everything: invariants I1 to I4 of incentives/README.md, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from incentives.channel import (
    ActionRelease,
    ActionReserve,
    ActionVouch,
    Change,
    Channel,
    ContractReceiveSlot,
    ReceiveVoucher,
    ReleaseTokens,
    SendVoucher,
    SettleNow,
    Transition,
    apply,
)
from incentives.ledger import ChannelKey, SlotSeen
from protocol.errors import LocalProtocolError, Overspend, StaleVoucher, TallyError
from protocol.units import Address, JobId, Wei

KEY = ChannelKey(Address(b"\x01" * 20), Address(b"\x02" * 20))
JOBS = [JobId(bytes([number]) * 32) for number in range(4)]
jobs = st.sampled_from(JOBS)
amounts = st.integers(0, 300)
MACHINE = settings(deadline=None, max_examples=60, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])


def slot(deposit: int, claimed: int = 0, exit_at: int = 0, key: ChannelKey = KEY) -> SlotSeen:
    return SlotSeen(key, Address(b"\x03" * 20), Wei(deposit), Wei(claimed), exit_at, 1)


def channel(deposit: int = 1_000, **changes: int) -> Channel:
    return Channel(KEY, **{"deposit": Wei(deposit), **{name: Wei(value) for name, value in changes.items()}})


class _Machine(RuleBasedStateMachine):
    """What both roles share. The model: totals per job, reservations, highest voucher, the slot."""

    def __init__(self) -> None:
        super().__init__()
        self.state = Channel(KEY)
        self.totals = dict.fromkeys(JOBS, 0)
        self.held: dict[JobId, int] = {}
        self.vouched = self.deposit = self.claimed = self.exit_at = 0

    def step(self, change: Change) -> Transition:
        """Apply, and check that it was pure: the state is as it was, and once more gives the same."""
        state, before = self.state, replace(self.state, reserved=MappingProxyType(dict(self.state.reserved)))
        try:
            done = apply(state, change)
        except TallyError as refusal:
            assert state == before
            with pytest.raises(type(refusal)) as again:
                apply(state, change)
            assert again.value.args == refusal.args and str(again.value) == str(refusal)
            raise
        assert state == before and apply(state, change) == done
        self.state = done.state
        return done

    @property
    def owed(self) -> int:
        return sum(self.totals.values())

    def room(self, job: JobId) -> int:
        """What `job` may reserve: what others leave of the deposit, or what it holds already."""
        others = sum(amount for other, amount in self.held.items() if other != job)
        left = self.deposit - self.owed - others
        if self.exit_at or self.vouched > self.deposit:
            left = min(0, left)
        return max(left, self.held.get(job, 0))

    def hold(self, job: JobId, amount: int) -> None:
        self.held.pop(job, None)
        if amount:
            self.held[job] = amount

    # ------------------------------------------------------------------------------------------------- the contract

    def see(self) -> Transition:
        return self.step(ContractReceiveSlot(slot(self.deposit, self.claimed, self.exit_at)))

    @precondition(lambda self: not self.exit_at)
    @rule(amount=amounts)
    def top_up(self, amount: int) -> None:
        self.deposit += amount
        assert self.see().effects == ()

    @rule()
    def settle(self) -> None:
        self.claimed = max(self.claimed, min(self.vouched, self.deposit))
        assert self.see().effects == ()

    @precondition(lambda self: not self.exit_at)
    @rule()
    def request_exit(self) -> None:
        self.exit_at = 1_800_000_000
        assert self.see().effects == ((SettleNow(self.exit_at),) if self.vouched > self.claimed else ())
        assert self.see().effects == ()  # once

    @precondition(lambda self: self.exit_at)
    @rule()
    def cancel_exit(self) -> None:
        self.exit_at = 0
        assert self.see().effects == ()

    @precondition(lambda self: self.exit_at)
    @rule()
    def exit(self) -> None:
        self.deposit, self.exit_at = self.claimed, 0
        assert self.see().effects == ()

    # ------------------------------------------------------------------------------------------------- reservations

    @rule(job=jobs, amount=amounts)
    def reserve(self, job: JobId, amount: int) -> None:
        free = self.state.free
        if amount > self.room(job):
            with pytest.raises(Overspend) as caught:
                self.step(ActionReserve(job, Wei(amount)))
            assert caught.value.deposit_wei == self.deposit < caught.value.voucher_wei
            return
        grew = amount > self.held.get(job, 0)
        self.hold(job, amount)
        assert self.step(ActionReserve(job, Wei(amount))).effects == ()
        if grew:  # I3
            assert not self.exit_at and self.owed + sum(self.held.values()) <= self.deposit
        assert self.state.free >= min(free, 0)

    @rule(job=jobs)
    def release(self, job: JobId) -> None:
        self.hold(job, 0)
        assert self.step(ActionRelease(job)).effects == ()

    @rule(job=jobs, amount=st.integers(-50, -1))
    def a_negative_reservation_is_our_own_error(self, job: JobId, amount: int) -> None:
        with pytest.raises(LocalProtocolError):
            self.step(ActionReserve(job, Wei(amount)))

    # --------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def accounts_are_those_of_the_model(self) -> None:
        state = self.state
        assert (state.owed, state.vouched) == (self.owed, self.vouched)
        assert (state.deposit, state.claimed, state.exit_at) == (self.deposit, self.claimed, self.exit_at)
        assert dict(state.reserved) == self.held and state.unclaimed == self.vouched - self.claimed
        assert all(type(amount) is int for amount in (state.free, state.owed, state.vouched))

    @invariant()
    def vouchers_cover_what_is_owed(self) -> None:
        """I2: what is owed was vouched for when it came to be owed, and a refund only lowers it."""
        assert self.state.vouched >= self.state.owed

    @invariant()
    def free_is_what_nothing_has_a_claim_on(self) -> None:
        left = self.deposit - self.owed - sum(self.held.values())
        closed = self.exit_at or self.vouched > self.deposit
        assert self.state.free == (min(0, left) if closed else left)


class ProviderMachine(_Machine):
    """Vouchers of any amount come in, for any movement of a job's total."""

    @rule(job=jobs, after=amounts, cumulative=st.integers(0, 600))
    def receive(self, job: JobId, after: int, cumulative: int) -> None:
        self._receive(job, after, cumulative)

    @rule(job=jobs, more=st.integers(0, 40))
    def receive_exactly(self, job: JobId, more: int) -> None:
        self._receive(job, self.totals[job] + more, self.owed + more)

    @rule(job=jobs, data=st.data())
    def receive_after_a_refund(self, job: JobId, data: st.DataObject) -> None:
        self._receive(job, data.draw(st.integers(0, self.totals[job])), self.vouched)

    def _receive(self, job: JobId, after: int, cumulative: int) -> None:
        before = self.totals[job]
        owed, vouched = self.owed - before + after, max(self.vouched, cumulative)
        change = ReceiveVoucher(job, Wei(before), Wei(after), Wei(cumulative))
        if vouched > self.deposit:
            with pytest.raises(Overspend) as over:
                self.step(change)
            assert (over.value.voucher_wei, over.value.deposit_wei) == (vouched, self.deposit)
        elif vouched < owed:
            with pytest.raises(StaleVoucher) as stale:
                self.step(change)
            assert (stale.value.voucher_wei, stale.value.needed_wei) == (cumulative, owed)
        else:
            self.totals[job], self.vouched = after, vouched
            self.hold(job, 0)
            done = self.step(change)
            assert done.effects == (ReleaseTokens(job),)
            assert owed <= done.state.vouched <= done.state.deposit  # I1, I2


class ClientMachine(_Machine):
    """Receipts that recomputed are promised: within what was reserved for the job, beyond it, and refunds."""

    @rule(job=jobs, after=amounts)
    def vouch(self, job: JobId, after: int) -> None:
        self._vouch(job, after)

    @rule(job=jobs, data=st.data())
    def vouch_within_the_reservation(self, job: JobId, data: st.DataObject) -> None:
        free = self.state.free
        self._vouch(job, self.totals[job] + data.draw(st.integers(0, self.held.get(job, 0))))
        assert self.state.free == free  # what was reserved is what is paid

    @rule(job=jobs, data=st.data())
    def vouch_for_a_refund(self, job: JobId, data: st.DataObject) -> None:
        """It always goes through while the deposit covers our vouchers, and becomes credit."""
        back = data.draw(st.integers(0, self.totals[job]))
        free, covered = self.state.free, self.vouched <= self.deposit
        self._vouch(job, self.totals[job] - back)
        if covered and not self.exit_at:
            assert self.state.free == free + back

    def _vouch(self, job: JobId, after: int) -> None:
        before = self.totals[job]
        owed = self.owed - before + after
        cumulative = max(self.vouched, owed)
        change = ActionVouch(job, Wei(before), Wei(after))
        if cumulative > self.deposit:
            with pytest.raises(Overspend) as over:
                self.step(change)
            assert (over.value.voucher_wei, over.value.deposit_wei) == (cumulative, self.deposit)
            return
        self.totals[job], self.vouched = after, cumulative
        self.hold(job, max(0, self.held.get(job, 0) - max(0, after - before)))
        done = self.step(change)
        assert done.effects == (SendVoucher(Wei(cumulative)),)
        assert owed <= cumulative <= done.state.deposit  # I1, I2


TestProvider = ProviderMachine.TestCase
TestProvider.settings = MACHINE
TestClient = ClientMachine.TestCase
TestClient.settings = MACHINE


class PairMachine(RuleBasedStateMachine):
    """An honest provider and an honest client on one deposit, increment by increment: neither ever refuses the other.

    A job's worst increment is reserved before it is delivered, its true cost may be less, and the last one may be
    refunded. I4: what is delivered and not vouched for is one increment per job.
    """

    def __init__(self) -> None:
        super().__init__()
        opened = ContractReceiveSlot(slot(500))
        self.provider, self.client = apply(Channel(KEY), opened).state, apply(Channel(KEY), opened).state
        self.totals = dict.fromkeys(JOBS, 0)
        self.delivered: dict[JobId, int] = {}

    @rule(job=jobs, worst=st.integers(1, 120))
    def deliver(self, job: JobId, worst: int) -> None:
        if job in self.delivered:
            return  # the conversation allows no second increment before the voucher for the first
        try:
            self.client = apply(self.client, ActionReserve(job, Wei(worst))).state
            self.provider = apply(self.provider, ActionReserve(job, Wei(worst))).state
        except Overspend:
            self.end(job)
            return
        self.delivered[job] = worst

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.delivered)))
        before = self.totals[job]
        after = before + data.draw(st.integers(0, self.delivered.pop(job)))
        self._acknowledge(job, before, after)

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def acknowledge_a_refund(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.delivered)))
        del self.delivered[job]
        before = self.totals[job]
        self._acknowledge(job, before, data.draw(st.integers(0, before)))
        self.end(job)

    def _acknowledge(self, job: JobId, before: int, after: int) -> None:
        promised = apply(self.client, ActionVouch(job, Wei(before), Wei(after)))
        (effect,) = promised.effects
        assert isinstance(effect, SendVoucher)
        taken = apply(self.provider, ReceiveVoucher(job, Wei(before), Wei(after), effect.cumulative))
        self.client, self.provider, self.totals[job] = promised.state, taken.state, after

    @rule(job=jobs)
    def end(self, job: JobId) -> None:
        self.delivered.pop(job, None)
        self.client = apply(self.client, ActionRelease(job)).state
        self.provider = apply(self.provider, ActionRelease(job)).state

    @rule(amount=st.integers(0, 200))
    def top_up(self, amount: int) -> None:
        change = ContractReceiveSlot(slot(self.client.deposit + amount, self.client.claimed))
        self.client, self.provider = apply(self.client, change).state, apply(self.provider, change).state

    @invariant()
    def both_sides_count_the_same(self) -> None:
        assert (self.client.owed, self.client.vouched) == (self.provider.owed, self.provider.vouched)
        assert self.client.owed == sum(self.totals.values())

    @invariant()
    def what_is_at_risk_is_one_increment_per_job(self) -> None:
        """I4, and that escrow covers all of it."""
        at_risk = sum(self.delivered.values())
        assert at_risk == sum(self.provider.reserved.values())
        assert self.provider.owed + at_risk <= self.provider.deposit and self.provider.free >= 0


TestPair = PairMachine.TestCase
TestPair.settings = MACHINE


# ------------------------------------------------------------------------------------------------------- single cases


def test_credit_of_a_refund_can_be_spent() -> None:
    state = channel(100, owed=90, vouched=100)
    assert state.free == 10
    served = apply(state, ActionReserve(JOBS[0], Wei(10))).state
    assert apply(served, ActionVouch(JOBS[0], Wei(0), Wei(10))).effects == (SendVoucher(Wei(100)),)


def test_a_refund_never_costs_the_client_its_promise() -> None:
    """The deposit is reserved to the last wei when the final receipt comes to less than the one before it."""
    state = apply(channel(100), ActionReserve(JOBS[0], Wei(100))).state
    state = apply(state, ActionVouch(JOBS[0], Wei(0), Wei(60))).state
    state = apply(state, ActionVouch(JOBS[0], Wei(60), Wei(50))).state
    assert (state.owed, state.vouched, dict(state.reserved)) == (50, 60, {JOBS[0]: 40})


def test_an_exit_closes_the_channel_to_new_work() -> None:
    state = apply(channel(100), ActionReserve(JOBS[0], Wei(30))).state
    state = apply(state, ContractReceiveSlot(slot(100, exit_at=9))).state
    assert state.free == 0
    for job, amount in ((JOBS[1], 1), (JOBS[0], 31)):
        with pytest.raises(Overspend):
            apply(state, ActionReserve(job, Wei(amount)))
    paid = apply(state, ReceiveVoucher(JOBS[0], Wei(0), Wei(30), Wei(30))).state  # what was delivered is still paid
    assert (paid.owed, paid.vouched) == (30, 30)


def test_a_voucher_is_not_taken_while_older_ones_are_not_covered() -> None:
    """After an exit that was not settled in time, a low voucher must not pass for cover of what a high one covered."""
    state = channel(50, claimed=50, owed=80, vouched=80)
    assert state.free == -30
    with pytest.raises(Overspend) as caught:
        apply(state, ReceiveVoucher(JOBS[0], Wei(10), Wei(5), Wei(40)))
    assert caught.value.voucher_wei == 80


@pytest.mark.parametrize("kind", ["receive", "vouch"])
@pytest.mark.parametrize(("before", "after"), [(-1, 0), (0, -1), (101, 0)])
def test_totals_that_cannot_be_are_our_own_error(kind: str, before: int, after: int) -> None:
    change: Change = ActionVouch(JOBS[0], Wei(before), Wei(after))
    if kind == "receive":
        change = ReceiveVoucher(JOBS[0], Wei(before), Wei(after), Wei(500))
    with pytest.raises(LocalProtocolError):
        apply(channel(owed=100, vouched=100), change)


def test_a_slot_of_another_channel_is_our_own_error() -> None:
    other = ChannelKey(KEY.provider, Address(b"\x09" * 20))
    with pytest.raises(LocalProtocolError):
        apply(channel(), ContractReceiveSlot(slot(1, key=other)))
