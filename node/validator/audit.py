"""One case looked into: entries and dossiers fetched over the whole submit window, each job judged, gaps measured.

Contract: an outcome against the provider rests on documents it signed or on a window it let pass. A line that breaks,
a provider that restarts, a chain that does not answer, a model that is not here: none of these is held against it
before the window is over, and a machine that cannot judge gives no verdict at all.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from incentives.audit_draw import gap_positions, is_drawn, pack_gaps
from incentives.committee import GUILTY
from incentives.faults import Proof
from incentives.ledger import ChannelKey, Role
from incentives.verdicts import JobFinding
from node.background import pause
from node.entries import NotDelivered, Shown, unsorted
from node.judging import Judged, forged, withheld
from node.ports import (
    Chain,
    Clock,
    CommitmentRecord,
    Court,
    Directory,
    Entropy,
    PeerAddress,
    Store,
    Transport,
)
from node.validator.fetch import AuditLine
from node.validator.proofs import OWN_RECEIPTS, mispriced, missing
from node.validator.shelf import Shelf
from protocol.dossier import Dossier, Forged, examine
from protocol.eip712 import digest
from protocol.errors import TallyError
from protocol.merkle import Entry
from protocol.messages import Profile
from protocol.sealing import BoxKey
from protocol.signing import recover_digest
from protocol.units import ZERO_DIGEST, Address, Digest, JobId

RESERVE_SHARE: Final = 5
RESERVE_MOST_S: Final = 120
"""The submit window's last part, a fifth of it and at most two minutes, is kept for sending the verdict: a transaction
that comes late counts as none. Doubling it gives a provider that restarts that much less time."""

PAUSE_MOST_S: Final = 5.0
"""Longest pause between two tries to fetch. Unit: s. A provider that comes back is found at most so much later; at a
tenth of it a provider that is away would be dialled all the time by every member."""

LEAST_ASK_S: Final = 2.0
"""Shortest time a conversation gets. Unit: s. Of one that trickles, what came whole until the window ends is judged and
the rest is withheld; doubling it could make a verdict late that is due."""

HELD_BYTES: Final = 256 << 20
"""Transcripts held at once before they are judged. Unit: bytes. All are fetched before the first is replayed, so that a
replay that takes long is not taken for a provider that shows nothing; doubling it doubles a validator's memory."""

LEAST_ASKED_SHARE: Final = 2
"""A provider withholds when it was asked over half of the time there was, at least. A larger share would let one that
really withholds escape a validator that was late; a smaller one would condemn on a few tries at the end."""

log = logging.getLogger("tally.validator")


class Recused(TallyError):
    """This wallet has a stake in the case and does not judge it."""


class Unable(TallyError):
    """This machine cannot judge the case; says why."""


