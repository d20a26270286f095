"""What an auditor is shown, taken straight from the provider's journal."""

from __future__ import annotations

from incentives.ledger import CommitmentMade
from node.provider.audits import Audits
from protocol.dossier import Dossier, unpack_entries
from protocol.merkle import Entry
from protocol.units import JobId
from tests.node.provider.desk import Desk


async def dossier_of(desk: Desk, made: CommitmentMade, job_id: JobId) -> tuple[Dossier, Entry]:
    """A job's dossier and its entry in a commitment."""
    audits = Audits(desk.world.domain, desk.node_key, desk.store, desk.chain, desk.court, desk.entropy)
    entry = next(entry for entry in unpack_entries(made.entries) if entry.job_id == job_id)
    job, receipt = await desk.store.job(job_id), await desk.store.receipt(entry.receipt)
    assert job is not None and receipt is not None
    return await audits._collect(job, receipt.digest, receipt.receipt), entry
