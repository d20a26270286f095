"""The gateway's life: listen, serve, stop without leaving a job running."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from errno import EACCES, EADDRINUSE
from typing import Final

from aiohttp import web

from node.gateway.auth import ApiKeys
from node.gateway.errors import GatewayError
from node.gateway.guards import Doorkeeper, Doors
from node.gateway.limits import Limits
from node.gateway.openai_api import OpenAIApi
from node.ports import Clock, Entropy, Marketplace
from protocol.units import Wei

_IDLE_S: Final = 75.0
"""How long an idle connection is kept. Unit: seconds. SDKs keep connections for seconds to minutes; each idle one
counts towards the connection limit."""


class GatewayServer:
    """An OpenAI-compatible HTTP server over a marketplace.

    `port` 0: chosen by the system. `allowed_hosts`: names besides localhost by which clients may address it.
    `allowed_origins`: web origins whose pages may use it (none by default), e.g. http://localhost:3000.
    `max_price`: most wei that one request may cost, whatever it asks for itself; None leaves it to the marketplace.
    """

    def __init__(
        self,
        marketplace: Marketplace,
        *,
        host: str = "127.0.0.1",
        port: int = 8411,
        api_keys: ApiKeys,
        clock: Clock,
        entropy: Entropy,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        limits: Limits | None = None,
        max_price: Wei | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._clock = clock
        self._limits = limits or Limits()
        doors = Doors({host, *allowed_hosts} - {"0.0.0.0", "::", ""}, allowed_origins)
        self._api = OpenAIApi(
            marketplace,
            keys=api_keys,
            doors=doors,
            clock=clock,
            entropy=entropy,
            limits=self._limits,
            max_price=max_price,
        )
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._doorkeeper: Doorkeeper | None = None

    async def start(self) -> int:
        """Listen; returns the port. Raises: GatewayError when the address cannot be had."""
        runner = web.AppRunner(
            self._api.application(),
            # Without it a handler whose client left runs on, and its tokens are paid for.
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=_IDLE_S,
            lingering_time=1.0,
            shutdown_timeout=1.0,
            auto_decompress=False,
            max_line_size=self._limits.header_line_bytes,
            max_field_size=self._limits.header_line_bytes,
        )
        await runner.setup()
        assert runner.server is not None
        doorkeeper = Doorkeeper(runner.server, self._clock, self._limits)
        self._api.arrived = doorkeeper.arrived
        try:
            listener = await asyncio.get_running_loop().create_server(
                doorkeeper.protocol, self._host, self._port, backlog=128
            )
        except OSError as exc:
            await runner.cleanup()
            raise GatewayError(self._cannot_listen(exc)) from exc
        self._runner, self._doorkeeper, self._listener = runner, doorkeeper, listener
        return int(listener.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Refuse new jobs, let running ones finish for a few seconds, cancel the rest. Idempotent."""
        if self._runner is None or self._listener is None or self._doorkeeper is None:
            return
        runner, self._runner = self._runner, None
        self._listener.close()
        await self._api.drain()
        self._doorkeeper.close()
        await runner.cleanup()

    def _cannot_listen(self, exc: OSError) -> str:
        where = f"the gateway cannot listen on {self._host} port {self._port}"
        if exc.errno == EADDRINUSE:
            return f"{where}: the port is in use. Nothing was started. Stop the other program or choose another port."
        if exc.errno == EACCES:
            return f"{where}: permission denied. Nothing was started. Choose a port of 1024 or above."
        return f"{where} ({exc.strerror or exc}). Nothing was started. Choose an address of this machine."
