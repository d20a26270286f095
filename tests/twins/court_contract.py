"""What Court.sol does, on a plain state: the same errors by name, the same order of checks, the same roundings.

The rules themselves are incentives/{audit_draw,committee,evidence,verdicts}.py, which the Solidity mirrors. Storage is
`State.court`, a dictionary as a contract's storage is; its values are immutable, so a copied state shares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from incentives.audit_draw import beacon_of, case_key, is_forced, lot_of
from incentives.committee import (
    Decision,
    NotEnoughValidators,
    Vote,
    credits_of,
    decide,
    draw_committee,
    excused_flags,
    penalised,
)
from incentives.evidence import MAX_FLAG_PPM, Evidence
from incentives.ledger import ChannelKey
from incentives.verdicts import contradicts_itself
from node.chain.errors import ContractReverted
from node.ports import CaseState, CommitmentRecord, CourtEvent, CourtRules
from protocol import merkle
from protocol.eip712 import Domain, digest, hash_struct
from protocol.merkle import Entry, SumNode
from protocol.messages import Commitment, Profile, Verdict, WorkReceipt
from protocol.signing import recover_digest
from protocol.units import BPS, ZERO_ADDRESS, ZERO_DIGEST, Address, AuditOutcome, Digest, Wei
from tests.twins.court_faults import judge
from tests.twins.memory_contracts import State, slash

COURT: Final = Address(b"\x0c" * 20)
"""The contract's own address: pools and bonds lie there."""

BOUNTY_BPS: Final = 1_000
SLASH_BPS: Final = {AuditOutcome.IMPROBABLE: BPS, AuditOutcome.FORGED: BPS, AuditOutcome.WITHHELD: 1_000}


@dataclass(frozen=True, slots=True)
class CourtConstants:
    """Rules, domain, the number of the block under way, and the hashes of those before it."""

    rules: CourtRules
    domain: Domain
    block: int
    hash_of: Callable[[int], Digest]


@dataclass(frozen=True, slots=True)
class Committed:
    """A commitment; `previous`: key of the provider's last one of the profile before it, or zero."""

    record: CommitmentRecord
    previous: Digest


@dataclass(frozen=True, slots=True)
class Seat:
    """One member of a round."""

    validator: Address
    submitted: Digest = ZERO_DIGEST
    verdict: Verdict | None = None
    credited: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """`rounds`: the seats of each. `decision`: of the last count. `pool`: wei for the victims, `paid` of it is."""

    id: Digest
    provider: Address
    profile_id: Digest
    epoch: int
    state: CaseState
    round: int
    until: int
    rounds: tuple[tuple[Seat, ...], ...]
    outcome: AuditOutcome = AuditOutcome.PASS
    evidence: int = 0
    slashed: int = 0
    was_forced: bool = False
    bond: int = 0
    pool: int = 0
    paid: int = 0
    decision: Decision | None = None


# -------------------------------------------------------------------------------------------------------------- storage


def commitment(state: State, key: Digest) -> Committed | None:
    found: Committed | None = state.court.get(("commitment", key))
    return found


def case(state: State, case_id: Digest) -> Case | None:
    found: Case | None = state.court.get(("case", case_id))
    return found


def validators(state: State) -> tuple[Address, ...]:
    found: tuple[Address, ...] = state.court.get("validators", ())
    return found


def evidence(state: State, provider: Address) -> Evidence:
    found: Evidence = state.court.get(("evidence", provider), Evidence())
    return found


def credits_and_missed(state: State, validator: Address) -> tuple[int, int]:
    found: tuple[int, int] = state.court.get(("credits", validator), (0, 0))
    return found


def flag_ppm(state: State, profile_id: Digest) -> int:
    """0 for a profile that is not registered."""
    found: int = state.court.get(("profile", profile_id), 0)
    return found


def events(state: State) -> list[CourtEvent]:
    return list(state.court.get("events", ()))


def _log(
    state_: State, k: CourtConstants, name: str, case_id: Digest, about: Address, /, **values: int | bytes
) -> None:
    past = state_.court.get("events", ())
    state_.court["events"] = (*past, CourtEvent(name, k.block, case_id, about, values))


def _need(condition: bool, action: str, error: str, **arguments: object) -> None:
    if not condition:
        raise ContractReverted(action, error, arguments)


def _pay(state: State, to: Address, amount: int) -> None:
    state.tally[to] = state.tally.get(to, 0) + amount


# ------------------------------------------------------------------------------------------------ profiles, enlistment


