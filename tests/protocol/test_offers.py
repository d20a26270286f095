"""Offer envelopes: what we seal is believed, and nothing that was changed on the way is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.base_price import base_epoch, next_base
from protocol.eip712 import Domain, digest, fields_of
from protocol.errors import BadSignature, FieldOutOfRange, RemoteProtocolError, TariffNotInForce
from protocol.frames import OfferEnvelope, decode, encode
from protocol.messages import Offer, Tariff
from protocol.offers import MAX_OFFER_LIFE_S, check_envelope, seal_offer, text_hash
from protocol.packing import pack
from protocol.peers import peer_id_of_secret
from protocol.signing import Signer
from protocol.tariff import MAX_PRICE
from protocol.units import BPS, Address, Digest, Verifiability
from tests.protocol.documents import values
from tests.protocol.sheets import ON_SLOW_CPU, SHEET, tariffs

DOMAIN = Domain(31337, Address(b"\x11" * 20))
NODE, STRANGER = Signer.from_secret(b"\x05" * 32), Signer.from_secret(b"\x06" * 32)
WALLET = Address(b"\x31" * 20)
NOW = SHEET.valid_from + 1_000
PEER = peer_id_of_secret(NODE.secret)
ADDRESSES = ("/ip4/10.0.0.1/tcp/4001",)
TARIFF = replace(SHEET, provider=WALLET, profile_id=Digest(b"\x32" * 32))
OFFER = Offer(
    provider=WALLET,
    sequence=9,
    box_key=Digest(b"\x33" * 32),
    model_hash=text_hash("twin-model"),
    profile_id=TARIFF.profile_id,
    slots=8,
    load_bps=2_500,
    max_context=4_096,
    max_output=1_024,
    tariff_hash=digest(DOMAIN, TARIFF),
    region_hash=text_hash("eu-west"),
    retention_hours=24,
    verifiability=Verifiability.REPLAY,
    base_epoch=base_epoch(NOW),
    base_bps=SHEET.base_min_bps,
    base_parent_bps=SHEET.base_min_bps,
    base_utilisation_bps=0,
    expires_at=NOW + 1_800,
)


@dataclass(frozen=True)
class Sealing:
    """What an honest or dishonest node puts into an envelope, and who signs it."""

    offer: Offer = OFFER
    tariff: Tariff = TARIFF
    signer: Signer = NODE
    tariff_signer: Signer = NODE
    peer_id: str = PEER
    model: str = "twin-model"
    region: str = "eu-west"

    def envelope(self) -> OfferEnvelope:
        return seal_offer(
            DOMAIN,
            self.signer,
            self.offer,
            self.tariff,
            self.tariff_signer.sign(DOMAIN, self.tariff),
            peer_id=self.peer_id,
            addresses=ADDRESSES,
            model=self.model,
            region=self.region,
        )


def seal(**changes: Any) -> OfferEnvelope:
    return Sealing(**changes).envelope()


HONEST = seal()


# --------------------------------------------------------------------------------------------------- what is believed


def test_what_we_seal_is_believed() -> None:
    checked = check_envelope(DOMAIN, HONEST, NOW)
    assert (checked.offer, checked.tariff, checked.tariff_hash) == (OFFER, TARIFF, digest(DOMAIN, TARIFF))
    assert (checked.node_key, checked.peer_id, checked.addresses) == (NODE.address, PEER, ADDRESSES)
    assert (checked.model, checked.region, checked.envelope) == ("twin-model", "eu-west", HONEST)


@ON_SLOW_CPU
@given(tariffs(), st.text(max_size=60), st.text(max_size=60), st.integers(0, BPS), st.data())
def test_any_offer_over_an_admitted_tariff_is_believed(
    sheet: Tariff, model: str, region: str, load: int, data: st.DataObject
) -> None:
    tariff = replace(sheet, provider=WALLET, profile_id=TARIFF.profile_id)
    now = data.draw(
        st.integers(max(MAX_OFFER_LIFE_S, tariff.valid_from), max(MAX_OFFER_LIFE_S, tariff.valid_until - 1))
    )
    assume(tariff.valid_from <= now < tariff.valid_until)
    parent, busy = data.draw(st.integers(tariff.base_min_bps, tariff.base_max_bps)), data.draw(st.integers(0, BPS))
    offer = replace(
        OFFER,
        base_epoch=data.draw(st.integers(base_epoch(now - MAX_OFFER_LIFE_S), base_epoch(now) + 1)),
        base_bps=next_base(tariff, parent, busy),
        base_parent_bps=parent,
        base_utilisation_bps=busy,
        model_hash=text_hash(model),
        region_hash=text_hash(region),
        tariff_hash=digest(DOMAIN, tariff),
        load_bps=load,
        verifiability=data.draw(st.sampled_from(Verifiability)),
        expires_at=data.draw(st.integers(now + 1, now + MAX_OFFER_LIFE_S)),
    )
    envelope = seal(offer=offer, tariff=tariff, model=model, region=region)
    travelled = decode(encode(envelope))
    assert isinstance(travelled, OfferEnvelope)
    assert check_envelope(DOMAIN, travelled, now).offer == offer


@pytest.mark.parametrize("epoch", [base_epoch(NOW) + 2, base_epoch(NOW - MAX_OFFER_LIFE_S) - 1])
def test_an_epoch_of_another_time_is_refused(epoch: int) -> None:
    with pytest.raises(FieldOutOfRange, match="base_epoch"):
        check_envelope(DOMAIN, seal(offer=replace(OFFER, base_epoch=epoch)), NOW)


def test_addresses_are_hints_that_nobody_signed() -> None:
    moved = msgspec.structs.replace(HONEST, addresses=("/ip4/10.9.9.9/tcp/1",))
    assert check_envelope(DOMAIN, moved, NOW).addresses == ("/ip4/10.9.9.9/tcp/1",)


# ------------------------------------------------------------------------------------------ what was changed on the way


@pytest.mark.parametrize("field", [item.name for item in fields(Offer)])
@settings(ON_SLOW_CPU, max_examples=8)
@given(data=st.data())
def test_an_altered_offer_is_refused(field: str, data: st.DataObject) -> None:
    value = data.draw(values(dict(fields_of(Offer))[field]))
    assume(value != getattr(OFFER, field))
    bent = msgspec.structs.replace(HONEST, offer=pack(replace(OFFER, **{field: value})))
    with pytest.raises(RemoteProtocolError):
        check_envelope(DOMAIN, bent, NOW)


@pytest.mark.parametrize("field", [item.name for item in fields(Tariff)])
@settings(ON_SLOW_CPU, max_examples=8)
@given(data=st.data())
def test_an_altered_tariff_is_refused(field: str, data: st.DataObject) -> None:
    value = data.draw(values(dict(fields_of(Tariff))[field]))
    assume(value != getattr(TARIFF, field))
    bent = msgspec.structs.replace(HONEST, tariff=pack(replace(TARIFF, **{field: value})))
    with pytest.raises(BadSignature):
        check_envelope(DOMAIN, bent, NOW)


@ON_SLOW_CPU
@given(st.sampled_from(["offer", "signature", "tariff", "tariff_signature"]), st.data())
def test_a_flipped_bit_is_refused(part: str, data: st.DataObject) -> None:
    raw = bytearray(getattr(HONEST, part))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RemoteProtocolError):
        check_envelope(DOMAIN, msgspec.structs.replace(HONEST, **{part: bytes(raw)}), NOW)


@ON_SLOW_CPU
@given(st.sampled_from(["offer", "signature", "tariff", "tariff_signature"]), st.binary(max_size=700))
def test_any_bytes_are_refused(part: str, junk: bytes) -> None:
    assume(junk != getattr(HONEST, part))
    with pytest.raises(RemoteProtocolError):
        check_envelope(DOMAIN, msgspec.structs.replace(HONEST, **{part: junk}), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "another-model"},
        {"model": ""},
        {"region": "us-east"},
        {"peer_id": peer_id_of_secret(STRANGER.secret)},
        {"peer_id": ""},
        {"peer_id": "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"},  # a valid peer id of another kind of key
        {"peer_id": "0OIl"},
    ],
    ids=str,
)
def test_another_text_or_peer_is_refused(changes: dict[str, str]) -> None:
    """A relay that redirects an honest offer to itself, or to nowhere, gains nothing."""
    with pytest.raises(RemoteProtocolError):
        check_envelope(DOMAIN, msgspec.structs.replace(HONEST, **changes), NOW)


# ----------------------------------------------------------------------------------------- what was signed and is wrong


@pytest.mark.parametrize(
    "sealing",
    [
        Sealing(signer=STRANGER),
        Sealing(tariff_signer=STRANGER),
        Sealing(offer=replace(OFFER, provider=Address(b"\x39" * 20))),
        Sealing(offer=replace(OFFER, profile_id=Digest(b"\x39" * 32))),
        Sealing(offer=replace(OFFER, tariff_hash=Digest(b"\x39" * 32))),
        Sealing(offer=replace(OFFER, verifiability=3)),
        Sealing(offer=replace(OFFER, load_bps=BPS + 1)),
        Sealing(tariff=replace(TARIFF, prompt_price=TARIFF.prompt_price + 1)),
    ],
)
def test_documents_that_contradict_each_other_are_refused(sealing: Sealing) -> None:
    with pytest.raises(RemoteProtocolError):
        check_envelope(DOMAIN, sealing.envelope(), NOW)


@pytest.mark.parametrize(
    ("field", "base"),
    [
        ("base_bps", {"base_bps": SHEET.base_min_bps + 1}),  # does not follow from an idle epoch
        ("base_bps", {"base_bps": 12_500, "base_parent_bps": 11_000, "base_utilisation_bps": BPS}),  # more than 1/8
        ("base_bps", {"base_bps": SHEET.base_min_bps - 1, "base_parent_bps": SHEET.base_min_bps}),
        ("base_bps", {"base_bps": 22_500, "base_parent_bps": 20_000, "base_utilisation_bps": BPS}),  # above the bound
        ("base_utilisation_bps", {"base_bps": 11_250, "base_utilisation_bps": BPS + 1}),
    ],
)
def test_a_base_multiplier_that_does_not_follow_is_refused(field: str, base: dict[str, int]) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        check_envelope(DOMAIN, seal(offer=replace(OFFER, **base)), NOW)
    assert caught.value.field == field


def test_a_tariff_that_could_overflow_is_refused() -> None:
    dear = replace(TARIFF, prompt_price=MAX_PRICE + 1)
    with pytest.raises(FieldOutOfRange):
        check_envelope(DOMAIN, seal(tariff=dear, offer=replace(OFFER, tariff_hash=digest(DOMAIN, dear))), NOW)


def test_an_offer_of_another_deployment_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        check_envelope(Domain(1, DOMAIN.verifying_contract), HONEST, NOW)


@pytest.mark.parametrize("expires_at", [0, NOW - 1, NOW, NOW + MAX_OFFER_LIFE_S + 1, (1 << 64) - 1])
def test_an_offer_that_is_over_or_lives_too_long_is_refused(expires_at: int) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        check_envelope(DOMAIN, seal(offer=replace(OFFER, expires_at=expires_at)), NOW)
    assert caught.value.field == "expires_at"


@pytest.mark.parametrize("life", [1, MAX_OFFER_LIFE_S])
def test_an_offer_may_live_from_a_second_to_an_hour(life: int) -> None:
    check_envelope(DOMAIN, seal(offer=replace(OFFER, expires_at=NOW + life)), NOW)


@pytest.mark.parametrize("dates", [{"valid_from": NOW + 1}, {"valid_from": 1, "valid_until": NOW}])
def test_a_tariff_out_of_force_is_refused(dates: dict[str, int]) -> None:
    tariff = replace(TARIFF, **dates)
    with pytest.raises(TariffNotInForce):
        check_envelope(DOMAIN, seal(tariff=tariff, offer=replace(OFFER, tariff_hash=digest(DOMAIN, tariff))), NOW)
