"""Model cards: fetched from a provider, and believed only by the hashes in the profile."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

from node.ports import ModelCard, PeerAddress, StreamEnded, Transport
from protocol import frames
from protocol.card import special_policy_hash
from protocol.eip712 import hash_struct
from protocol.errors import RemoteProtocolError, UnexpectedFrame
from protocol.frames import CARD_PROTOCOL, CardAsk, CardChunk, CardHead, Refuse
from protocol.messages import Profile
from protocol.offers import CheckedOffer
from protocol.packing import unpack

FETCH_TIMEOUT_S: Final = 30.0
"""For the whole card. Unit: s. A tokenizer of 20 MB passes loopback in one second and a slow link in twenty. Doubling
it doubles how long one provider that answers slowly on purpose can hold up a first request."""

MAX_TOKENIZER_BYTES: Final = 48 << 20
"""Largest tokenizer.json taken. Unit: bytes. The largest published ones (vocabularies of 256,000) have 33 MB. It is
held in memory before its hash can be checked, so this is what a liar can make us hold."""


async def fetch_card(transport: Transport, offer: CheckedOffer) -> ModelCard:
    """The card of the offer's profile, checked against the profile id that the offer signed.

    Raises: TransportError (also when it takes too long), RemoteProtocolError when what comes is not what the profile
    names.
    """
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            head, tokenizer_json = await _fetch(transport, offer)
    except TimeoutError as exc:
        raise StreamEnded(f"the provider did not give its model card in {FETCH_TIMEOUT_S:g} s") from exc
    return check_card(offer, head, tokenizer_json)


async def _fetch(transport: Transport, offer: CheckedOffer) -> tuple[CardHead, bytes]:
    """What the provider answers, unchecked. Raises: TransportError, RemoteProtocolError."""
    stream = await transport.open(PeerAddress(offer.peer_id, offer.addresses), CARD_PROTOCOL, FETCH_TIMEOUT_S)
    try:
        await stream.send(frames.encode(CardAsk(offer.offer.profile_id)))
        head = frames.decode(await stream.receive(FETCH_TIMEOUT_S))
        if isinstance(head, Refuse):
            raise RemoteProtocolError(f"the provider does not give its own model card: {head.reason}")
        if not isinstance(head, CardHead):
            raise UnexpectedFrame(type(head).__name__, "card")
        tokenizer_json = bytearray()
        for _ in range(head.chunks):
            chunk = frames.decode(await stream.receive(FETCH_TIMEOUT_S))
            if not isinstance(chunk, CardChunk):
                raise UnexpectedFrame(type(chunk).__name__, "card")
            tokenizer_json += chunk.data
            if len(tokenizer_json) > MAX_TOKENIZER_BYTES:
                raise RemoteProtocolError(f"the tokenizer is above the limit of {MAX_TOKENIZER_BYTES} bytes")
    finally:
        await stream.close()
    return head, bytes(tokenizer_json)


def check_card(offer: CheckedOffer, head: CardHead, tokenizer_json: bytes) -> ModelCard:
    """Raises: RemoteProtocolError naming the part that does not match its hash."""
    # SPEC 7.1: A client believes it only by the hashes in the profile
    profile = unpack(Profile, head.profile)
    if hash_struct(profile) != offer.offer.profile_id:
        raise RemoteProtocolError("the card's profile is not the one the offer signed")
    if hashlib.sha256(tokenizer_json).digest() != profile.tokenizer_hash:
        raise RemoteProtocolError("the tokenizer is not the one the profile names")
    if hashlib.sha256(head.chat_template.encode()).digest() != profile.chat_template_hash:
        raise RemoteProtocolError("the chat template is not the one the profile names")
    # SPEC 7.1: The special policy hash binds the special tokens and the end-of-sequence ids too
    if special_policy_hash(head.special, head.eos_ids) != profile.special_policy_hash:
        raise RemoteProtocolError("the special tokens or end-of-sequence ids are not those the profile names")
    return ModelCard(
        model=offer.model,
        profile_id=offer.offer.profile_id,
        profile=profile,
        tokenizer_json=tokenizer_json,
        chat_template=head.chat_template,
        special=head.special,
        eos_ids=head.eos_ids,
        max_context=min(head.max_context, offer.offer.max_context),
    )
