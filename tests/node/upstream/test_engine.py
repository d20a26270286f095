"""The engine port over a server: same tokens whatever its manner, honest refusals, and nothing left running."""

from __future__ import annotations

import asyncio
import math
import struct
from contextlib import aclosing

import pytest

from node.ports import EngineFull, Sampling, Urgency
from node.upstream import engine as engine_module
from node.upstream.http import UpstreamError
from node.upstream.writing import NO_PROJECTION, UNKNOWN_LOGPROB
from protocol.options import JobOptions, Syntax
from protocol.transcript import unpack_fp16
from protocol.units import FinishReason
from tests.node.upstream.helpers import PROMPT, ask, serving, tokens, until
from tests.node.upstream.servers import FakeServer
from tests.node.upstream.words import BOS, EOS, decode, encode

NAMED, TEXT = {"names_tokens": True}, {"names_tokens": False, "shows_stop": False}
SCHEMA = JobOptions(syntax=Syntax.JSON_SCHEMA, grammar='{"type":"object"}')


@pytest.mark.parametrize("manner", [NAMED, TEXT])
async def test_tokens_come_in_order_with_their_end(manner: dict[str, bool]) -> None:
    async with FakeServer(**manner) as server, serving(server) as engine:
        whole = await tokens(engine, ask(12))
        assert [t.finish for t in whole] == [FinishReason.OPEN] * 11 + [FinishReason.LENGTH]
        assert all(t.projection == NO_PROJECTION and t.routing == b"" and t.cached_tokens == 0 for t in whole)
        shorter = await tokens(engine, ask(5))
        assert [t.token_id for t in shorter] == [t.token_id for t in whole[:5]]
        if server.names_tokens:
            assert all(-20 < unpack_fp16(t.logprob)[0] < 0 for t in whole)
        else:
            assert all(t.logprob == UNKNOWN_LOGPROB for t in whole)
        stats = engine.stats()
        assert (stats.active, stats.queued, stats.tokens_total, stats.prompt_total) == (0, 0, 17, 2 * len(PROMPT))
        assert stats.busy_s > 0 and engine.wait_ms(Urgency.STANDARD, 10) >= 0


async def test_both_manners_give_the_same_tokens() -> None:
    async with FakeServer(**NAMED) as one, FakeServer(**TEXT) as two, serving(one) as named, serving(two) as text:
        for sampling in (Sampling(0), Sampling(900_000, 950_000, 0)):
            ids = [[t.token_id for t in await tokens(engine, ask(20, sampling=sampling))] for engine in (named, text)]
            assert ids[0] == ids[1]


@pytest.mark.parametrize("manner", [NAMED, TEXT])
async def test_a_text_that_ends_itself_ends_with_its_end_token(manner: dict[str, bool]) -> None:
    async with FakeServer(**manner, obeys_schema=True) as server, serving(server) as engine:
        out = await tokens(engine, ask(40, options=SCHEMA))
        assert decode([t.token_id for t in out[:-1]]) == '{"ok":true}'
        assert (out[-1].token_id, out[-1].finish) == (EOS, FinishReason.STOP)
        exact = await tokens(engine, ask(len(out) - 1, options=SCHEMA))
        assert exact[-1].finish is FinishReason.LENGTH and len(exact) == len(out) - 1


async def test_what_is_asked_is_what_is_sent() -> None:
    async with FakeServer() as server, serving(server) as engine:
        options = JobOptions(frequency_milli=500, presence_milli=-250, min_tokens=3, alternatives=4)
        out = await tokens(engine, ask(6, sampling=Sampling(700_000, 900_000, 5), options=options, seed=255))
        sent = server.bodies[-1]
        assert sent["prompt"] == list(PROMPT) and sent["max_tokens"] == 6 and sent["stream"] is True
        assert (sent["temperature"], sent["top_p"], sent["top_k"]) == (0.7, 0.9, 5)
        assert (sent["frequency_penalty"], sent["presence_penalty"], sent["min_tokens"]) == (0.5, -0.25, 3)
        assert sent["seed"] == 0x7FFFFFFF and sent["logprobs"] == 4
        assert sent["min_p"] == 0 and sent["repetition_penalty"] == 1, "the server's own defaults do not sample for us"
        for token in out:
            values = [unpack_fp16(logprob)[0] for _, logprob in token.alternatives]
            assert len(values) == 4 and values == sorted(values, reverse=True)


async def test_a_stop_id_ends_the_text_and_the_request() -> None:
    async with FakeServer() as server, serving(server) as engine:
        whole = await tokens(engine, ask(12))
        stop = whole[6].token_id
        first = [t.token_id for t in whole].index(stop)
        out = await tokens(engine, ask(12, options=JobOptions(stop_ids=(stop,))))
        assert [t.token_id for t in out] == [t.token_id for t in whole[: first + 1]]
        assert out[-1].finish is FinishReason.STOP
        await until(lambda: server.running == 0)


