"""The in-memory twin of the libp2p transport: same promises, one asyncio loop, and faults that can be ordered.

What it shares with the network: bounded buffers (a sender waits for a slow reader), peers authenticated by key, a
killed peer that reads as a plain end of file, a silent peer whose streams end after `dead_after_s`, a port that is in
use. What it leaves out: latency, loss, GossipSub's mesh (a message reaches every subscriber that is not cut off).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Final

from node.ports import (
    DialFailed,
    GossipHandler,
    PeerAddress,
    StreamEnded,
    StreamHandler,
    TransportError,
)
from node.transport.handlers import HandlerTasks
from node.transport.inbox import Inbox
from node.transport.subscriptions import Subscriptions
from protocol.errors import FrameTooLarge
from protocol.framing import encode_frame
from protocol.peers import address_of_peer, peer_id_of_secret
from protocol.units import MAX_FRAME_BYTES, Address

WINDOW_BYTES: Final = 256 * 1024
"""Bytes that may be under way to a reader who reads nothing, beside its inbox: Yamux's initial window."""

SEND_TIMEOUT_S: Final = 30.0
"""Longest wait of a sender for a reader who reads nothing. As in the libp2p transport."""

PROVIDERS_PER_KEY: Final = 20
"""Providers kept for one DHT key, first come: as Kademlia does, so nobody comes to rely on more."""


class MemoryNetwork:
    """The wires between the transports of one test, and the tool that cuts them."""

    def __init__(self, dead_after_s: float = 0.0) -> None:
        """`dead_after_s`: how long a silent peer's streams last; the libp2p transport takes 15 s."""
        self.dead_after_s = dead_after_s
        self._by_address: dict[str, MemoryTransport] = {}
        self._streams: set[MemoryStream] = set()
        self._dark: set[frozenset[str]] = set()
        self._frozen: set[str] = set()
        self._providers: defaultdict[bytes, dict[str, PeerAddress]] = defaultdict(dict)

    # ------------------------------------------------------------------------------------------------------ faults

    async def kill(self, peer_id: str) -> None:
        """End a peer as kill -9 would: whoever talked to it reads an end of file. Its address is free again."""
        for transport in [t for t in self._by_address.values() if t.peer_id == peer_id]:
            await transport.stop()

    def partition(self, peer_a: str, peer_b: str) -> None:
        """Let nothing pass between two peers. Streams end after `dead_after_s` unless `heal` comes first."""
        self._dark.add(frozenset((peer_a, peer_b)))
        self._darken()

    def freeze(self, peer_id: str) -> None:
        """Let nothing pass to or from a peer, as if it had been stopped with SIGSTOP."""
        self._frozen.add(peer_id)
        self._darken()

    def heal(self) -> None:
        """End every partition and freeze; streams that still live get what was on its way."""
        self._dark.clear()
        self._frozen.clear()
        for stream in list(self._streams):
            stream.flush()

    def reachable(self, peer_a: str, peer_b: str) -> bool:
        cut = frozenset((peer_a, peer_b)) in self._dark
        return not cut and peer_a not in self._frozen and peer_b not in self._frozen

    def _darken(self) -> None:
        for stream in list(self._streams):
            if not self.reachable(stream.own_id, stream.peer_id):
                asyncio.get_running_loop().call_later(self.dead_after_s, self._bury, stream)

    def _bury(self, stream: MemoryStream) -> None:
        if not self.reachable(stream.own_id, stream.peer_id):
            stream.fail(f"peer {stream.peer_id} has been silent for {self.dead_after_s:g} s and is taken for dead")

    # ------------------------------------------------------------------------------- used by the transports and streams

    def attach(self, transport: MemoryTransport, address: str) -> None:
        """Raises: TransportError when the address is taken."""
        if address in self._by_address:
            raise TransportError(
                f"cannot listen on {address}: it is in use; nothing was started; "
                "choose another address or stop its user"
            )
        self._by_address[address] = transport

    def detach(self, transport: MemoryTransport, address: str) -> None:
        if self._by_address.get(address) is transport:
            del self._by_address[address]
        for stream in [s for s in self._streams if transport in (s.owner, s.far_owner)]:
            stream.end_of_file()

    def listener(self, address: str) -> MemoryTransport | None:
        return self._by_address.get(address)

    def join(self, *streams: MemoryStream) -> None:
        self._streams.update(streams)

    def leave(self, stream: MemoryStream) -> None:
        self._streams.discard(stream)

    def peers_of(self, transport: MemoryTransport) -> tuple[str, ...]:
        alive = {t.peer_id for t in self._by_address.values() if self.reachable(t.peer_id, transport.peer_id)}
        return tuple(sorted(transport.known & alive))

    def spread(self, author: MemoryTransport, topic: str, payload: bytes) -> None:
        for transport in list(self._by_address.values()):
            if transport is not author and self.reachable(author.peer_id, transport.peer_id):
                transport.subscriptions.deliver(topic, author.peer_id, payload)

    def add_provider(self, key: bytes, peer: PeerAddress) -> None:
        providers = self._providers[key]
        if peer.peer_id in providers or len(providers) < PROVIDERS_PER_KEY:
            providers[peer.peer_id] = peer

    def providers(self, key: bytes, limit: int) -> list[PeerAddress]:
        return list(self._providers[key].values())[:limit]


