"""Offers as they travel: a signed Offer, the texts behind its hashes, and the signed Tariff it names. Pure checks.

What the documents alone can prove is checked here; that the node key belongs to the wallet, and that the tariff is
in the chain's log, is for the caller to ask the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from eth_hash.auto import keccak

from protocol.base_price import base_epoch, check_base
from protocol.eip712 import Domain, digest
from protocol.errors import BadSignature, FieldOutOfRange, RemoteProtocolError
from protocol.frames import OfferEnvelope
from protocol.messages import Offer, Tariff
from protocol.packing import pack, unpack
from protocol.peers import NotOurKey, address_of_peer
from protocol.signing import Signer, recover_digest, verify
from protocol.tariff import check_in_force, check_tariff
from protocol.units import BPS, Address, Digest, Verifiability

MAX_OFFER_LIFE_S: Final = 3600
"""Longest an offer may claim to live. Unit: s. A dead provider is forgotten after that; our offers live
ten minutes, so doubling it only makes the market staler."""


@dataclass(frozen=True, slots=True)
class CheckedOffer:
    """An envelope that passed every check its documents allow. `node_key`: who signed offer and tariff."""

    offer: Offer
    tariff: Tariff
    tariff_hash: Digest
    node_key: Address
    peer_id: str
    addresses: tuple[str, ...]
    model: str
    region: str
    envelope: OfferEnvelope


def text_hash(text: str) -> Digest:
    """keccak256 of UTF-8 text, as the signed documents carry names."""
    return Digest(keccak(text.encode()))


def seal_offer(
    domain: Domain,
    signer: Signer,
    offer: Offer,
    tariff: Tariff,
    tariff_signature: bytes,
    *,
    peer_id: str,
    addresses: tuple[str, ...],
    model: str,
    region: str,
) -> OfferEnvelope:
    """The envelope of our own offer. Raises: FieldOutOfRange."""
    return OfferEnvelope(
        pack(offer), signer.sign(domain, offer), pack(tariff), tariff_signature, peer_id, addresses, model, region
    )


def check_envelope(domain: Domain, envelope: OfferEnvelope, now_s: int) -> CheckedOffer:
    """Everything that can be checked without a chain. `now_s`: Unix seconds.

    Raises: MalformedFrame, BadSignature, FieldOutOfRange, TariffNotInForce, RemoteProtocolError.
    """
    # SPEC 6.2: An offer counts only if its signatures, hashes and dates hold
    offer, tariff = unpack(Offer, envelope.offer), unpack(Tariff, envelope.tariff)
    node_key = recover_digest(digest(domain, offer), envelope.signature)
    if node_key is None:
        raise BadSignature("Offer", offer.provider, None)
    tariff_hash = verify(domain, tariff, envelope.tariff_signature, node_key)
    check_tariff(tariff)
    if (tariff.provider, tariff.profile_id) != (offer.provider, offer.profile_id):
        raise RemoteProtocolError("the offer's tariff is of another provider or profile")
    if tariff_hash != offer.tariff_hash:
        raise RemoteProtocolError("the offer names another tariff than it carries")
    _check_peer(envelope.peer_id, node_key)
    if text_hash(envelope.model) != offer.model_hash or text_hash(envelope.region) != offer.region_hash:
        raise RemoteProtocolError("the offer's texts are not those it signed")
    _check_offer(offer, now_s)
    check_base(offer, tariff)
    check_in_force(tariff, now_s)
    return CheckedOffer(
        offer=offer,
        tariff=tariff,
        tariff_hash=tariff_hash,
        node_key=node_key,
        peer_id=envelope.peer_id,
        addresses=envelope.addresses,
        model=envelope.model,
        region=envelope.region,
        envelope=envelope,
    )


def _check_peer(peer_id: str, node_key: Address) -> None:
    """The peer id is not signed, but it is the signing key's other name, so no relay can redirect an offer."""
    # SPEC 6.1: The peer id must be that of the node key which signed
    try:
        known_as = address_of_peer(peer_id)
    except NotOurKey as exc:
        raise RemoteProtocolError(f"the offer's {exc}") from exc
    if known_as != node_key:
        raise RemoteProtocolError("the offer's peer id is not that of the key which signed it")


def _check_offer(offer: Offer, now_s: int) -> None:
    """Raises: FieldOutOfRange naming the field."""
    if offer.verifiability not in tuple(Verifiability):
        raise FieldOutOfRange("Offer", "verifiability", offer.verifiability)
    if offer.load_bps > BPS:
        raise FieldOutOfRange("Offer", "load_bps", offer.load_bps)
    # an epoch of another time would join no offer before it; a clock may be a moment ahead
    if not base_epoch(now_s - MAX_OFFER_LIFE_S) <= offer.base_epoch <= base_epoch(now_s) + 1:
        raise FieldOutOfRange("Offer", "base_epoch", offer.base_epoch)
    if not now_s < offer.expires_at <= now_s + MAX_OFFER_LIFE_S:
        raise FieldOutOfRange("Offer", "expires_at", offer.expires_at)