def register_profile(state: State, k: CourtConstants, profile: Profile) -> None:
    """Court.registerProfile."""
    profile_id = hash_struct(profile)
    in_range = 0 < profile.flag_ppm <= MAX_FLAG_PPM
    _need(in_range, "registerProfile", "FlagRate", flagPpm=profile.flag_ppm)
    if not flag_ppm(state, profile_id):
        state.court["profile", profile_id] = profile.flag_ppm
        _log(state, k, "ProfileAccepted", ZERO_DIGEST, ZERO_ADDRESS, profileId=profile_id, flagPpm=profile.flag_ppm)


def enlist(state: State, k: CourtConstants, sender: Address) -> None:
    """Court.enlist."""
    stake = state.stakes.get(sender, 0)
    _need(sender not in validators(state), "enlist", "AlreadyEnlisted", validator=sender)
    _need(sender in state.node_keys, "enlist", "NotRegistered", wallet=sender)
    least = k.rules.validator_stake
    _need(stake >= least, "enlist", "StakeTooLow", active=stake, minimum=least)
    state.court["validators"] = (*validators(state), sender)
    _log(state, k, "Enlisted", ZERO_DIGEST, sender)


def retire(state: State, k: CourtConstants, sender: Address) -> None:
    """Court.retire: the last one takes the place that becomes free."""
    now = list(validators(state))
    _need(sender in now, "retire", "NotEnlisted", validator=sender)
    now[now.index(sender)] = now[-1]
    state.court["validators"] = tuple(now[:-1])
    _log(state, k, "Retired", ZERO_DIGEST, sender)


# ---------------------------------------------------------------------------------------------------- commit and draw


def commit(state: State, k: CourtConstants, made: Commitment, signature: bytes) -> None:
    """Court.commit: anybody may post what the provider's node key signed."""
    provider, profile_id, epoch = Address(made.provider), Digest(made.profile_id), int(made.epoch)
    key = case_key(provider, profile_id, epoch)
    _need(flag_ppm(state, profile_id) > 0, "commit", "UnknownProfile", profileId=profile_id)
    ends = (epoch + 1) * k.rules.epoch_seconds
    _need(state.timestamp >= ends, "commit", "EpochNotOver", endsAt=ends, nowSeconds=state.timestamp)
    empty = made.count == 0 and (made.root != ZERO_DIGEST or made.total != 0)
    _need(not empty, "commit", "EmptyTree")
    _need(commitment(state, key) is None, "commit", "AlreadyCommitted", key=key)
    recovered = recover_digest(digest(k.domain, made), signature) or ZERO_ADDRESS
    signed = recovered != ZERO_ADDRESS and recovered == state.node_keys.get(provider)
    _need(signed, "commit", "NotTheProviders", recovered=recovered, provider=provider)
    previous = state.court.get(("last", provider, profile_id), ZERO_DIGEST)
    earlier = state.court.get(("jobs", provider, profile_id), 0)
    record = CommitmentRecord(
        key,
        provider,
        profile_id,
        epoch,
        Digest(made.root),
        made.count,
        Wei(made.total),
        Digest(made.lot),
        k.block,
        ZERO_DIGEST,
        earlier,
    )
    newest = commitment(state, previous)
    if newest is None or epoch > newest.record.epoch:
        state.court["last", provider, profile_id] = key
        state.court["jobs", provider, profile_id] = earlier + made.count
    else:  # out of order: it draws no lot for another, and none was drawn for it
        previous = ZERO_DIGEST
    state.court["commitment", key] = Committed(record, previous)
    values = {"profileId": profile_id, "epoch": epoch, "count": made.count, "total": made.total}
    _log(state, k, "Committed", key, provider, **values)


def draw(state: State, k: CourtConstants, key: Digest) -> None:
    """Court.draw."""
    made = commitment(state, key)
    if made is None:
        raise ContractReverted("draw", "UnknownCommitment", {"key": key})
    record, first = made.record, made.record.block + 2
    _need(case(state, key) is None, "draw", "AlreadyDrawn", key=key)
    _need(record.count > 0, "draw", "NothingToJudge", key=key)
    _need(k.block >= first, "draw", "TooEarlyToDraw", drawableAt=first, blockNumber=k.block)
    beacon = beacon_of(k.hash_of(record.block + 1 if k.block - record.block <= 257 else k.block - 1), key)
    state.court["commitment", key] = replace(made, record=replace(record, beacon=beacon))
    fresh = Case(key, record.provider, record.profile_id, record.epoch, CaseState.SUBMIT, 0, 0, ())
    opened = _opened(state, k, fresh, 0)
    members = b"".join(seat.validator for seat in opened.rounds[0])
    _log(state, k, "Drawn", key, ZERO_ADDRESS, beacon=beacon, members=members)
    _store(state, opened)