class MemoryStream:
    """One end of a stream between two transports."""

    def __init__(self, network: MemoryNetwork, owner: MemoryTransport, far_owner: MemoryTransport) -> None:
        self._network = network
        self.owner, self.far_owner = owner, far_owner
        self.own_id, self._peer_id = owner.peer_id, far_owner.peer_id
        self._far: MemoryStream | None = None
        self._room = asyncio.Event()
        self._inbox = Inbox(on_room=self._drained)
        self._under_way: list[bytes] = []  # what the far end sent and this end's inbox has no place for
        self._let_go = False  # this end was closed or reset by its owner

    @classmethod
    def pair(
        cls, network: MemoryNetwork, dialler: MemoryTransport, listener: MemoryTransport
    ) -> tuple[MemoryStream, MemoryStream]:
        near, far = cls(network, dialler, listener), cls(network, listener, dialler)
        near._far, far._far = far, near
        network.join(near, far)
        return near, far

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def peer_address(self) -> Address:
        return address_of_peer(self._peer_id)

    async def send(self, *frames: bytes) -> None:
        await self.send_raw(b"".join([encode_frame(frame) for frame in frames]))

    async def send_raw(self, data: bytes) -> None:
        """Bytes as they are, for tests that play a peer who keeps no rules. Raises: StreamEnded."""
        far = self._far_end()
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                while sum(map(len, far._under_way)) >= WINDOW_BYTES and not self._inbox.ended:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError as exc:
            await self.reset()
            raise StreamEnded(
                f"peer {self._peer_id} read nothing for {SEND_TIMEOUT_S:g} s; the stream is reset"
            ) from exc
        if self._let_go or far._let_go or far._inbox.ended:
            raise StreamEnded(f"the stream to {self._peer_id} is over; the frames were not sent; open a new one")
        far._under_way.append(data)
        far.flush()
        await asyncio.sleep(0)  # a real write lets the reader run; without this a busy sender would starve it

    async def receive(self, timeout_s: float | None = None) -> bytes:
        try:
            return await self._inbox.receive(timeout_s)
        except TimeoutError as exc:
            await self.reset()
            raise StreamEnded(f"peer {self._peer_id} sent nothing for {timeout_s:g} s; the stream is reset") from exc
        except FrameTooLarge:
            await self.reset()
            raise

    async def close(self) -> None:
        if not self._let_go:
            self._release("the stream was closed here")
            self._far_end().end_of_file()

    async def reset(self) -> None:
        if not self._let_go:
            self._release("the stream was reset here")
            self._far_end().fail(f"peer {self.own_id} reset the stream")

    # ------------------------------------------------------------------------------------------ called by the other end

    def flush(self) -> None:
        """Move what is under way into the inbox, as far as there is room and the wire is whole."""
        if not self._network.reachable(self.own_id, self._peer_id):
            return
        while self._under_way and not self._inbox.full:
            self._inbox.feed(self._under_way.pop(0))
        self._far_end()._room.set()

    def end_of_file(self) -> None:
        """The far end is gone or sends no more: what it had sent can still be received."""
        while self._under_way:
            self._inbox.feed(self._under_way.pop(0))
        self._end(f"peer {self._peer_id} ended the stream (end of file)")

    def fail(self, reason: str) -> None:
        """The stream is broken: what was under way is lost, as it is on a real network."""
        self._under_way.clear()
        self._end(reason)

    # ----------------------------------------------------------------------------------------------------------- own

    def _far_end(self) -> MemoryStream:
        assert self._far is not None, "streams are made in pairs"
        return self._far

    def _release(self, reason: str) -> None:
        self._let_go = True
        self._under_way.clear()
        self._end(reason)
        self._inbox.discard()

    def _end(self, reason: str) -> None:
        self._inbox.end(StreamEnded(reason))
        self._room.set()
        self._far_end()._room.set()
        self._network.leave(self)

    def _drained(self) -> None:
        self.flush()


