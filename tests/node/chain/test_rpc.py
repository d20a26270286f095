"""The RPC's moods: down, hanging, rate limited, talking nonsense, on the wrong chain, restarted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from devnet.anvil import Anvil, AnvilOptions
from devnet.deploy import deploy
from node.chain import ChainOptions, Deployment, RpcLimits, Web3Chain
from node.chain.errors import NoContract, WrongChain
from node.chain.rpc import Refusal, Rpc, RpcRefused
from node.ports import ChainError, ChainUnavailable
from protocol.units import ZERO_ADDRESS, Address, Wei
from tests.node.chain.helpers import session, watching
from tests.twins.chain_lab import AnvilLab
from tests.twins.wall_clock import WallClock

GOOD = (200, json.dumps({"jsonrpc": "2.0", "id": 0, "result": "0x2a"}))
LIMITS = RpcLimits(timeout_s=5, attempts=3, backoff_s=0.01)


class CountingClock(WallClock):
    """Sleeps no time and says how long it would have."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@asynccontextmanager
async def answering(answers: Sequence[tuple[int, str]]) -> AsyncIterator[tuple[Rpc, CountingClock, list[str]]]:
    """An Rpc whose node gives these (HTTP status, body) in turn, the last for ever; and the methods it was asked."""
    asked: list[str] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(line.split(b":")[1]) for line in head.lower().splitlines() if b"content-length" in line
                )
                asked.append(json.loads(await reader.readexactly(length))["method"])
                status, body = left.pop(0) if len(left) > 1 else left[0]
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    clock = CountingClock()
    rpc = Rpc(f"http://user:secret@127.0.0.1:{port}/v2/apikey", clock, LIMITS)
    await rpc.start()
    try:
        yield rpc, clock, asked
    finally:
        await rpc.stop()
        server.close()


def error(code: int, message: str) -> tuple[int, str]:
    return 200, json.dumps({"jsonrpc": "2.0", "id": 0, "error": {"code": code, "message": message}})


@pytest.mark.parametrize(
    "mood",
    [
        (429, "slow down"),
        (503, "<html>busy</html>"),
        (200, "<html>captive portal</html>"),
        (200, "{}"),
        error(-32005, "daily request count exceeded, request rate limited"),
        error(-32000, "header not found"),
        error(-32603, "Internal error"),
    ],
)
async def test_a_moody_node_is_asked_again_with_growing_pauses(mood: tuple[int, str]) -> None:
    async with answering([mood, mood, GOOD]) as (rpc, clock, asked):
        assert await rpc.read(lambda w3: w3.eth.block_number) == 42
        assert clock.slept == [0.01, 0.02]
        assert asked == ["eth_blockNumber"] * 3
    async with answering([mood]) as (rpc, _, asked):
        with pytest.raises(ChainUnavailable, match="try again later") as gone:
            await rpc.read(lambda w3: w3.eth.block_number)
        assert len(asked) == LIMITS.attempts
        assert "secret" not in str(gone.value) and "apikey" not in str(gone.value)


async def test_a_refusal_is_not_asked_again() -> None:
    async with answering([(401, "who are you?")]) as (rpc, clock, asked):
        with pytest.raises(ChainError, match="HTTP 401") as refused:
            await rpc.read(lambda w3: w3.eth.block_number)
        assert not isinstance(refused.value, ChainUnavailable)
        assert (clock.slept, len(asked)) == ([], 1)
    async with answering([error(-32601, "the method does not exist")]) as (rpc, _, asked):
        with pytest.raises(RpcRefused, match="does not exist"):
            await rpc.read(lambda w3: w3.eth.block_number)
        assert len(asked) == 1