def _opened(state: State, k: CourtConstants, old: Case, round_: int) -> Case:
    """The case with round `round_` begun; reverts when nobody is there to judge it."""
    made = commitment(state, old.id)
    assert made is not None
    least = k.rules.validator_stake
    eligible = [v for v in validators(state) if v != old.provider and state.stakes.get(v, 0) >= least]
    before = [seat.validator for seats in old.rounds for seat in seats]
    try:
        members = draw_committee(made.record.beacon, round_, eligible, k.rules.committees[round_], before)
    except NotEnoughValidators as exc:
        raise ContractReverted("draw", "NotEnoughValidators", {"eligible": exc.eligible}) from exc
    seats = tuple(Seat(member) for member in members)
    until = state.timestamp + k.rules.submit_window
    if round_:
        _log(state, k, "RoundOpened", old.id, ZERO_ADDRESS, round=round_, members=b"".join(members))
    return replace(old, state=CaseState.SUBMIT, round=round_, until=until, rounds=(*old.rounds, seats))


def _store(state: State, changed: Case) -> None:
    state.court["case", changed.id] = changed


# ------------------------------------------------------------------------------------------------- submit and reveal


def _known(state: State, k: CourtConstants, action: str, case_id: Digest) -> Case:
    """The case as it stands now: a submit window that is over became the reveal window."""
    found = case(state, case_id)
    if found is None:
        raise ContractReverted(action, "UnknownCase", {"caseId": case_id})
    if found.state is CaseState.SUBMIT and state.timestamp >= found.until:
        return replace(found, state=CaseState.REVEAL, until=found.until + k.rules.reveal_window)
    return found


def _its_time(is_its_time: bool, action: str, found: Case) -> None:
    _need(is_its_time, action, "WrongPhase", state=int(found.state), until=found.until)


def _seat(found: Case, action: str, sender: Address) -> tuple[int, Seat]:
    for index, seat in enumerate(found.rounds[-1]):
        if seat.validator == sender:
            return index, seat
    raise ContractReverted(action, "NotAMember", {"validator": sender})


def _with_seat(found: Case, index: int, seat: Seat) -> Case:
    seats = (*found.rounds[-1][:index], seat, *found.rounds[-1][index + 1 :])
    return replace(found, rounds=(*found.rounds[:-1], seats))


def submit(state: State, k: CourtConstants, sender: Address, case_id: Digest, verdict_digest: Digest) -> None:
    """Court.submit."""
    found = _known(state, k, "submit", case_id)
    _its_time(found.state is CaseState.SUBMIT, "submit", found)
    _need(verdict_digest != ZERO_DIGEST, "submit", "ZeroDigest")
    index, seat = _seat(found, "submit", sender)
    _need(seat.submitted == ZERO_DIGEST, "submit", "AlreadySubmitted", validator=sender)
    found = _with_seat(found, index, replace(seat, submitted=verdict_digest))
    if all(item.submitted != ZERO_DIGEST for item in found.rounds[-1]):
        found = replace(found, state=CaseState.REVEAL, until=state.timestamp + k.rules.reveal_window)
    _store(state, found)
    _log(state, k, "Submitted", case_id, sender, round=found.round, digest=verdict_digest)


def reveal(state: State, k: CourtConstants, sender: Address, verdict: Verdict) -> None:
    """Court.reveal."""
    found = _known(state, k, "reveal", Digest(verdict.case_id))
    _its_time(found.state is CaseState.REVEAL and state.timestamp < found.until, "reveal", found)
    index, seat = _seat(found, "reveal", sender)
    _need(seat.verdict is None, "reveal", "AlreadyRevealed", validator=sender)
    mine = verdict.validator == sender and verdict.round == found.round
    _need(mine and digest(k.domain, verdict) == seat.submitted, "reveal", "NotWhatWasSubmitted", validator=sender)
    wrong = contradicts_itself(verdict, flag_ppm(state, found.profile_id))
    _need(not wrong, "reveal", "ContradictsItself", outcome=verdict.outcome)
    _store(state, _with_seat(found, index, replace(seat, verdict=verdict)))
    numbers = {name: getattr(verdict, name) for name in ("round", "outcome", "tokens", "flags", "voids", "gaps")}
    _log(state, k, "Revealed", found.id, sender, **numbers)


# -------------------------------------------------------------------------------------------------------- conclude


