"""GossipSub for small signed announcements. Runs in trio.

Best effort: the library drops, silently, more than 10 messages a second per topic and forwarder, and a message costs
3 to 8 ms of CPU at every hop. So publish on change, not on a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final

from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from node.transport.guards import SafeTasks, map_libp2p_errors
from protocol.peers import NotOurKey, address_of_peer
from protocol.units import MAX_FRAME_BYTES

log = logging.getLogger("tally.transport")

PROTOCOLS: Final = ("/meshsub/1.1.0", "/meshsub/1.0.0")

HEARTBEAT_S: Final = 1
"""Mesh upkeep interval: what GossipSub's specification says. The library's own default, 120 s, leaves a newcomer
outside the mesh for two minutes."""

MAX_RPC_BYTES: Final = 512 * 1024
"""Largest gossip packet read from a peer: eight of the largest messages, or thousands of control entries."""


class GuardedPubsub(SafeTasks, Pubsub):  # type: ignore[misc]
    """Defect: a message that cannot be decoded, verified or validated raises, and that ends pubsub and the host."""

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:  # noqa: BLE001 - whatever a stranger's message makes the library raise
            log.info("a gossip message forwarded by %s was dropped: %r", msg_forwarder, exc)


class GuardedGossipSub(SafeTasks, GossipSub):  # type: ignore[misc]
    """Its heartbeat is started again should it fail."""


class Gossip:
    """The topics of one node."""

    def __init__(self, host: Any, deliver: Callable[[str, str, bytes], None]) -> None:
        """`deliver(topic, author's peer id, payload)` is called in trio for every message that is not our own."""
        self._own_id = host.get_id()
        self._deliver = deliver
        self._router = GuardedGossipSub(
            PROTOCOLS,
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=HEARTBEAT_S,
            adaptive_gossip_enabled=False,  # it stretches the heartbeat as it sees fit
        )
        self.pubsub = GuardedPubsub(host, self._router, strict_signing=True, max_inbound_rpc_size=MAX_RPC_BYTES)
        self._joined: set[str] = set()

    def close(self) -> None:
        """End the thread that the library starts for its memory of messages seen."""
        self.pubsub.seen_messages.stop()

    async def run(self, stack: AsyncExitStack) -> None:
        """Start the services; they end with `stack`."""
        await stack.enter_async_context(background_trio_service(self.pubsub))
        await stack.enter_async_context(background_trio_service(self._router))
        await self.pubsub.wait_until_ready()

    async def join(self, topic: str, spawn: Callable[..., None]) -> None:
        """Subscribe once; messages are delivered from a task that `spawn(function, *arguments)` starts."""
        if topic in self._joined:
            return
        self._joined.add(topic)
        self.pubsub.set_topic_validator(topic, self._acceptable, is_async_validator=False)
        subscription = await self.pubsub.subscribe(topic)
        spawn(self._listen, topic, subscription)

    async def publish(self, topic: str, payload: bytes) -> None:
        with map_libp2p_errors(f"a message on {topic} was not published; it is safe to publish it again"):
            await self.pubsub.publish(topic, payload)

    @staticmethod
    def _acceptable(_forwarder: Any, msg: Any) -> bool:
        return len(msg.data) <= MAX_FRAME_BYTES

    async def _listen(self, topic: str, subscription: Any) -> None:
        while True:
            msg = await subscription.get()
            if msg.from_id == self._own_id.to_bytes():
                continue
            # The signature was verified against the key this id embeds: the author is who it says.
            author = str(ID(msg.from_id))
            try:
                address_of_peer(author)
            except NotOurKey:
                continue
            self._deliver(topic, author, msg.data)
