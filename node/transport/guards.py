"""The libp2p host of a node, built so that no peer can end it, starve it or make it forget its own address.

Only TCP, Noise and Yamux are spoken: the library would otherwise accept plaintext. Each class here answers defects of
py-libp2p 0.8.1 that were measured; its docstring names them.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.secp256k1 import Secp256k1PrivateKey
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.network import swarm as swarm_module
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection as connection_module
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer import multiselect_communicator as communicator_module
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.transport.tcp import tcp as tcp_module
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from node.ports import TransportError
from node.transport import muxer

log = logging.getLogger("tally.transport")

MAX_CONNECTIONS: Final = 512
"""Live connections, both directions. Each costs two file descriptors at most and ~100 KiB; the usual limit of 1024
descriptors leaves room for the store and the gateway."""

MAX_CONNECTIONS_PER_PEER: Final = 8
"""Connections kept with one peer: at 200 streams each, more than one provider can serve. The library
closes any above."""

UPGRADE_S: Final = 10.0
"""Time a stranger has to finish the Noise and Yamux handshakes, and a stream to name its protocol."""

MAX_NEGOTIATION_BYTES: Final = 64 * 1024
"""Longest line of a protocol negotiation. Ours are under 100 bytes; the list of all protocols a peer speaks may be some
thousand. The library sets no limit, even for strangers who have not authenticated: 10 s of sending is a gigabyte."""

KEEPER_TICK_S: Final = 0.25
"""How often every connection's buffers and streams are looked at. At 80 MB/s, the most the library moves, a flood is
20 MB when it is seen; doubling the time doubles that."""


OVERSLEPT_S: Final = 1.0
"""A tick this late says that our own process was stopped or starved: pongs may lie unread in the sockets, so the time
counts for nobody's death."""


@contextmanager
def map_libp2p_errors(what: str, error: type[TransportError] = TransportError) -> Iterator[None]:
    """Turn whatever the library raises into `error`. `what`: what did not happen, what is safe, what to do next."""
    try:
        yield
    except TransportError:
        raise
    except Exception as exc:
        raise error(f"{what} ({type(exc).__name__}: {exc})") from exc


class SafeManager:
    """A service's task manager whose tasks cannot end the service.

    Defect: an exception in any task (a malformed gossip message is enough) cancels the service and then the host.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run_task(self, function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> None:
        self._inner.run_task(self._once(function), *args, **options)

    def run_daemon_task(self, function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> None:
        self._inner.run_daemon_task(self._for_ever(function), *args, **options)

    @staticmethod
    def _once(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(function)
        async def safely(*args: Any) -> None:
            try:
                await function(*args)
            except Exception as exc:  # noqa: BLE001 - containing everything is the purpose
                log.info("a libp2p task (%s) failed and was contained: %r", getattr(function, "__name__", "?"), exc)

        return safely

    @staticmethod
    def _for_ever(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(function)
        async def safely(*args: Any) -> None:
            while True:
                try:
                    await function(*args)
                except Exception as exc:  # noqa: BLE001 - containing everything is the purpose
                    log.warning("libp2p's %s failed and is started again: %r", getattr(function, "__name__", "?"), exc)
                await trio.sleep(1.0)

        return safely


class SafeTasks:
    """Mix-in for the library's services: their tasks run under a SafeManager."""

    @property
    def manager(self) -> Any:
        return SafeManager(super().manager)  # type: ignore[misc]


class GuardedSwarm(SafeTasks, swarm_module.Swarm):  # type: ignore[misc]
    """The library's connection keeper.

    Defects: an inbound connection's slot is freed only when the host ends (250 in a lifetime); a peer whose dial
    failed is refused for 60 s; a stream handler's exception ends the host, and so do malformed negotiation bytes.
    """

    async def upgrade_inbound_raw_conn(self, raw_conn: Any, maddr: Any) -> Any:
        muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        # The caller holds the slot until this returns, and gives it back when this raises.
        await muxed.event_closed.wait()
        raise SwarmException("the inbound connection is over")

    async def dial_peer(self, peer_id: Any) -> Any:
        try:
            return await super().dial_peer(peer_id)
        except SwarmException:
            self.unblock_peer(peer_id)
            raise

    def set_stream_handler(self, stream_handler: Callable[[Any], Awaitable[None]]) -> None:
        async def contained(stream: Any) -> None:
            try:
                await stream_handler(stream)
            except Exception as exc:  # noqa: BLE001 - containing everything is the purpose
                log.info("a stream of %s failed and is reset; others go on: %r", stream.muxed_conn.peer_id, exc)
                with trio.move_on_after(UPGRADE_S):
                    await stream.reset()

        super().set_stream_handler(contained)


