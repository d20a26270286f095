"""A trio event loop in a thread of its own, and the two-way bridge between it and asyncio.

Contract: the asyncio side survives whatever happens in the thread. When `trio.run` ends by a crash it is started
again with a growing pause; calls under way fail with `NetworkDown`, and `on_down` is told. Every call has a deadline.
What trio reports is handed over in batches, one wake-up of the asyncio loop for as much as has gathered.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import trio

from node.ports import TransportError

log = logging.getLogger("tally.transport")
T = TypeVar("T")

RESTART_PAUSE_S: Final = 0.1
"""Pause before the first restart, doubled for each further one up to RESTART_PAUSE_MAX_S: a crash that repeats must
not burn a core, and a single one should be over before a caller's retry comes."""

RESTART_PAUSE_MAX_S: Final = 5.0

STEADY_S: Final = 30.0
"""A run that lasted this long was healthy: the next restart starts over with the short pause."""

JOIN_S: Final = 2.0
"""Longest wait for the thread at `stop`. It is a daemon: beyond this the process is not held up by it."""


class NetworkDown(TransportError):
    """The network thread is not running, or ended while the call was under way."""


class _Call:
    """One asyncio call into trio: who waits, and the scope that ends it."""

    __slots__ = ("cancelled", "future", "orphan", "scope", "timeout_s")

    def __init__(
        self, future: asyncio.Future[Any], timeout_s: float, orphan: Callable[[Any], None] | None = None
    ) -> None:
        self.future, self.timeout_s, self.orphan = future, timeout_s, orphan
        self.scope: trio.CancelScope | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Runs in trio."""
        self.cancelled = True
        if self.scope is not None:
            self.scope.cancel()


class TrioThread:
    """Runs `main` in trio, again and again until stopped, and carries calls and reports across."""

    def __init__(self, name: str, main: Callable[[], Awaitable[None]], on_down: Callable[[], None]) -> None:
        """`main` runs in trio, calls `ready()` once and returns only when cancelled. `on_down` runs in asyncio."""
        self._name, self._main, self._on_down = name, main, on_down
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_pending = False
        self._pending: set[asyncio.Future[Any]] = set()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._was_ready = False
        self._ended = asyncio.Event()
        self._stopping = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # -------------------------------------------------------------------------------------------------- asyncio side

    async def start(self, timeout_s: float) -> None:
        """Start the thread and wait until `main` is ready.

        Raises: what `main` raised before it was ready, NetworkDown when it is not ready in time.
        """
        self._thread.start()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._ready)
        except BaseException as exc:  # cancelled too: no thread is left behind
            await self.stop()
            if isinstance(exc, TimeoutError):
                raise NetworkDown(f"the network was not up within {timeout_s:g} s; nothing listens; try again") from exc
            raise

    async def stop(self) -> None:
        """Cancel everything and join the thread. Idempotent, never raises."""
        self._stopping.set()
        self.submit(self._cancel_run)
        try:
            async with asyncio.timeout(JOIN_S):
                await self._ended.wait()
            self._thread.join(JOIN_S)
        except TimeoutError:
            log.warning("the network thread did not end within %g s; it is left behind as a daemon", JOIN_S)
        self._fail_pending()
        self._drain()

    def submit(self, function: Callable[..., None], *args: Any) -> bool:
        """Run a synchronous function in trio soon, in order. False when trio is not running (nothing happens then)."""
        token = self._token
        if token is None:
            return False
        try:
            token.run_sync_soon(self._guarded, function, args)
        except trio.RunFinishedError:
            return False
        return True

    async def call(
        self,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        timeout_s: float,
        orphan: Callable[[T], None] | None = None,
    ) -> T:
        """Run a coroutine function in trio and wait for its result.

        Raises: what it raises, TimeoutError, NetworkDown. Cancelling the caller cancels the call; `orphan` (in
        asyncio) gets a result that came too late for that.
        """
        call = _Call(self._loop.create_future(), timeout_s, orphan)
        if not self.submit(self._spawn_call, call, function, args):
            raise NetworkDown("the network is not running; nothing was sent; it restarts by itself, try again")
        self._pending.add(call.future)
        try:
            result: T = await call.future
        except asyncio.CancelledError:
            self.submit(call.cancel)
            raise
        finally:
            self._pending.discard(call.future)
        return result

    def _drain(self) -> None:
        # The flag falls before the queue is emptied: a report that arrives meanwhile asks for another wake-up, which
        # costs one empty round at worst; the other order could leave a report lying.
        self._wake_pending = False
        while self._outbox:
            function, args = self._outbox.popleft()
            try:
                function(*args)
            except Exception:
                log.exception("a report of the network thread could not be handled; the next ones go on")

    def _fail_pending(self) -> None:
        for future in list(self._pending):
            if not future.done():
                future.set_exception(NetworkDown("the network ended while the call was under way; try again"))

    def _went_down(self) -> None:
        self._fail_pending()
        self._on_down()

    # ----------------------------------------------------------------------------------------------------- trio side

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run a synchronous function in asyncio soon, in order. Dropped when the asyncio loop is gone."""
        self._outbox.append((function, args))
        if not self._wake_pending:
            self._wake_pending = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the asyncio loop was closed without stop(): nobody is left to tell
                self._stopping.set()
                self._cancel_run()

    def ready(self) -> None:
        """Called by `main` once it serves."""
        if not self._was_ready:
            self._was_ready = True
            self.post(self._resolve_ready, None)

    def spawn(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a trio task whose exceptions are logged and end nothing else."""
        if self._nursery is not None:
            self._nursery.start_soon(self._run_task, function, args)

    def _guarded(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        # An exception in a run_sync_soon callback would end trio.run as an internal error.
        try:
            function(*args)
        except Exception:
            log.exception("a request to the network thread failed; the thread goes on")

    def _spawn_call(self, call: _Call, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        if self._nursery is None:
            self.post(self._settle_call, call, None, NetworkDown("the network is restarting; try again"))
        elif not call.cancelled:
            self._nursery.start_soon(self._run_call, call, function, args)

    async def _run_call(self, call: _Call, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        result: Any = None
        error: Exception | None = NetworkDown("the network ended while the call was under way; try again")
        try:
            with trio.move_on_after(call.timeout_s) as call.scope:
                try:
                    result, error = await function(*args), None
                except Exception as exc:  # noqa: BLE001 - handed to the caller in asyncio
                    error = exc
            if call.scope.cancelled_caught:
                error = TimeoutError(f"not done within {call.timeout_s:g} s")
        finally:
            self.post(self._settle_call, call, result, error)

    async def _run_task(self, function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception:
            log.exception("a task of the network thread failed; the others go on")

    def _settle_call(self, call: _Call, result: Any, error: Exception | None) -> None:
        if call.future.done() and error is None and call.orphan is not None:
            call.orphan(result)
        self._settle(call.future, result, error)

    @staticmethod
    def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _resolve_ready(self, error: Exception | None) -> None:
        self._settle(self._ready, None, error)
        if error is not None:
            self._ready.exception()  # seen: start() may have given up already

    def _cancel_run(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _trio_main(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._token = trio.lowlevel.current_trio_token()
                if not self._stopping.is_set():
                    await self._main()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None

    def _run(self) -> None:
        """The thread. trio installs its SIGINT handler in the main thread only, so none is touched here."""
        try:
            self._run_until_stopped()
        finally:
            self.post(self._ended.set)

    def _run_until_stopped(self) -> None:
        pause = RESTART_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            error: BaseException | None = None
            try:
                trio.run(self._trio_main)
            except BaseException as exc:  # noqa: BLE001 - TrioInternalError and exception groups too: it restarts
                error = exc
            self._token = None
            if self._stopping.is_set():
                break
            if not self._was_ready:
                # It never came up: say why to whoever called start(), and do not try again behind their back.
                self.post(self._resolve_ready, _first_error(error))
                return
            if time.monotonic() - started > STEADY_S:
                pause = RESTART_PAUSE_S
            log.error("the network stopped (%r); it is started again in %.1f s", error, pause, exc_info=error)
            self.post(self._went_down)
            del error
            gc.collect()  # a crashed run closes nothing; collecting its sockets frees the listening port
            self._stopping.wait(pause)
            pause = min(pause * 2, RESTART_PAUSE_MAX_S)


def _first_error(error: BaseException | None) -> Exception:
    """The one exception inside groups of one, as nurseries make them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Exception):
        return error
    return NetworkDown(f"the network ended before it was up: {error!r}")
