"""Web3Court: the Court port over the connection of a Web3Chain. Importing this module does not import web3."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from incentives.audit_draw import case_key
from incentives.faults import Fault, Placed, Proof
from node.chain.chain import Web3Chain
from node.chain.contracts import checksum
from node.ports import (
    CaseMember,
    CaseRecord,
    CaseState,
    ChainUnavailable,
    Clock,
    CommitmentRecord,
    CourtEvent,
    CourtRules,
    Mined,
)
from protocol.eip712 import Domain, digest, fields_of
from protocol.merkle import Entry, SumNode
from protocol.messages import Commitment, Profile, Verdict, WorkReceipt
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Address, Digest

if TYPE_CHECKING:
    from node.chain.court_abi import CourtAbi, SeatWords

TRAIL: Final = 64
"""Blocks up to which events were read whose hashes are remembered. Each look leaves one; a reorganisation that goes
below all of them makes the next look read as many blocks again, counted from the lowest."""

_CASE_IDS: Final = ("key", "caseId")
_ABOUT: Final = ("provider", "validator", "accused", "payer")


class FaultKind(IntEnum):
    """Kinds of objective faults, as contracts/src/IFaults.sol numbers them."""

    TWO_TARIFFS = 0
    TWO_RECEIPTS = 1
    PRICE = 2
    BROKEN_CHAIN = 3
    MISSING = 4
    UNSORTED = 5
    UNCOMMITTED = 6


_KINDS: Final = {
    Fault.TWO_TARIFFS: FaultKind.TWO_TARIFFS,
    Fault.TWO_RECEIPTS: FaultKind.TWO_RECEIPTS,
    Fault.BROKEN_CHAIN: FaultKind.BROKEN_CHAIN,
    Fault.MISSING: FaultKind.MISSING,
    Fault.UNSORTED: FaultKind.UNSORTED,
    Fault.UNCOMMITTED: FaultKind.UNCOMMITTED,
    Fault.OVERCHARGE: FaultKind.PRICE,
    Fault.UNDERCHARGE: FaultKind.PRICE,
    Fault.MISPRICED: FaultKind.PRICE,
    Fault.OUT_OF_FORCE: FaultKind.PRICE,
    Fault.TIER_NOT_OFFERED: FaultKind.PRICE,
    Fault.BASE_OUT_OF_BOUNDS: FaultKind.PRICE,
    Fault.IMPOSSIBLE: FaultKind.PRICE,
}
"""Every fault that the Court judges; a hidden cache hit is shown to people only."""

ENTRY_TYPE: Final = "(bytes32,bytes32,uint96)"
LEAF_TYPE: Final = f"({ENTRY_TYPE},uint256,(bytes32,uint96)[])"
"""An entry, its index and its siblings, as the Court takes them."""


def document_type(struct: Any) -> str:
    """The ABI type of a signed document: a tuple of its fields."""
    return f"({','.join(sol for _, sol in fields_of(struct))})"


def words(document: Any) -> tuple[Any, ...]:
    """A document's fields as the ABI takes them: addresses as checksummed text."""
    struct: Any = type(document)
    values = ((getattr(document, name), sol) for name, sol in fields_of(struct))
    return tuple(checksum(value) if sol == "address" else value for value, sol in values)


def entry_words(entry: Entry) -> tuple[bytes, bytes, int]:
    """An entry as the ABI takes it."""
    return entry.job_id, entry.receipt, entry.amount


def node_words(siblings: Sequence[SumNode]) -> list[tuple[bytes, int]]:
    """Siblings as the ABI takes them."""
    return [(node.hash, node.total) for node in siblings]


def _leaf_words(item: Placed) -> tuple[Any, ...]:
    return entry_words(item.entry), item.index, node_words(item.siblings)


