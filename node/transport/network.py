"""The libp2p side of the transport: everything here runs in the trio thread.

It is made anew for each run of that thread, so that a crash leaves nothing half alive behind.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import trio
from libp2p.abc import INotifee
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr

from node.ports import DialFailed, PeerAddress, TransportError
from node.transport import guards, muxer
from node.transport.directory import Directory
from node.transport.gossip import Gossip
from node.transport.streams import Libp2pStream
from node.transport.trio_thread import TrioThread
from protocol.peers import NotOurKey, address_of_peer

log = logging.getLogger("tally.transport")

DIAL_STAGGER_S: Final = 0.25
"""Head start of one address of a peer over the next (RFC 8305's connection attempt delay)."""

DYING_S: Final = 0.25
"""Time between a write that fails and the end of file that tells why, on one and the same socket."""

BOOTSTRAP_DIAL_S: Final = 10.0
BOOTSTRAP_PAUSES_S: Final = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Pauses between dials of a bootstrap peer that does not answer; the last one repeats."""

ADDRESS_TTL_S: Final = 3600
"""How long the library's address book keeps an address that worked."""


class _Meet(INotifee):  # type: ignore[misc]
    """Tells of each new connection."""

    def __init__(self, met: Callable[[Any], None]) -> None:
        self._met = met

    async def connected(self, _network: Any, conn: Any) -> None:
        self._met(conn.muxed_conn.peer_id)

    async def disconnected(self, network: Any, conn: Any) -> None: ...
    async def opened_stream(self, network: Any, stream: Any) -> None: ...
    async def closed_stream(self, network: Any, stream: Any) -> None: ...
    async def listen(self, network: Any, multiaddr: Any) -> None: ...
    async def listen_close(self, network: Any, multiaddr: Any) -> None: ...


class Network:
    """One run of the host with gossip, directory, keeper and bootstrap."""

    def __init__(
        self,
        thread: TrioThread,
        node_secret: bytes,
        announce: Sequence[str],
        ping_every_s: float,
        dead_after_s: float,
        on_stream: Callable[[str, Libp2pStream], None],
        on_gossip: Callable[[str, str, bytes], None],
    ) -> None:
        """`on_stream(protocol, stream)` and `on_gossip(topic, author, payload)` are called in asyncio."""
        self._thread = thread
        self._announce = tuple(announce)
        self._on_stream = on_stream
        self.host, self.swarm = guards.build_host(node_secret, self._addresses_to_tell)
        self.keeper = guards.Keeper(self.swarm, ping_every_s, dead_after_s)
        self.gossip = Gossip(self.host, lambda *message: thread.post(on_gossip, *message))
        self.directory = Directory(self.host)
        self.streams: set[Libp2pStream] = set()
        self._dial_locks: dict[Any, trio.Lock] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """What others may dial, without the /p2p part."""
        return tuple(str(a) for a in self._addresses_to_tell(self.host.get_transport_addrs()))

    def _addresses_to_tell(self, listening: list[Multiaddr]) -> list[Multiaddr]:
        if self._announce:
            return [Multiaddr(address) for address in self._announce]
        return [_concrete(address) for address in listening]

    async def run(self, listen_address: str, ready: Callable[[Network], None]) -> None:
        """Serve until cancelled. Raises: TransportError when `listen_address` cannot be bound."""
        async with AsyncExitStack() as stack:
            stack.callback(self.gossip.close)
            await stack.enter_async_context(self.host.run(listen_addrs=[Multiaddr(listen_address)]))
            if not self.host.get_transport_addrs():
                raise TransportError(
                    f"cannot listen on {listen_address}: it is in use, or not an address of this machine; nothing was "
                    "started; choose another port or stop the process that has it"
                )
            await self.gossip.run(stack)
            await self.directory.run(stack)
            async with trio.open_nursery() as nursery:
                self.swarm.register_notifee(_Meet(lambda peer_id: self._thread.spawn(self.directory.meet, peer_id)))
                nursery.start_soon(self.keeper.run)
                ready(self)
                try:
                    await trio.sleep_forever()
                finally:
                    # Frozen peers would hold up the end of this run: their sockets go first.
                    for conn in self.keeper.connections():
                        with trio.CancelScope(shield=True):
                            await conn._drop_socket()

    async def farewell(self) -> None:
        """Close every connection and say so."""
        async with trio.open_nursery() as nursery:
            for conn in self.keeper.connections():
                nursery.start_soon(conn.close)

    # ------------------------------------------------------------------------------------------------------- inbound

    def serve(self, protocol_id: str) -> None:
        async def inbound(net_stream: Any) -> None:
            try:
                address_of_peer(str(net_stream.muxed_conn.peer_id))
            except NotOurKey as exc:
                log.info("a stream was refused: %s", exc)
                await net_stream.reset()
                return
            stream = Libp2pStream(self._thread, net_stream, self.streams)
            self._thread.post(self._on_stream, protocol_id, stream)
            await stream.t_pump()

        self.host.set_stream_handler(protocol_id, inbound)

    async def subscribe(self, topic: str) -> None:
        await self.gossip.join(topic, self._thread.spawn)

    # ------------------------------------------------------------------------------------------------------ outbound

    async def open(self, peer: PeerAddress, protocol_id: str) -> Libp2pStream:
        """Raises: DialFailed. The caller's deadline ends it."""
        what = f"no stream to {peer.peer_id}; nothing was sent; try again later or another peer"
        with guards.map_libp2p_errors(what, DialFailed):
            address_of_peer(peer.peer_id)
            peer_id = ID.from_string(peer.peer_id)
            if peer_id == self.host.get_id():
                raise DialFailed("a node does not dial itself; nothing was sent")
            conn, fresh = await self._connection(peer_id, peer.addresses)
            try:
                return await self._open_on(conn, protocol_id)
            except (BaseLibp2pError, OSError, EOFError):
                if fresh or not await _is_dying(conn):
                    raise
            # The peer was restarted, say, and this was the first to notice: once more on a new connection.
            conn, _ = await self._connection(peer_id, peer.addresses)
            return await self._open_on(conn, protocol_id)

    async def _open_on(self, conn: Any, protocol_id: str) -> Libp2pStream:
        net_stream = await conn.new_stream()
        done = False
        try:
            negotiator = MultiselectCommunicator(net_stream)
            with trio.fail_after(guards.UPGRADE_S):
                await self.host.multiselect_client.handshake(negotiator)
                await self.host.multiselect_client.try_select(negotiator, protocol_id)
            done = True
        except ProtocolNotSupportedError as exc:
            peer_id = net_stream.muxed_conn.peer_id
            raise DialFailed(f"peer {peer_id} does not speak {protocol_id}; nothing was sent; ask another") from exc
        finally:
            if not done:
                self._thread.spawn(net_stream.reset)
        net_stream.set_protocol(protocol_id)
        stream = Libp2pStream(self._thread, net_stream, self.streams)
        self._thread.spawn(stream.t_pump)
        return stream

    def _usable(self, peer_id: Any) -> tuple[list[Any], Any | None]:
        """Live connections to a peer, and one of them with a place for another stream."""
        live = [
            conn
            for conn in self.swarm.connections.get(peer_id, [])
            if not conn.is_closed and not conn.muxed_conn.event_shutting_down.is_set() and not conn.muxed_conn.condemned
        ]
        free = [conn for conn in live if conn.muxed_conn.outbound_streams < muxer.MAX_OUTBOUND_STREAMS]
        return live, free[0] if free else None

    async def _connection(self, peer_id: Any, addresses: Sequence[str]) -> tuple[Any, bool]:
        """A connection with a place for another stream, and whether it was made now."""
        _, conn = self._usable(peer_id)
        if conn is not None:
            return conn, False
        lock = self._dial_locks.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                live, conn = self._usable(peer_id)
                if conn is not None:
                    return conn, False
                if len(live) >= guards.MAX_CONNECTIONS_PER_PEER:
                    raise DialFailed(
                        f"{len(live)} connections to {peer_id} carry {muxer.MAX_OUTBOUND_STREAMS} streams each; "
                        "nothing was sent; close some streams or ask another peer"
                    )
                return await self._dial(peer_id, addresses), True
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dial_locks.pop(peer_id, None)

    async def _dial(self, peer_id: Any, addresses: Sequence[str]) -> Any:
        """Try every address, each a little after the one before; the first connection wins.

        The library tries one address per kind of transport, and remembers a failure for 60 s.
        """
        won: list[Any] = []
        failures: list[str] = []

        async def attempt(address: str, over: trio.Event) -> None:
            try:
                conn = await self.swarm.dial_addr(Multiaddr(address), peer_id)
            except Exception as exc:  # noqa: BLE001 - the reason is told when no address answers
                failures.append(f"{address}: {exc}")
            else:
                won.append(conn)
                self.swarm.peerstore.add_addrs(peer_id, [Multiaddr(address)], ADDRESS_TTL_S)
                nursery.cancel_scope.cancel()
            finally:
                over.set()

        dialable = [address for address in addresses if "/tcp/" in address]
        async with trio.open_nursery() as nursery:
            for address in dialable:
                over = trio.Event()
                nursery.start_soon(attempt, address, over)
                with trio.move_on_after(DIAL_STAGGER_S):
                    await over.wait()
        self.swarm.unblock_peer(peer_id)
        for extra in won[1:]:
            await extra.close()
        if not won:
            tried = "; ".join(failures) or "it names no TCP address"
            raise DialFailed(f"no connection to {peer_id} ({tried}); nothing was sent; try again later or another peer")
        return won[0]

    async def keep_bootstrapped(self, address: str) -> None:
        """Stay connected to a bootstrap peer. `address`: a multiaddr with its /p2p part."""
        where, _, peer_text = address.partition("/p2p/")
        peer_id = ID.from_string(peer_text)
        failures = 0
        while True:
            live, _ = self._usable(peer_id)
            if not live:
                try:
                    with trio.fail_after(BOOTSTRAP_DIAL_S):
                        await self._connection(peer_id, (where,))
                    failures = 0
                except (DialFailed, trio.TooSlowError) as exc:
                    failures += 1
                    log.info("bootstrap peer %s does not answer (attempt %d): %s", address, failures, exc)
            await trio.sleep(BOOTSTRAP_PAUSES_S[min(failures, len(BOOTSTRAP_PAUSES_S) - 1)])


async def _is_dying(conn: Any) -> bool:
    """Whether a connection on which something failed is itself going; one that is not carries others' streams."""
    with trio.move_on_after(DYING_S):
        await conn.muxed_conn.event_shutting_down.wait()
    return bool(conn.muxed_conn.event_shutting_down.is_set())


def _concrete(address: Multiaddr) -> Multiaddr:
    """An address others can dial in place of 0.0.0.0 or ::, which only says "every interface"."""
    text = str(address)
    for anywhere, family, probe in (
        ("/ip4/0.0.0.0/", socket.AF_INET, "192.0.2.1"),
        ("/ip6/::/", socket.AF_INET6, "2001:db8::1"),
    ):
        if text.startswith(anywhere):
            loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
            try:
                # Connecting a datagram socket sends nothing; it asks the kernel which of our addresses it would use.
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect((probe, 9))
                    host = str(sock.getsockname()[0])
            except OSError:
                host = loopback
            return Multiaddr(anywhere.replace("0.0.0.0", host).replace("::", host) + text[len(anywhere) :])
    return address
