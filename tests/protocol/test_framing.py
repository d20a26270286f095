"""Framing: whatever the chopping, the same frames come out, and an oversized prefix is refused before its body."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FrameTooLarge
from protocol.framing import PREFIX_BYTES, FrameDecoder, encode_frame
from protocol.units import MAX_FRAME_BYTES

_frames = st.lists(st.binary(max_size=300), max_size=12)


def _chop(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(frames=_frames, cuts=st.lists(st.integers(min_value=0, max_value=5000), max_size=20))
def test_any_chopping_gives_the_frames_back(frames: list[bytes], cuts: list[int]) -> None:
    decoder = FrameDecoder()
    decoded = [f for part in _chop(b"".join(map(encode_frame, frames)), cuts) for f in decoder.feed(part)]
    assert decoded == frames
    assert decoder.buffered == 0


@given(
    frames=_frames,
    length=st.integers(min_value=MAX_FRAME_BYTES + 1, max_value=2**32 - 1),
    tail=st.binary(max_size=50),
    cuts=st.lists(st.integers(min_value=0, max_value=5000), max_size=8),
)
def test_frames_before_an_oversized_prefix_survive_and_then_it_is_refused(
    frames: list[bytes], length: int, tail: bytes, cuts: list[int]
) -> None:
    wire = b"".join(map(encode_frame, frames)) + length.to_bytes(PREFIX_BYTES, "big") + tail
    decoder, decoded = FrameDecoder(), []
    with pytest.raises(FrameTooLarge) as caught:
        for part in _chop(wire, cuts):
            decoded += decoder.feed(part)
        decoder.feed(b"")
    assert decoded == frames
    assert (caught.value.length, caught.value.limit) == (length, MAX_FRAME_BYTES)
    assert decoder.buffered == 0, "nothing of a refused stream is kept"
    with pytest.raises(FrameTooLarge):
        decoder.feed(encode_frame(b"later"))


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    largest = b"\xff" * MAX_FRAME_BYTES
    assert FrameDecoder().feed(encode_frame(largest)) == [largest]
    with pytest.raises(ValueError, match="above the limit"):
        encode_frame(largest + b"!")


def test_an_unfinished_frame_is_held_within_the_limit() -> None:
    decoder = FrameDecoder()
    wire = encode_frame(b"\0" * MAX_FRAME_BYTES)
    assert decoder.feed(wire[:-1]) == []
    assert decoder.buffered == MAX_FRAME_BYTES + PREFIX_BYTES - 1
    assert decoder.feed(wire[-1:]) == [b"\0" * MAX_FRAME_BYTES]
