"""Steps that must not stop halfway: what is on disk and what is in memory have to agree when somebody hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, also when the caller is cancelled meanwhile; the cancellation is raised after it.

    A journal write that a cancellation interrupts is kept all the same, so whatever follows from it must happen too:
    otherwise a channel in memory falls behind the journal and refuses its next voucher.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the caller is gone: its own cancellation is what it hears of
        raise
