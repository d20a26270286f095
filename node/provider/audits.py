"""The provider's side of /tally/audit/1: entries to anybody, dossiers to the case's members and to nobody else.

Contract: a dossier leaves only for a job that the beacon drew, only to a peer whose node key belongs to the wallet of a
member of the case's current round, and sealed to the key that this member gave. Of a private job documents leave, and
neither prompt nor output. It answers while the node drains: being away costs stake.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeVar

from incentives.audit_draw import is_drawn
from incentives.ledger import Role
from node.crashpoints import crash_point, declare
from node.ports import Chain, ChainError, ChainUnavailable, Court, Entropy, JobRow, Store, Stream, StreamEnded
from protocol import frames
from protocol.dossier import Dossier, SealedDossiers, encode, unpack_entries
from protocol.eip712 import Domain
from protocol.errors import FieldOutOfRange, Refused, RemoteProtocolError, TallyError, UnexpectedFrame
from protocol.frames import AuditAsk, AuditEntries, AuditHead, DossierAsk, RefusalCode, Refuse
from protocol.merkle import Entry
from protocol.messages import Tariff, WorkReceipt
from protocol.options import decode_options
from protocol.packing import pack, packed_size, unpack
from protocol.sealing import BoxKey
from protocol.signing import Signer
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Address, Digest, JobId, JobKind

T = TypeVar("T")

log = logging.getLogger("tally.provider.audits")

IDLE_S: Final = 30.0
"""An audit stream that asks nothing for this long is closed. Unit: s. A member asks for its next dossier when it has
read the last one; replaying can wait until it has all, or open another stream."""

MAX_STREAMS: Final = 64
"""Audit streams at once, of whomever: each holds one dossier in memory. Beyond it only enlisted validators are let in,
for keeping committees out is how a stranger could have an honest provider found to withhold its transcripts."""

MEMORY_OF_PEERS: Final = 4_096
"""Peers of whom it is remembered, while streams are scarce, whether they are validators. Each saves a look at the
chain for every further stream it opens; doubling it doubles 60 bytes a peer."""

MAX_STREAMS_PER_PEER: Final = 4
"""Audit streams of one peer at once: a member that came back before its former stream was given up, and a spare."""

MAX_ASKS: Final = 4_096
"""Dossiers asked for on one stream. Beyond it the peer opens another; it bounds what one stream can cost us."""

DOSSIER_READ: Final = declare("provider.dossier.read")
"""A dossier that a member asked for is in memory; nothing of it was sent."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The commitment that a stream is about, its entries by job, and where each stands in the tree."""

    key: Digest
    places: dict[JobId, tuple[int, Entry]]
    box_key: bytes


