"""The control socket: private, one node per home, stale ones replaced, long homes supported."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from node.gateway.control import (
    MAX_PATH_BYTES,
    ControlClient,
    ControlRefused,
    ControlServer,
    ControlUnavailable,
    ControlUnknown,
    socket_path,
)
from protocol.errors import TallyError


async def echo(params: dict[str, Any]) -> dict[str, Any]:
    return {"got": params}


async def refuse(_: dict[str, Any]) -> dict[str, Any]:
    raise TallyError("not today")


async def crash(_: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("a secret detail")


ROUTES = {"echo": echo, "refuse": refuse, "crash": crash}


async def test_a_call_goes_there_and_back(home: Path) -> None:
    path = home / "control.sock"
    server = ControlServer(path, ROUTES)
    await server.start()
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        client = ControlClient(path)
        assert await client.call("echo", text="é" * 50_000, n=2**70) == {"got": {"text": "é" * 50_000, "n": 2**70}}
        with pytest.raises(ControlRefused, match="not today"):
            await client.call("refuse")
        with pytest.raises(ControlUnknown, match="does not answer 'other': its role is another"):
            await client.call("other")
        with pytest.raises(ControlRefused, match="failed inside the node") as info:
            await client.call("crash")
        assert "secret" not in str(info.value)
        answers = await asyncio.gather(*(client.call("echo", i=i) for i in range(20)))
        assert [answer["got"]["i"] for answer in answers] == list(range(20))
    finally:
        await server.stop()
    assert not path.exists()
    await server.stop()


async def test_nobody_there(home: Path) -> None:
    with pytest.raises(ControlUnavailable, match="no node is running"):
        await ControlClient(home / "control.sock").call("echo")


async def test_a_second_node_is_refused_and_the_first_goes_on(home: Path) -> None:
    first, second = ControlServer(home / "control.sock", ROUTES), ControlServer(home / "control.sock", {})
    await first.start()
    try:
        with pytest.raises(ControlRefused, match="another node already runs"):
            await second.start()
        await second.stop()
        assert (await ControlClient(home / "control.sock").call("echo"))["got"] == {}
    finally:
        await first.stop()


async def test_a_dead_nodes_socket_is_replaced(home: Path) -> None:
    path = home / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ControlUnavailable):
        await ControlClient(path).call("echo")
    server = ControlServer(path, ROUTES)
    await server.start()
    assert await ControlClient(path).call("echo") == {"got": {}}
    await server.stop()


async def test_a_home_too_long_for_a_socket_works_all_the_same(home: Path) -> None:
    path = home / ("x" * 60) / ("y" * 60) / "control.sock"
    server = ControlServer(path, ROUTES)
    await server.start()
    where = socket_path(path)
    assert where != path and len(str(where)) <= MAX_PATH_BYTES
    assert where.parent.stat().st_mode & 0o777 == 0o700
    assert await ControlClient(path).call("echo") == {"got": {}}
    await server.stop()
    assert not where.parent.exists() and list(path.parent.iterdir()) == []
    with pytest.raises(ControlUnavailable):
        await ControlClient(path).call("echo")


async def test_a_node_that_hangs_or_breaks_off_is_not_waited_for(home: Path) -> None:
    path = home / "control.sock"
    broke = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if broke.is_set():
            writer.close()
            return
        await reader.read()

    server = await asyncio.start_unix_server(answer, path)
    client = ControlClient(path)
    with pytest.raises(ControlUnavailable, match="did not answer"):
        await client.call("echo", 0.1)
    broke.set()
    with pytest.raises(ControlUnavailable):
        await client.call("echo")
    server.close()


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff"])
async def test_parameters_must_be_an_object(home: Path, body: bytes) -> None:
    path = home / "control.sock"
    server = ControlServer(path, ROUTES)
    await server.start()
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"POST /echo HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b" 400 " in await reader.readline()
    writer.close()
    await server.stop()