async def test_nobody_listening_is_unavailable_and_so_is_a_connection_not_started() -> None:
    rpc = Rpc("http://127.0.0.1:1", CountingClock(), LIMITS)
    with pytest.raises(ChainUnavailable, match="not started"):
        await rpc.read(lambda w3: w3.eth.block_number)
    await rpc.start()
    with pytest.raises(ChainUnavailable, match="http://127.0.0.1:1 "):
        await rpc.read(lambda w3: w3.eth.block_number)
    await rpc.stop()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("already known", Refusal.KNOWN),
        ("AlreadyKnown", Refusal.KNOWN),
        ("transaction already imported", Refusal.KNOWN),
        ("nonce too low: next nonce 5, tx nonce 4", Refusal.NONCE_USED),
        ("OldNonce", Refusal.NONCE_USED),
        ("replacement transaction underpriced", Refusal.UNDERPRICED),
        ("max fee per gas less than block base fee", Refusal.UNDERPRICED),
        ("Insufficient funds for gas * price + value", Refusal.NO_COIN),
        ("BlockOutOfRangeError: block height is 3 but requested was 153", Refusal.UNKNOWN_BLOCK),
        ("429 Too Many Requests", Refusal.BUSY),
        ("something else entirely", Refusal.OTHER),
    ],
)
def test_what_nodes_say_is_understood(said: str, meant: Refusal) -> None:
    assert Refusal.of(said) is meant


async def test_the_wrong_chain_or_no_contracts_are_named_at_the_start(anvil_lab: AnvilLab) -> None:
    right, clock, url = anvil_lab.deployment, WallClock(), anvil_lab.anvil.rpc_url
    with pytest.raises(WrongChain, match=r"on chain 7, but the RPC at http://127\.0\.0\.1:\d+ serves chain 31337"):
        await Web3Chain(url, replace(right, chain_id=7), None, clock=clock).start()
    empty = replace(right, registry=Address(b"\x42" * 20))
    with pytest.raises(NoContract, match="no contract Registry at 0x4242.* on chain 31337"):
        await Web3Chain(url, empty, None, clock=clock).start()
    node = Web3Chain(url, right, None, clock=clock)
    with pytest.raises(ChainUnavailable):
        await node.head()
    await node.start()
    await node.start()
    await node.stop()
    await node.stop()


async def test_anvil_restarts_and_crashes_and_the_watcher_tells_what_is_left(tmp_path: Path) -> None:
    clock, state = WallClock(), tmp_path / "state.json"
    options = ChainOptions(poll_s=0.05, rpc=RpcLimits(attempts=2, backoff_s=0.02))
    anvil = Anvil(AnvilOptions(state=state))
    try:
        bank = anvil.accounts[0]
        deployment = await deploy(anvil.rpc_url, bank, clock)
        again = AnvilOptions(state=state, port=int(anvil.rpc_url.rsplit(":", 1)[1]))
        node = Web3Chain(anvil.rpc_url, deployment, bank, clock=clock, options=options)
        await node.start()
        provider = Address(b"\x77" * 20)
        async with watching(node, provider) as reports:
            await node.open_channel(provider, session(1).secret, Wei(10))
            await reports.until(lambda s: s.deposit == 10)
            anvil.stop()
            with pytest.raises(ChainUnavailable):
                await node.token_balance(provider)
            anvil = Anvil(again)
            await node.open_channel(provider, session(2).secret, Wei(20))
            await reports.until(lambda s: s.deposit == 20)
            anvil.kill()
            anvil = Anvil(again)  # as of the clean stop: the second channel never was
            await node.open_channel(provider, session(3).secret, Wei(30))
            await node.open_channel(provider, session(3).secret, Wei(3))
            gone = await reports.until(lambda s: s.owner == ZERO_ADDRESS)
            assert gone.key.client == session(2).address
            await reports.until(lambda s: s.deposit == 33)
            assert sorted(seen.deposit for seen in reports.latest().values()) == [0, 10, 33]
        await node.stop()
    finally:
        anvil.stop()


def test_a_deployment_file_says_the_same_when_read_back_and_names_itself_when_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    there = Deployment(31337, *(Address(bytes([n]) * 20) for n in range(1, 7)), 5)
    there.save(path)
    assert Deployment.load(path) == there
    assert [entry.name for entry in tmp_path.iterdir()] == ["deployment.json"]
    with pytest.raises(ChainError, match=r"missing\.json cannot be read"):
        Deployment.load(tmp_path / "missing.json")
    for broken in ("", "[]", "{}", path.read_text().replace("0x01", "0x")):
        path.write_text(broken)
        with pytest.raises(ChainError, match=r"deployment\.json is no deployment file"):
            Deployment.load(path)


def test_importing_the_chain_package_does_not_import_web3() -> None:
    check = "import sys, node.chain; sys.exit(any(m in sys.modules for m in ('web3', 'aiohttp', 'eth_account')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
