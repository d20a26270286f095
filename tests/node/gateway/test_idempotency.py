"""One job per Idempotency-Key, whatever the client does in between."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from node.gateway.limits import Limits
from node.ports import JobFailed, NoProvider
from tests.node.gateway.cards import card
from tests.node.gateway.serving import ManualClock, Served, ids, serving
from tests.twins.fake_marketplace import Fail, FakeMarketplace, Finish, Hold, Say, Step

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def market(*script: Step) -> FakeMarketplace:
    return FakeMarketplace(card(), script or (Say(ids("hello")), Say(ids(" world")), Finish()))


async def ask(served: Served, key: str = "once", **options: Any) -> Any:
    return await served.client().chat.completions.create(
        **({"model": "tally-test", "messages": HELLO, "extra_headers": {"Idempotency-Key": key}} | options)
    )


async def text(stream: Any) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_the_same_request_is_one_job_and_one_answer() -> None:
    fake = market()
    async with serving(fake) as served:
        answers = [await ask(served) for _ in range(3)]
        other = await ask(served, key="twice")
    assert len({answer.id for answer in answers}) == 1
    assert other.id != answers[0].id
    assert len(fake.specs) == 2


async def test_requests_that_come_while_it_runs_wait_for_it() -> None:
    hold = Hold()
    fake = market(Say(ids("hello")), hold, Finish())
    async with serving(fake) as served:
        waiting = [asyncio.ensure_future(ask(served)) for _ in range(3)]
        await hold.reached.wait()
        hold.go.set()
        answers = await asyncio.gather(*waiting)
    assert {answer.choices[0].message.content for answer in answers} == {"hello"}
    assert len(fake.specs) == 1


async def test_a_stream_is_replayed_and_joined() -> None:
    hold = Hold()
    fake = market(Say(ids("hello")), hold, Say(ids(" world")), Finish())
    async with serving(fake) as served:
        first = await ask(served, stream=True)
        await hold.reached.wait()
        second = await ask(served, stream=True)
        hold.go.set()
        assert await text(first) == await text(second) == "hello world"
        assert await text(await ask(served, stream=True)) == "hello world"
    assert len(fake.specs) == 1


async def test_another_body_under_the_key_is_refused() -> None:
    fake = market()
    async with serving(fake) as served:
        await ask(served)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await ask(served, temperature=0)
    assert caught.value.code == "idempotency_key_reused"
    assert len(fake.specs) == 1


async def test_a_client_that_comes_back_in_time_finds_its_job_running() -> None:
    hold = Hold()
    fake = market(Say(ids("hello")), hold, Say(ids(" world")), Finish())
    clock = ManualClock()
    async with serving(fake, clock=clock, limits=Limits(grace_s=5, stop_s=0)) as served:
        lost = await ask(served, stream=True)
        await hold.reached.wait()
        await lost.close()
        await clock.sleeping(5)
        back = asyncio.ensure_future(ask(served, stream=True))
        stream = await back
        await clock.advance(5)
        hold.go.set()
        assert await text(stream) == "hello world"
    assert (len(fake.specs), fake.closed) == (1, 0)


async def test_a_client_that_does_not_come_back_stops_paying() -> None:
    hold = Hold()
    fake = market(Say(ids("hello")), hold)
    clock = ManualClock()
    async with serving(fake, clock=clock, limits=Limits(grace_s=5, stop_s=0)) as served:
        lost = await ask(served, stream=True)
        await hold.reached.wait()
        await lost.close()
        await clock.sleeping(5)
        await clock.advance(5)
        await asyncio.wait_for(fake.was_closed.wait(), 10)
        with pytest.raises(openai.APIError) as caught:
            await text(await ask(served, stream=True))
    assert caught.value.code == "job_cancelled"
    assert (len(fake.specs), fake.closed) == (1, 1)


async def test_a_failure_that_cost_nothing_is_forgotten() -> None:
    fake = market(Fail(NoProvider("none now.")))
    async with serving(fake) as served:
        with pytest.raises(openai.InternalServerError):
            await ask(served)
        fake.script = (Say(ids("hello")), Finish())
        assert (await ask(served)).choices[0].message.content == "hello"


async def test_a_failure_that_cost_something_is_kept() -> None:
    fake = market(Say(ids("hello")), Fail(JobFailed("gone.")))
    async with serving(fake) as served:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                await ask(served)
            assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(fake.specs) == 1


async def test_answers_expire() -> None:
    fake = market()
    clock = ManualClock()
    async with serving(fake, clock=clock, limits=Limits(replay_s=100, stop_s=0)) as served:
        await ask(served)
        await clock.advance(99)
        await ask(served)
        assert len(fake.specs) == 1
        await clock.advance(1)
        await ask(served)
    assert len(fake.specs) == 2


async def test_the_oldest_answers_go_when_they_are_too_many() -> None:
    fake = market()
    async with serving(fake, limits=Limits(replay_bytes=2500, stop_s=0)) as served:
        for key in "abcd":
            await ask(served, key=key)
        assert len(fake.specs) == 4
        await ask(served, key="d")
        assert len(fake.specs) == 4
        await ask(served, key="a")
    assert len(fake.specs) == 5


async def test_an_answer_too_large_to_keep_reaches_its_reader_and_is_not_bought_twice() -> None:
    fake = market(*(Say(ids("word ")) for _ in range(200)), Finish())
    async with serving(fake, limits=Limits(replay_entry_bytes=2000, stop_s=0)) as served:
        assert await text(await ask(served, stream=True)) == "word " * 200
        with pytest.raises(openai.ConflictError) as caught:
            await ask(served, stream=True)
    assert caught.value.code == "answer_not_kept"
    assert len(fake.specs) == 1
