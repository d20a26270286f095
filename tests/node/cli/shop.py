"""A home whose journal holds many jobs, sold or bought, of the market in tests/incentives/trade.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from incentives.ledger import Role
from node.chain.deployment import Deployment
from node.keys import save
from node.store.store import SqlStore
from protocol.bundle import Bundle
from protocol.packing import pack
from protocol.signing import Signer
from protocol.units import Address
from tests.incentives.trade import DOMAIN, NODE, PAYERS, WALLET
from tests.node.cli.conftest import _records


def furnish_shop(home: Path, role: Role, bundles: Sequence[Bundle], payer: Signer = PAYERS[0]) -> None:
    """Password, keys, deployment file, and a journal with the jobs in order."""
    (home / "password").write_text("correct horse\n")
    (home / "password").chmod(0o600)
    for name, signer in (("wallet", WALLET), ("node", NODE), ("session", payer)):
        save(home / "keys", name, "correct horse", signer.secret, scrypt_n=1024)
    token, registry, *others = (Address(bytes([n]) * 20) for n in range(1, 6))
    deployment = Deployment(DOMAIN.chain_id, token, DOMAIN.verifying_contract, registry, *others, 0)
    deployment.save(home / "deployment.json")
    asyncio.run(_fill(home, role, bundles))


async def _fill(home: Path, role: Role, bundles: Sequence[Bundle]) -> None:
    store = SqlStore(home / "journal.db")
    await store.open()
    for bundle in bundles:
        assert bundle.tariff is not None and bundle.profile is not None
        kept = pack(bundle.tariff) + bundle.tariff_signature
        await store.put_value(f"tariff/{bundle.request.tariff_hash.hex()}", kept)
        await store.put_value(f"profile/{bundle.request.profile_id.hex()}", pack(bundle.profile))
        await store.write(*_records(role, bundle))
    await store.close()
