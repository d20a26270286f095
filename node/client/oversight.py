"""Looks whether the providers that this home paid commit to its jobs, and claims what is due when they are slashed.

Nobody but its buyer can know that a job is missing from a commitment, or that an epoch with it has none. What is shown
then rests on documents alone: a receipt that the provider signed and this home paid by. A provider that does not show
its entries proves nothing here; the committee finds it withholding.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from incentives.audit_draw import case_key
from incentives.faults import Fault, Placed, Proof, SignedReceipt, uncommitted
from incentives.ledger import Role
from node.background import Background
from node.client.claims import Claims, Place, Places
from node.entries import EntriesLine, NotDelivered, Shown, missing, tariff_of, unsorted
from node.ports import (
    Chain,
    ChainError,
    ChainUnavailable,
    Clock,
    CommitmentRecord,
    Court,
    CourtRules,
    Directory,
    Entropy,
    JobRow,
    PeerAddress,
    ReceiptRow,
    Store,
    Transport,
)
from protocol import merkle
from protocol.sealing import BoxKey
from protocol.units import ZERO_ADDRESS, Address, Digest, JobId

log = logging.getLogger("tally.client.oversight")

LOOK_LEAST_S: Final = 2
LOOK_MOST_S: Final = 60
"""Between two looks: an epoch, within these bounds. Unit: s. A look is a read of the chain's log and one more per
commitment that is due. Doubling the upper one finds an omission a minute later, out of a window of hours."""

GRACE_S: Final = 30
"""After the commit window, before a commitment is called overdue. Unit: s. The Court counts by its blocks' seconds,
and so does this; the time is left for a late provider's transaction to be mined first."""

LATE_WINDOWS: Final = 2
"""An epoch without a commitment is looked at for so many commit windows more: one that comes late must hold our jobs
too. Doubling it doubles the reads of the chain for a provider that is gone."""

TRIES: Final = 12
"""Conversations in which a provider may fail to show the entries of one commitment before this home gives up. Unit:
tries, one per look: twelve minutes at least where epochs are hours. The committee asks for the same entries."""

TALK_S: Final = 60.0
"""Longest conversation. Unit: s. The largest tree that is fetched comes in less over 12 Mbit/s."""

MOST_ENTRIES: Final = 1 << 20
"""Entries of the largest commitment that is fetched. Unit: entries, 76 bytes each: 80 MB. Three hundred jobs a second
for an hour; a validator reads more."""

MAX_STEPS: Final = 1 << 17
"""Receipts of one job that are read, as the provider reads them (provider/epochs.py)."""

ORDER_SLACK_MS: Final = 3_600_000
"""How far the journal's order of jobs may be from that of their acceptances. Unit: ms. Providers' clocks
stamp these."""

CURSOR_BLOCKS: Final = 64
"""How far behind the last block read the durable cursor lies, and by how much it moves on. Unit: blocks. As deep as a
reorganisation is taken to go; what is read again was paid before, and the Court pays nothing twice."""

EncodeProof = Callable[[Proof], tuple[int, bytes]]
"""A proof as Court.prove takes it: (kind, bytes). Raises: ValueError for a fault that the Court does not judge."""


@dataclass(slots=True)
class Seen:
    """What this process did since it started."""

    commitments: int = 0
    jobs: int = 0
    proved: int = 0
    refused: int = 0
    compensated: int = 0


@dataclass(frozen=True, slots=True)
class _Due:
    """The jobs of this home that one commitment has to hold."""

    provider: Address
    profile_id: Digest
    epoch: int
    jobs: tuple[JobRow, ...]

    @property
    def key(self) -> Digest:
        return case_key(self.provider, self.profile_id, self.epoch)


