"""Waiting with a limit, by the injected clock: nothing here reads the time itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from node.ports import Clock

T = TypeVar("T")


async def within(clock: Clock, seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when it takes longer. Raises: TimeoutError, and what `work` raises."""
    task = asyncio.ensure_future(work)
    timer = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        await end(timer, task)


async def ticking(items: AsyncGenerator[T, None], clock: Clock, seconds: float) -> AsyncGenerator[T | None, None]:
    """The items as they come, and None whenever `seconds` went by without one. Closes `items`."""
    task: asyncio.Task[T] | None = None
    timer: asyncio.Task[None] | None = None
    try:
        while True:
            task = asyncio.ensure_future(_next(items))
            while not task.done():
                timer = asyncio.ensure_future(clock.sleep(seconds))
                await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    yield None
                await end(timer)
            try:
                item = task.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        await end(*(waiting for waiting in (timer, task) if waiting is not None))
        await items.aclose()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has cleaned up."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)
