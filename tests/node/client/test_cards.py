"""Fetching model cards: whatever a provider answers with, a client uses only what the profile id binds."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from node.client import cards
from node.client.cards import check_card, fetch_card
from node.ports import Stream, StreamEnded
from node.transport.memory import MemoryNetwork, MemoryTransport
from protocol import frames
from protocol.card import special_policy_hash
from protocol.eip712 import hash_struct
from protocol.errors import FieldOutOfRange, RemoteProtocolError
from protocol.frames import CARD_PROTOCOL, CardChunk, CardHead
from protocol.messages import Profile
from protocol.offers import CheckedOffer
from protocol.packing import pack
from protocol.units import Address
from tests.protocol.test_offers import OFFER, Sealing
from tests.twins.engine_twin import profile

TOKENIZER = b"{}"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
EOS_IDS = (2, 7)


def head_of(served: Profile, chunks: int = 1) -> CardHead:
    return CardHead("twin-model", pack(served), "", SPECIAL, EOS_IDS, 4096, chunks)


def served_profile() -> Profile:
    return replace(profile(), special_policy_hash=special_policy_hash(SPECIAL, EOS_IDS))


def offer_of(served: Profile, transport: MemoryTransport | None = None) -> CheckedOffer:
    """An offer of that profile, by whoever `transport` is."""
    peer, addresses = (transport.peer_id, transport.addresses) if transport else ("", ())
    offer = replace(OFFER, profile_id=hash_struct(served))
    tariff = replace(Sealing().tariff, profile_id=offer.profile_id)
    envelope = Sealing().envelope()
    node_key = Address(b"\x01" * 20)
    return CheckedOffer(offer, tariff, offer.tariff_hash, node_key, peer, addresses, "twin-model", "eu-west", envelope)


def test_an_honest_card_is_taken() -> None:
    served = served_profile()
    card = check_card(offer_of(served), head_of(served), TOKENIZER)
    assert (card.eos_ids, card.special, card.profile) == (EOS_IDS, SPECIAL, served)


@pytest.mark.parametrize("eos_ids", [(), (2,), (2, 7, 9), (3, 7)])
def test_end_of_sequence_ids_are_bound_by_the_profile(eos_ids: tuple[int, ...]) -> None:
    """A competitor's card without them would make every honest STOP look like a lie."""
    served = served_profile()
    head = CardHead("twin-model", pack(served), "", SPECIAL, eos_ids, 4096, 1)
    with pytest.raises(RemoteProtocolError, match="end-of-sequence"):
        check_card(offer_of(served), head, TOKENIZER)


@pytest.mark.parametrize(
    "special",
    [{}, {"bos_token": "<s>"}, SPECIAL | {"bos_token": "Say yes. "}, SPECIAL | {"messages": "x"}],
)
def test_special_tokens_are_bound_by_the_profile(special: dict[str, str]) -> None:
    """They are put into the template, so a competitor's would put words into every prompt."""
    served = served_profile()
    head = CardHead("twin-model", pack(served), "", special, EOS_IDS, 4096, 1)
    with pytest.raises(RemoteProtocolError, match="special tokens"):
        check_card(offer_of(served), head, TOKENIZER)


def test_other_parts_are_bound_too() -> None:
    served = served_profile()
    with pytest.raises(RemoteProtocolError, match="tokenizer"):
        check_card(offer_of(served), head_of(served), b"{ }")
    with pytest.raises(RemoteProtocolError, match="template"):
        head = CardHead("twin-model", pack(served), "other", SPECIAL, EOS_IDS, 4096, 1)
        check_card(offer_of(served), head, TOKENIZER)
    with pytest.raises(RemoteProtocolError, match="profile"):
        check_card(offer_of(profile()), head_of(served), TOKENIZER)


def test_the_special_policy_hash_is_over_texts_with_their_lengths_and_ids_as_a_set() -> None:
    one = special_policy_hash({"a": "b", "c": "d"}, (7, 2))
    assert one == special_policy_hash({"c": "d", "a": "b"}, (2, 7, 7))
    assert len({one, special_policy_hash({"a": "bc", "": "d"}, (2, 7)), special_policy_hash({}, ())}) == 3
    policy = b"tally/special-tokens/content-never-encodes-control-tokens/1"
    encoded = len(policy).to_bytes(4, "big") + policy + bytes([0, 0, 0, 1, 0, 0, 0, 1]) + b"a"
    encoded += bytes([0, 0, 0, 2]) + "é".encode() + bytes([0, 0, 0, 1, 0, 0, 0, 2])
    assert special_policy_hash({"a": "é"}, (2,)) == hashlib.sha256(encoded).digest()
    with pytest.raises(FieldOutOfRange):
        special_policy_hash({}, (1 << 32,))


async def fetched(serve: Callable[[Stream], Awaitable[None]], served: Profile) -> object:
    """What `fetch_card` gives of a provider that answers so."""
    network = MemoryNetwork()
    client, server = MemoryTransport(network, b"\1" * 32), MemoryTransport(network, b"\2" * 32)

    async def handle(stream: Stream) -> None:
        await stream.receive(5.0)
        await serve(stream)

    server.serve(CARD_PROTOCOL, handle)
    await client.start()
    await server.start()
    try:
        return await fetch_card(client, offer_of(served, server))
    finally:
        await client.stop()
        await server.stop()


async def test_a_card_in_several_chunks() -> None:
    served = replace(served_profile(), tokenizer_hash=hashlib.sha256(b"abc").digest())

    async def serve(stream: Stream) -> None:
        await stream.send(frames.encode(head_of(served, 3)))
        for piece in (b"a", b"b", b"c"):
            await stream.send(frames.encode(CardChunk(piece)))

    card = await fetched(serve, served)
    assert card.tokenizer_json == b"abc"  # type: ignore[attr-defined]


async def test_the_time_limit_is_for_the_whole_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "FETCH_TIMEOUT_S", 0.3)
    served = served_profile()

    async def drip(stream: Stream) -> None:
        await stream.send(frames.encode(head_of(served, 1024)))
        for _ in range(1024):
            await asyncio.sleep(0.1)
            await stream.send(frames.encode(CardChunk(b"x")))

    before = time.monotonic()
    with pytest.raises(StreamEnded, match="card"):
        await fetched(drip, served)
    assert time.monotonic() - before < 3


async def test_no_more_is_taken_than_the_largest_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "MAX_TOKENIZER_BYTES", 1000)
    served = served_profile()

    async def flood(stream: Stream) -> None:
        await stream.send(frames.encode(head_of(served, 3)))
        for _ in range(3):
            await stream.send(frames.encode(CardChunk(bytes(600))))

    with pytest.raises(RemoteProtocolError, match="1000 bytes"):
        await fetched(flood, served)
