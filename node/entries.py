"""A commitment's entries as anybody may ask for them (/tally/audit/1), and what they prove about jobs of this home.

Validators and clients share this. Whatever ends a conversation early is NotDelivered and worth another try: nothing
here is held against a provider before entries were shown that hash to the root on chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self, TypeVar

from incentives import faults
from incentives.faults import Fault, Placed, Proof, SignedReceipt, SignedRoot, SignedTariff
from node.ports import CommitmentRecord, PeerAddress, ReceiptRow, Store, Stream, Transport, TransportError
from protocol import frames, merkle
from protocol.dossier import ENTRY_BYTES, unpack_entries
from protocol.eip712 import Domain, digest
from protocol.errors import RemoteProtocolError, TallyError
from protocol.frames import AUDIT_PROTOCOL, CHUNK_BYTES, AuditAsk, AuditEntries, AuditHead, Frame
from protocol.merkle import Entry
from protocol.messages import Commitment, Tariff
from protocol.packing import packed_size, unpack
from protocol.sealing import BoxKey
from protocol.signing import recover_digest
from protocol.units import ZERO_ADDRESS, JobId

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


class EntriesLine:
    """One open conversation about one commitment. Close it with `close`."""

    def __init__(self, stream: Stream, box: BoxKey) -> None:
        self._stream, self._box = stream, box

    @classmethod
    async def open(cls, transport: Transport, peer: PeerAddress, box: BoxKey) -> Self:
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
        data = bytearray()
        for _ in range(head.chunks):
            data += (await self._expect(AuditEntries)).data
        try:
            shown = unpack_entries(bytes(data))
            found = merkle.root(shown)
        except RemoteProtocolError as exc:
            raise NotDelivered(f"the entries cannot be read: {exc}") from exc
        if (found.hash, found.total, len(shown)) != (record.root, record.total, record.count):
            raise NotDelivered(f"{len(shown)} entries that do not hash to the root committed to")
        return Shown(shown, head.signature)

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


# ------------------------------------------------------------------------------------------------------------- proofs


async def tariff_of(store: Store, row: ReceiptRow) -> SignedTariff | None:
    """The sheet a receipt names, as this home kept it when it bought. Raises: StoreError."""
    kept, size = await store.get_value(f"tariff/{row.receipt.tariff_hash.hex()}"), packed_size(Tariff)
    if kept is None or len(kept) != size + 65:
        return None
    return SignedTariff(unpack(Tariff, kept[:size]), kept[size:])


def unsorted(domain: Domain, record: CommitmentRecord, shown: Shown) -> Proof | None:
    """That a committed tree is out of order; None when it is not."""
    places = faults.out_of_order(shown.entries)
    return None if places is None else _of_tree(domain, record, shown, Fault.UNSORTED, places)


def missing(
    domain: Domain, record: CommitmentRecord, shown: Shown, tariff: SignedTariff, row: ReceiptRow, epoch_s: int
) -> Proof | None:
    """That the commitment leaves out the job of a receipt that the provider signed; None when it does not, or owes the
    job no place. `tariff`: the one the receipt names. `shown`: in order, see `unsorted`."""
    if not row.receipt_signature:
        return None
    places = faults.neighbours(shown.entries, JobId(row.receipt.job_id))
    if places is None or faults.missing(tariff.tariff, row.receipt, _made(record), places, epoch_s) is None:
        return None
    receipt = SignedReceipt(row.receipt, row.receipt_signature)
    return _of_tree(domain, record, shown, Fault.MISSING, places, (tariff,), (receipt,), epoch_s)


def _made(record: CommitmentRecord) -> Commitment:
    return Commitment(
        record.provider, record.profile_id, record.epoch, record.root, record.count, record.total, record.lot
    )


def _of_tree(
    domain: Domain,
    record: CommitmentRecord,
    shown: Shown,
    fault: Fault,
    places: tuple[Placed, ...],
    tariffs: tuple[SignedTariff, ...] = (),
    receipts: tuple[SignedReceipt, ...] = (),
    epoch_s: int = 0,
) -> Proof:
    """The Court has the commitment itself, so the proof holds there whoever signed the copy at hand."""
    made = _made(record)
    signer = recover_digest(digest(domain, made), shown.signature) or ZERO_ADDRESS
    root = SignedRoot(made, shown.signature)
    return Proof(domain, signer, fault, tariffs, receipts, roots=(root,), placed=places, epoch_s=epoch_s)
