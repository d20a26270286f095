"""Objective faults that a validator meets on its way: what documents alone prove, with nobody's word taken."""

from __future__ import annotations

from typing import Final

from incentives import faults
from incentives.faults import Proof, ProofFails, SignedReceipt, SignedTariff
from incentives.ledger import Role
from node import entries
from node.entries import Shown, tariff_of
from node.ports import CommitmentRecord, Court, Store
from protocol.dossier import Dossier
from protocol.eip712 import Domain
from protocol.units import Address

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


async def missing(store: Store, court: Court, record: CommitmentRecord, shown: Shown) -> list[Proof]:
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
        tariff = await tariff_of(store, row)
        proof = None if tariff is None else entries.missing(court.domain, record, shown, tariff, row, epoch_s)
        if proof is not None:
            out.append(proof)
    return out


def _holds(proof: Proof) -> bool:
    try:
        faults.judge(proof)
    except ProofFails:
        return False
    return True
