"""How frames lie on a byte stream: a u32 big-endian length, then that many bytes; no frame above MAX_FRAME_BYTES.

Pure: bytes in, frames out. The limit is checked on the length prefix, before a single byte of the body is kept.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import FrameTooLarge
from protocol.units import MAX_FRAME_BYTES

PREFIX_BYTES: Final = 4
"""Size of the length prefix, bytes. u32 because every peer's language reads it without a varint loop."""


def encode_frame(payload: bytes) -> bytes:
    """Prefix one payload with its length. Raises: ValueError when it is above MAX_FRAME_BYTES."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(payload)} bytes is above the limit of {MAX_FRAME_BYTES}; send it in parts")
    return len(payload).to_bytes(PREFIX_BYTES, "big") + payload


class FrameDecoder:
    """Cuts a byte stream, however it was chopped, back into the frames that were sent.

    Once a length prefix is above the limit the stream cannot be trusted again: `error` is set, what was buffered is
    let go, and every later `feed` raises it. Frames completed before that prefix are still returned.
    """

    __slots__ = ("_buffer", "error")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.error: FrameTooLarge | None = None

    @property
    def buffered(self) -> int:
        """Bytes of an unfinished frame held, prefix included. At most MAX_FRAME_BYTES + 4 between calls."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Frames that `data` completes, in order.

        Raises: FrameTooLarge when the very next frame is announced above the limit (or one was before); if good
        frames precede it in `data` they are returned, and the next call raises.
        """
        if self.error is not None:
            raise self.error
        self._buffer += data
        frames: list[bytes] = []
        position, end = 0, len(self._buffer)
        # Slices are taken through a memoryview so that each payload is copied once, and the consumed head is cut
        # off once per call: many small frames in one chunk stay linear.
        with memoryview(self._buffer) as view:
            while end - position >= PREFIX_BYTES:
                start = position + PREFIX_BYTES
                length = int.from_bytes(view[position:start], "big")
                if length > MAX_FRAME_BYTES:
                    self.error = FrameTooLarge(length, MAX_FRAME_BYTES)
                    break
                if end - start < length:
                    break
                position = start + length
                frames.append(bytes(view[start:position]))
        if self.error is not None:
            self._buffer.clear()
            if not frames:
                raise self.error
            return frames
        del self._buffer[:position]
        return frames