def encode_proof(proof: Proof) -> tuple[int, bytes]:
    """Kind and bytes for Court.prove. Raises: ValueError for a fault the Court does not judge, or documents missing."""
    from eth_abi.abi import encode

    kind = _KINDS.get(proof.fault)
    if kind is None:
        raise ValueError(f"the Court does not judge {proof.fault.value!r}: its documents convince people")
    types: list[str] = []
    values: list[Any] = []

    def add(type_: str, value: Any) -> None:
        types.append(type_)
        values.append(value)

    paired = kind in (FaultKind.TWO_TARIFFS, FaultKind.TWO_RECEIPTS, FaultKind.BROKEN_CHAIN)
    for sheet in proof.tariffs:
        add(document_type(type(sheet.tariff)), words(sheet.tariff))
        if paired:
            add("bytes", sheet.signature)
    for note in proof.receipts:
        add(document_type(type(note.receipt)), words(note.receipt))
        add("bytes", note.signature)
    if kind is FaultKind.MISSING:
        add(f"{LEAF_TYPE}[]", [_leaf_words(item) for item in proof.placed])
    if kind is FaultKind.UNSORTED:
        [root] = proof.roots
        made = root.commitment
        add("bytes32", case_key(Address(made.provider), Digest(made.profile_id), int(made.epoch)))
        for item in proof.placed:
            add(LEAF_TYPE, _leaf_words(item))
    return int(kind), encode(types, values)


