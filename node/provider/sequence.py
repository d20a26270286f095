"""Which sequence number a price sheet gets: each is written down before it is signed, so none is ever signed twice.

Two sheets under one number would be a proof against the provider. Its running node and a command that signs ahead of
time share this record, per deployment, wallet and profile.
"""

from __future__ import annotations

from dataclasses import replace

from node.ports import Store
from protocol.eip712 import Domain
from protocol.messages import Tariff
from protocol.packing import pack, packed_size, unpack


def tariff_slot(kind: str, domain: Domain, tariff: Tariff) -> str:
    """Where the newest tariff that was `signed`, or is `logged`, or the `base` multiplier, is kept.

    Per deployment, wallet and profile, as the sequence numbers are: going back to a model goes on where it was.
    """
    return f"provider/tariff_{kind}/{domain.separator().hex()}/{tariff.provider.hex()}/{tariff.profile_id.hex()}"


async def load_tariff(store: Store, kind: str, domain: Domain, tariff: Tariff) -> Tariff | None:
    """The one kept there for the provider and profile of `tariff`. Raises: StoreError."""
    raw = await store.get_value(tariff_slot(kind, domain, tariff))
    return None if raw is None or len(raw) != packed_size(Tariff) else unpack(Tariff, raw)


async def claim(store: Store, domain: Domain, tariff: Tariff, least: int) -> Tariff:
    """`tariff` under the next free number, `least` or above, written down: now it may be signed. Raises: StoreError."""
    before = await load_tariff(store, "signed", domain, tariff)
    free = max(least, before.sequence + 1 if before is not None else 1)
    numbered = replace(tariff, sequence=free)
    await store.put_value(tariff_slot("signed", domain, numbered), pack(numbered))
    return numbered
