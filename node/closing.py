"""Jobs of a marketplace, closed when their reader leaves: nothing more is generated or paid for nobody."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from node.ports import JobEvent


def closed_after(job: AsyncIterator[JobEvent]) -> aclosing[AsyncGenerator[JobEvent, None]]:
    """Closes the job's iterator on leaving, whatever kind of iterator the marketplace gave."""

    async def events() -> AsyncGenerator[JobEvent, None]:
        try:
            async for event in job:
                yield event
        finally:
            close = getattr(job, "aclose", None)
            if close is not None:
                await close()

    return aclosing(events())
