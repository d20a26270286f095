"""Objective faults that a validator meets on its way: what documents alone prove, with nobody's word taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from incentives import faults
from incentives.faults import Fault, Placed, Proof, ProofFails, SignedReceipt, SignedRoot, SignedTariff
from incentives.ledger import Role
from node.ports import CommitmentRecord, Court, ReceiptRow, Store
from protocol.dossier import Dossier
from protocol.eip712 import Domain, digest
from protocol.merkle import Entry
from protocol.messages import Commitment, Tariff
from protocol.packing import packed_size, unpack
from protocol.signing import recover_digest
from protocol.units import ZERO_ADDRESS, Address

OWN_RECEIPTS: Final = 10_000
"""Newest receipts of this home's own purchases that are looked for in a commitment. Unit: receipts, 2 KB each while
they are looked through; whoever buys more in the epochs that are still judged runs no validator from the same home."""


def mispriced(domain: Domain, node_key: Address, dossier: Dossier) -> list[Proof]:
    """What tariff and receipt of a dossier prove by themselves, the first fault of them; [] when nothing."""
    tariff = SignedTariff(dossier.tariff, dossier.tariff_signature)
    receipt = SignedReceipt(dossier.receipt, dossier.receipt_signature)
    for found in faults.charge_findings(dossier.tariff, dossier.receipt):
        proof = Proof(domain, node_key, found.fault, (tariff,), (receipt,))
        if _holds(proof):
            return [proof]
    return []


def unsorted(domain: Domain, record: CommitmentRecord, signature: bytes, entries: Sequence[Entry]) -> list[Proof]:
    """That a committed tree is out of order; [] when it is not."""
    places = faults.out_of_order(entries)
    if places is None:
        return []
    return [_of_tree(domain, record, signature, Fault.UNSORTED, places)]


async def missing(
    store: Store, court: Court, record: CommitmentRecord, signature: bytes, entries: Sequence[Entry]
) -> list[Proof]:
    """Jobs that this home bought and holds the provider's receipt of, and that its commitment leaves out.

    Raises: StoreError, ChainUnavailable.
    """
    epoch_s = (await court.rules()).epoch_seconds
    out, seen = [], set()
    for row in await store.receipts(role=Role.CLIENT, limit=OWN_RECEIPTS):
        receipt = row.receipt
        ours = receipt.provider == record.provider and faults.epoch_of(receipt, epoch_s) == record.epoch
        if not ours or receipt.job_id in seen:
            continue
        seen.add(receipt.job_id)
        tariff = await _tariff_of(store, row)
        places = faults.neighbours(entries, row.receipt.job_id)  # type: ignore[arg-type]
        if tariff is None or tariff.tariff.profile_id != record.profile_id or places is None:
            continue
        shown = (tariff,), (SignedReceipt(receipt, row.receipt_signature),)
        out.append(_of_tree(court.domain, record, signature, Fault.MISSING, places, *shown, epoch_s))
    return out


def _of_tree(
    domain: Domain,
    record: CommitmentRecord,
    signature: bytes,
    fault: Fault,
    places: tuple[Placed, ...],
    tariffs: tuple[SignedTariff, ...] = (),
    receipts: tuple[SignedReceipt, ...] = (),
    epoch_s: int = 0,
) -> Proof:
    """The Court has the commitment itself, so the proof holds there whoever signed the copy at hand."""
    made = Commitment(
        record.provider, record.profile_id, record.epoch, record.root, record.count, record.total, record.lot
    )
    signer = recover_digest(digest(domain, made), signature) or ZERO_ADDRESS
    root = SignedRoot(made, signature)
    return Proof(domain, signer, fault, tariffs, receipts, roots=(root,), placed=places, epoch_s=epoch_s)


async def _tariff_of(store: Store, row: ReceiptRow) -> SignedTariff | None:
    """The sheet a receipt names, as this home kept it when it bought."""
    kept, size = await store.get_value(f"tariff/{row.receipt.tariff_hash.hex()}"), packed_size(Tariff)
    if kept is None or len(kept) != size + 65:
        return None
    return SignedTariff(unpack(Tariff, kept[:size]), kept[size:])


def _holds(proof: Proof) -> bool:
    try:
        faults.judge(proof)
    except ProofFails:
        return False
    return True
