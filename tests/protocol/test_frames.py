"""Frames: what we encode decodes to itself, and any bytes give a frame or MalformedFrame, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import frames
from protocol.errors import FrameTooLarge, MalformedFrame
from protocol.frames import (
    Abort,
    Accepted,
    Ack,
    Cancel,
    CardAsk,
    CardChunk,
    End,
    OfferEnvelope,
    OffersAsk,
    OffersEnd,
    Ping,
    Pong,
    PromptChunk,
    Quote,
    QuoteAsk,
    Receipt,
    Refuse,
    Request,
    TokenBatch,
    Tokens,
    VectorBatch,
    Vectors,
    VoucherFrame,
    chunked,
    decode_batch,
    decode_vector,
    encode_batch,
    encode_vector,
)
from protocol.options import MAX_OPTIONS_BYTES
from protocol.units import MAX_FRAME_BYTES

b32, b20, b65 = (st.binary(min_size=n, max_size=n) for n in (32, 20, 65))
u32 = st.integers(0, (1 << 32) - 1)
packed = st.binary(max_size=1024)
short = st.text(max_size=64)

any_frame = st.one_of(
    st.builds(QuoteAsk, b20, b32, u32, u32, st.integers(0, 2)),
    st.builds(Quote, b32, b32, u32),
    st.builds(
        Request, packed, b65, b32, b32, st.sampled_from([b"", bytes(32)]), st.binary(max_size=2000), st.integers(1, 128)
    ),
    st.builds(PromptChunk, st.binary(max_size=2000)),
    st.builds(Accepted, packed, b65),
    st.builds(Refuse, short, short),
    st.builds(Tokens, st.binary(max_size=2000)),
    st.builds(Vectors, st.binary(max_size=2000)),
    st.builds(Receipt, packed, b65),
    st.builds(VoucherFrame, u32, packed, b65),
    st.builds(End, packed, b65),
    st.builds(Ack, packed, b65, packed, b65),
    st.just(Cancel()),
    st.builds(Abort, short, short),
    st.builds(Ping, u32),
    st.builds(Pong, u32),
    st.builds(OffersAsk, b20),
    st.builds(OfferEnvelope, packed, b65, packed, b65, short, st.lists(short, max_size=8).map(tuple), short, short),
    st.builds(OffersEnd, st.booleans()),
    st.builds(CardAsk, b32),
    st.builds(CardChunk, st.binary(max_size=2000)),
)


@given(any_frame)
def test_frames_round_trip(frame: frames.Frame) -> None:
    data = frames.encode(frame)
    assert frames.decode(data) == frame and len(data) <= MAX_FRAME_BYTES


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    try:
        frames.decode(data)
    except MalformedFrame:
        pass


@given(any_frame, st.data())
def test_damaged_frames_decode_or_are_malformed(frame: frames.Frame, data: st.DataObject) -> None:
    raw = bytearray(frames.encode(frame))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        frames.decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except MalformedFrame:
        pass


likely = st.tuples(u32, st.binary(min_size=2, max_size=2))


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Any batch that a provider may send: of a dense model or experts, with or without the likeliest tokens."""
    ids = draw(st.lists(u32, min_size=1, max_size=32).map(tuple))
    count = len(ids)
    shown = st.lists(likely, max_size=20).map(tuple)
    return TokenBatch(
        draw(u32),
        ids,
        b"lp" * count,
        b"0123456789abcdef" * count,
        draw(st.sampled_from([b"", b"8 bytes." * count])),
        draw(st.one_of(st.just(()), st.lists(shown, min_size=count, max_size=count).map(tuple))),
    )


@given(batches())
def test_token_batches_round_trip(batch: TokenBatch) -> None:
    raw = encode_batch(batch)
    assert decode_batch(raw) == batch
    assert len(raw) + 64 <= frames.CHUNK_BYTES  # a full leaf with all its evidence is one frame


