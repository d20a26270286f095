"""Frames: what we encode decodes to itself, and any bytes give a frame or MalformedFrame, nothing else."""

from __future__ import annotations

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
    VoucherFrame,
    chunked,
    decode_batch,
    encode_batch,
)
from protocol.units import MAX_FRAME_BYTES

b32, b20, b65 = (st.binary(min_size=n, max_size=n) for n in (32, 20, 65))
u32 = st.integers(0, (1 << 32) - 1)
packed = st.binary(max_size=1024)
short = st.text(max_size=64)

any_frame = st.one_of(
    st.builds(QuoteAsk, b20, b32, u32, u32, st.integers(0, 2)),
    st.builds(Quote, b32, b32, u32),
    st.builds(Request, packed, b65, b32, b32, st.lists(u32, max_size=64).map(tuple), st.integers(1, 128)),
    st.builds(PromptChunk, st.binary(max_size=2000)),
    st.builds(Accepted, packed, b65),
    st.builds(Refuse, short, short),
    st.builds(Tokens, st.binary(max_size=2000)),
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


@given(st.lists(u32, min_size=1, max_size=32).map(tuple), u32)
def test_token_batches_round_trip(ids: tuple[int, ...], start: int) -> None:
    batch = TokenBatch(start, ids, b"lp" * len(ids), b"0123456789abcdef" * len(ids))
    assert decode_batch(encode_batch(batch)) == batch


@pytest.mark.parametrize(("logprobs", "projections"), [(3, 32), (4, 31), (0, 32), (4, 0)])
def test_evidence_must_match_the_tokens(logprobs: int, projections: int) -> None:
    raw = encode_batch(TokenBatch(0, (1, 2), bytes(logprobs), bytes(projections)))
    with pytest.raises(MalformedFrame, match="2 tokens"):
        decode_batch(raw)


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
