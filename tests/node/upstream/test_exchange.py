"""Where a job goes when a platform outside is an alternative, what it then costs, and what is never sent there."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from node.app import _with_exchange
from node.config import load
from node.ports import JobDone, JobEvent, JobFailed, JobOutside, JobSpec, JobStarted, JobTokens, NoProvider, Sampling
from node.upstream.byte_card import byte_card
from node.upstream.exchange import Exchange
from node.upstream.platform import SHEET_LIFE_S, SHEET_RETRY_S, Platform
from node.upstream.settings import ExchangeSettings
from protocol.errors import Refused, TallyError
from protocol.options import JobOptions, Syntax
from protocol.units import WEI_PER_TALLY, Address, Digest, FinishReason, JobKind, Wei
from tests.node.gateway import cards
from tests.node.gateway.serving import ids
from tests.node.gateway.serving import serving as gateway
from tests.node.upstream.platforms import FakePlatform, priced
from tests.twins.fake_marketplace import FakeMarketplace, Finish, Say
from tests.twins.wall_clock import WallClock

CARD = cards.card()
HERE = CARD.model
LOCAL = (Say(ids("from here")), Finish())
CHEAP, DEAR = "0.0000000000000000001", "0.001"
"""USD per token; the market's own offer costs 5 wei a token, and a TALLY is worth 0.25 USD: 0.4 wei, and 4e15 wei."""

HI = (("user", "hi"),)


@asynccontextmanager
async def exchange(
    platform: FakePlatform, inner: FakeMarketplace, **changes: Any
) -> AsyncIterator[tuple[Exchange, list[float]]]:
    """An exchange over both, and its clock in seconds, which a test may move."""
    settings = ExchangeSettings(
        platform.url, Wei(10**13), Decimal("0.25"), Wei(WEI_PER_TALLY), models=((HERE, "far/model"),)
    )
    settings = replace(settings, **changes)
    now = [0.0]
    async with Platform(settings, lambda: now[0]) as entered:
        yield Exchange(inner, entered, settings, WallClock()), now


def spec(**changes: Any) -> JobSpec:
    return replace(JobSpec(HERE, ids("hi there"), 64, Sampling(500_000), messages=HI), **changes)


async def events_of(market: Exchange, job: JobSpec) -> list[JobEvent]:
    return [event async for event in market.run(job)]


def outside(events: list[JobEvent]) -> bool:
    assert isinstance(events[0], JobOutside | JobStarted)
    assert not (isinstance(events[0], JobOutside) and any(isinstance(event, JobStarted) for event in events))
    return isinstance(events[0], JobOutside)


async def test_a_cheaper_platform_gets_the_job_and_nothing_is_receipted() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)]) as platform:
        inner = FakeMarketplace(CARD, LOCAL)
        async with exchange(platform, inner) as (market, _):
            events = await events_of(market, spec())
            assert events[0] == JobOutside("127.0.0.1", "far/model") and inner.specs == []
            tokens = [number for event in events if isinstance(event, JobTokens) for number in event.token_ids]
            assert tuple(tokens) == ids("Hello from outside.")
            assert all(math.isnan(v) for event in events if isinstance(event, JobTokens) for v in event.logprobs)
            done = events[-1]
            assert isinstance(done, JobDone) and done.finish is FinishReason.STOP
            assert (done.job_ids, done.receipts, done.refund, done.ste_micro) == ((), (), 0, 0)
            assert (done.prompt_tokens, done.completion_tokens) == (11, 5), "as the platform counts"
            assert done.cost == 7, "16 tokens at 0.4 wei, rounded up once"
            ((path, body),) = platform.asked
            assert path == "/chat/completions" and body["messages"] == [{"role": "user", "content": "hi"}]
            assert (body["model"], body["max_tokens"], body["temperature"]) == ("far/model", 64, 0.5)
            status = await market.status()
            assert status["exchange"] == {
                "host": "127.0.0.1",
                "jobs": 1,
                "cost_wei": "7",
                "tally_usd": "0.25",
            }


async def test_text_that_is_no_chat_goes_as_text() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)]) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, _):
            await events_of(market, spec(messages=(), options=JobOptions(stop_ids=ids("."))))
            ((path, body),) = platform.asked
            assert path == "/completions" and body["prompt"] == "hi there" and body["stop"] == ["."]


