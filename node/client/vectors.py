"""What an embedding must be before a caller sees it: a unit vector of the size that was asked for."""

from __future__ import annotations

import math
import struct
from typing import Final

from protocol.errors import RemoteProtocolError

LENGTH_SLACK: Final = 1e-3
"""How far from 1 a vector's length may be. fp32 sums of 16,384 squares are within 1e-5 of it; doubling it lets through
vectors that turn cosine similarities wrong in the third digit."""


def check_vector(vector: bytes, dimensions: int) -> None:
    """`vector`: fp32 little-endian, a whole number of them. `dimensions`: what it must have, 0 for any.

    Raises: RemoteProtocolError when it has others, or is no unit vector; NaN and infinity are none.
    """
    # SPEC 4.12: cut to the dimensions asked for and of unit length
    size = len(vector) // 4
    if dimensions and size != dimensions:
        raise RemoteProtocolError(f"a vector of {size} dimensions where {dimensions} are due")
    length = math.hypot(*struct.unpack(f"<{size}f", vector))
    if not abs(length - 1) <= LENGTH_SLACK:  # written so that NaN fails
        raise RemoteProtocolError(f"a vector of length {length:g} where a unit vector is due")