@pytest.mark.parametrize(
    ("request_of", "says"),
    [
        (lambda: ask(0), "at least 1"),
        (lambda: ask(8, prompt=()), "empty"),
        (lambda: ask(600), "context"),
        (lambda: ask(8, prompt=(100_000,)), "vocabulary"),
        (lambda: ask(8, options=JobOptions(syntax=Syntax.JSON)), "JSON mode"),
        (lambda: ask(8, options=SCHEMA), "JSON Schema"),
        (lambda: ask(8, options=JobOptions(syntax=Syntax.LARK, grammar="start: /a/")), "Lark"),
        (lambda: ask(8, options=JobOptions(min_tokens=2, stop_ids=(5,))), "stop ids"),
        (lambda: ask(8, options=JobOptions(continued=2, frequency_milli=5)), "continued"),
    ],
)
async def test_what_it_cannot_do_is_refused_before_anything_is_sent(request_of: object, says: str) -> None:
    async with FakeServer() as server, serving(server) as engine:
        before = len(server.bodies)
        with pytest.raises(ValueError, match=says):
            await engine.submit(request_of())  # type: ignore[operator]
        assert len(server.bodies) == before and engine.stats().active == 0


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (400, ValueError, "seven is too many"),
        (422, ValueError, "seven is too many"),
        (429, EngineFull, "no room"),
        (503, EngineFull, "no room"),
        (500, UpstreamError, "HTTP 500"),
        (401, UpstreamError, "key"),
    ],
)
async def test_a_servers_refusal_has_a_type_and_frees_its_slot(status: int, error: type[Exception], says: str) -> None:
    async with FakeServer() as server, serving(server, slots=1) as engine:
        server.refuses, server.says = status, "seven is too many"
        with pytest.raises(error, match=says):
            await engine.submit(ask())
        server.refuses = 0
        assert len(await tokens(engine, ask(4))) == 4


@pytest.mark.parametrize(
    ("manner", "fault", "before"),
    [(NAMED, {"breaks_after": 3}, 3), (TEXT, {"breaks_after": 3}, 2), (NAMED, {"unnamed_after": 4}, 3)],
)
async def test_a_broken_stream_is_an_error_and_never_an_end(
    manner: dict[str, bool], fault: dict[str, int], before: int
) -> None:
    async with FakeServer(**manner) as server, serving(server, slots=1) as engine:
        taken = asyncio.Event()

        async def pace(index: int) -> None:
            if index == 3:
                await taken.wait()

        server.pace = pace
        for name, value in fault.items():
            setattr(server, name, value)
        async with aclosing(await engine.submit(ask(10))) as stream:
            for _ in range(before):
                assert (await anext(stream)).finish is FinishReason.OPEN
            taken.set()
            with pytest.raises(UpstreamError):
                await anext(stream)
            assert engine.stats().active == 0


async def test_an_end_for_a_reason_of_the_servers_own_is_an_error() -> None:
    async with FakeServer(**TEXT, obeys_schema=True) as server, serving(server) as engine:
        server.ends_with = "content_filter"
        async with aclosing(await engine.submit(ask(40, options=SCHEMA))) as stream:
            with pytest.raises(UpstreamError, match="content_filter"):
                async for _ in stream:
                    pass


@pytest.mark.parametrize("status", [0, 400, 429])
async def test_a_server_that_takes_its_time_may_still_refuse(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HEADERS_S", 0.01)
    async with FakeServer() as server, serving(server, slots=1) as engine:
        server.hold = asyncio.Event()
        stream = await engine.submit(ask(4))
        server.refuses = status
        server.hold.set()
        if status:
            with pytest.raises(UpstreamError):
                await anext(stream)
            assert engine.stats().active == 0
        else:
            assert len([token async for token in stream]) == 4
        await stream.aclose()


async def test_a_turn_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "TURN_S", 0.01)
    async with FakeServer(max_model_len=None) as server, serving(server, slots=1) as engine:
        first = await engine.submit(ask(1000))
        with pytest.raises(EngineFull, match="stayed taken"):
            await engine.submit(ask(3))
        assert engine.stats().queued == 0 and engine.wait_ms(Urgency.FLEX, 1) >= 0
        await first.aclose()


async def test_a_stop_before_min_tokens_is_an_error() -> None:
    async with FakeServer(obeys_schema=True) as server, serving(server) as engine:
        options = JobOptions(syntax=SCHEMA.syntax, grammar=SCHEMA.grammar, min_tokens=30)
        async with aclosing(await engine.submit(ask(40, options=options))) as stream:
            with pytest.raises(UpstreamError, match="fewest"):
                async for _ in stream:
                    pass