@pytest.mark.parametrize(
    "changes",
    [
        {"private": True},
        {"only": frozenset({Address(b"\1" * 20)})},
        {"reservation": Digest(b"\1" * 32)},
        {"tier": 2},
        {"kind": JobKind.EMBED, "max_tokens": 0, "options": JobOptions(inputs=(1,))},
        {"options": JobOptions(min_tokens=3)},
        {"options": JobOptions(alternatives=3)},
        {"options": JobOptions(syntax=Syntax.JSON)},
        {"options": JobOptions(stop_ids=(1, 2, 3, 4, 5))},
        {"messages": (), "prompt": (*ids("hi"), CARD.eos_ids[0])},
        {"price_ceiling": Wei(3)},
    ],
)
async def test_what_only_the_market_can_do_stays_in_the_market(changes: dict[str, Any]) -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)]) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, _):
            assert not outside(await events_of(market, spec(**changes)))
            assert platform.asked == []


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([priced("far/model", DEAR, DEAR)], {}),
        ([priced("far/model", "0", DEAR)], {"ceiling": Wei(10**15)}),
        ([priced("other/model", CHEAP, CHEAP)], {}),
        ([priced(HERE, CHEAP, CHEAP)], {}),
        ([priced("far/model", CHEAP, CHEAP, context_length=64)], {}),
        ([priced("far/model", "-1", "-1"), priced("x", CHEAP, CHEAP)], {}),
        ([], {}),
    ],
)
async def test_a_dearer_or_unknown_model_is_not_asked(rows: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    async with FakePlatform(rows) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL), **changes) as (market, _):
            assert not outside(await events_of(market, spec()))
            assert platform.asked == []


async def test_the_ceiling_binds_where_nobody_here_can_take_the_job() -> None:
    async with FakePlatform([priced("far/model", CHEAP, DEAR)]) as platform:
        inner = FakeMarketplace(CARD, LOCAL, max_output=8)  # too short for the job
        async with exchange(platform, inner, ceiling=Wei(4 * 10**15)) as (market, _):
            assert outside(await events_of(market, spec(max_tokens=50)))
        async with exchange(platform, inner, ceiling=Wei(4 * 10**15 - 1)) as (market, _):
            assert not outside(await events_of(market, spec(max_tokens=50)))
        async with exchange(platform, inner, ceiling=Wei(4 * 10**15), most=Wei(10**17)) as (market, _):
            assert not outside(await events_of(market, spec(max_tokens=50)))


async def test_a_model_that_nobody_here_offers() -> None:
    async with FakePlatform([priced("far/other", CHEAP, CHEAP)]) as platform:
        inner = FakeMarketplace(CARD, LOCAL)
        async with exchange(platform, inner, models=()) as (market, _):
            card = await market.card("far/other")
            assert card.max_context == 8 * 4096
            prompt = tuple(range(65, 75))
            events = await events_of(market, JobSpec("far/other", prompt, 64, messages=HI))
            assert outside(events) and inner.specs == []
            with pytest.raises(NoProvider):
                await market.card("far/none")
            assert (await market.card(HERE)).profile_id == CARD.profile_id


def test_a_byte_card_spells_any_text() -> None:
    from node.gateway.text import TextCodec

    codec = TextCodec(byte_card("far/other", "host", 10))
    text = "naïve 🙂 <|im_end|>"
    assert codec.decode(codec.encode_text(text)) == text and len(codec.encode_text(text)) == len(text.encode())
    assert byte_card("a", "h", 1).profile_id != byte_card("b", "h", 1).profile_id


@pytest.mark.parametrize("changes", [{"refuses": 400}, {"refuses": 429}, {"refuses": 500}, {"breaks_after": 0}])
async def test_a_platform_that_does_not_take_the_job_leaves_it_here(changes: dict[str, int]) -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)], **changes) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, _):
            events = await events_of(market, spec())
            done = events[-1]
            assert isinstance(done, JobDone) and len(done.receipts) == 1 and len(platform.asked) == 1
            assert any(isinstance(event, JobStarted) for event in events)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"refuses": 400}, Refused, "not this prompt"),
        ({"refuses": 429}, NoProvider, "no room"),
        ({"refuses": 401}, NoProvider, "key"),
        ({"refuses": 302}, NoProvider, "redirects"),
        ({"breaks_after": 2}, JobFailed, "part of its answer"),
        ({"finish": "content_filter"}, JobFailed, "content_filter"),
        ({"finish": None}, JobFailed, "proper end"),
    ],
)
async def test_what_fails_outside_fails_by_type(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)], **changes) as platform:
        inner = FakeMarketplace(CARD, LOCAL, max_output=8)
        async with exchange(platform, inner) as (market, _):
            with pytest.raises(error, match=says):
                await events_of(market, spec())
            assert inner.specs == []


