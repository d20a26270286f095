"""What Faults.sol does: objective faults, decoded from their ABI encoding and judged by incentives/faults.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from eth_abi.abi import decode
from eth_hash.auto import keccak

from incentives import faults
from incentives.audit_draw import case_key
from incentives.faults import Placed
from node.chain.court import LEAF_TYPE, FaultKind, document_type
from node.chain.errors import ContractReverted
from node.ports import CommitmentRecord
from protocol.eip712 import Domain, digest, fields_of
from protocol.merkle import Entry, SumNode
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.signing import recover_digest
from protocol.units import ZERO_ADDRESS, Address, Digest, JobId, Wei
from tests.twins.memory_contracts import State

T = TypeVar("T")

SHARES = {FaultKind.PRICE: 1_000, FaultKind.UNCOMMITTED: 1_000}
"""Share of the stake that is lost, in basis points, where it is not half."""

OF_JOBS = frozenset({FaultKind.TWO_RECEIPTS, FaultKind.BROKEN_CHAIN, FaultKind.MISSING, FaultKind.PRICE})
"""Kinds named after their share and job: a lie about a job that shows in several ways is one offence."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """As IFaults.judge returns it, without the payer."""

    accused: Address
    fault_id: Digest
    share_bps: int


def judge(
    state: State,
    domain: Domain,
    epoch_s: int,
    commit_window: int,
    made: dict[Digest, CommitmentRecord],
    kind: int,
    proof: bytes,
) -> Ruling:
    """Raises: ContractReverted with NotProven, UnknownKind or NotSignedBy. `made`: commitments by key."""
    try:
        which = FaultKind(kind)
    except ValueError as exc:
        raise ContractReverted("prove", "UnknownKind", {"kind": kind}) from exc
    bench = _Bench(state, domain, epoch_s, commit_window, made)
    accused, over = bench.shown(which, proof)
    share = SHARES.get(which, 5_000)
    name = share.to_bytes(2, "big") if which in OF_JOBS else bytes([which])
    identity = keccak(b"".join(part.rjust(32, b"\0") for part in (name, accused, *over)))
    return Ruling(accused, Digest(identity), share)


class _Bench:
    def __init__(
        self,
        state: State,
        domain: Domain,
        epoch_s: int,
        commit_window: int,
        made: dict[Digest, CommitmentRecord],
    ) -> None:
        self._state, self._domain, self._made = state, domain, made
        self._epoch_s, self._commit_window = epoch_s, commit_window

    def shown(self, kind: FaultKind, proof: bytes) -> tuple[Address, tuple[bytes, ...]]:
        """(the accused, what its offence is named after)."""
        tariff, receipt = document_type(Tariff), document_type(WorkReceipt)
        match kind:
            case FaultKind.TWO_TARIFFS:
                a, sig_a, b, sig_b = decode([tariff, "bytes", tariff, "bytes"], proof)
                first, second = _document(Tariff, a), _document(Tariff, b)
                self._signed(first, sig_a), self._signed(second, sig_b)
                _need(faults.two_tariffs(self._domain, first, second) is not None)
                return first.provider, (first.profile_id, first.sequence.to_bytes(32, "big"))
            case FaultKind.TWO_RECEIPTS | FaultKind.BROKEN_CHAIN:
                a, sig_a, b, sig_b = decode([receipt, "bytes", receipt, "bytes"], proof)
                one, other = _document(WorkReceipt, a), _document(WorkReceipt, b)
                self._signed(one, sig_a), self._signed(other, sig_b)
                shown = faults.two_receipts if kind is FaultKind.TWO_RECEIPTS else faults.broken_chain
                _need(shown(self._domain, one, other) is not None)
                return one.provider, (one.job_id,)
            case FaultKind.UNSORTED:
                key, left, right = decode(["bytes32", LEAF_TYPE, LEAF_TYPE], proof)
                root = self._commitment(Digest(key))
                _need(faults.unsorted(root, _placed(left), _placed(right)) is not None)
                return root.provider, (key,)
            case FaultKind.MISSING:
                sheet, note, signature, around = decode([tariff, receipt, "bytes", f"{LEAF_TYPE}[]"], proof)
                return self._missing(sheet, note, signature, tuple(map(_placed, around)))
            case FaultKind.PRICE | FaultKind.UNCOMMITTED:
                sheet, note, signature = decode([tariff, receipt, "bytes"], proof)
                return self._of_one(kind, sheet, note, signature)

    def _missing(
        self, sheet: Any, note: Any, signature: bytes, around: tuple[Placed, ...]
    ) -> tuple[Address, tuple[bytes, ...]]:
        tariff, receipt = self._pair(sheet, note, signature)
        root = self._commitment(self._key(tariff, receipt))
        _need(faults.missing(tariff, receipt, root, around, self._epoch_s) is not None)
        return receipt.provider, (receipt.job_id,)

    def _of_one(self, kind: FaultKind, sheet: Any, note: Any, signature: bytes) -> tuple[Address, tuple[bytes, ...]]:
        tariff, receipt = self._pair(sheet, note, signature)
        if kind is FaultKind.PRICE:
            _need(digest(self._domain, tariff) in self._state.tariffs)
            _need(bool(faults.charge_findings(tariff, receipt)))
            return receipt.provider, (receipt.job_id,)
        key = self._key(tariff, receipt)
        ends = (faults.epoch_of(receipt, self._epoch_s) + 1) * self._epoch_s
        _need(key not in self._made and self._state.timestamp >= ends + self._commit_window)
        return receipt.provider, (key,)

    def _pair(self, sheet: Any, note: Any, signature: bytes) -> tuple[Tariff, WorkReceipt]:
        tariff, receipt = _document(Tariff, sheet), _document(WorkReceipt, note)
        self._signed(receipt, signature)
        _need(digest(self._domain, tariff) == receipt.tariff_hash)
        return tariff, receipt

    def _key(self, tariff: Tariff, receipt: WorkReceipt) -> Digest:
        return case_key(receipt.provider, tariff.profile_id, faults.epoch_of(receipt, self._epoch_s))

    def _commitment(self, key: Digest) -> Commitment:
        record = self._made.get(key)
        if record is None:
            raise ContractReverted("prove", "NotProven", {"step": "commitment"})
        return Commitment(
            record.provider, record.profile_id, record.epoch, record.root, record.count, record.total, record.lot
        )

    def _signed(self, document: Tariff | WorkReceipt, signature: bytes) -> None:
        signer = recover_digest(digest(self._domain, document), signature)
        wallet = self._state.wallets.get(signer, ZERO_ADDRESS) if signer is not None else ZERO_ADDRESS
        if wallet != document.provider:
            raise ContractReverted("prove", "NotSignedBy", {"provider": document.provider, "wallet": wallet})


def _need(shown: bool) -> None:
    if not shown:
        raise ContractReverted("prove", "NotProven", {"step": "fault"})


def _document(struct: type[T], values: tuple[Any, ...]) -> T:
    plain = [bytes.fromhex(v[2:]) if isinstance(v, str) else v for v in values]
    return struct(**{name: value for (name, _), value in zip(fields_of(struct), plain, strict=True)})


def _placed(values: tuple[Any, ...]) -> Placed:
    (job_id, receipt, amount), index, siblings = values
    nodes = tuple(SumNode(Digest(hash_), Wei(total)) for hash_, total in siblings)
    return Placed(Entry(JobId(job_id), Digest(receipt), Wei(amount)), index, nodes)
