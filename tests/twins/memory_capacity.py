"""What contracts/src/Reservations.sol does, on a plain state: same errors, same order of checks, same roundings."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from eth_hash.auto import keccak

from incentives.reservation import HORIZON, earned_down, per_period_up
from node.chain.errors import ContractReverted
from node.ports import CapacityTerms, ReservationOrder, ReservationRecord
from protocol.units import BPS, ZERO_ADDRESS, ZERO_DIGEST, Address, Digest, Wei
from tests.twins.memory_contracts import FEE_BPS, State

PERIOD_S: Final = 60
"""Length of a period, as `make devnet` deploys it. Unit: s."""


def offer(state: State, sender: Address, profile_id: Digest, terms: CapacityTerms) -> None:
    """Reservations.offer."""
    least, most = terms.min_periods, terms.max_periods
    if least == 0 or most > HORIZON or (most and most < least):
        arguments: dict[str, object] = {"minPeriods": least, "maxPeriods": most, "horizon": HORIZON}
        raise ContractReverted("offer", "TermsOutOfRange", arguments)
    now = state.timestamp // PERIOD_S
    booked = sorted(key[2] for key in state.sold if key[:2] == (sender, profile_id) and key[2] >= now)
    for period in booked:
        sold = state.sold[sender, profile_id, period]
        if sold > terms.capacity:
            evidence: dict[str, object] = {"period": period, "sold": sold, "capacity": terms.capacity}
            raise ContractReverted("offer", "SoldAlready", evidence)
    state.capacities[sender, profile_id] = terms


def buy(state: State, sender: Address, order: ReservationOrder) -> None:
    """Reservations.buy; the right's id is `next_id` of the state before."""
    book = order.provider, order.profile_id
    terms = state.capacities.get(book, CapacityTerms(0, Wei(0), 0, 0))
    if order.rate == 0:
        raise ContractReverted("buy", "ZeroRate")
    if order.periods == 0 or not terms.min_periods <= order.periods <= terms.max_periods:
        bounds: dict[str, object] = {"minPeriods": terms.min_periods, "maxPeriods": terms.max_periods}
        raise ContractReverted("buy", "TermNotSold", {"periods": order.periods, **bounds})
    last, earliest = order.first + order.periods, state.timestamp // PERIOD_S
    if order.first < earliest or last > earliest + HORIZON:
        window: dict[str, object] = {"earliest": earliest, "latest": earliest + HORIZON}
        raise ContractReverted("buy", "OutsideHorizon", {"first": order.first, "last": last, **window})
    per_period = per_period_up(order.rate, PERIOD_S, terms.price)
    cost = per_period * order.periods
    if cost > order.max_cost:
        raise ContractReverted("buy", "CostAbove", {"cost": cost, "maxCost": order.max_cost})
    for period in range(order.first, last):
        free = terms.capacity - state.sold.get((*book, period), 0)
        if order.rate > free:
            raise ContractReverted("buy", "SoldOut", {"period": period, "rate": order.rate, "free": free})
    if state.tally.get(sender, 0) < cost:
        raise ContractReverted("buy", "TransferFromFailed")
    right = next_id(state, sender)
    for period in range(order.first, last):
        state.sold[*book, period] = state.sold.get((*book, period), 0) + order.rate
    state.purchases[sender] = state.purchases.get(sender, 0) + 1
    state.tally[sender] -= cost
    span = order.first * PERIOD_S, last * PERIOD_S
    state.rights[right] = ReservationRecord(
        right, *book, sender, order.session, order.rate, *span, terms.min_periods, per_period, Wei(0)
    )


def next_id(state: State, buyer: Address) -> Digest:
    """What `buyer`'s next purchase will be called."""
    return Digest(keccak(buyer + b"%d" % state.purchases.get(buyer, 0)))


def transfer(state: State, sender: Address, right: Digest, to: Address) -> None:
    """Reservations.transfer."""
    if to == ZERO_ADDRESS:
        raise ContractReverted("transfer", "ZeroHolder")
    state.rights[right] = replace(_held(state, "transfer", sender, right), holder=to, session=ZERO_ADDRESS)


def assign(state: State, sender: Address, right: Digest, session: Address) -> None:
    """Reservations.assign."""
    state.rights[right] = replace(_held(state, "assign", sender, right), session=session)


def release(state: State, sender: Address, right: Digest) -> None:
    """Reservations.release."""
    record = state.rights.get(right, _NONE)
    if sender != record.provider:
        raise ContractReverted("release", "NotProvider", {"caller": sender, "provider": record.provider})
    _shorten(state, "release", record, max(record.start, state.timestamp))


def quit_right(state: State, sender: Address, right: Digest) -> None:
    """Reservations.quit."""
    record = _held(state, "quit", sender, right)
    start = max(record.start, (state.timestamp // PERIOD_S + 1) * PERIOD_S)
    _shorten(state, "quit", record, start + record.notice * PERIOD_S)


def claim(state: State, provider: Address, rights: tuple[Digest, ...]) -> None:
    """Reservations.claim. The fee is burned."""
    paid = 0
    for right in rights:
        record = state.rights.get(right, _NONE)
        if record.provider != provider or right not in state.rights:
            continue
        seconds = max(0, min(state.timestamp, record.end) - record.start)
        amount = earned_down(record.per_period, seconds, PERIOD_S) - record.claimed
        state.rights[right] = replace(record, claimed=Wei(record.claimed + amount))
        paid += amount
    state.tally[provider] = state.tally.get(provider, 0) + paid - paid * FEE_BPS // BPS


def _held(state: State, action: str, sender: Address, right: Digest) -> ReservationRecord:
    record = state.rights.get(right, _NONE)
    if sender != record.holder:
        raise ContractReverted(action, "NotHolder", {"caller": sender, "holder": record.holder})
    return record


def _shorten(state: State, action: str, record: ReservationRecord, end: int) -> None:
    if end >= record.end:
        raise ContractReverted(action, "EndsAnyway", {"end": record.end, "earliest": end})
    for period in range(-(-end // PERIOD_S), record.end // PERIOD_S):
        state.sold[record.provider, record.profile_id, period] -= record.rate
    before = earned_down(record.per_period, record.end - record.start, PERIOD_S)
    refund = before - earned_down(record.per_period, end - record.start, PERIOD_S)
    state.rights[record.id] = replace(record, end=end)
    state.tally[record.holder] = state.tally.get(record.holder, 0) + refund


_NONE: Final = ReservationRecord(
    ZERO_DIGEST, ZERO_ADDRESS, ZERO_DIGEST, ZERO_ADDRESS, ZERO_ADDRESS, 0, 0, 0, 0, Wei(0), Wei(0)
)
