"""Raw sockets: strangers, web pages and broken clients. Each gets a JSON error, and nothing is bought."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.gateway.auth import ApiKeys
from node.gateway.errors import ApiError, GatewayError
from node.gateway.fields import decode_body
from node.gateway.limits import Limits
from node.gateway.requests import parse_chat, parse_completion
from node.gateway.server import GatewayServer
from tests.node.gateway.cards import card
from tests.node.gateway.serving import ManualClock, Seeded, ids, read_answer, serving
from tests.twins.fake_marketplace import FakeMarketplace, Finish, Hold, Say
from tests.twins.wall_clock import WallClock

GOOD = b'{"model":"tally-test","messages":[{"role":"user","content":"hello"}]}'


def market() -> FakeMarketplace:
    return FakeMarketplace(card(), [Say(ids("hello world")), Finish()])


# ------------------------------------------------------------------------------------------------- who may come in


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Authorization": None}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer sk-tally-" + "A" * 43}, 401, "invalid_api_key"),
        ({"Host": "evil.example"}, 403, "host_not_allowed"),
        ({"Host": "127.0.0.1.evil.example:80"}, 403, "host_not_allowed"),
        ({"Host": "evil.example@127.0.0.1"}, 403, "host_not_allowed"),
        ({"Host": "127.0.0.1:port"}, 403, "host_not_allowed"),
        ({"Host": ""}, 403, "host_not_allowed"),
        ({"Origin": "http://evil.example"}, 403, "origin_not_allowed"),
        ({"Origin": "null"}, 403, "origin_not_allowed"),
        ({"Content_Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content_Type": None}, 415, "unsupported_media_type"),
        ({"Content_Encoding": "gzip"}, 415, "unsupported_encoding"),
        ({"Content_Length": str(2 << 20)}, 413, "request_too_large"),
        ({"Idempotency_Key": "x" * 300}, 400, "bad_key"),
    ],
)
async def test_refused_at_the_door(headers: dict[str, str | None], status: int, code: str) -> None:
    fake = market()
    async with serving(fake) as served:
        answer = await served.post(GOOD, **headers)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert fake.specs == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8787", "[::1]:8787", "node.example"])
async def test_own_names_and_allowed_origins_are_let_in(host: str) -> None:
    async with serving(market(), allowed_hosts=["node.example"], allowed_origins=["http://app.example"]) as served:
        assert (await served.post(GOOD, Host=host)).status == 200
        answer = await served.post(GOOD, Origin="http://app.example")
        assert answer.status == 200 and "access-control-allow-origin: http://app.example" in answer.head.lower()
        assert (await served.post(GOOD, Origin=f"http://127.0.0.1:{served.port}")).status == 200
        asked = b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nOrigin: http://%s\r\n\r\n"
        assert (await served.raw(asked % b"app.example")).status == 204
        assert (await served.raw(asked % b"evil.example")).status == 403


async def test_health_and_readiness_need_no_key_and_status_does() -> None:
    fake = market()
    async with serving(fake) as served:
        head = b"Host: localhost\r\nConnection: close\r\n"
        assert (await served.raw(b"GET /health HTTP/1.1\r\n" + head + b"\r\n")).json() == {"status": "ok"}
        assert (await served.raw(b"GET /ready HTTP/1.1\r\n" + head + b"\r\n")).status == 200
        fake.cards.clear()
        assert (await served.raw(b"GET /ready HTTP/1.1\r\n" + head + b"\r\n")).status == 503
        assert (await served.raw(b"GET /api/v1/status HTTP/1.1\r\n" + head + b"\r\n")).status == 401
        key = f"Authorization: Bearer {served.key}\r\n".encode()
        status = (await served.raw(b"GET /api/v1/status HTTP/1.1\r\n" + head + key + b"\r\n")).json()
        assert status["peers"] == 3 and status["gateway"]["jobs"] == 0
        missing = await served.raw(b"GET /nowhere HTTP/1.1\r\n" + head + key + b"\r\n")
        assert (missing.status, missing.error["code"]) == (404, "not_found")
        wrong = await served.raw(b"GET /v1/completions HTTP/1.1\r\n" + head + key + b"\r\n")
        assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")


# ---------------------------------------------------------------------------------------------- how much, how long


async def test_a_body_without_length_is_cut_at_the_limit() -> None:
    async with serving(market(), limits=Limits(body_bytes=100, stop_s=0)) as served:
        chunk = b"80\r\n" + b"x" * 128 + b"\r\n0\r\n\r\n"
        answer = await served.post(chunk, Content_Length=None, Transfer_Encoding="chunked")
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_a_stalled_body_is_cut_off() -> None:
    clock = ManualClock()
    async with serving(market(), clock=clock, limits=Limits(body_s=14, stop_s=0)) as served:
        waiting = asyncio.ensure_future(served.post(GOOD[:10], Content_Length="500"))
        await clock.sleeping(14)
        await clock.advance(14)
        answer = await waiting
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert "connection: close" in answer.head.lower()


async def test_a_connection_that_never_asks_is_dropped() -> None:
    clock = ManualClock()
    async with serving(market(), clock=clock, limits=Limits(headers_s=11, stop_s=0)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/chat/comp")
        await clock.sleeping(11)
        await clock.advance(11)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_connections_above_the_cap_are_told_so() -> None:
    async with serving(market(), limits=Limits(connections=1, stop_s=0)) as served:
        _, first = await asyncio.open_connection("127.0.0.1", served.port)
        first.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reader, second = await asyncio.open_connection("127.0.0.1", served.port)
        answer = await read_answer(reader)
        first.close()
        second.close()
    assert (answer.status, answer.error["code"]) == (503, "too_many_connections")


async def test_long_headers_are_refused() -> None:
    async with serving(market()) as served:
        assert (await served.post(GOOD, X_Long="x" * 20_000)).status == 400


async def test_a_reader_that_stops_reading_loses_the_job() -> None:
    clock = ManualClock()
    # 64 tokens a batch: enough text to fill every buffer between the gateway and a client that reads nothing.
    fake = FakeMarketplace(card(), [*(Say((300,) * 64) for _ in range(60_000)), Finish()])
    async with serving(fake, clock=clock, limits=Limits(write_s=60, stop_s=0)) as served:
        stuck = socket.create_connection(("127.0.0.1", served.port))
        body = GOOD[:-1] + b',"stream":true,"logprobs":true}'
        head = f"Host: localhost\r\nAuthorization: Bearer {served.key}\r\nContent-Type: application/json\r\n"
        request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        stuck.sendall(request)
        await clock.stuck(60)
        await clock.advance(60)
        await asyncio.wait_for(fake.was_closed.wait(), 10)
        stuck.close()
    assert fake.closed == 1


async def test_silence_is_filled_with_comments() -> None:
    clock = ManualClock()
    before, between = Hold(), Hold()
    fake = FakeMarketplace(card(), [before, Say(ids("hello")), between, Finish()])
    async with serving(fake, clock=clock, limits=Limits(keepalive_s=10, stop_s=0)) as served:
        waiting = asyncio.ensure_future(served.post(GOOD[:-1] + b',"stream":true}'))
        for hold in (before, between):
            await hold.reached.wait()
            await clock.sleeping(10)
            await clock.advance(10)
            await clock.sleeping(10)
            hold.go.set()
        answer = await waiting
    assert answer.status == 200
    lines = [line for line in answer.body.decode().split("\r\n") if line.startswith((":", "data:"))]
    kinds = [line.strip() if line[0] == ":" else "data" for line in lines]
    assert kinds[0] == ": keep-alive" and kinds.count(": keep-alive") == 2
    assert b"[DONE]" in answer.body


async def test_a_failure_after_a_comment_stays_inside_the_stream() -> None:
    clock = ManualClock()
    hold = Hold()
    fake = FakeMarketplace(card(), [hold])
    async with serving(fake, clock=clock, limits=Limits(keepalive_s=10, stop_s=0)) as served:
        waiting = asyncio.ensure_future(served.post(GOOD[:-1] + b',"stream":true}'))
        await hold.reached.wait()
        await clock.sleeping(10)
        await clock.advance(10)
        await clock.sleeping(10)
        hold.go.set()
        answer = await waiting
    assert answer.status == 200 and b'data: {"error":' in answer.body and b"[DONE]" not in answer.body


# --------------------------------------------------------------------------------------------------------- bad bodies


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function.name"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": {"type": "function"}},
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": "any"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * (32 << 10)}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": 3}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {"x": 1}}, "web_search_options"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]"),
        ({"stop_token_ids": list(range(33))}, "stop_token_ids"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"prompt_cache_key": "x" * 257}, "prompt_cache_key"),
        ({"x_tally": 1}, "x_tally"),
        ({"x_tally": {"max_prize": "1"}}, "x_tally.max_prize"),
        ({"x_tally": {"max_price": 0.1}}, "x_tally.max_price"),
        ({"x_tally": {"max_price": "-1"}}, "x_tally.max_price"),
        ({"x_tally": {"tier": "gold"}}, "x_tally.tier"),
        ({"x_tally": {"tier": "priority", "batch": True}}, "x_tally.tier"),
        ({"x_tally": {"reservation": "0x12"}}, "x_tally.reservation"),
        ({"x_tally": {"only": ["0x" + "aa" * 20, "me"]}}, "x_tally.only[1]"),
        ({"x_tally": {"private": "yes"}}, "x_tally.private"),
    ],
)
def test_a_bad_parameter_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({**json.loads(GOOD), **change})
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [{}]}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_a_bad_completion_parameter_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"model": "tally-test", "prompt": "x", **change})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_is_unknown_or_harmless_is_accepted() -> None:
    call = parse_chat(
        {**json.loads(GOOD), "seed": 5, "user": "me", "n": 1, "tools": [], "tool_choice": "auto", "logit_bias": {}}
        | {"response_format": {"type": "text"}, "presence_penalty": 0, "stop": None, "new_in_2031": {}, "top_p": 0}
    )
    assert call.sampling.top_p_micro == 1 and call.stops == () and call.max_tokens is None


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"nonsense",
            b"[]",
            b"NaN",
            b'{"temperature": NaN}',
            b'{"a": 1e999}',
            b'"\\ud800"',
            b'{"model": "\xff"}',
        ),
        *(b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, GOOD + b"x", b"\0"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_object_is_said_to_be_so(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(decode_body(body))
    assert caught.value.status == 400


WORDS = ["user", "text", "tool", "assistant", "function", "json_schema", "json_object", "required", "0x" + "aa" * 20]
NAMES = [
    *("role", "content", "type", "function", "name", "parameters", "arguments", "tool_calls", "tool_call_id"),
    *("json_schema", "schema", "max_price", "only", "tier", "batch"),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "stop", "stream"),
        *("stream_options", "n", "logprobs", "top_logprobs", "tools", "service_tier", "response_format"),
        *("tool_choice", "parallel_tool_calls", "functions", "min_tokens", "stop_token_ids", "x_tally"),
        *("frequency_penalty", "prompt_cache_key", "modalities", "best_of", "echo", "suffix", "logit_bias"),
    ]
)


@given(st.dictionaries(fields, values, max_size=4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_parameters_are_a_call_or_a_named_error(change: dict[str, Any], chat: bool) -> None:
    base: dict[str, Any] = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    try:
        (parse_chat if chat else parse_completion)({**base, **change})
    except ApiError as exc:
        assert exc.status == 400 and json.loads(exc.encoded())["error"]["message"]


async def test_any_bytes_as_a_body_get_a_json_answer() -> None:
    fake = market()
    hostile = st.one_of(
        st.binary(max_size=200),
        st.tuples(st.binary(max_size=5), st.integers(0, len(GOOD))).map(lambda t: GOOD[: t[1]] + t[0] + GOOD[t[1] :]),
        st.dictionaries(fields, values, max_size=4).map(lambda d: json.dumps({**json.loads(GOOD), **d}).encode()),
    )
    bodies: list[tuple[bytes, str]] = []

    @given(hostile, st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
    @settings(max_examples=120, deadline=None, database=None)
    def collect(body: bytes, path: str) -> None:
        bodies.append((body, path))

    collect()  # Hypothesis drives plain functions; the requests are made on the server's own loop
    async with serving(fake) as served:
        for body, path in bodies:
            answer = await served.post(body, path)
            if answer.status == 200 and "text/event-stream" in answer.head:
                continue
            assert answer.status < 500, (body, answer)
            assert answer.status == 200 or answer.error["message"]


# --------------------------------------------------------------------------------------------------- life of a server


async def test_a_port_in_use_is_named_with_a_remedy(tmp_path: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        keys = ApiKeys(tmp_path / "keys.json", clock=WallClock(), entropy=Seeded())
        server = GatewayServer(market(), port=port, api_keys=keys, clock=WallClock(), entropy=Seeded())
        with pytest.raises(GatewayError, match=f"port {port}.*in use.*another port"):
            await server.start()
        await server.stop()