class Oversight:
    """Oversees the providers that this home paid; `start` and `stop` it. `claims`: over the same store and Court."""

    def __init__(
        self,
        claims: Claims,
        store: Store,
        chain: Chain,
        court: Court,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
        encode_proof: EncodeProof,
    ) -> None:
        self._store, self._chain, self._court, self._transport = store, chain, court, transport
        self._directory, self._clock, self._entropy, self._encode_proof = directory, clock, entropy, encode_proof
        self.claims = claims
        self.background = Background(clock)
        self.seen = Seen()
        self._known: dict[Address, PeerAddress] = {}  # where providers were last seen
        self._over: dict[Digest, int] = {}  # commitments that need no further look -> jobs of ours then
        self._overdue: set[Digest] = set()  # shown, or tried to be, as missing
        self._failures: dict[Digest, int] = defaultdict(int)
        self._next_block = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for ever, in the background."""
        kept = "receipts are in the journal and can be shown later"
        self._task = self.background.start("overseeing providers", self._run, kept)

    async def stop(self) -> None:
        """Idempotent. What was begun is done again at the next start."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self.look()
            epoch = (await self._court.rules()).epoch_seconds
            await self._clock.sleep(float(min(max(epoch, LOOK_LEAST_S), LOOK_MOST_S)))

    async def look(self) -> None:
        """One look at every commitment that is due, and at what was executed. Raises: ChainError, StoreError."""
        for offer in self._directory.offers():
            envelope = offer.envelope
            self._known[Address(offer.offer.provider)] = PeerAddress(envelope.peer_id, envelope.addresses)
        # The chain's own time: what a wrong clock here would take for overdue is not.
        rules, now = await self._court.rules(), (await self._chain.head()).timestamp
        due = await self._due(rules, now)
        keys = {item.key for item in due}
        self._over = {key: jobs for key, jobs in self._over.items() if key in keys}
        self._overdue &= keys
        self._failures = defaultdict(int, {key: n for key, n in self._failures.items() if key in keys})
        for item in due:
            if self._over.get(item.key) != len(item.jobs) and await self._settled(item, rules, now):
                self._over[item.key] = len(item.jobs)
        # A job may be stamped back by as much as a provider's clock may lag, and paid for later than it began.
        waiting = [item.epoch for item in due if item.key not in self._over]
        opened = [job.opened_at_ms // 1000 for job in await self._store.jobs(Role.CLIENT, open_only=True)]
        settled = min([now - rules.commit_window, *opened]) // rules.epoch_seconds
        await self._keep("epoch", max(0, min([settled, *waiting])))
        await self._claim_executed()

    # ------------------------------------------------------------------------------------------------ what is kept

    def _slot(self, name: str) -> str:
        return f"client/oversight/{name}/{self._court.domain.separator().hex()}"

    async def _keep(self, name: str, value: int) -> None:
        if await self._kept(name) != value:
            await self._store.put_value(self._slot(name), value.to_bytes(8, "big"))

    async def _kept(self, name: str) -> int | None:
        raw = await self._store.get_value(self._slot(name))
        return None if raw is None else int.from_bytes(raw, "big")

    async def _due(self, rules: CourtRules, now: int) -> list[_Due]:
        """Paid jobs by the commitment that owes them a place, of epochs that are over, oldest first."""
        first = await self._kept("epoch") or 0
        least, limit = first * rules.epoch_seconds * 1000 - ORDER_SLACK_MS, 256
        while True:
            rows = await self._store.jobs(Role.CLIENT, limit=limit)
            if len(rows) < limit or rows[-1].opened_at_ms < least:
                break
            limit *= 4
        found: dict[tuple[int, Address, Digest], list[JobRow]] = defaultdict(list)
        for row in rows:
            epoch = row.opened_at_ms // 1000 // rules.epoch_seconds
            if row.owed > 0 and first <= epoch < now // rules.epoch_seconds:
                found[epoch, Address(row.request.provider), Digest(row.request.profile_id)].append(row)
        return [
            _Due(provider, profile, epoch, tuple(jobs)) for (epoch, provider, profile), jobs in sorted(found.items())
        ]

    # -------------------------------------------------------------------------------------------- one commitment

    async def _settled(self, due: _Due, rules: CourtRules, now: int) -> bool:
        """Do what can be done about one commitment; whether nothing is left to do. Raises: ChainError, StoreError."""
        before = await self.claims.remembered(due.key)
        if before is not None and before.jobs == len(due.jobs):
            return True
        record = await self._court.commitment(due.key)
        if record is None:
            return await self._without(due, rules, now)
        if record.count > MOST_ENTRIES:
            log.warning("%s: %d entries are more than this node reads; validators do", _name(due), record.count)
            return True
        try:
            shown = await self._entries(record)
        except NotDelivered as exc:
            return self._not_shown(due, exc)
        proof = unsorted(self._court.domain, record, shown)
        places: list[Place] = []
        if proof is not None:
            await self._prove(due, proof)
        else:
            places = await self._find(due, record, shown, rules.epoch_seconds)
        paid = {place.placed.index for place in before.places if place.paid} if before is not None else set()
        places = [replace(place, paid=place.placed.index in paid) for place in places]
        await self.claims.remember(due.key, Places(len(due.jobs), tuple(places)))
        self.seen.commitments += 1
        self.seen.jobs += len(places)
        await self._claim(due.key)  # it may have been executed before its entries were shown
        return True

    async def _without(self, due: _Due, rules: CourtRules, now: int) -> bool:
        """There is no commitment: show that, once, when it is overdue. Raises: ChainError, StoreError."""
        overdue = (due.epoch + 1) * rules.epoch_seconds + rules.commit_window + GRACE_S
        if now < overdue:
            return False
        if due.key not in self._overdue and await self._court.profile_registered(due.profile_id):
            proof = await self._overdue_proof(due, rules.epoch_seconds)
            if proof is not None:
                await self._prove(due, proof)
        self._overdue.add(due.key)
        return now >= overdue + LATE_WINDOWS * rules.commit_window

    async def _overdue_proof(self, due: _Due, epoch_s: int) -> Proof | None:
        """That one of our receipts made the commitment due. Raises: StoreError."""
        for job in due.jobs:
            row = await self._receipt(job)
            tariff = None if row is None else await tariff_of(self._store, row)
            if row is None or tariff is None or tariff.tariff.profile_id != due.profile_id:
                continue
            owed = row.receipt.received_at // 1000 // epoch_s == due.epoch
            if owed and uncommitted(tariff.tariff, row.receipt, epoch_s) is not None:
                receipts = (SignedReceipt(row.receipt, row.receipt_signature),)
                made_by = ZERO_ADDRESS  # which node key signed it is the Court's to look up
                return Proof(self._court.domain, made_by, Fault.UNCOMMITTED, (tariff,), receipts, epoch_s=epoch_s)
        return None

    async def _receipt(self, job: JobRow) -> ReceiptRow | None:
        """The last receipt of a job that this home paid by and that the provider signed. Raises: StoreError."""
        rows = await self._store.receipts(role=Role.CLIENT, job_id=job.job_id, limit=MAX_STEPS)
        return next((row for row in reversed(rows) if row.receipt_signature and row.voucher is not None), None)

    async def _entries(self, record: CommitmentRecord) -> Shown:
        """Raises: NotDelivered."""
        peer = self._known.get(record.provider)
        if peer is None:
            raise NotDelivered("the provider's offer is not known here")
        try:
            async with asyncio.timeout(TALK_S):
                line = await EntriesLine.open(self._transport, peer, BoxKey.from_secret(self._entropy.token(32)))
                try:
                    return await line.entries(record)
                finally:
                    await line.close()
        except TimeoutError as exc:
            raise NotDelivered(f"the entries were not whole after {TALK_S:g} s") from exc

    def _not_shown(self, due: _Due, exc: NotDelivered) -> bool:
        """Whether it is to be given up."""
        self._failures[due.key] += 1
        if self._failures[due.key] < TRIES:
            return False
        log.warning(
            "%s: the provider does not show which jobs it committed to, so this home cannot say whether its %d are "
            "among them; the committee that is drawn asks for the same (%s)",
            *(_name(due), len(due.jobs), exc),
        )
        return True

    async def _find(self, due: _Due, record: CommitmentRecord, shown: Shown, epoch_s: int) -> list[Place]:
        """Where our jobs stand; those that do not are shown to the Court. Raises: ChainUnavailable, StoreError."""
        at = {entry.job_id: index for index, entry in enumerate(shown.entries)}
        places = []
        for job in due.jobs:
            index = at.get(JobId(job.job_id))
            if index is None:
                await self._left_out(due, job, record, shown, epoch_s)
                continue
            entry = shown.entries[index]
            held = await self._store.receipt(entry.receipt)
            if held is not None and bytes(held.receipt.job_id) == bytes(entry.job_id):
                places.append(Place(Placed(entry, index, merkle.prove(shown.entries, index))))
        return places

    async def _left_out(self, due: _Due, job: JobRow, record: CommitmentRecord, shown: Shown, epoch_s: int) -> None:
        row = await self._receipt(job)
        tariff = None if row is None else await tariff_of(self._store, row)
        if row is None or tariff is None:
            return
        proof = missing(self._court.domain, record, shown, tariff, row, epoch_s)
        if proof is not None:
            await self._prove(due, proof)

    async def _prove(self, due: _Due, proof: Proof) -> None:
        """Somebody else may have been first, and a commitment may come just before: a refusal is no error of ours.

        Raises: ChainUnavailable; then the whole commitment is looked at again.
        """
        try:
            await self._court.prove(*self._encode_proof(proof))
        except ChainUnavailable:
            raise
        except ChainError as exc:
            self.seen.refused += 1
            log.info("%s: the Court did not take the fault %r: %s", _name(due), proof.fault.value, exc)
            return
        self.seen.proved += 1
        log.warning("%s: proved on chain: %s; part of the provider's stake is gone", _name(due), proof.fault.value)

    # ------------------------------------------------------------------------------------------------------- claims

    async def _claim_executed(self) -> None:
        """Claim in every case that was executed since the last look. Raises: ChainError, StoreError."""
        first = await self._kept("block")
        if first is None:
            head = (await self._chain.head()).number  # nothing was bought by this home before its first look
            await self._keep("block", head)
            first = head
        events, following = await self._court.events(max(first, self._next_block))
        for event in events:
            if event.name == "Executed" and event.values.get("slashed"):
                await self._claim(event.case_id)
        self._next_block = following
        if following - CURSOR_BLOCKS >= first + CURSOR_BLOCKS:
            await self._keep("block", following - CURSOR_BLOCKS)

    async def _claim(self, key: Digest) -> None:
        """Raises: ChainUnavailable, StoreError."""
        claimed = await self.claims.claim(key)
        if claimed.jobs:
            self.seen.compensated += claimed.jobs
            log.info("case 0x%s: compensated with %d wei for %d jobs", key.hex()[:8], claimed.amount, claimed.jobs)
        elif claimed.why:
            log.debug("case 0x%s: nothing claimed: %s", key.hex()[:8], claimed.why)

    def status(self) -> dict[str, object]:
        """Plain JSON values for `tally status`."""
        return {
            "commitments_seen": self.seen.commitments,
            "jobs_found": self.seen.jobs,
            "faults_proved": self.seen.proved,
            "jobs_compensated": self.seen.compensated,
            "background": self.background.status(),
        }


def _name(due: _Due) -> str:
    return f"provider 0x{due.provider.hex()[:8]}, epoch {due.epoch}"