def _votes(seats: Iterable[Seat]) -> list[Vote]:
    shown = [seat.verdict for seat in seats if seat.verdict is not None]
    return [
        Vote(Address(v.validator), AuditOutcome(v.outcome), v.tokens, v.flags, v.voids, Digest(v.gaps)) for v in shown
    ]


def conclude(state: State, k: CourtConstants, case_id: Digest) -> None:
    """Court.conclude."""
    found = _known(state, k, "conclude", case_id)
    seats = found.rounds[-1]
    told = all(seat.verdict is not None for seat in seats if seat.submitted != ZERO_DIGEST)
    _its_time(found.state is CaseState.REVEAL and (told or state.timestamp >= found.until), "conclude", found)
    for seat in seats:
        if seat.verdict is None:
            _credit(state, k, found, seat.validator, 0)
    before = evidence(state, found.provider)
    is_last = found.round == len(k.rules.committees) - 1
    decision = decide(len(seats), _votes(seats), is_last, before, flag_ppm(state, found.profile_id))
    closed = replace(found, state=decision.state, outcome=decision.outcome, decision=decision)
    closed = replace(closed, evidence=decision.evidence.value)
    numbers = {"round": found.round, "outcome": decision.outcome, "evidence": decision.evidence.value}
    _log(state, k, "Concluded", case_id, ZERO_ADDRESS, state=int(decision.state), **numbers)
    match decision.state:
        case CaseState.SUBMIT:
            closed = _opened(state, k, replace(closed, state=CaseState.SUBMIT), found.round + 1)
        case CaseState.ANSWER:
            closed = replace(closed, until=state.timestamp + k.rules.answer_window)
        case CaseState.CLOSED:
            closed = _settled(state, k, closed)
        case _:
            closed = _bond_back(state, closed)
    _store(state, closed)


def _credit(state: State, k: CourtConstants, found: Case, validator: Address, tokens: int) -> None:
    """`tokens` 0: a reveal was missed."""
    credited, missed = credits_and_missed(state, validator)
    state.court["credits", validator] = (credited + tokens, missed + (not tokens))
    if tokens:
        _log(state, k, "Credited", found.id, validator, tokens=tokens)
    else:
        _log(state, k, "Missed", found.id, validator)


def _settled(state: State, k: CourtConstants, found: Case) -> Case:
    """Evidence, credits and penalties of a case whose outcome stands."""
    decision = found.decision
    assert decision is not None
    if not found.was_forced:
        state.court["evidence", found.provider] = decision.evidence
    deciding = found.rounds[-1]
    earned = credits_of(decision, _votes(deciding))
    for validator, tokens in earned.items():
        _credit(state, k, found, validator, tokens)
    everyone = [vote for seats in found.rounds for vote in _votes(seats)]
    for validator in penalised(decision, found.was_forced, everyone):
        taken = slash(state, validator, k.rules.validator_penalty)
        _log(state, k, "Penalised", found.id, validator, slashed=taken)
    seats = tuple(replace(seat, credited=seat.validator in earned) for seat in deciding)
    found = replace(found, rounds=(*found.rounds[:-1], seats), state=CaseState.CLOSED)
    guilty = found.outcome in SLASH_BPS and not found.was_forced
    return found if guilty else _bond_back(state, found)


def _bond_back(state: State, found: Case) -> Case:
    if found.bond:
        _pay(state, found.provider, found.bond)
        state.tally[COURT] -= found.bond
    return replace(found, bond=0)


# ----------------------------------------------------------------------------------------- answer, appeal, execute


def _accused(state: State, k: CourtConstants, action: str, sender: Address, case_id: Digest) -> Case:
    """The case, in its answer window, called by its accused."""
    found = _known(state, k, action, case_id)
    _its_time(found.state is CaseState.ANSWER and state.timestamp < found.until, action, found)
    _need(found.provider == sender, action, "NotTheAccused", caller=sender, provider=found.provider)
    return found


def answer(state: State, k: CourtConstants, sender: Address, case_id: Digest, secret: bytes) -> None:
    """Court.answer: the error was forced by the commitment before."""
    found = _accused(state, k, "answer", sender, case_id)
    made = commitment(state, case_id)
    assert made is not None
    before = commitment(state, made.previous)
    beacon = before.record.beacon if before is not None else ZERO_DIGEST
    known = before is not None and lot_of(secret) == before.record.lot and beacon != ZERO_DIGEST
    excused = known and found.outcome is AuditOutcome.IMPROBABLE and is_forced(secret, beacon, k.rules.forced_bps)
    decision, ppm = found.decision, flag_ppm(state, made.record.profile_id)
    _need(excused and decision is not None, "answer", "NotForced")
    assert decision is not None
    _need(decision.flags <= excused_flags(decision.tokens, ppm), "answer", "NotForced")
    found = _settled(state, k, replace(found, was_forced=True))
    _store(state, found)
    _log(state, k, "Answered", case_id, ZERO_ADDRESS, forced=1)


