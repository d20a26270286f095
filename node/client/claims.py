"""What this home needs to be compensated: where its jobs stand in the commitments that it saw, and the claim itself.

Contract: places are on disk before anything is claimed, so that a claim needs neither the provider nor its entries any
more; and the Court pays each place once, however often it is asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Final

from incentives.faults import Placed
from node.ports import CaseRecord, CaseState, Chain, ChainError, ChainUnavailable, Court, Store
from protocol.dossier import ENTRY_BYTES, pack_entries, unpack_entries
from protocol.merkle import SumNode
from protocol.units import BPS, Address, Digest, Wei

VICTIMS_BPS: Final = 500
"""The victims' part of a slash, in basis points: half of the Registry's bounty (BOUNTY_BPS in Registry.sol). It only
says whether a claim is worth its gas; what is paid is the Court's own reckoning."""

_NODE_BYTES: Final = 44


@dataclass(frozen=True, slots=True)
class Place:
    """A job of this home in a commitment whose receipt is in the journal. `paid`: its share was sent."""

    placed: Placed
    paid: bool = False


@dataclass(frozen=True, slots=True)
class Places:
    """What was found in one commitment. `jobs`: of this home that were looked for, in it or not."""

    jobs: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim came to. `amount`: wei of the shares now sent, for `jobs` jobs. `why`: why nothing more was due."""

    amount: Wei
    jobs: int
    why: str


class Claims:
    """Places of this home's jobs, and claims for the wallet `me`, which pays the gas."""

    def __init__(self, me: Address, store: Store, chain: Chain, court: Court) -> None:
        self._me, self._store, self._chain, self._court = me, store, chain, court

    def _slot(self, key: Digest) -> str:
        return f"client/places/{self._court.domain.separator().hex()}/{key.hex()}"

    async def remember(self, key: Digest, found: Places) -> None:
        """Keep where our jobs stand in a commitment; none is a result too. Raises: StoreError."""
        told = {"jobs": found.jobs, "places": [_told(place) for place in found.places]}
        await self._store.put_value(self._slot(key), json.dumps(told).encode())

    async def remembered(self, key: Digest) -> Places | None:
        """What `remember` kept; None for a commitment that this home never saw. Raises: StoreError."""
        kept = await self._store.get_value(self._slot(key))
        if kept is None:
            return None
        told = json.loads(kept)
        return Places(int(told["jobs"]), tuple(_read(row) for row in told["places"]))

    async def claim(self, key: Digest) -> Claimed:
        """Have every job of ours in an executed case compensated that was not yet.

        Raises: ChainUnavailable, StoreError; what was paid before is noted, and the rest can be claimed again.
        """
        found = await self.remembered(key)
        if found is None or not found.places:
            return Claimed(Wei(0), 0, "no job of this home is known to be in that commitment")
        if all(place.paid for place in found.places):
            return Claimed(Wei(0), 0, "the shares of this home's jobs were paid before")
        case, made = await self._court.case(key), await self._court.commitment(key)
        why = _not_due(case)
        if why or case is None or made is None:
            return Claimed(Wei(0), 0, why or "the commitment is not deep enough in the chain yet")
        if await self._chain.coin_balance(self._me) == 0:
            return Claimed(Wei(0), 0, f"the wallet 0x{self._me.hex()} has no coin for gas")
        places, amount, jobs = list(found.places), 0, 0
        for at, place in enumerate(places):
            share = share_of(case.slashed, place.placed.entry.amount, made.total)
            if place.paid or share == 0:
                continue
            refused = await self._send(key, place)
            if refused:
                why = refused
                continue
            places[at] = replace(place, paid=True)
            await self.remember(key, Places(found.jobs, tuple(places)))
            amount, jobs = amount + share, jobs + 1
        return Claimed(Wei(amount), jobs, why if jobs or why else "the shares of this home's jobs come to nothing")

    async def _send(self, key: Digest, place: Place) -> str:
        """One transaction; why the Court refused it, "" when it did not. Raises: ChainUnavailable, StoreError."""
        entry, index, siblings = place.placed.entry, place.placed.index, place.placed.siblings
        row = await self._store.receipt(entry.receipt)
        if row is None:
            return "the receipt is no longer in the journal"
        try:
            await self._court.compensation(key, entry, index, siblings, row.receipt)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            return str(exc)
        return ""


def share_of(slashed: int, amount: int, total: int) -> Wei:
    """Wei that the payer of a job of `amount` gets when `slashed` was taken for a commitment of `total`, at most."""
    pool = slashed * VICTIMS_BPS // BPS
    return Wei(min(amount, pool * amount // total) if total else 0)


def _not_due(case: CaseRecord | None) -> str:
    """Why a case pays nobody; "" when it may."""
    if case is None:
        return "the case was not drawn yet"
    if case.state is not CaseState.CLOSED:
        return f"the case is not carried out: it is in state {case.state.name.lower()}"
    return "" if case.slashed else f"nothing was slashed: the case was closed as {case.outcome.name}"


def _told(place: Place) -> list[str | int | bool]:
    placed = place.placed
    siblings = b"".join(node.hash + node.total.to_bytes(12, "big") for node in placed.siblings)
    return [pack_entries([placed.entry]).hex(), placed.index, siblings.hex(), place.paid]


def _read(row: list[str | int | bool]) -> Place:
    entry, index, siblings, paid = row
    nodes = bytes.fromhex(str(siblings))
    path = tuple(
        SumNode(Digest(nodes[at : at + 32]), Wei(int.from_bytes(nodes[at + 32 : at + _NODE_BYTES], "big")))
        for at in range(0, len(nodes), _NODE_BYTES)
    )
    [leaf] = unpack_entries(bytes.fromhex(str(entry))[:ENTRY_BYTES])
    return Place(Placed(leaf, int(index), path), bool(paid))
