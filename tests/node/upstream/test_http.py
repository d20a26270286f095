"""One server over HTTP: what it redirects to is not dialled, what it sends is bounded, and a key stays a secret."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from node.upstream import http
from node.upstream.http import HttpServer, UpstreamError, read_key
from node.upstream.urls import UrlRefused
from tests.node.upstream.helpers import serving
from tests.node.upstream.servers import FakeServer

REDIRECTS = ["http://169.254.169.254/latest/meta-data/", "/v1/models", "file:///etc/passwd"]


@pytest.mark.parametrize("target", REDIRECTS)
async def test_a_redirect_is_not_followed(target: str) -> None:
    async with FakeServer(says=target) as server:
        async with HttpServer(server.url.replace("/v1", "/away")) as client:
            with pytest.raises(UpstreamError, match="redirects"):
                await client.get("/models")
            with pytest.raises(UpstreamError, match="redirects"):
                await client.post("/models", {})


async def test_an_answer_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeServer(models=tuple(f"model-{i}" for i in range(100))) as server, HttpServer(server.url) as client:
        assert len((await client.get("/models"))["data"]) == 100
        monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1000)
        with pytest.raises(UpstreamError, match="1000 bytes"):
            await client.get("/models")


async def test_an_event_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeServer(padding=50_000) as server, HttpServer(server.url) as client:
        monkeypatch.setattr(http, "MAX_EVENT_BYTES", 40_000)
        events = await client.stream("/completions", {"prompt": [5], "max_tokens": 2, "stream": True})
        with pytest.raises(UpstreamError, match="40000 bytes"):
            await anext(events)
        await events.aclose()


async def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeServer() as server, HttpServer(server.url) as client:
        forever = asyncio.Event()

        async def pace(_index: int) -> None:
            await forever.wait()

        server.pace = pace
        monkeypatch.setattr(http, "SILENCE_S", 0.05)
        events = await client.stream("/completions", {"prompt": [5], "max_tokens": 2, "stream": True})
        with pytest.raises(UpstreamError, match="silent"):
            await anext(events)
        await events.aclose()


async def test_a_server_that_is_not_there() -> None:
    async with FakeServer() as server:
        url = server.url
    async with HttpServer(url) as client:
        with pytest.raises(UpstreamError, match="cannot be reached"):
            await client.get("/models")


async def test_only_what_was_checked_is_dialled() -> None:
    with pytest.raises(UrlRefused):
        async with HttpServer("http://10.0.0.1:8000/v1"):
            raise AssertionError("a private network was dialled")
    with pytest.raises(UrlRefused):
        async with HttpServer("http://169.254.169.254/v1", allow_private=True):
            raise AssertionError("a metadata service was dialled")


async def test_the_key_is_sent_and_appears_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "key"
    await asyncio.to_thread(file.write_text, "sk-upstream-0123456789\nsecond line\n")
    await asyncio.to_thread(file.chmod, 0o600)
    caplog.set_level(logging.DEBUG)
    async with FakeServer(key="sk-upstream-0123456789") as server:
        async with serving(server, key_file=file) as engine:
            assert engine.abilities.ids_in
        with pytest.raises(UpstreamError, match="does not accept our key"):
            async with serving(server):
                raise AssertionError("it was let in without a key")
    assert "sk-upstream" not in caplog.text


@pytest.mark.parametrize(("text", "mode"), [("short", 0o600), ("", 0o600), ("sk-upstream-0123456789", 0o644)])
def test_a_key_file_that_is_none(tmp_path: Path, text: str, mode: int) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(UpstreamError, match="key file"):
        read_key(file)
    with pytest.raises(UpstreamError, match="cannot be read"):
        read_key(tmp_path / "missing")
