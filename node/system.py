"""The machine's own clock and entropy: the only place where time and randomness enter the node."""

from __future__ import annotations

import asyncio
import secrets
import time


class SystemClock:
    """Implements the Clock port."""

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemEntropy:
    """Implements the Entropy port."""

    def token(self, size: int) -> bytes:
        """`size` bytes from the operating system."""
        return secrets.token_bytes(size)
