"""Who is shown what of a provider's work, over real frames."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from incentives.ledger import CommitmentMade, ContentShredded, Role
from node.ports import (
    CaseMember,
    CaseRecord,
    CaseState,
    ChainUnavailable,
    CommitmentRecord,
    PeerAddress,
    Stream,
    StreamEnded,
)
from node.provider.audits import MAX_STREAMS, MAX_STREAMS_PER_PEER, Audits
from node.transport.memory import MemoryNetwork, MemoryTransport
from protocol import frames, merkle
from protocol.dossier import SealedDossiers, decode, examine, unpack_entries
from protocol.frames import AUDIT_PROTOCOL, AuditAsk, AuditEntries, AuditHead, DossierAsk, DossierChunk, Refuse
from protocol.messages import Commitment
from protocol.packing import unpack
from protocol.sealing import BoxKey
from protocol.signing import Signer, verify
from protocol.units import WEI_PER_TALLY, ZERO_DIGEST, Address, AuditOutcome, Digest, JobId, Wei
from tests.node.provider.desk import Desk

BOX = BoxKey.from_secret(b"\x71" * 32)
MEMBER, STRANGER = Signer.from_secret(b"\x72" * 32), Signer.from_secret(b"\x73" * 32)
MEMBER_WALLET = Signer.from_secret(b"\x74" * 32)
BEACON = Digest(b"\x77" * 32)


class OneCase:
    """The Court as far as an audit looks at it. `earlier` 0: every job of a newcomer is drawn."""

    def __init__(self) -> None:
        self.beacon, self.earlier, self.down = BEACON, 0, False
        self.members: tuple[Address, ...] = (MEMBER_WALLET.address,)

    async def commitment(self, key: Digest) -> CommitmentRecord | None:
        if self.down:
            raise ChainUnavailable("down")
        zero = ZERO_DIGEST
        return CommitmentRecord(key, Address(b""), zero, 0, zero, 1, Wei(0), zero, 1, self.beacon, self.earlier)

    async def validators(self) -> tuple[Address, ...]:
        return (MEMBER_WALLET.address,)

    async def case(self, key: Digest) -> CaseRecord | None:
        members = tuple(CaseMember(wallet, ZERO_DIGEST, None, False) for wallet in self.members)
        provider, outcome = Address(b""), AuditOutcome.PASS
        return CaseRecord(key, provider, ZERO_DIGEST, 0, CaseState.SUBMIT, 0, 0, outcome, members, 0, Wei(0), False)


@dataclass
class Room:
    """A provider that made one commitment, and whoever asks it."""

    desk: Desk
    court: OneCase
    made: CommitmentMade
    network: MemoryNetwork
    at: PeerAddress
    audits: Audits

    @asynccontextmanager
    async def ask(self, who: Signer = MEMBER, commitment: Digest | None = None) -> AsyncIterator[Stream]:
        transport = MemoryTransport(self.network, who.secret)
        await transport.start()
        stream = await transport.open(self.at, AUDIT_PROTOCOL, 1.0)
        await stream.send(frames.encode(AuditAsk(commitment or self.made.key, BOX.public)))
        try:
            yield stream
        finally:
            await stream.reset()
            await transport.stop()


async def room(*, jobs: int = 2, private: bool = False) -> Room:
    desk = await Desk.made()
    await desk.epochs.join()
    for number in range(jobs):
        await desk.serve(number, is_private=private)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    desk.world.fund(MEMBER_WALLET.address, 1000 * WEI_PER_TALLY, 10**18)
    member = type(desk.chain)(desk.world, MEMBER_WALLET)
    await member.register_provider(MEMBER.secret, Wei(WEI_PER_TALLY))
    court = OneCase()
    network = MemoryNetwork()
    transport = MemoryTransport(network, desk.node_key.secret)
    audits = Audits(desk.world.domain, desk.node_key, desk.store, desk.chain, court, desk.entropy)  # type: ignore[arg-type]
    transport.serve(AUDIT_PROTOCOL, audits.handle)
    await transport.start()
    made = (await desk.store.commitments())[0].record
    return Room(desk, court, made, network, PeerAddress(transport.peer_id, transport.addresses), audits)


async def next_frame(stream: Stream) -> frames.Frame:
    return frames.decode(await stream.receive(2.0))


async def entries_of(stream: Stream) -> tuple[AuditHead, bytes]:
    head = await next_frame(stream)
    assert isinstance(head, AuditHead)
    parts = [await next_frame(stream) for _ in range(head.chunks)]
    return head, b"".join(part.data for part in parts if isinstance(part, AuditEntries))


async def dossier(stream: Stream, reader: SealedDossiers, job_id: JobId) -> bytes | Refuse:
    await stream.send(frames.encode(DossierAsk(job_id)))
    parts: list[bytes] = []
    while True:
        frame = await next_frame(stream)
        if isinstance(frame, Refuse):
            return frame
        assert isinstance(frame, DossierChunk) and frame.index == len(parts)
        parts.append(reader.unseal(frame))
        if len(parts) == frame.count:
            return b"".join(parts)


async def refusal(place: Room, who: Signer = MEMBER, job_id: JobId | None = None) -> str:
    """What a peer is told that asks for the first job."""
    first = unpack_entries(place.made.entries)[0].job_id
    async with place.ask(who) as stream:
        await entries_of(stream)
        answer = await dossier(stream, SealedDossiers(BOX, None), job_id or first)
    assert isinstance(answer, Refuse)
    return answer.reason


async def test_anybody_may_see_what_was_committed_to() -> None:
    place = await room()
    async with place.ask(STRANGER) as stream:
        head, raw = await entries_of(stream)
    commitment = unpack(Commitment, head.commitment)
    verify(place.desk.world.domain, commitment, head.signature, place.desk.node_key.address)
    root = merkle.root(unpack_entries(raw))
    assert (root.hash, root.total, len(raw) // 76) == (commitment.root, commitment.total, 2)


async def test_strangers_who_take_every_stream_do_not_keep_a_validator_out() -> None:
    """Else anybody could have an honest provider found to withhold."""
    place = await room()
    first = unpack_entries(place.made.entries)[0].job_id
    async with AsyncExitStack() as crowd:
        for number in range(MAX_STREAMS):
            who = Signer.from_secret(bytes([number + 1]) + b"\x75" * 31)
            await entries_of(await crowd.enter_async_context(place.ask(who)))
        for _ in range(2):
            with pytest.raises(StreamEnded):
                async with place.ask(STRANGER) as stream:
                    await entries_of(stream)
        for _ in range(2):
            async with place.ask(MEMBER) as stream:
                await entries_of(stream)
                assert isinstance(await dossier(stream, SealedDossiers(BOX, None), first), bytes)
    async with place.ask(STRANGER) as stream:
        await entries_of(stream)


async def test_a_member_of_the_round_is_shown_every_drawn_job() -> None:
    place = await room()
    desk = place.desk
    async with place.ask() as stream:
        _, raw = await entries_of(stream)
        reader = SealedDossiers(BOX, None)
        for entry in unpack_entries(raw):
            data = await dossier(stream, reader, entry.job_id)
            assert isinstance(data, bytes)
            found = examine(decode(data), entry, desk.world.domain, (desk.node_key.address,), desk.profile)
            assert len(found.rows) == 40
    assert place.audits.dossiers == 2


async def test_of_a_private_job_documents_alone_are_shown() -> None:
    place = await room(private=True)
    desk = place.desk
    async with place.ask() as stream:
        _, raw = await entries_of(stream)
        entry = unpack_entries(raw)[0]
        data = await dossier(stream, SealedDossiers(BOX, None), entry.job_id)
    assert isinstance(data, bytes)
    shown = decode(data)
    assert (shown.salt, shown.prompt, shown.content) == (b"", (), ())
    assert examine(shown, entry, desk.world.domain, (desk.node_key.address,), desk.profile).private
    assert await desk.store.kept(Role.PROVIDER, entry.job_id) is None, "nothing of it was ever kept"


async def test_nobody_else_is_shown_a_dossier() -> None:
    place = await room()
    members = "members of the case's current round"
    assert members in await refusal(place, STRANGER)
    assert members in await refusal(place, MEMBER_WALLET), "a wallet is not its node key"
    place.court.members = ()
    assert members in await refusal(place)
    place.court.members = (MEMBER_WALLET.address,)
    place.court.beacon = ZERO_DIGEST
    assert "not drawn yet" in await refusal(place)


async def test_only_drawn_jobs_and_only_those_of_the_commitment_are_shown() -> None:
    place = await room()
    assert "not in the commitment" in await refusal(place, job_id=JobId(b"\1" * 32))
    place.court.earlier = 50  # beyond a newcomer's first jobs; this beacon draws neither
    assert "was not drawn" in await refusal(place)


async def test_what_cannot_be_answered_now_is_refused_and_the_stream_goes_on() -> None:
    place = await room()
    first, second = (entry.job_id for entry in unpack_entries(place.made.entries))
    await place.desk.store.write(ContentShredded(Role.PROVIDER, first))
    async with place.ask() as stream:
        await entries_of(stream)
        reader = SealedDossiers(BOX, None)
        gone = await dossier(stream, reader, first)
        assert isinstance(gone, Refuse) and "gone" in gone.reason
        place.court.down = True
        away = await dossier(stream, reader, second)
        assert isinstance(away, Refuse) and "ask again" in away.reason
        place.court.down = False
        assert isinstance(await dossier(stream, reader, second), bytes)


async def test_an_unknown_commitment_is_refused() -> None:
    place = await room()
    async with place.ask(commitment=Digest(b"\5" * 32)) as stream:
        frame = await next_frame(stream)
    assert isinstance(frame, Refuse) and "no such commitment" in frame.reason


@pytest.mark.parametrize("frame", [DossierAsk(b"\1" * 32), Refuse("x", "y")])
async def test_a_peer_that_does_not_keep_to_the_order_loses_its_stream(frame: frames.Frame) -> None:
    place = await room()
    async with place.ask() as stream:
        await entries_of(stream)
        await stream.send(frames.encode(AuditAsk(place.made.key, BOX.public)))
        with pytest.raises(StreamEnded):
            await stream.receive(2.0)
    transport = MemoryTransport(place.network, STRANGER.secret)
    await transport.start()
    stream = await transport.open(place.at, AUDIT_PROTOCOL, 1.0)
    await stream.send(frames.encode(frame))
    with pytest.raises(StreamEnded):
        await stream.receive(2.0)


async def test_a_box_key_that_keeps_no_secret_is_no_key() -> None:
    place = await room()
    transport = MemoryTransport(place.network, MEMBER.secret)
    await transport.start()
    stream = await transport.open(place.at, AUDIT_PROTOCOL, 1.0)
    await stream.send(frames.encode(AuditAsk(place.made.key, bytes(32))))
    _, raw = await entries_of(stream)
    await stream.send(frames.encode(DossierAsk(unpack_entries(raw)[0].job_id)))
    with pytest.raises(StreamEnded):
        await stream.receive(2.0)


async def test_one_peer_holds_a_few_streams_at_most() -> None:
    place = await room()
    transport = MemoryTransport(place.network, STRANGER.secret)
    await transport.start()
    held = []
    for _ in range(MAX_STREAMS_PER_PEER):
        stream = await transport.open(place.at, AUDIT_PROTOCOL, 1.0)
        await stream.send(frames.encode(AuditAsk(place.made.key, BOX.public)))
        await entries_of(stream)
        held.append(stream)
    stream = await transport.open(place.at, AUDIT_PROTOCOL, 1.0)
    await stream.send(frames.encode(AuditAsk(place.made.key, BOX.public)))
    with pytest.raises(StreamEnded):
        await stream.receive(2.0)
    async with place.ask() as other:
        await entries_of(other)
