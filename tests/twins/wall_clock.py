"""The clock on the wall, for tests against real processes."""

from __future__ import annotations

import asyncio
import time


class WallClock:
    """The Clock port over the machine's own clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