async def test_closing_a_stream_closes_the_request() -> None:
    async with FakeServer(max_model_len=None) as server, serving(server, slots=1) as engine:
        gate = asyncio.Event()

        async def pace(index: int) -> None:
            if index == 2:
                await gate.wait()

        server.pace = pace
        stream = await engine.submit(ask(1000))
        assert (await anext(stream)).finish is FinishReason.OPEN
        await stream.aclose()
        await stream.aclose()
        assert engine.stats().active == 0
        await until(lambda: server.left_early == 1 and server.running == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_dropped_stream_gives_its_slot_back() -> None:
    async with FakeServer(max_model_len=None) as server, serving(server, slots=1) as engine:
        stream = await engine.submit(ask(1000))
        await anext(stream)
        del stream
        await until(lambda: engine.stats().active == 0)


async def test_a_slow_reader_slows_the_server_and_loses_nothing() -> None:
    async with FakeServer(max_model_len=None, padding=8_000) as server, serving(server) as engine:
        before = server.written
        async with aclosing(await engine.submit(ask(2000))) as stream:
            await anext(stream)
            last, calm = -1, 0
            while calm < 40:  # until the server has written nothing for 40 turns of 5 ms
                await asyncio.sleep(0.005)
                calm = calm + 1 if server.written == last else 0
                last = server.written
            assert server.written - before < 1500, "the server went on writing for nobody"
            assert len([token async for token in stream]) == 1999


async def test_as_many_run_at_a_time_as_there_are_slots_and_the_urgent_go_first() -> None:
    async with FakeServer(max_model_len=None) as server, serving(server, slots=1, max_queue=2) as engine:
        server.most_running = 0
        order: list[str] = []

        async def job(name: str, urgency: Urgency) -> None:
            async with aclosing(await engine.submit(ask(3, urgency=urgency))) as stream:
                order.append(name)
                async for _ in stream:
                    pass

        first = await engine.submit(ask(1000))
        waiting = [asyncio.create_task(job("flex", Urgency.FLEX))]
        await until(lambda: engine.stats().queued == 1)
        waiting.append(asyncio.create_task(job("priority", Urgency.PRIORITY)))
        await until(lambda: engine.stats().queued == 2)
        with pytest.raises(EngineFull, match="2 queue places"):
            await engine.submit(ask(3))
        await first.aclose()
        await asyncio.gather(*waiting)
        assert order == ["priority", "flex"]
        assert engine.stats().active == 0


async def test_a_waiter_that_gives_up_leaves_its_place() -> None:
    async with FakeServer(max_model_len=None) as server, serving(server, slots=1) as engine:
        first = await engine.submit(ask(1000))
        waiter = asyncio.create_task(engine.submit(ask(3)))
        await until(lambda: engine.stats().queued == 1)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert engine.stats().queued == 0
        await first.aclose()
        assert len(await tokens(engine, ask(3))) == 3


async def test_stopping_the_engine_ends_open_streams_with_an_error() -> None:
    async with FakeServer(max_model_len=None) as server, serving(server) as engine:
        gate = asyncio.Event()

        async def pace(index: int) -> None:
            if index == 1:
                await gate.wait()

        server.pace = pace
        stream = await engine.submit(ask(100))
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(UpstreamError, match="stopped"):
            await reading
        with pytest.raises(UpstreamError, match="not running"):
            await engine.submit(ask())


async def test_text_prompts_are_exact_or_refused() -> None:
    async with FakeServer(**TEXT) as server, serving(server) as engine:
        chat = tuple(encode("<|user|>the end"))
        await tokens(engine, ask(2, prompt=chat))
        assert server.bodies[-1]["prompt"] == "<|user|>the end"
        typed = engine._texts.encode_plain("<|user|>")
        assert typed != tuple(encode("<|user|>"))
        with pytest.raises(ValueError, match="exactly"):
            await engine.submit(ask(2, prompt=(*chat, *typed)))


async def test_a_servers_own_bos_is_not_sent_twice() -> None:
    async with FakeServer(**TEXT, adds_bos=True) as server, serving(server) as engine:
        await tokens(engine, ask(2, prompt=(BOS, *PROMPT)))
        assert server.bodies[-1]["prompt"] == decode(list(PROMPT))
        with pytest.raises(ValueError, match="BOS"):
            await engine.submit(ask(2))


@pytest.mark.parametrize("manner", [NAMED, TEXT])
async def test_embeddings_are_unit_vectors_in_order(manner: dict[str, bool]) -> None:
    async with FakeServer(**manner, dimensions=16) as server, serving(server) as engine:
        assert engine.hidden_size == 16
        texts = [tuple(encode(text)) for text in ("the", "a thing", "of")]
        whole = await engine.embed(texts, 0, Urgency.STANDARD)
        alone = [(await engine.embed([ids], 0, Urgency.STANDARD))[0] for ids in texts]
        assert list(whole) == alone and len(set(whole)) == 3
        for vector in await engine.embed(texts, 5, Urgency.STANDARD):
            values = struct.unpack("<5f", vector)
            assert math.isclose(math.hypot(*values), 1.0, rel_tol=1e-5)
        for dimensions in (-1, 17):
            with pytest.raises(ValueError, match="dimensions"):
                await engine.embed(texts, dimensions, Urgency.STANDARD)
    async with FakeServer() as server, serving(server) as engine:
        assert engine.hidden_size == 0
        with pytest.raises(ValueError, match="no embeddings"):
            await engine.embed([PROMPT], 0, Urgency.STANDARD)