class Keeper:
    """Watches every connection: pings it, ends it when its peer is dead, and ends it when its peer hoards memory.

    Defects: a frozen peer's reads wait for ever; window and stream limits across a connection are not enforced.
    """

    def __init__(self, swarm: GuardedSwarm, ping_every_s: float, dead_after_s: float) -> None:
        self._swarm, self._ping_every_s, self._dead_after_s = swarm, ping_every_s, dead_after_s

    def connections(self) -> list[muxer.GuardedYamux]:
        return [conn.muxed_conn for conns in list(self._swarm.connections.values()) for conn in list(conns)]

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            next_ping = trio.current_time() + self._ping_every_s
            tick_s = min(KEEPER_TICK_S, self._ping_every_s)
            while True:
                before = trio.current_time()
                await trio.sleep(tick_s)
                overslept = trio.current_time() - before - tick_s
                for conn in self.connections():
                    if overslept > OVERSLEPT_S:
                        conn.forgive(overslept)
                    self._judge(conn)
                if trio.current_time() >= next_ping:
                    next_ping = trio.current_time() + self._ping_every_s
                    for conn in self.connections():
                        nursery.start_soon(self._ping, conn)

    def _judge(self, conn: muxer.GuardedYamux) -> None:
        silent = trio.current_time() - conn.last_pong
        if silent > self._dead_after_s:
            conn.condemn(f"has answered no ping for {silent:.1f} s")
        elif len(conn.streams) > muxer.MAX_STREAMS:
            conn.condemn(f"holds {len(conn.streams)} streams, more than {muxer.MAX_STREAMS}")
        elif conn.buffered_bytes > muxer.MAX_BUFFERED_BYTES:
            conn.condemn(f"has {conn.buffered_bytes} bytes unread, more than {muxer.MAX_BUFFERED_BYTES}")

    async def _ping(self, conn: muxer.GuardedYamux) -> None:
        try:
            await conn.ping()
        except Exception as exc:  # noqa: BLE001 - the frame loop of that connection reports what is wrong
            log.debug("no ping to %s: %r", conn.peer_id, exc)


def install() -> None:
    """Process-wide settings of the library. Idempotent."""
    muxer.install()
    swarm_module._HAPPY_EYEBALLS_DELAY = 0.02  # `connect` sits out this delay even when it has one address: 0.25 s
    tcp_module._set_reuse_flags = _set_exclusive_flags
    communicator_module.read_delim = _read_line
    for name in ("libp2p", "libp2p.network.auto_connector", "multiaddr"):
        # It reports every peer that hangs up as a warning or an error.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # One module logs through the root logger, which also configures logging behind the application's back.
    connection_module.logging = logging.getLogger("libp2p.network.connection")


async def _read_line(reader: Any) -> bytes:
    line = await read_varint_prefixed_bytes_limited(reader, MAX_NEGOTIATION_BYTES)
    if not line.endswith(b"\n"):
        raise ParseError("a negotiation line does not end in a line feed")
    return bytes(line[:-1])


def _set_exclusive_flags(sock: Any) -> None:
    # The library sets SO_REUSEPORT, so that a second node on the same port "listens" and gets half of the first one's
    # connections. Without it the second bind fails, as it should; SO_REUSEADDR lets a restart have its port back.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def build_host(node_secret: bytes, announce: Callable[[list[Multiaddr]], list[Multiaddr]]) -> tuple[Any, GuardedSwarm]:
    """A host that does not run yet. `announce`: what to tell others, given the addresses listened on."""
    install()
    private = Secp256k1PrivateKey.new(node_secret)
    key_pair = KeyPair(private, private.get_public_key())
    noise = NoiseTransport(key_pair, noise_privkey=new_x25519_key_pair().private_key)
    muxers = {YAMUX_PROTOCOL_ID: muxer.GuardedYamux}
    upgrader = TransportUpgrader({NOISE_PROTOCOL_ID: noise}, muxers)
    upgrader.muxer_multistream = muxer.GuardedMuxerMultistream(muxers, int(UPGRADE_S))
    peer_id = ID.from_pubkey(key_pair.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, key_pair)
    limits = ConnectionConfig(
        max_connections=MAX_CONNECTIONS,
        min_connections=0,
        low_watermark=0,  # the library dials strangers from its address book below this mark
        high_watermark=MAX_CONNECTIONS,
        max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
        inbound_upgrade_timeout=UPGRADE_S,
        outbound_upgrade_timeout=UPGRADE_S,
        inbound_stream_protocol_negotiation_timeout=UPGRADE_S,
        outbound_stream_protocol_negotiation_timeout=UPGRADE_S,
    )
    swarm = GuardedSwarm(
        peer_id,
        peerstore,
        upgrader,
        transports=[tcp_module.TCP()],
        retry_config=RetryConfig(max_retries=0),  # the caller decides what is tried again, and when
        connection_config=limits,
    )
    host = BasicHost(
        swarm,
        addrs_factory=announce,
        # What strangers say our address is must not become what we tell others.
        disable_identify_address_discovery=True,
    )
    return host, swarm
