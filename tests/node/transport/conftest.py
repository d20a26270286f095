"""The two transports under one roof: every contract test runs on the in-memory twin and on libp2p."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from node.ports import PeerAddress, Stream, Transport
from node.transport.memory import MemoryNetwork, MemoryTransport

DEADLINE_S = 10.0


def secret_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def where(transport: Transport) -> PeerAddress:
    return PeerAddress(transport.peer_id, transport.addresses)


async def eventually(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    """Wait until `condition()` is true; fails after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not true after {deadline_s} s: {condition}"
        await asyncio.sleep(0.01)


class Net:
    """Makes transports of one kind and stops them all at the end of the test."""

    def __init__(self) -> None:
        self.made: list[Transport] = []
        self._next_secret = 1

    def build(self, secret: bytes, address: str | None, **options: Any) -> Transport:
        raise NotImplementedError

    async def node(self, secret: bytes | None = None, address: str | None = None, **options: Any) -> Transport:
        """A started transport. `address`: one of another transport's addresses, to listen there again."""
        if secret is None:
            secret, self._next_secret = secret_of(self._next_secret), self._next_secret + 1
        transport = self.build(secret, address, **options)
        self.made.append(transport)
        await transport.start()
        return transport

    async def pair(self, protocol_id: str, handler: Callable[[Stream], Any]) -> tuple[Transport, Transport]:
        """A client, and a server that serves `handler`."""
        client, server = await self.node(), await self.node()
        server.serve(protocol_id, handler)
        return client, server

    async def close(self) -> None:
        await asyncio.gather(*(transport.stop() for transport in self.made))


class MemoryNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork()

    def build(self, secret: bytes, address: str | None, **options: Any) -> Transport:
        return MemoryTransport(self.network, secret, address)


class Libp2pNet(Net):
    def build(self, secret: bytes, address: str | None, **options: Any) -> Transport:
        from node.transport.libp2p import Libp2pTransport

        port = 0 if address is None else int(address.rpartition("/")[2])
        return Libp2pTransport(secret, port=port, **options)


KINDS: dict[str, Callable[[], Net]] = {"memory": MemoryNet, "libp2p": Libp2pNet}


@pytest.fixture(params=sorted(KINDS))
async def net(request: pytest.FixtureRequest) -> AsyncIterator[Net]:
    made = KINDS[request.param]()
    yield made
    await made.close()


@pytest.fixture
async def real() -> AsyncIterator[Libp2pNet]:
    """Transports over libp2p only."""
    made = Libp2pNet()
    yield made
    await made.close()


@pytest.fixture
async def pair(real: Libp2pNet) -> tuple[Transport, Transport]:
    """A libp2p client, and a server that echoes on ECHO and holds its streams, unread, on HOLD."""
    from tests.node.transport.helpers import HOLD, hold
    from tests.node.transport.peer_process import ECHO, echo

    client, server = await real.pair(ECHO, echo)
    server.serve(HOLD, hold)
    return client, server
