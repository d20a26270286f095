"""Sealed frames: they open once, in order, on the other side, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedFrame
from protocol.sealing import BoxKey, Sealed
from tests.protocol.sheets import ON_SLOW_CPU

texts = st.lists(st.binary(max_size=300), min_size=1, max_size=8)
SEAL_BYTES = 16
CLIENT, PROVIDER, STRANGER = (BoxKey.from_secret(bytes([number]) * 32) for number in (1, 2, 3))
LOW_ORDER = (
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
)
"""Points whose shared secret is zero whatever our key. Source: https://cr.yp.to/ecdh.html#validate"""


def pair() -> tuple[Sealed, Sealed]:
    return Sealed(CLIENT, PROVIDER.public, we_are_client=True), Sealed(PROVIDER, CLIENT.public, we_are_client=False)


@ON_SLOW_CPU
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), max_size=12))
def test_both_directions_open_in_order(messages: list[tuple[bool, bytes]]) -> None:
    """Also when the directions interleave, and when a message is read only after others were sent."""
    client, provider = pair()
    waiting: list[tuple[Sealed, bytes, bytes]] = []
    for from_client, text in messages:
        sealed = (client if from_client else provider).seal(text)
        assert len(sealed) == len(text) + SEAL_BYTES
        waiting.append((provider if from_client else client, sealed, text))
    for reader, sealed, text in waiting:
        assert reader.unseal(sealed) == text


@ON_SLOW_CPU
@given(st.binary(max_size=100), st.integers(1, 20))
def test_no_nonce_serves_twice(text: bytes, count: int) -> None:
    """One text, many times, both ways, under one pair of keys: no ciphertext comes back."""
    client, provider = pair()
    seen = {side.seal(text) for _ in range(count) for side in (client, provider)}
    assert len(seen) == 2 * count


@ON_SLOW_CPU
@given(texts, st.data())
def test_a_frame_out_of_order_does_not_open(messages: list[bytes], data: st.DataObject) -> None:
    client, provider = pair()
    sealed = [client.seal(text) for text in messages]
    ahead = data.draw(st.integers(0, len(sealed) - 1))
    for early in sealed[1 : ahead + 1]:
        with pytest.raises(MalformedFrame):
            provider.unseal(early)
    for text, frame in zip(messages, sealed, strict=True):
        assert provider.unseal(frame) == text
        with pytest.raises(MalformedFrame):
            provider.unseal(frame)


@ON_SLOW_CPU
@given(st.binary(max_size=100), st.data())
def test_an_altered_frame_does_not_open(text: bytes, data: st.DataObject) -> None:
    client, provider = pair()
    sealed = client.seal(text)
    at, bit = data.draw(st.integers(0, len(sealed) - 1)), 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(sealed) - 1))
    for bent in (sealed[:at] + bytes([sealed[at] ^ bit]) + sealed[at + 1 :], sealed[:cut], sealed + b"\0"):
        with pytest.raises(MalformedFrame):
            provider.unseal(bent)
    assert provider.unseal(sealed) == text


@ON_SLOW_CPU
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(junk: bytes) -> None:
    _, provider = pair()
    with pytest.raises(MalformedFrame):
        provider.unseal(junk)


def test_a_frame_does_not_open_on_the_side_that_sealed_it() -> None:
    client, provider = pair()
    for side in (client, provider):
        with pytest.raises(MalformedFrame):
            side.unseal(side.seal(b"mirrored"))


def test_a_frame_for_another_key_does_not_open() -> None:
    client, _ = pair()
    sealed = client.seal(b"secret")
    for reader in (
        Sealed(STRANGER, CLIENT.public, we_are_client=False),
        Sealed(PROVIDER, STRANGER.public, we_are_client=False),
    ):
        with pytest.raises(MalformedFrame):
            reader.unseal(sealed)


@pytest.mark.parametrize("theirs", [*LOW_ORDER, b"", b"\1" * 31, b"\1" * 33], ids=lambda key: key.hex()[:8])
def test_a_key_that_keeps_no_secret_is_refused(theirs: bytes) -> None:
    """A stranger chooses this key: it must not break us, and must not get a seal that anybody can open."""
    with pytest.raises(MalformedFrame):
        Sealed(PROVIDER, theirs, we_are_client=False)


def test_a_box_key_shows_only_its_public_half() -> None:
    secret = bytes(range(32))
    assert secret.hex() not in repr(BoxKey.from_secret(secret)) and "secret" not in repr(BoxKey.from_secret(secret))