class Web3Court:
    """The Court of `chain`'s deployment, acting for its wallet. It is started and stopped with the chain."""

    def __init__(self, chain: Web3Chain, clock: Clock) -> None:
        self._chain, self._clock = chain, clock
        self._abi: CourtAbi | None = None
        self._rules: CourtRules | None = None
        self._trail: dict[int, Digest] = {}  # last block of a look at the events -> its hash
        self._verdicts: dict[tuple[Digest, int, Address], Verdict] = {}

    @property
    def domain(self) -> Domain:
        return self._chain.domain

    # ---------------------------------------------------------------------------------------------------- reading

    async def rules(self) -> CourtRules:
        if self._rules is None:
            self._rules = (await self._connected()).rules(await self._view("rules"))
        return self._rules

    async def now(self) -> int:
        return max((await self._chain.head()).timestamp, self._clock.now_ms() // 1_000)

    async def events(self, first_block: int) -> tuple[list[CourtEvent], int]:
        """See the port. After a reorganisation, events of the blocks that came instead are given, so some may come
        again. Raises: ChainUnavailable, also when the chain changed while it was read."""
        abi, reader = await self._connected(), self._chain.reader
        target = await reader.confirmed()
        if target.number < max(self._trail, default=0):
            return [], first_block  # a node behind a load balancer that lags
        first = await self._rewound(max(first_block, abi.first_block))
        found = [abi.event(log) async for log in reader.logs(abi.filter, first, target.number)]
        if (await reader.block(target.number)).hash != target.hash:
            raise ChainUnavailable("the chain was reorganised while its events were read; nothing was taken from them")
        self._trail[target.number] = target.hash
        self._trail = dict(sorted(self._trail.items())[-TRAIL:])
        return [_named(block, name, values) for block, name, values in found], target.number + 1

    async def _rewound(self, first: int) -> int:
        """`first`, or an earlier block when those before it are no longer what was read."""
        for number in sorted((n for n in self._trail if n < first), reverse=True):
            if (await self._chain.reader.block(number)).hash == self._trail[number]:
                return first
            del self._trail[number]
            first = max(self._trail, default=max(0, number - TRAIL)) + 1
        return first

    async def commitment(self, key: Digest) -> CommitmentRecord | None:
        block = (await self._chain.reader.confirmed()).number
        return (await self._connected()).commitment(key, await self._view("commitments", key, block=block))

    async def case(self, case_id: Digest) -> CaseRecord | None:
        """See the port: of the newest block."""
        abi = await self._connected()
        seen = abi.case(await self._view("caseOf", case_id))
        if seen.state is CaseState.NONE:
            return None
        made = abi.commitment(case_id, await self._view("commitments", case_id))
        assert made is not None, "a case has a commitment"
        seats = abi.seats(await self._view("seatsOf", case_id, seen.round))
        await self._learn_verdicts(case_id, seen.round, made.block, seats)
        return CaseRecord(
            case_id,
            made.provider,
            made.profile_id,
            made.epoch,
            seen.state,
            seen.round,
            seen.until,
            seen.outcome,
            tuple(self._member(case_id, seen.round, seat) for seat in seats),
            seen.evidence,
            seen.slashed,
            seen.was_forced,
        )

    async def _learn_verdicts(self, case_id: Digest, round_: int, block: int, seats: Sequence[SeatWords]) -> None:
        """Whole verdicts are in the log alone. Raises: ChainUnavailable while the log lacks one."""
        wanted = {seat.validator for seat in seats if seat.revealed}
        if all((case_id, round_, validator) in self._verdicts for validator in wanted):
            return
        abi, reader = await self._connected(), self._chain.reader
        newest = (await reader.block("latest")).number
        async for log in reader.logs(lambda low, high: abi.reveals(case_id, low, high), block, newest):
            verdict = abi.verdict(log)
            self._verdicts[case_id, verdict.round, Address(verdict.validator)] = verdict
        if not all((case_id, round_, validator) in self._verdicts for validator in wanted):
            raise ChainUnavailable("the RPC does not show the log of a verdict it knows of; ask again")

    def _member(self, case_id: Digest, round_: int, seat: SeatWords) -> CaseMember:
        if not seat.revealed:
            return CaseMember(seat.validator, seat.submitted, None, False)
        verdict = self._verdicts[case_id, round_, seat.validator]
        return CaseMember(seat.validator, digest(self.domain, verdict), verdict, seat.credited)

    async def validators(self) -> tuple[Address, ...]:
        return tuple(_address(shown) for shown in await self._view("validators"))

    async def evidence(self, provider: Address) -> int:
        return int(await self._view("evidenceOf", provider))

    async def credits(self, validator: Address) -> tuple[int, int]:
        tokens, missed = await self._view("creditsOf", validator)
        return int(tokens), int(missed)

    async def profile_registered(self, profile_id: Digest) -> bool:
        return int(await self._view("profileFlagPpm", profile_id)) > 0

    # ---------------------------------------------------------------------------------------------------- writing

    async def register_profile(self, profile: Profile) -> Mined:
        return await self._do("registerProfile", words(profile))

    async def enlist(self) -> Mined:
        return await self._do("enlist")

    async def retire(self) -> Mined:
        return await self._do("retire")

    async def post_commitment(self, commitment: Commitment, signature: bytes) -> Mined:
        return await self._do("commit", words(commitment), signature)

    async def draw(self, case_id: Digest) -> Mined:
        return await self._do("draw", case_id)

    async def submit(self, case_id: Digest, verdict_digest: Digest) -> Mined:
        return await self._do("submit", case_id, verdict_digest)

    async def reveal(self, verdict: Verdict) -> Mined:
        return await self._do("reveal", words(verdict))

    async def conclude(self, case_id: Digest) -> Mined:
        return await self._do("conclude", case_id)

    async def execute(self, case_id: Digest) -> Mined:
        return await self._do("execute", case_id)

    async def answer(self, case_id: Digest, secret: bytes) -> Mined:
        return await self._do("answer", case_id, secret)

    async def appeal(self, case_id: Digest) -> Mined:
        """See the port. Raises: NotEnoughTally for a bond that the wallet does not hold."""
        abi = await self._connected()
        bond = (await self.rules()).appeal_bond
        return await self._chain.pay_contract("appeal", abi.address, bond, abi.encode("appeal", case_id))

    async def prove(self, kind: int, proof: bytes) -> Mined:
        return await self._do("prove", kind, proof)

    async def compensation(
        self, case_id: Digest, entry: Entry, index: int, siblings: Sequence[SumNode], receipt: WorkReceipt
    ) -> Mined:
        return await self._do("compensate", case_id, entry_words(entry), index, node_words(siblings), words(receipt))

    # ----------------------------------------------------------------------------------------------------- inside

    async def _connected(self) -> CourtAbi:
        """The contract's interface, bound to the chain's connection. Raises: ChainUnavailable."""
        from node.chain.court_abi import CourtAbi

        contracts = self._chain.contracts  # of this start: a chain that was stopped and started has another
        if self._abi is None or self._abi.contracts is not contracts:
            self._abi = CourtAbi(contracts)
        return self._abi

    async def _view(self, function: str, *arguments: Any, block: int | str = "latest") -> Any:
        abi = await self._connected()
        return await self._chain.reader.view(abi.call(function, *arguments), block)

    async def _do(self, function: str, *arguments: Any) -> Mined:
        abi = await self._connected()
        return await self._chain.call_contract(function, abi.address, abi.encode(function, *arguments))


def _named(block: int, name: str, values: dict[str, int | bytes]) -> CourtEvent:
    """An event with what it is about taken out of its arguments."""
    rest = dict(values)
    case_id = next((rest.pop(key) for key in _CASE_IDS if key in rest), ZERO_DIGEST)
    about = next((rest.pop(key) for key in _ABOUT if key in rest), ZERO_ADDRESS)
    assert isinstance(case_id, bytes) and isinstance(about, bytes)
    return CourtEvent(name, block, Digest(case_id), Address(about), rest)


def _address(shown: str) -> Address:
    return Address(bytes.fromhex(shown.removeprefix("0x")))
