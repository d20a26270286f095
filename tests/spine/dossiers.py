"""What an audit would find in the papers of everything a provider served: nothing, if it is honest.

Every job of a journal that any receipt was issued for is shown as node/provider/audits.py shows it, sent over the wire
form, and examined against the entry that its commitment would hold.
"""

from __future__ import annotations

import secrets

from incentives.fairness import entry_of
from incentives.faults import Finding, broken_chain, charge_findings, two_receipts
from incentives.ledger import Role
from node.ports import Chain, Store
from node.provider.audits import Audits
from protocol.dossier import Examined, decode, encode, examine
from protocol.messages import Profile, Tariff
from protocol.packing import packed_size, unpack
from protocol.signing import Signer
from protocol.units import Address, Digest


class _Entropy:
    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)


async def examine_all(
    store: Store, chain: Chain, wallet: Address, node_key: Signer, former: tuple[Address, ...] = ()
) -> list[Examined]:
    """Every receipted job of `wallet` in the journal, examined; oldest last. `former`: its node keys before this one.

    Raises: Forged where an honest provider would be condemned, Refused where it could not show the job.
    """
    shows = Audits(chain.domain, node_key, store, chain, None, _Entropy())
    out = []
    for job in await store.jobs(Role.PROVIDER, limit=10_000):
        rows = await store.receipts(role=Role.PROVIDER, job_id=job.job_id, limit=10_000)
        issued = [(row.digest, row.receipt, row.voucher is not None or bool(row.ack_signature)) for row in rows]
        entry = entry_of(issued)
        if entry is None or job.request.provider != wallet:
            continue
        receipt = next(row.receipt for row in rows if row.digest == entry.receipt)
        profile = await store.get_value(f"profile/{job.request.profile_id.hex()}")
        assert profile is not None, "the profile of each job is in the journal"
        shown = decode(encode(await shows._collect(job, Digest(entry.receipt), receipt)))
        keys = (node_key.address, *former)
        out.append(examine(shown, entry, chain.domain, keys, unpack(Profile, profile)))
    return out


async def faults_of(store: Store, chain: Chain) -> list[Finding]:
    """Objective faults that the provider's own receipts show, all pairs of each job included."""
    found: list[Finding] = []
    for job in await store.jobs(Role.PROVIDER, limit=10_000):
        rows = await store.receipts(role=Role.PROVIDER, job_id=job.job_id, limit=10_000)
        raw = await store.get_value(f"tariff/{job.request.tariff_hash.hex()}")
        assert raw is not None, "the tariff of each job is in the journal"
        tariff = unpack(Tariff, raw[: packed_size(Tariff)])
        for row in rows:
            found += charge_findings(tariff, row.receipt)
        pairs = [(a.receipt, b.receipt) for a in rows for b in rows]
        found += [item for a, b in pairs if (item := broken_chain(chain.domain, a, b)) is not None]
        found += [item for a, b in pairs if (item := two_receipts(chain.domain, a, b)) is not None]
    return found
