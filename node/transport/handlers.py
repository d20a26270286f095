"""Runs the application's handler of each inbound stream: what it raises resets that stream and nothing else."""

from __future__ import annotations

import asyncio
import logging

from node.ports import Stream, StreamEnded, StreamHandler
from node.transport.subscriptions import cancel_and_wait

log = logging.getLogger("tally.transport")


class HandlerTasks:
    """The tasks that serve inbound streams."""

    def __init__(self) -> None:
        self._handlers: dict[str, StreamHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(self._handlers)

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self._handlers[protocol_id] = handler

    def start(self, protocol_id: str, stream: Stream) -> None:
        """Serve a stream of a protocol that is in `protocols`, in a task of its own."""
        task = asyncio.create_task(self._run(protocol_id, stream), name=f"serve {protocol_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, protocol_id: str, stream: Stream) -> None:
        try:
            await self._handlers[protocol_id](stream)
        except asyncio.CancelledError:
            await stream.reset()
            raise
        except StreamEnded as exc:
            log.info("%s of %s ended early: %s", protocol_id, stream.peer_id, exc)
            await stream.reset()
        except Exception:
            log.exception(
                "%s of %s: the handler failed; this stream is reset, all others go on", protocol_id, stream.peer_id
            )
            await stream.reset()
        else:
            await stream.close()

    async def close(self) -> None:
        """Cancel what is being served; each stream is reset."""
        await cancel_and_wait(list(self._tasks))
