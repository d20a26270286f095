"""A provider's answers to an auditor, well and ill: what is half said is not delivered, and nothing is believed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest

from node.entries import NotDelivered
from node.ports import CommitmentRecord, PeerAddress, Stream
from node.transport.memory import MemoryNetwork, MemoryTransport
from node.validator.fetch import AuditLine
from protocol import frames, merkle
from protocol.dossier import SealedDossiers, pack_entries
from protocol.frames import AUDIT_PROTOCOL, AuditAsk, AuditEntries, AuditHead, DossierAsk, DossierChunk, Refuse
from protocol.messages import Commitment
from protocol.packing import pack
from protocol.sealing import BoxKey
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Digest, JobId, Wei
from tests.node.chain.court_bench import entries

ENTRIES = entries(5)
ROOT = merkle.root(ENTRIES)
RECORD = CommitmentRecord(
    Digest(b"\x01" * 32),
    ZERO_ADDRESS,
    ZERO_DIGEST,
    7,
    ROOT.hash,
    len(ENTRIES),
    Wei(ROOT.total),
    ZERO_DIGEST,
    1,
    ZERO_DIGEST,
    0,
)
SIGNATURE = b"\x05" * 65
HEAD = AuditHead(pack(Commitment(ZERO_ADDRESS, ZERO_DIGEST, 7, ROOT.hash, 5, ROOT.total, ZERO_DIGEST)), SIGNATURE, 1)
JOB = JobId(b"\x07" * 32)

Answer = Callable[[Stream, AuditAsk], Awaitable[None]]


async def line_to(answer: Answer) -> AuditLine:
    """A conversation with a provider that answers so."""
    network = MemoryNetwork()
    provider, auditor = (MemoryTransport(network, secrets.token_bytes(32)) for _ in range(2))

    async def handle(stream: Stream) -> None:
        ask = frames.decode(await stream.receive(5))
        assert isinstance(ask, AuditAsk) and ask.commitment == RECORD.key
        await answer(stream, ask)
        await stream.close()

    provider.serve(AUDIT_PROTOCOL, handle)
    await provider.start()
    await auditor.start()
    box = BoxKey.from_secret(secrets.token_bytes(32))
    return await AuditLine.open(auditor, PeerAddress(provider.peer_id, provider.addresses), box)


def says(*answers: frames.Frame) -> Answer:
    async def answer(stream: Stream, ask: AuditAsk) -> None:
        await stream.send(*(frames.encode(frame) for frame in answers))

    return answer


async def test_entries_that_hash_to_the_root_are_taken() -> None:
    line = await line_to(says(HEAD, AuditEntries(pack_entries(ENTRIES))))
    shown = await line.entries(RECORD)
    assert shown.entries == ENTRIES and shown.signature == SIGNATURE
    await line.close()


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((), "the conversation ended"),
        ((HEAD,), "the conversation ended"),
        ((Refuse("busy", "come back"),), "come back"),
        ((HEAD, AuditEntries(pack_entries(ENTRIES[:4]))), "do not hash to the root"),
        ((HEAD, AuditEntries(pack_entries(tuple(reversed(ENTRIES))))), "do not hash to the root"),
        ((HEAD, AuditEntries(pack_entries(ENTRIES)[:-1])), "cannot be read"),
        ((AuditHead(HEAD.commitment, SIGNATURE, 4096),), "4096 pieces for 5 entries"),
        ((AuditEntries(b""),), "instead of AuditHead"),
    ],
)
async def test_what_is_no_answer_is_not_delivered(answers: tuple[frames.Frame, ...], why: str) -> None:
    line = await line_to(says(*answers))
    with pytest.raises(NotDelivered, match=why):
        await line.entries(RECORD)
    await line.close()


async def dossier_of(*chunks: Callable[[SealedDossiers], DossierChunk]) -> None:
    """Ask for a dossier that comes in these pieces."""

    async def answer(stream: Stream, ask: AuditAsk) -> None:
        await stream.send(frames.encode(HEAD), frames.encode(AuditEntries(pack_entries(ENTRIES))))
        asked = frames.decode(await stream.receive(5))
        assert asked == DossierAsk(JOB)
        sealed = SealedDossiers(BoxKey.from_secret(secrets.token_bytes(32)), ask.box_key)
        await stream.send(*(frames.encode(chunk(sealed)) for chunk in chunks))

    line = await line_to(answer)
    try:
        await line.entries(RECORD)
        await line.dossier(JOB)
    finally:
        await line.close()


def piece(index: int, count: int, data: bytes = b"no dossier") -> Callable[[SealedDossiers], DossierChunk]:
    def made(sealed: SealedDossiers) -> DossierChunk:
        return DossierChunk(index, count, sealed.seal(data)[0].sealed)

    return made


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ((), "the conversation ended"),
        ((piece(0, 2),), "the conversation ended"),
        ((piece(1, 2),), "piece 1 of 2 came where 0"),
        ((piece(0, 2), piece(1, 3)), "piece 1 of 3 came where 1 of 2"),
        ((piece(0, 1),), "cannot be read"),
        ((lambda sealed: DossierChunk(0, 1, b"\x09" * 80),), "cannot be opened"),
    ],
)
async def test_a_dossier_that_is_none_is_not_delivered(
    chunks: tuple[Callable[[SealedDossiers], DossierChunk], ...], why: str
) -> None:
    with pytest.raises(NotDelivered, match=why):
        await dossier_of(*chunks)


async def test_nobody_there_is_not_delivered() -> None:
    auditor = MemoryTransport(MemoryNetwork(), secrets.token_bytes(32))
    await auditor.start()
    with pytest.raises(NotDelivered, match="no connection"):
        await AuditLine.open(auditor, PeerAddress("nobody", ("memory/nobody",)), BoxKey.from_secret(b"\x01" * 32))
    await asyncio.sleep(0)