@dataclass(frozen=True, slots=True)
class Docket:
    """A case to look into: its commitment (with its beacon), the round, and the Unix second its window ends at."""

    record: CommitmentRecord
    round: int
    until: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking into a case gave. `gaps`: as a Verdict states them. `proofs`: of objective faults met on the way."""

    findings: tuple[JobFinding, ...]
    gaps: Digest
    proofs: tuple[Proof, ...]


@dataclass
class _Progress:
    """What was delivered and judged so far. `held`: delivered, not judged yet."""

    shown: Shown | None = None
    drawn: tuple[Entry, ...] = ()
    held: dict[JobId, Dossier] = field(default_factory=dict)
    judged: dict[JobId, Judged] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    last_failure: str = "it could not be found"

    @property
    def missing(self) -> list[Entry]:
        """Drawn and not delivered."""
        return [entry for entry in self.drawn if entry.job_id not in self.held and entry.job_id not in self.judged]

    @property
    def is_whole(self) -> bool:
        return self.shown is not None and all(entry.job_id in self.judged for entry in self.drawn)

    @property
    def held_bytes(self) -> int:
        return sum(4 * len(one.prompt) + sum(map(len, one.content)) for one in self.held.values())


class Auditor:
    """Looks into cases for the validator wallet `me`."""

    def __init__(
        self,
        me: Address,
        shelf: Shelf,
        store: Store,
        chain: Chain,
        court: Court,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._me, self._shelf, self._store, self._chain, self._court = me, shelf, store, chain, court
        self._transport, self._directory, self._clock, self._entropy = transport, directory, clock, entropy
        self._known: dict[Address, PeerAddress] = {}  # where providers were last seen: a restart empties the directory

    def notice(self) -> None:
        """Remember where the providers of the present offers are."""
        for offer in self._directory.offers():
            envelope = offer.envelope
            self._known[Address(offer.offer.provider)] = PeerAddress(envelope.peer_id, envelope.addresses)

    async def look(self, docket: Docket) -> Looked:
        """Fetch and judge all drawn jobs; what is not delivered when the window's reserve begins is withheld.

        Raises: Recused; Unable; ChainError, StoreError (try again later).
        """
        record = docket.record
        profile = self._shelf.profile(record.profile_id)
        if profile is None:
            have = ", ".join(self._shelf.names()) or "none"
            raise Unable(f"no model here has profile 0x{record.profile_id.hex()} (models: {have})")
        if record.provider == self._me:
            raise Recused("the work is this wallet's own")
        rules = await self._court.rules()
        reserve = min(RESERVE_MOST_S, rules.submit_window // RESERVE_SHARE)
        deadline = docket.until - reserve
        began = await self._court.now()
        late = deadline - began < (deadline - docket.until + rules.submit_window) // LEAST_ASKED_SHARE
        progress, failures = _Progress(), 0
        while True:
            answered = await self._ask(record, progress, deadline - await self._court.now())
            replayed = await self._judge_held(record, profile, rules.epoch_seconds, progress, deadline)
            left = deadline - await self._court.now()
            if progress.is_whole:
                return self._sum_up(record, progress)
            if left <= 0:
                if replayed:  # the last try lies that far back: once more, lest it be held against the provider
                    await self._ask(record, progress, reserve // 2)
                return self._out_of_time(record, progress, late=late)
            if answered:
                continue  # all that fitted was delivered; there is more to ask for
            failures += 1
            log.info("case 0x%s: not delivered yet, %d s left: %s", record.key.hex()[:8], left, progress.last_failure)
            await self._clock.sleep(min(pause(failures), PAUSE_MOST_S, float(left)))
            await self._directory.refresh()

    async def _ask(self, record: CommitmentRecord, progress: _Progress, limit_s: int) -> bool:
        """One conversation of `limit_s` at most; whether everything asked for came.

        Raises: Recused; ChainError, StoreError.
        """
        try:
            async with asyncio.timeout(max(LEAST_ASK_S, float(limit_s))):
                await self._fetch(record, progress)
        except TimeoutError:
            progress.last_failure = "it was still on its way when the time for it was over"
            return False
        except NotDelivered as exc:
            progress.last_failure = str(exc)
            return False
        return True

    async def _fetch(self, record: CommitmentRecord, progress: _Progress) -> None:
        """The entries if they are still missing, then every dossier that is, as far as memory goes.

        Raises: NotDelivered; Recused; ChainError, StoreError.
        """
        self.notice()
        peer = self._known.get(record.provider)
        if peer is None:
            raise NotDelivered("the provider's offer is not known here")
        line = await AuditLine.open(self._transport, peer, BoxKey.from_secret(self._entropy.token(32)))
        try:
            shown = await line.entries(record)
            if progress.shown is None:
                await self._take_entries(record, shown, progress)
            for entry in progress.missing:
                if progress.held_bytes >= HELD_BYTES:
                    return
                progress.held[entry.job_id] = await line.dossier(entry.job_id)
        finally:
            await line.close()

    async def _judge_held(
        self, record: CommitmentRecord, profile: Profile, epoch_s: int, progress: _Progress, deadline: int
    ) -> int:
        """Judge what is held while there is time; how many. Raises: Recused; Unable; ChainError."""
        judged = 0
        for entry in progress.drawn:
            if entry.job_id in progress.held and await self._court.now() < deadline:
                dossier = progress.held[entry.job_id]
                progress.judged[entry.job_id] = await self._judge(record, profile, epoch_s, entry, dossier, progress)
                del progress.held[entry.job_id]
                judged += 1
        return judged

    def _out_of_time(self, record: CommitmentRecord, progress: _Progress, *, late: bool) -> Looked:
        """What the end of the window leaves. Our own slowness is never the provider's: Raises: Unable."""
        guilty = any(judged.finding.outcome in GUILTY for judged in progress.judged.values())
        if progress.held and not guilty:
            raise Unable(f"{len(progress.held)} transcripts were delivered and not replayed in time by this machine")
        if late and not guilty and (progress.shown is None or progress.missing):
            raise Unable("it came too late to this case to say that its provider withholds anything")
        return self._sum_up(record, progress)

    async def _take_entries(self, record: CommitmentRecord, shown: Shown, progress: _Progress) -> None:
        ours = {job.job_id for job in await self._store.jobs(Role.CLIENT, limit=OWN_RECEIPTS)}
        if any(entry.job_id in ours for entry in shown.entries):
            raise Recused("jobs in it were bought from this home")
        progress.shown = shown
        progress.drawn = tuple(
            entry
            for index, entry in enumerate(shown.entries)
            if is_drawn(record.beacon, entry.job_id, record.earlier + index)
        )
        out_of_order = unsorted(self._court.domain, record, shown)
        left_out = [out_of_order] if out_of_order else await missing(self._store, self._court, record, shown)
        progress.proofs += left_out

    async def _judge(
        self,
        record: CommitmentRecord,
        profile: Profile,
        epoch_s: int,
        entry: Entry,
        dossier: Dossier,
        progress: _Progress,
    ) -> Judged:
        """Raises: Recused; Unable; ChainError."""
        slot = await self._chain.slot(ChannelKey(record.provider, Address(dossier.request.client)))
        if slot is not None and slot.owner == self._me:
            raise Recused("this wallet pays a job in it")
        node_keys = await self._signers_of(record.provider, dossier)
        starts = record.epoch * epoch_s * 1_000
        period = (starts, starts + epoch_s * 1_000)
        try:
            examined = examine(dossier, entry, self._court.domain, node_keys, profile, period)
        except Forged as exc:
            for node_key in node_keys:
                progress.proofs += mispriced(self._court.domain, node_key, dossier)
            return Judged(forged(entry.job_id, exc.reason))
        try:
            return await self._shelf.judge(record.profile_id, entry.job_id, examined)
        except TallyError as exc:
            raise Unable(f"job 0x{entry.job_id.hex()[:8]} cannot be replayed here: {exc}") from exc

    async def _signers_of(self, provider: Address, dossier: Dossier) -> set[Address]:
        """Node keys that the dossier's documents are signed with and that are or were the provider's.

        A provider may change its key between a job and its audit: an acceptance then has the former one's signature, a
        receipt, which is signed as often as it is shown, the present one's. Raises: ChainError.
        """
        documents = (
            (dossier.accept, dossier.accept_signature),
            (dossier.tariff, dossier.tariff_signature),
            (dossier.receipt, dossier.receipt_signature),
        )
        signers = {recover_digest(digest(self._court.domain, document), signed) for document, signed in documents}
        return {key for key in signers if key is not None and await self._chain.key_holder(key) == provider}

    def _sum_up(self, record: CommitmentRecord, progress: _Progress) -> Looked:
        why = f"not delivered in the submit window: {progress.last_failure}"
        if progress.shown is None:
            return Looked((withheld(JobId(ZERO_DIGEST), why),), pack_gaps(()), tuple(progress.proofs))
        findings = [
            progress.judged[entry.job_id].finding for entry in progress.drawn if entry.job_id in progress.judged
        ]
        findings += [withheld(entry.job_id, why) for entry in progress.missing]
        measured = [progress.judged[entry.job_id].gaps for entry in progress.drawn if entry.job_id in progress.judged]
        places = gap_positions(record.beacon, [len(gaps) for gaps in measured])
        gaps = pack_gaps([measured[job][position] for job, position in places])
        return Looked(tuple(findings), gaps, tuple(progress.proofs))
