"""/tally/audit/1 as a validator speaks it: a commitment's entries (node/entries.py), then the drawn jobs' transcripts.

What is wrong with the line is told apart from what is wrong with the documents: whatever ends a conversation early
is NotDelivered and worth another try, and only a dossier that was delivered whole is judged.
"""

from __future__ import annotations

from node.entries import EntriesLine, NotDelivered
from node.ports import Stream
from protocol.dossier import MAX_DOSSIER_BYTES, Dossier, SealedDossiers, decode
from protocol.errors import RemoteProtocolError
from protocol.frames import DossierAsk, DossierChunk
from protocol.sealing import BoxKey
from protocol.units import JobId


class AuditLine(EntriesLine):
    """One open conversation about one commitment and its drawn jobs. Close it with `close`."""

    def __init__(self, stream: Stream, box: BoxKey) -> None:
        super().__init__(stream, box)
        self._sealed = SealedDossiers(box, None)

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