@pytest.mark.parametrize(
    ("logprobs", "projections", "routing"),
    [(3, 32, 0), (4, 31, 0), (0, 32, 0), (4, 0, 0), (4, 32, 8), (4, 32, 15), (4, 32, 17), (4, 32, 24)],
)
def test_evidence_must_match_the_tokens(logprobs: int, projections: int, routing: int) -> None:
    raw = encode_batch(TokenBatch(0, (1, 2), bytes(logprobs), bytes(projections), bytes(routing)))
    with pytest.raises(MalformedFrame, match="2 tokens"):
        decode_batch(raw)


@pytest.mark.parametrize(
    "alternatives",
    [
        ((),),  # of one token of two
        ((), (), ()),
        (((1, b"\0\0"),) * 21, ()),  # more than are sold
        (((1, b"\0"),), ()),
        (((1, b"\0\0\0"),), ()),
        (((-1, b"\0\0"),), ()),
        (((1 << 32, b"\0\0"),), ()),
        (((1,),), ()),
        (((1, b"\0\0", 1),), ()),
        (1, 2),
    ],
)
def test_malformed_alternatives_are_refused(alternatives: Any) -> None:
    raw = encode_batch(TokenBatch(0, (1, 2), bytes(4), bytes(32), b"", alternatives))
    with pytest.raises(MalformedFrame):
        decode_batch(raw)


@given(st.one_of(st.binary(max_size=300), batches().map(encode_batch)), st.data())
def test_any_bytes_are_a_batch_or_malformed(raw: bytes, data: st.DataObject) -> None:
    bent = bytearray(raw)
    if bent:
        bent[data.draw(st.integers(0, len(bent) - 1))] ^= data.draw(st.integers(0, 255))
    for decode in (decode_batch, decode_vector):
        try:
            decode(bytes(bent))
        except MalformedFrame:
            pass


@given(u32, st.binary(min_size=1, max_size=300).map(lambda raw: raw * 4))
def test_vectors_round_trip(index: int, vector: bytes) -> None:
    batch = VectorBatch(index, vector)
    assert decode_vector(encode_vector(batch)) == batch


@pytest.mark.parametrize("size", [0, 1, 3, 5, 4095, frames.CHUNK_BYTES + 4])
def test_a_vector_is_made_of_fp32_values_and_fits_a_frame(size: int) -> None:
    with pytest.raises(MalformedFrame):
        decode_vector(encode_vector(VectorBatch(0, bytes(size))))


def test_the_longest_vector_fits_a_frame() -> None:
    raw = encode_vector(VectorBatch(31, bytes(frames.CHUNK_BYTES)))
    assert decode_vector(raw).vector == bytes(frames.CHUNK_BYTES)
    assert len(frames.encode(Vectors(raw + bytes(16)))) <= MAX_FRAME_BYTES  # 16: a seal's authenticator


@pytest.mark.parametrize(("salt", "options"), [(33, 0), (32, MAX_OPTIONS_BYTES + 1)])
def test_a_request_bounds_salt_and_options(salt: int, options: int) -> None:
    request = Request(b"", bytes(65), bytes(32), bytes(32), bytes(salt), bytes(options), 1)
    with pytest.raises(MalformedFrame):
        frames.decode(frames._encoder.encode(request))


def test_the_largest_request_fits_a_frame() -> None:
    request = Request(bytes(1024), bytes(65), bytes(32), bytes(32), bytes(32), bytes(MAX_OPTIONS_BYTES), 128)
    assert frames.decode(frames.encode(request)) == request


def test_oversized_content_is_refused_before_it_leaves() -> None:
    with pytest.raises(FrameTooLarge):
        frames.encode(PromptChunk(bytes(MAX_FRAME_BYTES)))
    with pytest.raises(MalformedFrame):
        frames.decode(frames._encoder.encode(PromptChunk(bytes(MAX_FRAME_BYTES))))


@given(st.binary(max_size=200_000))
def test_chunks_are_bounded_and_complete(data: bytes) -> None:
    pieces = chunked(data)
    assert b"".join(pieces) == data and pieces
    assert all(len(frames.encode(CardChunk(piece))) <= MAX_FRAME_BYTES for piece in pieces)
