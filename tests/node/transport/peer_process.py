"""A peer in a process of its own, to be frozen and killed: `python -m tests.node.transport.peer_process [stock]`.

It prints its peer id and address. `stock`: a plain py-libp2p client without our guards, which reads a peer id and an
address from its arguments, sends frames to the echo protocol and prints what comes back.
"""

from __future__ import annotations

import asyncio
import sys

from node.ports import Stream, StreamEnded
from tests.node.transport.conftest import DEADLINE_S, secret_of

ECHO = "/tally/test/echo/1"
ROUNDS = 20


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive(DEADLINE_S * 6))
    except StreamEnded:
        await stream.close()


async def serve() -> None:
    from node.transport.libp2p import Libp2pTransport

    transport = Libp2pTransport(secret_of(900))
    transport.serve(ECHO, echo)
    await transport.start()
    print(transport.peer_id, transport.addresses[0], flush=True)
    await asyncio.Event().wait()


async def stock_client(peer_text: str, address: str) -> None:
    import trio
    from libp2p import new_host
    from libp2p.crypto.secp256k1 import create_new_key_pair
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from multiaddr import Multiaddr

    host = new_host(key_pair=create_new_key_pair(secret_of(901)))
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        peer_id = ID.from_string(peer_text)
        await host.connect(PeerInfo(peer_id, [Multiaddr(address)]))
        stream = await host.new_stream(peer_id, [ECHO])
        back = b""
        for number in range(ROUNDS):
            payload = bytes([number]) * 30_000
            frame = len(payload).to_bytes(4, "big") + payload
            await stream.write(frame)
            while len(back) < len(frame):
                with trio.fail_after(DEADLINE_S):
                    back += await stream.read(65536)
            assert back == frame, "the echo differs"
            back = b""
        await stream.close()
        print("echoed", ROUNDS, flush=True)
        # The host's own shutdown is not what is tested.
        sys.stdout.flush()
        import os

        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stock"]:
        import trio

        trio.run(stock_client, *sys.argv[2:])
    else:
        asyncio.run(serve())
