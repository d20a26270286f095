"""`python -m tests.node.cli.fake_node provider run ...` (or gateway run): the command line over nodes without a chain.

TALLY_TEST_HANG: `start` never serves, `drain` never finishes stopping, `busy` blocks the event loop while stopping.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import node.app
from node.cli.main import cli
from node.config import NodeConfig
from node.gateway.control import ControlServer
from tests.node.cli.sticks import NODE, WALLET


async def status(_: dict[str, Any]) -> dict[str, Any]:
    return {"role": "provider", "model": "tiny", "vouched_wei": "1500000000000000000", "channels": []}


@asynccontextmanager
async def fake_app(config: NodeConfig) -> AsyncIterator[Any]:
    hang = os.environ.get("TALLY_TEST_HANG", "")
    print("starting", flush=True)
    if hang == "start":
        try:
            await asyncio.sleep(1000)
        finally:
            (config.home / "cleaned").touch()
    control = ControlServer(config.home / "control.sock", {"status": status})
    await control.start()
    transport = SimpleNamespace(peer_id="16Uiu2HAmTest", addresses=("/ip4/127.0.0.1/tcp/4001",))
    provider = SimpleNamespace(status=lambda: status({}))
    signers = {"wallet": WALLET, "node_key": NODE}
    try:
        yield SimpleNamespace(provider=provider, transport=transport, home=config.home, **signers)
    finally:
        print("draining", flush=True)
        if hang == "drain":
            await asyncio.sleep(1000)
        if hang == "busy":
            for _ in range(10_000):
                time.sleep(0.01)  # noqa: ASYNC251 - a loop that does not turn is what is tested
        await control.stop()
        (config.home / "drained").touch()


@asynccontextmanager
async def fake_gateway(config: NodeConfig) -> AsyncIterator[Any]:
    async with fake_app(config) as app:
        client = SimpleNamespace(wallet=app.wallet, session=app.node_key, transport=app.transport)
        yield SimpleNamespace(client=client, url=f"http://127.0.0.1:{config.client.gateway_port}/v1")


if __name__ == "__main__":
    node.app.provider_app = fake_app  # type: ignore[assignment]
    node.app.gateway_app = fake_gateway  # type: ignore[assignment]
    cli(prog_name="tally")