async def test_an_answer_without_text_that_is_charged_for_is_not_bought_a_second_time_here() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)], pieces=(), finish="content_filter") as platform:
        inner = FakeMarketplace(CARD, LOCAL)
        async with exchange(platform, inner) as (market, _):
            with pytest.raises(JobFailed, match="content_filter"):
                await events_of(market, spec())
            assert inner.specs == []


async def test_an_empty_prompt_stays_here() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)]) as platform:
        inner = FakeMarketplace(CARD, LOCAL)
        async with exchange(platform, inner) as (market, _):
            await events_of(market, spec(messages=(), prompt=()))
            assert platform.asked == [] and len(inner.specs) == 1


async def test_without_usage_our_own_count_is_what_it_costs() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)], usage=None) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, _):
            done = (await events_of(market, spec()))[-1]
            assert isinstance(done, JobDone) and done.prompt_tokens == len(ids("hi there"))
            assert done.completion_tokens == len(ids("Hello from outside."))


async def test_prices_are_read_once_an_hour_and_old_ones_are_not_used() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP)]) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, now):
            for _ in range(3):
                assert outside(await events_of(market, spec()))
            assert platform.sheets_read == 1
            now[0] += SHEET_LIFE_S
            platform.rows = []
            assert not outside(await events_of(market, spec()))
            assert not outside(await events_of(market, spec()))
            assert platform.sheets_read == 2, "a sheet that cannot be read is not asked for with every job"
            platform.rows = [priced("far/model", CHEAP, CHEAP)]
            now[0] += SHEET_RETRY_S
            assert outside(await events_of(market, spec()))


async def test_the_gateway_says_who_answered() -> None:
    async with FakePlatform([priced("far/model", CHEAP, CHEAP), priced("far/other", CHEAP, CHEAP)]) as platform:
        async with exchange(platform, FakeMarketplace(CARD, LOCAL)) as (market, _), gateway(market) as served:
            client = served.client()
            for model in (HERE, "far/other"):
                raw = await client.chat.completions.with_raw_response.create(
                    model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=20
                )
                assert raw.headers["x-tally-provider"] == "exchange:127.0.0.1"
                assert "x-tally-job" not in raw.headers and raw.headers["x-tally-cost"] == "7"
                answer = raw.parse()
                assert answer.choices[0].message.content == "Hello from outside."
                assert answer.choices[0].finish_reason == "stop"
                assert answer.usage is not None and answer.usage.completion_tokens == 5
                told = answer.usage.model_extra["tally"]  # type: ignore[index]
                assert told["receipts"] == [] and told["provider"] == "exchange:127.0.0.1"
            stream = await client.chat.completions.create(
                model="far/other", messages=[{"role": "user", "content": "hi"}], max_tokens=20, stream=True
            )
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello from outside."
            assert {path for path, _ in platform.asked} == {"/chat/completions"}


async def test_an_exchange_that_lacks_something_is_refused_at_the_start(tmp_path: Path) -> None:
    inner = FakeMarketplace(CARD, LOCAL)
    flags = {"home": str(tmp_path), "exchange.enabled": True, "exchange.url": "http://127.0.0.1:1/v1"}
    with pytest.raises(TallyError, match=r"exchange\.tally_usd, exchange\.ceiling"):
        async with _with_exchange(load(flags, env={}), inner):
            raise AssertionError("it started without a rate")
    async with _with_exchange(load({"home": str(tmp_path)}, env={}), inner) as market:
        assert market is inner
    whole = {**flags, "exchange.tally_usd": "0.5", "exchange.ceiling": "1"}
    async with _with_exchange(load(whole, env={}), inner) as market:
        assert isinstance(market, Exchange) and not outside(await events_of(market, spec()))
