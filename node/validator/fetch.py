"""/tally/audit/1 as a validator speaks it: a commitment's entries, then the transcripts of the drawn jobs.

What is wrong with the line is told apart from what is wrong with the documents: whatever ends a conversation early
is NotDelivered and worth another try, and only a dossier that was delivered whole is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from node.ports import CommitmentRecord, PeerAddress, Stream, Transport, TransportError
from protocol import frames, merkle
from protocol.dossier import ENTRY_BYTES, MAX_DOSSIER_BYTES, Dossier, SealedDossiers, decode, unpack_entries
from protocol.errors import RemoteProtocolError, TallyError
from protocol.frames import (
    AUDIT_PROTOCOL,
    CHUNK_BYTES,
    AuditAsk,
    AuditEntries,
    AuditHead,
    DossierAsk,
    DossierChunk,
    Frame,
)
from protocol.merkle import Entry
from protocol.sealing import BoxKey
from protocol.units import JobId

OPEN_TIMEOUT_S: Final = 10.0
FRAME_TIMEOUT_S: Final = 15.0
"""Longest wait for a connection, and for the next frame. Unit: s. A provider reads its journal for each; past it the
conversation begins anew. Doubling either makes a provider that hangs cost twice the share of the submit window."""

F = TypeVar("F", bound=Frame)


class NotDelivered(TallyError):
    """The provider did not show what was asked for, this time; says why."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The entries of a commitment, which hash to the root on chain. `signature`: of the commitment, as shown."""

    entries: tuple[Entry, ...]
    signature: bytes


class AuditLine:
    """One open conversation about one commitment. Close it with `close`."""

    def __init__(self, stream: Stream, box: BoxKey) -> None:
        self._stream, self._box = stream, box
        self._sealed = SealedDossiers(box, None)

    @classmethod
    async def open(cls, transport: Transport, peer: PeerAddress, box: BoxKey) -> AuditLine:
        """Raises: NotDelivered."""
        try:
            return cls(await transport.open(peer, AUDIT_PROTOCOL, OPEN_TIMEOUT_S), box)
        except TransportError as exc:
            raise NotDelivered(f"no connection: {exc}") from exc

    async def close(self) -> None:
        """Never raises."""
        await self._stream.close()

    async def entries(self, record: CommitmentRecord) -> Shown:
        """The entries under the root that is on chain. Raises: NotDelivered."""
        await self._send(AuditAsk(record.key, self._box.public))
        head = await self._expect(AuditHead)
        if head.chunks > 1 + record.count * ENTRY_BYTES // CHUNK_BYTES:
            raise NotDelivered(f"{head.chunks} pieces for {record.count} entries")
        data = b""
        for _ in range(head.chunks):
            data += (await self._expect(AuditEntries)).data
        try:
            shown = unpack_entries(data)
            found = merkle.root(shown)
        except RemoteProtocolError as exc:
            raise NotDelivered(f"the entries cannot be read: {exc}") from exc
        if (found.hash, found.total, len(shown)) != (record.root, record.total, record.count):
            raise NotDelivered(f"{len(shown)} entries that do not hash to the root committed to")
        return Shown(shown, head.signature)

    async def dossier(self, job_id: JobId) -> Dossier:
        """The transcript of a drawn job. Raises: NotDelivered."""
        await self._send(DossierAsk(job_id))
        data, index, count = b"", 0, 1
        while index < count:
            chunk = await self._expect(DossierChunk)
            if chunk.index != index or (index and chunk.count != count):
                raise NotDelivered(f"piece {chunk.index} of {chunk.count} came where {index} of {count} was due")
            count, index = chunk.count, index + 1
            try:
                data += self._sealed.unseal(chunk)
            except RemoteProtocolError as exc:
                raise NotDelivered(f"the dossier cannot be opened: {exc}") from exc
            if len(data) > MAX_DOSSIER_BYTES:
                raise NotDelivered(f"a dossier above {MAX_DOSSIER_BYTES} bytes")
        try:
            return decode(data)
        except RemoteProtocolError as exc:
            raise NotDelivered(f"the dossier cannot be read: {exc}") from exc

    async def _send(self, frame: Frame) -> None:
        try:
            await self._stream.send(frames.encode(frame))
        except TransportError as exc:
            raise NotDelivered(f"the conversation ended: {exc}") from exc

    async def _expect(self, kind: type[F]) -> F:
        try:
            frame = frames.decode(await self._stream.receive(FRAME_TIMEOUT_S))
        except (TransportError, RemoteProtocolError) as exc:
            raise NotDelivered(f"the conversation ended: {exc}") from exc
        if not isinstance(frame, kind):
            said = frame.reason if isinstance(frame, frames.Refuse) else type(frame).__name__
            raise NotDelivered(f"instead of {kind.__name__} came: {said}")
        return frame