class MemoryTransport:
    """`node.ports.Transport` within one process and one asyncio loop."""

    def __init__(self, network: MemoryNetwork, node_secret: bytes, address: str | None = None) -> None:
        """`node_secret`: 32 bytes. `address`: where to listen; by default one that follows from the key."""
        self._network = network
        self._peer_id = peer_id_of_secret(node_secret)
        self._address = address if address is not None else f"/memory/{self._peer_id}"
        self._handlers = HandlerTasks()
        self.subscriptions = Subscriptions()
        self._wanted: list[tuple[str, GossipHandler]] = []
        self._running = False
        self.known: set[str] = set()  # peers a connection was made with and not yet lost

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self._address,) if self._running else ()

    async def start(self) -> None:
        if self._running:
            return
        self._network.attach(self, self._address)
        self._running = True
        for topic, handler in self._wanted:
            self.subscriptions.add(topic, handler)

    async def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        self._network.detach(self, self._address)
        self.known.clear()
        await self._handlers.close()
        await self.subscriptions.close()

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self._handlers.serve(protocol_id, handler)

    async def open(self, peer: PeerAddress, protocol_id: str, timeout_s: float) -> MemoryStream:
        self._check_running(DialFailed)
        if peer.peer_id == self._peer_id:
            raise DialFailed("a node does not dial itself; nothing was sent")
        for address in peer.addresses:
            listener = self._network.listener(address)
            if listener is None or listener.peer_id != peer.peer_id:
                continue
            if not self._network.reachable(self._peer_id, peer.peer_id):
                continue
            if protocol_id not in listener._handlers.protocols:
                raise DialFailed(
                    f"peer {peer.peer_id} does not speak {protocol_id}; nothing was sent; try another peer"
                )
            near, far = MemoryStream.pair(self._network, self, listener)
            self.known.add(listener.peer_id)
            listener.known.add(self._peer_id)
            listener._handlers.start(protocol_id, far)
            return near
        raise DialFailed(
            f"no connection to {peer.peer_id} at {', '.join(peer.addresses) or 'no address'} within {timeout_s:g} s; "
            "nothing was sent; try again later or another peer"
        )

    async def publish(self, topic: str, payload: bytes) -> None:
        self._check_running(TransportError)
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes is above the limit of {MAX_FRAME_BYTES}")
        self._network.spread(self, topic, payload)

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        self._wanted.append((topic, handler))
        if self._running:
            self.subscriptions.add(topic, handler)

    async def provide(self, key: bytes) -> None:
        if self._running:
            self._network.add_provider(key, PeerAddress(self._peer_id, self.addresses))

    async def find_providers(self, key: bytes, limit: int) -> list[PeerAddress]:
        return self._network.providers(key, limit) if self._running else []

    def connected(self) -> tuple[str, ...]:
        return self._network.peers_of(self) if self._running else ()

    def _check_running(self, error: type[TransportError]) -> None:
        if not self._running:
            raise error("the transport is not running; nothing was sent; call start() first")