class Audits:
    """Answers auditors from the journal. `court` None: no commitment exists that could be asked for."""

    def __init__(
        self, domain: Domain, signer: Signer, store: Store, chain: Chain, court: Court | None, entropy: Entropy
    ) -> None:
        self._domain = domain
        self._signer = signer
        self._store = store
        self._chain = chain
        self._court = court
        self._entropy = entropy
        self._streams: Counter[str] = Counter()
        self._enlisted: dict[Address, bool] = {}  # emptied whenever streams are no longer scarce
        self.dossiers = 0

    async def handle(self, stream: Stream) -> None:
        """One stream of /tally/audit/1."""
        peer = stream.peer_id
        if self._streams[peer] >= MAX_STREAMS_PER_PEER:
            await stream.reset()
            return
        scarce = self._streams.total() >= MAX_STREAMS
        self._streams[peer] += 1
        try:
            if scarce and not await self._is_validator(stream.peer_address):
                await stream.reset()
                return
            await self._converse(stream)
        except StreamEnded as exc:
            log.debug("audit stream of %s ended: %s", peer, exc)
        except RemoteProtocolError as exc:
            log.warning("peer %s broke the audit protocol: %s", peer, exc)
            await stream.reset()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
        await stream.close()

    async def _is_validator(self, peer: Address) -> bool:
        """Whether a peer's node key is of an enlisted validator, as far as the chain answers."""
        if self._streams.total() <= MAX_STREAMS or len(self._enlisted) >= MEMORY_OF_PEERS:
            self._enlisted.clear()
        if peer not in self._enlisted and self._court is not None:
            try:
                record = await self._chain.provider_by_node_key(peer)
                self._enlisted[peer] = record is not None and record.wallet in await self._court.validators()
            except ChainError as exc:
                log.warning("an auditor was turned away, for the chain does not say whether it is a validator: %s", exc)
        return self._enlisted.get(peer, False)

    async def _converse(self, stream: Stream) -> None:
        """Raises: StreamEnded, RemoteProtocolError."""
        frame = frames.decode(await stream.receive(IDLE_S))
        if not isinstance(frame, AuditAsk):
            raise UnexpectedFrame(type(frame).__name__, "audit")
        try:
            asked = await self._show_entries(stream, frame)
        except Refused as exc:
            await self._refuse(stream, exc)
            return
        sealer: SealedDossiers | None = None
        for _ in range(MAX_ASKS):
            ask = frames.decode(await stream.receive(IDLE_S))
            if not isinstance(ask, DossierAsk):
                raise UnexpectedFrame(type(ask).__name__, "entries")
            if sealer is None:
                sealer = SealedDossiers(BoxKey.from_secret(self._entropy.token(32)), asked.box_key)
            try:
                data = await self._dossier(stream.peer_address, asked, JobId(ask.job_id))
            except Refused as exc:
                await self._refuse(stream, exc)
                continue
            crash_point(DOSSIER_READ)
            self.dossiers += 1
            for chunk in sealer.seal(data):
                await stream.send(frames.encode(chunk))

    async def _refuse(self, stream: Stream, exc: Refused) -> None:
        await stream.send(frames.encode(Refuse(exc.code, exc.reason[:1024])))

    async def _show_entries(self, stream: Stream, ask: AuditAsk) -> _Asked:
        """The commitment and its entries, for anybody. Raises: Refused, StreamEnded."""
        # SPEC 8.7: Anybody may ask which jobs a commitment holds
        row = await self._read(self._store.commitment(Digest(ask.commitment)))
        if row is None:
            raise Refused(RefusalCode.BAD_REQUEST, "this provider made no such commitment")
        record = row.record
        signature = self._signer.sign(self._domain, record.commitment)
        chunks = frames.chunked(record.entries)
        await stream.send(frames.encode(AuditHead(pack(record.commitment), signature, len(chunks))))
        for chunk in chunks:
            await stream.send(frames.encode(AuditEntries(chunk)))
        places = {entry.job_id: (index, entry) for index, entry in enumerate(unpack_entries(record.entries))}
        return _Asked(record.key, places, ask.box_key)

    async def _dossier(self, peer: Address, asked: _Asked, job_id: JobId) -> bytes:
        """A job's dossier, if this peer may see it. Raises: Refused."""
        place = asked.places.get(job_id)
        if place is None:
            raise Refused(RefusalCode.BAD_REQUEST, "that job is not in the commitment")
        try:
            await self._check_member(peer, asked.key, place[0], job_id)
        except ChainUnavailable as exc:
            raise Refused(RefusalCode.BUSY, "the chain does not answer this provider; ask again") from exc
        except ChainError as exc:
            raise Refused(RefusalCode.INTERNAL, str(exc)) from exc
        job = await self._read(self._store.job(job_id))
        receipt = await self._read(self._store.receipt(place[1].receipt))
        if job is None or receipt is None:
            raise Refused(RefusalCode.INTERNAL, "the job is not in this provider's journal")
        dossier = await self._read(self._collect(job, receipt.digest, receipt.receipt))
        try:
            return encode(dossier)
        except FieldOutOfRange as exc:
            log.error("job 0x%s cannot be shown in an audit: %s", job_id.hex(), exc)
            raise Refused(RefusalCode.INTERNAL, "the job does not fit a dossier") from exc

    async def _check_member(self, peer: Address, key: Digest, index: int, job_id: JobId) -> None:
        """Raises: Refused unless the case is drawn, the job in it, and the peer of its current round; ChainError."""
        # SPEC 8.8: sends a dossier only of a drawn job, only to a member of the case's current round
        court = self._court
        commitment = None if court is None else await court.commitment(key)
        if court is None or commitment is None or commitment.beacon == ZERO_DIGEST:
            raise Refused(RefusalCode.BAD_REQUEST, "the commitment was not drawn yet; nothing is audited in it")
        if not is_drawn(commitment.beacon, job_id, commitment.earlier + index):
            raise Refused(RefusalCode.BAD_REQUEST, "that job was not drawn; nobody but its parties may see it")
        case = await court.case(key)
        record = await self._chain.provider_by_node_key(peer)
        members = () if case is None else tuple(member.validator for member in case.members)
        if record is None or record.wallet not in members:
            raise Refused(RefusalCode.BAD_REQUEST, "dossiers go to the members of the case's current round only")

    async def _collect(self, job: JobRow, receipt_digest: Digest, receipt: WorkReceipt) -> Dossier:
        """Raises: Refused when something is gone, StoreError."""
        raw = await self._store.get_value(f"tariff/{job.request.tariff_hash.hex()}")
        size = packed_size(Tariff)
        if raw is None or len(raw) < size:
            raise Refused(RefusalCode.INTERNAL, "the job's tariff is not in this provider's journal")
        salt = b""
        prompt: tuple[int, ...] = ()
        content: tuple[bytes, ...] = ()
        if not job.request.is_private:
            kept = await self._store.kept(Role.PROVIDER, job.job_id)
            if kept is None:
                log.error(
                    "the content of job 0x%s is asked for in an audit and is gone; without it the job counts as "
                    "withheld",
                    job.job_id.hex(),
                )
                raise Refused(RefusalCode.INTERNAL, "the job's content is gone")
            salt, prompt, content = kept.salt, kept.prompt, kept.content[: _covered(job, receipt)]
        return Dossier(
            job.request,
            job.request_signature,
            job.accept,
            job.accept_signature,
            job.options,
            unpack(Tariff, raw[:size]),
            raw[size:],
            receipt,
            self._signer.sign_digest(receipt_digest),
            salt,
            prompt,
            content,
        )

    async def _read(self, work: Awaitable[T]) -> T:
        """What the journal says, or a refusal that tells a stranger nothing. Raises: Refused."""
        try:
            return await work
        except Refused:
            raise
        except TallyError as exc:
            log.error("an auditor could not be answered: %s", exc)
            raise Refused(RefusalCode.INTERNAL, "the provider's journal cannot be read; ask again") from exc


def _covered(job: JobRow, receipt: WorkReceipt) -> int:
    """How many leaves or vectors a receipt is over; later ones were delivered and never acknowledged."""
    if job.request.kind == JobKind.EMBED:
        ends = list(accumulate(decode_options(job.options).inputs))
        return sum(end <= receipt.prompt_tokens for end in ends)
    return -(-receipt.completion_tokens // LEAF_TOKENS)
