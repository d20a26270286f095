"""Commitments: after each epoch of the Court, one signed root per profile over every job received in it.

Contract: there is at most one commitment per epoch and profile, journaled before its signature exists; every job that
any receipt was issued for stands in it, with its last acknowledged receipt, else the last one issued; and it is posted
again until a block holds it, across crashes. An epoch without jobs has none.

A job belongs to the epoch in which it was accepted. It may run on into the next ones, but must be over while its own
can still be committed in time, so one that takes too long is cut off there and keeps what was vouched for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from incentives.audit_draw import case_key, lot_of
from incentives.evidence import MAX_FLAG_PPM
from incentives.fairness import entry_of
from incentives.ledger import CommitmentMade, Role
from node.crashpoints import crash_point, declare
from node.ports import ChainError, ChainUnavailable, Clock, CommitmentRow, Court, CourtRules, Entropy, JobRow, Store
from node.provider.decoys import Decoys
from node.provider.delivery import FOREVER_MS
from protocol import merkle
from protocol.dossier import pack_entries
from protocol.eip712 import hash_struct
from protocol.errors import Refused
from protocol.frames import RefusalCode
from protocol.messages import Commitment, Profile
from protocol.signing import Signer
from protocol.units import ZERO_DIGEST, Address, Digest, JobId, Verifiability

log = logging.getLogger("tally.provider.epochs")

TICK_S: Final = 0.5
"""How often a provider looks whether an epoch is over and its jobs closed. Unit: s. Far below any epoch."""

RESEND_S: Final = 60.0
"""How long a commitment that was posted may take to be in a confirmed block before it is posted again. Unit: s. Longer
than confirmations take; the commit window is longer still."""

PLANT_LOOK_S: Final = 2.0
"""How often it is looked whether an error is due. Unit: s. One read of the chain each, until the last commitment is
drawn; validators draw within a block or two, and the error has to come before the epoch ends."""

GRACE_MS: Final = 1_000
"""After an epoch's end, before it is committed. Unit: ms. The chain's newest block may lag our clock that much; sooner
would only be refused and tried again."""

CUT_SHARE: Final = 4
"""The last 1/4 of the commit window is kept for posting: a job that is not over by then is cut off. A smaller share
would leave too little for a chain that does not answer; a larger one cuts jobs sooner."""

LATE_SHARE: Final = 4
"""A clock that is behind the chain's by more than 1/4 of the commit window is not sold by. A larger share would have
jobs stamped into epochs that nobody can commit to in time any more; a smaller one minds a block's own lateness."""

COMPARE_S: Final = 30.0
"""How often the clock is held against the chain's. Unit: s."""

ORDER_SLACK_MS: Final = 3_600_000
"""How far the journal's order of jobs may be from the order of their acceptances. Unit: ms. They differ by the length
of a write; an hour also covers a clock that was set back."""

MAX_STEPS: Final = 1 << 17
"""Receipts of one job that are read: four million tokens' worth, beyond any context."""

COMMITMENT_JOURNALED: Final = declare("provider.commitment.journaled")
"""A commitment is on disk; its signature does not exist yet."""

COMMITMENT_POSTED: Final = declare("provider.commitment.posted")
"""A commitment is in a block; the provider has not noted that it needs no posting any more."""