def appeal(state: State, k: CourtConstants, sender: Address, case_id: Digest) -> None:
    """Court.appeal."""
    found = _accused(state, k, "appeal", sender, case_id)
    _need(found.round + 1 < len(k.rules.committees), "appeal", "NoFurtherRound", round=found.round)
    bond = k.rules.appeal_bond
    _need(state.tally.get(sender, 0) >= bond, "appeal", "TransferFromFailed")
    state.tally[sender] -= bond
    _pay(state, COURT, bond)
    _store(state, _opened(state, k, replace(found, bond=found.bond + bond), found.round + 1))
    _log(state, k, "Appealed", case_id, ZERO_ADDRESS, round=found.round + 1)


def execute(state: State, k: CourtConstants, case_id: Digest) -> None:
    """Court.execute: the slash, its bounty split between the credited members and the victims."""
    found = _known(state, k, "execute", case_id)
    _its_time(found.state is CaseState.ANSWER and state.timestamp >= found.until, "execute", found)
    found = _settled(state, k, found)
    whole = state.stakes.get(found.provider, 0) + state.unbonding.get(found.provider, (0, 0))[0]
    taken = slash(state, found.provider, whole * SLASH_BPS[found.outcome] // BPS)
    bounty = taken * BOUNTY_BPS // BPS
    members = [seat.validator for seat in found.rounds[-1] if seat.credited]
    share = bounty // 2 // len(members) if members else 0
    for member in members:
        _pay(state, member, share)
    pool = bounty - bounty // 2
    _pay(state, COURT, pool)
    if found.bond:
        state.tally[COURT] -= found.bond  # burned
    _store(state, replace(found, slashed=taken, pool=pool, bond=0))
    _log(state, k, "Executed", case_id, found.provider, outcome=int(found.outcome), slashed=taken)


def compensate(
    state: State,
    k: CourtConstants,
    case_id: Digest,
    entry: Entry,
    index: int,
    siblings: tuple[SumNode, ...],
    receipt: WorkReceipt,
) -> None:
    """Court.compensate: a committed job's payer takes its share of the pool, once."""
    found, made = _known(state, k, "compensate", case_id), commitment(state, case_id)
    assert made is not None
    _need(found.pool > found.paid, "compensate", "NothingToPay")
    root = SumNode(made.record.root, made.record.total)
    inside = merkle.verify(entry, index, made.record.count, siblings, root)
    _need(inside and digest(k.domain, receipt) == entry.receipt, "compensate", "NotInTheTree")
    _need(("paid", case_id, index) not in state.court, "compensate", "AlreadyCompensated", index=index)
    channel = state.channels.get(ChannelKey(found.provider, Address(receipt.client)))
    if channel is None:
        raise ContractReverted("compensate", "NoPayer", {"client": Address(receipt.client)})
    payer = channel.owner
    amount = min(entry.amount, found.pool * entry.amount // made.record.total, found.pool - found.paid)
    state.court["paid", case_id, index] = True
    _store(state, replace(found, paid=found.paid + amount))
    state.tally[COURT] -= amount
    _pay(state, payer, amount)
    _log(state, k, "Compensated", case_id, payer, amount=amount, index=index)


# ---------------------------------------------------------------------------------------------------- objective faults


def prove(state: State, k: CourtConstants, sender: Address, kind: int, proof: bytes) -> None:
    """Court.prove: half of the bounty goes to whoever showed it."""
    made = {name[1]: item.record for name, item in state.court.items() if name[0] == "commitment"}
    ruling = judge(state, k.domain, k.rules.epoch_seconds, k.rules.commit_window, made, kind, proof)
    _need(("fault", ruling.fault_id) not in state.court, "prove", "FaultAlreadyPunished", faultId=ruling.fault_id)
    state.court["fault", ruling.fault_id] = True
    whole = state.stakes.get(ruling.accused, 0) + state.unbonding.get(ruling.accused, (0, 0))[0]
    taken = slash(state, ruling.accused, whole * ruling.share_bps // BPS)
    _pay(state, sender, taken * BOUNTY_BPS // BPS // 2)
    values = {"kind": kind, "reporter": sender, "slashed": taken, "faultId": ruling.fault_id}
    _log(state, k, "FaultProven", ZERO_DIGEST, ruling.accused, **values)
