"""One payment channel, as either side accounts for it: what is owed, what is promised, what is still free to spend.

Pure: `apply(state, change)` gives the next state and the effects the caller must carry out, in order. Invariants,
each tested by a Hypothesis state machine (tests/incentives/test_channel.py):
  I1  vouched <= deposit at the moment a voucher is made or taken
  I2  vouched never falls, and a voucher taken or made covers all that is owed
  I3  owed + reserved <= deposit when work is taken on: nothing is served past confirmed escrow, and nothing new is
      taken on once the payer has asked to leave
  I4  at most one increment per job is delivered beyond what was vouched for
Equations and symbols: incentives/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from incentives.ledger import ChannelKey, SlotSeen
from protocol.errors import LocalProtocolError, Overspend, StaleVoucher
from protocol.units import JobId, Wei

_NOTHING: Mapping[JobId, Wei] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Channel:
    """State of one channel. All amounts in wei and cumulative over the channel's life.

    `deposit`, `claimed`, `exit_at`: the escrow slot at a confirmed block. `owed`: sum of the totals of all jobs at
    their last acknowledged receipts. `vouched`: highest voucher. `reserved`: per running job, what it may come to
    beyond its last acknowledged receipt before the next voucher.
    """

    key: ChannelKey
    deposit: Wei = field(default=Wei(0))
    claimed: Wei = field(default=Wei(0))
    exit_at: int = 0
    owed: Wei = field(default=Wei(0))
    vouched: Wei = field(default=Wei(0))
    reserved: Mapping[JobId, Wei] = field(default_factory=lambda: _NOTHING)

    @property
    def free(self) -> Wei:
        """Deposit that neither a receipt nor a running job has a claim on, so what is vouched beyond `owed` is credit.

        Nothing while the payer leaves, or while vouchers stand that the deposit does not cover. Negative after an
        exit was paid out.
        """
        left = self.deposit - self.owed - sum(self.reserved.values())
        return Wei(min(0, left) if self.exit_at or self.vouched > self.deposit else left)

    @property
    def unclaimed(self) -> Wei:
        """Vouched and not yet settled on chain."""
        return Wei(self.vouched - self.claimed)


# ------------------------------------------------------------------------------------------------------------ changes


@dataclass(frozen=True, slots=True)
class ContractReceiveSlot:
    """The chain shows this slot at a confirmed block."""

    slot: SlotSeen


@dataclass(frozen=True, slots=True)
class ActionReserve:
    """A running job may come to `amount` wei beyond its last acknowledged receipt."""

    job_id: JobId
    amount: Wei


@dataclass(frozen=True, slots=True)
class ReceiveVoucher:
    """Provider: a signed voucher acknowledges a receipt that moved a job's total from `before` to `after`."""

    job_id: JobId
    before: Wei
    after: Wei
    cumulative: Wei


@dataclass(frozen=True, slots=True)
class ActionVouch:
    """Client: a receipt recomputed and moved a job's total from `before` to `after`; promise it.

    It is paid out of what is reserved for the job; the rest stays reserved.
    """

    job_id: JobId
    before: Wei
    after: Wei


@dataclass(frozen=True, slots=True)
class ActionRelease:
    """The job is over; nothing more is reserved for it."""

    job_id: JobId


Change = ContractReceiveSlot | ActionReserve | ReceiveVoucher | ActionVouch | ActionRelease


# ------------------------------------------------------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class SendVoucher:
    """Client: journal, then sign and send a voucher of `cumulative` wei."""

    cumulative: Wei


@dataclass(frozen=True, slots=True)
class ReleaseTokens:
    """Provider: journal the voucher, then let the job's next increment out."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class SettleNow:
    """Provider: the payer asked to leave; settle before `exit_at` (Unix seconds)."""

    exit_at: int


Effect = SendVoucher | ReleaseTokens | SettleNow


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state, and what must be done now, in order."""

    state: Channel
    effects: tuple[Effect, ...] = ()


def apply(state: Channel, change: Change) -> Transition:
    """The one step function of a channel.

    Raises: Overspend, StaleVoucher, LocalProtocolError (a slot of another channel, a negative amount).
    """
    match change:
        case ContractReceiveSlot(slot):
            return _receive_slot(state, slot)
        case ActionReserve(job_id, amount):
            return _reserve(state, job_id, amount)
        case ReceiveVoucher():
            return _receive_voucher(state, change)
        case ActionVouch():
            return _vouch(state, change)
        case ActionRelease(job_id):
            return Transition(replace(state, reserved=_with(state.reserved, job_id, 0)))


def _with(reserved: Mapping[JobId, Wei], job_id: JobId, amount: int) -> Mapping[JobId, Wei]:
    """The reservations with this job's at `amount`; nothing is kept for zero."""
    rest = {job: held for job, held in reserved.items() if job != job_id}
    return MappingProxyType(rest | ({job_id: Wei(amount)} if amount else {}))


def _owed_after(state: Channel, change: ReceiveVoucher | ActionVouch) -> Wei:
    """Raises: LocalProtocolError when a total is negative, or a job takes back more than the channel owes."""
    owed = state.owed + change.after - change.before
    if min(change.before, change.after, owed) < 0:
        raise LocalProtocolError(
            f"a job from {change.before} to {change.after} wei in a channel that owes {state.owed}"
        )
    return Wei(owed)


def _receive_slot(state: Channel, slot: SlotSeen) -> Transition:
    if slot.key != state.key:
        raise LocalProtocolError("an escrow slot was applied to another channel")
    following = replace(state, deposit=slot.deposit, claimed=slot.claimed, exit_at=slot.exit_at)
    leaving = slot.exit_at and not state.exit_at and following.unclaimed > 0
    return Transition(following, (SettleNow(slot.exit_at),) if leaving else ())


def _reserve(state: Channel, job_id: JobId, amount: Wei) -> Transition:
    if amount < 0:
        raise LocalProtocolError("a reservation cannot be negative")
    # SPEC 4.11: takes on nothing more once the payer has requested its exit
    others = replace(state, reserved=_with(state.reserved, job_id, 0))
    if amount > max(others.free, state.reserved.get(job_id, 0)):  # keeping or lowering one's own takes nothing on
        raise Overspend(others.deposit - others.free + amount, others.deposit)
    return Transition(replace(state, reserved=_with(state.reserved, job_id, amount)))


def _receive_voucher(state: Channel, change: ReceiveVoucher) -> Transition:
    # SPEC 4.6: of several vouchers the highest counts and the order of arrival does not matter
    owed, vouched = _owed_after(state, change), max(state.vouched, change.cumulative)
    if vouched > state.deposit:
        raise Overspend(vouched, state.deposit)
    if vouched < owed:
        raise StaleVoucher(change.cumulative, owed)
    reserved = _with(state.reserved, change.job_id, 0)
    return Transition(replace(state, owed=owed, vouched=vouched, reserved=reserved), (ReleaseTokens(change.job_id),))


def _vouch(state: Channel, change: ActionVouch) -> Transition:
    owed = _owed_after(state, change)
    cumulative = max(state.vouched, owed)
    if cumulative > state.deposit:
        raise Overspend(cumulative, state.deposit)
    used = max(0, change.after - change.before)
    reserved = _with(state.reserved, change.job_id, max(0, state.reserved.get(change.job_id, 0) - used))
    return Transition(replace(state, owed=owed, vouched=cumulative, reserved=reserved), (SendVoucher(cumulative),))