class Epochs:
    """The commitments of one provider wallet and profile. `running`: acceptance times (Unix ms) of unclosed jobs."""

    def __init__(
        self,
        wallet: Address,
        profile: Profile,
        verifiability: Verifiability,
        signer: Signer,
        court: Court | None,
        store: Store,
        clock: Clock,
        entropy: Entropy,
        decoys: Decoys,
        running: Callable[[], Iterable[int]],
    ) -> None:
        self._wallet = wallet
        self._profile = profile
        self._profile_id = Digest(hash_struct(profile))
        self._verifiability = verifiability
        self._signer = signer
        self._court = court
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._decoys = decoys
        self._running = running
        self._rules: CourtRules | None = None
        self._registered: dict[Digest, bool] = {}  # profile -> whether its jobs are committed to
        self._next = 0  # the first epoch that may still need a commitment
        self._closing = 0  # the first epoch that jobs are still accepted in
        self._unposted: list[Digest] = []
        self._sent: dict[Digest, float] = {}  # when it was posted, monotonic; until a confirmed block holds it
        self._newest: CommitmentMade | None = None  # of this profile
        self._born_ms = clock.now_ms()
        self._behind_s = 0
        self._compared_at = float("-inf")  # monotonic
        self.committed = 0
        self.posted = 0
        self.why_not = ""
        self.conflict = ""
        """What shows that another node works with this wallet; jobs are refused from then on. "" while nothing does."""

    @property
    def rules(self) -> CourtRules | None:
        """The Court's rules once they are known, else None."""
        return self._rules

    @property
    def active(self) -> bool:
        """Whether the jobs served now will be committed to."""
        return self._rules is not None and not self.why_not

    @property
    def unposted(self) -> int:
        """Commitments made that no block is known to hold."""
        return len(self._unposted)

    # ---------------------------------------------------------------------------------------------------- beginning

    async def join(self) -> None:
        """Read the rules, have the profile registered, take up what was left. Does nothing once that is done.

        Raises: ChainError, StoreError; then it may be called again.
        """
        if self._rules is not None:
            return
        if self._court is None:
            self._go_without("this deployment has no Court")
            return
        rules = await self._court.rules()
        self._registered[self._profile_id] = await self._register(self._court)
        self._unposted = _split(await self._store.get_value(self._slot("unposted")) or b"")
        cursor = await self._store.get_value(self._slot("next"))
        # With a chain that did not answer at once, jobs were served before the first look at it.
        current = min(self._born_ms, self._clock.now_ms()) // 1000 // rules.epoch_seconds
        if cursor is None:
            await self._store.put_value(self._slot("next"), current.to_bytes(8, "big"))
        self._next = self._closing = current if cursor is None else int.from_bytes(cursor, "big")
        self._rules = rules
        await self._compare_clocks(self._court)

    async def _compare_clocks(self, court: Court) -> None:
        """A block is never ahead of the time it was made at, so our clock is behind by as much as it shows at least.

        Jobs stamped by such a clock fall into epochs whose commitment is overdue. Raises: ChainError.
        """
        if self._clock.monotonic() - self._compared_at < COMPARE_S:
            return
        behind = max(0, await court.now() - self._clock.now_ms() // 1000)
        self._compared_at = self._clock.monotonic()
        assert self._rules is not None
        if behind > self._rules.commit_window // LATE_SHARE >= self._behind_s:
            log.error(
                "this machine's clock is %d s behind the chain's: set it right; no job is accepted until then", behind
            )
        self._behind_s = behind

    async def _register(self, court: Court) -> bool:
        """Have this profile among those that providers can be judged under; False when it cannot be. Raises: ChainError
        when the chain does not answer."""
        if self._verifiability is not Verifiability.REPLAY:
            self._go_without("what this engine writes cannot be replayed")
            return False
        if self._profile.flag_ppm > MAX_FLAG_PPM:
            self._go_without("the model is not calibrated in this number format (`tally profile calibrate` does it)")
            return False
        if await court.profile_registered(self._profile_id):
            return True
        try:
            await court.register_profile(self._profile)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            if not await court.profile_registered(self._profile_id):
                self._go_without(f"the Court does not take this profile: {exc}")
                return False
        return True

    def _go_without(self, why: str) -> None:
        """Say once what it means to serve without commitments."""
        if self.why_not != why:
            log.warning(
                "no commitments are made: %s. Jobs are receipted and paid as always, but no committee can check them",
                why,
            )
        self.why_not = why

    def _slot(self, name: str) -> str:
        assert self._court is not None
        return f"provider/epochs/{name}/{self._court.domain.separator().hex()}/{self._wallet.hex()}"

    # ------------------------------------------------------------------------------------------------- while serving

    def check_open(self, accepted_ms: int) -> None:
        """Whether a job may be accepted at that time. Raises: Refused when its epoch is committed to already, or may be
        committed to by another node without it."""
        if self.conflict:
            raise Refused(RefusalCode.DRAINING, "another node works with this provider's wallet")
        if self._rules is not None and self._behind_s > self._rules.commit_window // LATE_SHARE:
            raise Refused(RefusalCode.BUSY, f"this provider's clock is {self._behind_s} s behind the chain's")
        if self._rules is not None and self.epoch_of(accepted_ms) < self._closing:
            reason = "this provider's clock was set back behind its last commitment; it serves again once it is past it"
            raise Refused(RefusalCode.BUSY, reason)

    def cut_ms(self, accepted_ms: int) -> int:
        """Unix ms by which a job accepted then must be over, for its epoch to be committed in time."""
        if self._rules is None or self.why_not:
            return FOREVER_MS
        window = self._rules.commit_window - self._rules.commit_window // CUT_SHARE
        return ((self.epoch_of(accepted_ms) + 1) * self._rules.epoch_seconds + window) * 1000

    def epoch_of(self, unix_ms: int) -> int:
        """The Court's epoch of a time."""
        assert self._rules is not None
        return unix_ms // 1000 // self._rules.epoch_seconds

    # ---------------------------------------------------------------------------------------------------- committing

    async def run(self) -> None:
        """Commit every epoch that is over, for ever. Raises: ChainError, StoreError; then call it again."""
        await self.join()
        looked_at = 0.0
        while self._rules is not None:
            await self.commit_due()
            now = self._clock.monotonic()
            if now - looked_at >= PLANT_LOOK_S:
                looked_at = now
                await self.plant_due()
            await self._clock.sleep(TICK_S)

    async def plant_due(self) -> None:
        """Plant the error that the last commitment obliges to, if it does. Raises: ChainError, StoreError.

        Only an error in the very next commitment is excused by that obligation. So none is planted while an epoch
        before the running one is still to be committed, or while a commitment still has to find its place on chain: it
        would stand between the two, and the planted error would cost the whole stake.
        """
        if self._rules is None or not self.active or self._unposted:
            return
        epoch = self.epoch_of(self._clock.now_ms())
        if epoch == self._next:
            await self._decoys.plant_if_due(self._rules, epoch, self._last_made)

    async def commit_due(self) -> None:
        """Commit what is over and closed, and post what is not in a block yet. Raises: ChainError, StoreError."""
        if self._rules is None or self._court is None:
            return
        ready = self._closing = self._ready()
        if ready > self._next:
            for (epoch, profile_id), jobs in sorted((await self._jobs(self._next, ready)).items()):
                if await self._commits_to(profile_id):
                    await self._make(epoch, profile_id, jobs)
            await self._store.put_value(self._slot("next"), ready.to_bytes(8, "big"))
            self._next = ready
        await self._post()
        await self._compare_clocks(self._court)

    def _ready(self) -> int:
        """The first epoch that cannot be committed yet: it is not over, or a job of it is still running."""
        ended = self.epoch_of(self._clock.now_ms() - GRACE_MS)
        return max(self._next, min([ended, *(self.epoch_of(accepted) for accepted in self._running())]))

    async def _commits_to(self, profile_id: Digest) -> bool:
        """Whether a profile's jobs can be judged; another one than today's was served before a restart.

        Anybody may register a profile at any time, and a commitment is owed from then on: a no is asked for again.
        """
        assert self._court is not None
        if profile_id == self._profile_id and self._verifiability is not Verifiability.REPLAY:
            return False  # its flag rate is none that a Court accepts (engine/declared.py), so nothing is owed
        if not self._registered.get(profile_id):
            self._registered[profile_id] = await self._court.profile_registered(profile_id)
            if self._registered[profile_id] and profile_id == self._profile_id and self.why_not:
                log.warning("this profile was registered at the Court after all: its jobs are committed to from now on")
                self.why_not = ""
        return self._registered[profile_id]

    async def _jobs(self, first: int, end: int) -> dict[tuple[int, Digest], list[JobRow]]:
        """Our jobs received in the epochs `first` to `end` - 1, by epoch and profile."""
        assert self._rules is not None
        least = first * self._rules.epoch_seconds * 1000 - ORDER_SLACK_MS
        limit = 256
        while True:
            rows = await self._store.jobs(Role.PROVIDER, limit=limit)
            if len(rows) < limit or rows[-1].opened_at_ms < least:
                break
            limit *= 4
        out: dict[tuple[int, Digest], list[JobRow]] = defaultdict(list)
        for row in rows:
            epoch = self.epoch_of(row.opened_at_ms)
            if row.request.provider == self._wallet and first <= epoch < end:
                out[epoch, Digest(row.request.profile_id)].append(row)
        return out

    async def _make(self, epoch: int, profile_id: Digest, jobs: Sequence[JobRow]) -> None:
        """Journal the commitment of an epoch, if it has a receipt and none was made. Raises: StoreError."""
        assert self._court is not None
        key = case_key(self._wallet, profile_id, epoch)
        if await self._store.commitment(key) is None:
            entries = [entry for job in jobs if (entry := await self._entry(job)) is not None]
            if not entries:
                return
            decoy = await self._decoys.planted_in(epoch)
            record = self._record(key, epoch, profile_id, merkle.ordered(entries), decoy)
            await self._note_unposted([*self._unposted, key])
            # SPEC 8.6: A provider writes its commitment to disk and syncs before it signs it
            await self._store.write(record)
            self.committed += 1
            self._newest = record if profile_id == self._profile_id else self._newest
            crash_point(COMMITMENT_JOURNALED)
        if key not in self._unposted and await self._court.commitment(key) is None:
            await self._note_unposted([*self._unposted, key])

    async def _entry(self, job: JobRow) -> merkle.Entry | None:
        """What the job is committed as; None for one without a receipt."""
        rows = await self._store.receipts(role=Role.PROVIDER, job_id=job.job_id, limit=MAX_STEPS)
        return entry_of((row.digest, row.receipt, row.voucher is not None or bool(row.ack_signature)) for row in rows)

    def _record(
        self, key: Digest, epoch: int, profile_id: Digest, entries: Sequence[merkle.Entry], decoy: JobId
    ) -> CommitmentMade:
        root = merkle.root(entries)
        secret = self._entropy.token(32)
        commitment = Commitment(self._wallet, profile_id, epoch, root.hash, len(entries), root.total, lot_of(secret))
        planted = decoy if any(entry.job_id == decoy for entry in entries) else JobId(ZERO_DIGEST)
        return CommitmentMade(key, commitment, pack_entries(entries), secret, planted)

    async def _post(self) -> None:
        """Send what no block holds, oldest first. Raises: ChainError; the rest stays noted and is tried again.

        One that is refused holds up those of its profile behind it, as each names the one before by the Court's order:
        a forced error would be looked for in another than the one it was planted in. Other profiles go on.
        """
        refused: ChainError | None = None
        held: set[Digest] = set()
        for key in list(self._unposted):
            row = await self._store.commitment(key)
            profile = ZERO_DIGEST if row is None else Digest(row.record.commitment.profile_id)
            if profile in held:
                continue
            try:
                await self._post_one(key, row)
            except ChainUnavailable:
                raise
            except ChainError as exc:
                refused = exc
                held.add(profile)
        if refused is not None:
            raise refused

    async def _post_one(self, key: Digest, row: CommitmentRow | None) -> None:
        assert self._court is not None
        posted = await self._court.commitment(key)
        if row is not None and posted is not None and posted.root != row.record.commitment.root:
            self._note_conflict(row.record.commitment)
        now = self._clock.monotonic()
        if row is not None and posted is None:
            if now - self._sent.get(key, -RESEND_S) < RESEND_S:
                return  # in a block that is not confirmed yet, and may still be reorganised away
            commitment = row.record.commitment
            signature = self._signer.sign(self._court.domain, commitment)
            await self._court.post_commitment(commitment, signature)
            self.posted += 1
            crash_point(COMMITMENT_POSTED)
            log.info("committed to %d jobs, %d wei, of epoch %d", commitment.count, commitment.total, commitment.epoch)
            self._sent[key] = now
            if await self._court.commitment(key) is None:
                return
        self._sent.pop(key, None)
        await self._note_unposted([other for other in self._unposted if other != key])

    def _note_conflict(self, ours: Commitment) -> None:
        """Jobs of ours are missing from what the chain holds: each new one there would cost half of the stake."""
        self.conflict = f"the chain holds another commitment of this wallet for epoch {ours.epoch} than this journal"
        log.error(
            "%s. Another node works with the same wallet, or this journal was put back to an earlier state. No job is "
            "accepted any more: run one node per wallet, with the journal that it wrote last",
            self.conflict,
        )

    async def _note_unposted(self, keys: list[Digest]) -> None:
        await self._store.put_value(self._slot("unposted"), b"".join(keys))
        self._unposted = keys

    async def _last_made(self) -> CommitmentMade | None:
        """The newest commitment of this wallet and profile."""
        if self._newest is None:
            for row in await self._store.commitments(limit=64):
                made = row.record.commitment
                if (made.provider, made.profile_id) == (self._wallet, self._profile_id):
                    self._newest = row.record
                    break
        return self._newest

    async def finish(self, limit_s: float) -> None:
        """At a stop, when no job runs any more: commit what can be within `limit_s`, which waits for the epoch to end
        if that is soon. What is left is committed at the next start. Raises: StoreError."""
        if self._rules is None:
            return
        why = ""
        try:
            async with asyncio.timeout(limit_s):
                await self.commit_due()
                while await self._pending() and (self._unposted or self._ends_in_s() < limit_s):
                    await self._clock.sleep(min(TICK_S, limit_s / 4))
                    await self.commit_due()
                if not await self._pending():
                    return
        except (TimeoutError, ChainError) as exc:
            why = f" ({exc})" if str(exc) else ""
        due = (self.epoch_of(self._clock.now_ms()) + 1) * self._rules.epoch_seconds + self._rules.commit_window
        log.warning(
            "jobs of the last epoch are not committed to yet: start this node again before Unix second %d, else "
            "anybody can have a part of the stake slashed for it%s",
            due,
            why,
        )

    def _ends_in_s(self) -> float:
        """Seconds until the running epoch can be committed to."""
        assert self._rules is not None
        now = self._clock.now_ms()
        return ((self.epoch_of(now) + 1) * self._rules.epoch_seconds * 1000 + GRACE_MS - now) / 1000

    async def _pending(self) -> bool:
        """Whether there is a job that is not committed to, or a commitment that no block is known to hold."""
        if self._unposted:
            return True
        found = await self._jobs(self._next, self.epoch_of(self._clock.now_ms()) + 1)
        return any([await self._commits_to(profile_id) for _, profile_id in found])

    def is_past(self, job: JobRow) -> bool:
        """Whether everything that had to be committed to of the job's epoch is."""
        return self._rules is not None and self.epoch_of(job.opened_at_ms) < self._next


def _split(raw: bytes) -> list[Digest]:
    return [Digest(raw[at : at + 32]) for at in range(0, len(raw) - 31, 32)]
