"""Who goes first, who makes room, who is never starved, and who is refused; in steps, not in seconds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.engine.generation import Generation
from node.engine.pace import Pace
from node.engine.scheduler import PREFILL_TOKENS
from node.engine.waiting import PATIENCE, queue_limit
from node.ports import EngineFull, EngineToken, Urgency
from protocol.units import LEAF_TOKENS
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import PAYER, Lab, ask


@pytest.fixture(scope="module")
def lab(model_dir: Callable[[str], Path]) -> Lab:
    return Lab(model_dir("endless"), slots=2, saved_tokens=2_000)


def steps_to_first_token(lab: Lab, stream: Generation) -> int:
    before = lab.steps
    while not lab.tokens[stream]:
        lab.step()
        assert lab.steps - before < 500
    return lab.steps - before


@pytest.mark.parametrize("length", [5, 250, 400])
def test_priority_under_a_flood_of_flex_waits_only_for_its_own_prompt(lab: Lab, length: int) -> None:
    """40 long flex jobs fill slots and queue; each priority job has its first token as soon as its prompt is read."""
    lab.restart()
    for number in range(40):
        lab.submit(ask(number, 300, 60, urgency=Urgency.FLEX))
    for number in range(PATIENCE + 4):
        for _ in range(7):
            lab.step()
        stream = lab.submit(ask(100 + number, length, 3, urgency=Urgency.PRIORITY))
        assert steps_to_first_token(lab, stream) <= math.ceil(length / PREFILL_TOKENS) + 1
    assert lab.scheduler.preempted_total > 0


def test_the_most_urgent_reads_first_even_among_those_with_a_slot(lab: Lab) -> None:
    lab.restart()
    flex = lab.submit(ask(1, 450, 3, urgency=Urgency.FLEX))
    lab.step()
    first = lab.submit(ask(2, 250, 3, urgency=Urgency.PRIORITY))
    assert lab.step() == [first]
    assert flex.fed == 2 * PREFILL_TOKENS - 250
    assert set(lab.step()) == {first, flex}


def test_who_makes_room_is_the_least_urgent_that_got_its_slot_last(lab: Lab) -> None:
    lab.restart()
    standard = lab.submit(ask(1, 5, 40))
    flex = lab.submit(ask(2, 5, 40, urgency=Urgency.FLEX))
    lab.step()
    other = lab.submit(ask(3, 5, 40))  # as urgent as the first: displaces flex alone
    lab.step()
    assert [stream.slot >= 0 for stream in (standard, flex, other)] == [True, False, True]
    assert flex.saved is not None
    assert not lab.scheduler._victim()
    batch = lab.submit(ask(4, 5, 40, urgency=Urgency.BATCH))
    lab.step()
    assert batch.waiting
    urgent = lab.submit(ask(5, 5, 40, urgency=Urgency.PRIORITY))
    lab.step()
    assert [stream.slot >= 0 for stream in (standard, other, urgent)] == [True, False, True]
    assert lab.scheduler.preempted_total == 2
    lab.drain()
    for number, stream in enumerate((standard, flex, other, batch, urgent), 1):
        lab_text = lab.text(stream)
        assert len(lab_text) == 40
        assert lab_text == Lab.run(lab, ask(number, 5, 40))


@pytest.mark.parametrize("saved_tokens", [0, 30, 2_000])
def test_a_displaced_stream_loses_and_changes_no_token(saved_tokens: int, model_dir: Callable[[str], Path]) -> None:
    """Displaced while reading, while decoding, and twice; saved, or without room for it computed again."""
    lab = Lab(model_dir("endless"), slots=1, saved_tokens=saved_tokens)
    request = ask(1, 300, 50, urgency=Urgency.FLEX)
    whole = lab.run(request)
    lab.restart()
    stream = lab.submit(request)
    for number, steps in enumerate((1, 20, 3)):
        for _ in range(steps):
            lab.step()
        lab.submit(ask(10 + number, 20, 5, urgency=Urgency.PRIORITY))
        lab.step()
        assert stream.slot < 0
        assert (stream.saved is not None) == (stream.fed > 0) == (saved_tokens > 300)
        while stream.slot < 0:
            lab.step()
    lab.drain()
    assert lab.text(stream) == whole
    assert lab.scheduler.preempted_total == 3
    assert lab.scheduler._saved_room == lab._saved_bytes


def test_a_stream_cancelled_while_displaced_gives_its_memory_back(lab: Lab) -> None:
    lab.restart()
    streams = [lab.submit(ask(number, 40, 50, urgency=Urgency.FLEX, salt=PAYER)) for number in (1, 2)]
    lab.step()
    urgent = [lab.submit(ask(number, 40, 50)) for number in (3, 4)]
    lab.step()
    assert all(stream.saved for stream in streams)
    for stream in streams:
        lab.cancel(stream)
        lab.cancel(stream)
    assert lab.scheduler._saved_room == lab._saved_bytes
    assert not any(block.pins for block in lab.cache._held.values())
    lab.drain()
    assert all(len(lab.tokens[stream]) == 50 for stream in urgent)


@pytest.mark.parametrize("slots", [1, 2])
def test_flex_is_served_under_an_endless_flood_of_priority(slots: int, model_dir: Callable[[str], Path]) -> None:
    """One slot in PATIENCE + 1, a leaf at least each time: the stream ends, and every priority job has its turn."""
    lab = Lab(model_dir("endless"), slots=slots)
    flex = lab.submit(ask(1, 20, 4 * LEAF_TOKENS, urgency=Urgency.BATCH))
    whole = lab.run(ask(1, 20, 4 * LEAF_TOKENS))
    lab.restart()
    flex = lab.submit(ask(1, 20, 4 * LEAF_TOKENS, urgency=Urgency.BATCH))
    urgent: list[Generation] = []
    while not flex.ended:
        if sum(not stream.ended for stream in urgent) < 3 * slots:
            urgent.append(lab.submit(ask(10 + len(urgent), 20, 8, urgency=Urgency.PRIORITY)))
        lab.step()
        assert lab.steps < 3_000
    assert lab.text(flex) == whole
    assert len(urgent) > 2 * PATIENCE
    assert all(stream.ended for stream in urgent[: -3 * slots])


@given(places=st.integers(0, 1_000))
def test_queue_limits_leave_room_for_the_more_urgent(places: int) -> None:
    limits = [queue_limit(urgency, places) for urgency in Urgency]
    assert limits == sorted(limits)
    assert limits[Urgency.PRIORITY] == places
    assert all(limit > 0 for limit in limits) == (places > 0)
    if places >= 4:
        assert len(set(limits)) == len(limits)


async def test_a_flood_of_flex_cannot_fill_the_queue(start_engine: StartEngine) -> None:
    engine = await start_engine("endless", slots=1, max_queue=8)
    flex = ask(1, 4, 400, urgency=Urgency.FLEX)
    streams = [await engine.submit(flex)]
    await anext(streams[0])
    streams += [await engine.submit(flex) for _ in range(4)]
    with pytest.raises(EngineFull, match="flex ones queue up to 4 of 8"):
        await engine.submit(flex)
    with pytest.raises(EngineFull, match="batch ones queue up to 2 of 8"):
        await engine.embed([(1, 2)], 0, Urgency.BATCH)
    standard = [await engine.submit(ask(2, 4, 400)) for _ in range(2)]
    with pytest.raises(EngineFull, match="standard ones queue up to 6"):
        await engine.submit(ask(2, 4, 400))
    urgent = await engine.submit(ask(3, 4, 5, urgency=Urgency.PRIORITY))
    assert [token.token_id async for token in urgent]
    assert engine.stats().preempted_total > 0
    for stream in (*streams, *standard):
        await stream.aclose()
    assert (engine.stats().active, engine.stats().queued) == (0, 0)


async def test_displaced_streams_go_on_through_the_engine(start_engine: StartEngine) -> None:
    """Several of each class at once, over two slots; nobody notices."""
    crowd, alone = await start_engine("llama", slots=2), await start_engine("llama", slots=1)
    asked = [ask(number, 30 + number, 40, urgency=Urgency(number % 4)) for number in range(12)]

    async def run(engine: object, index: int) -> list[EngineToken]:
        return [token async for token in await engine.submit(asked[index])]  # type: ignore[attr-defined]

    got = await asyncio.gather(*(run(crowd, index) for index in range(12)))
    for index, tokens in enumerate(got):
        assert [token.token_id for token in tokens] == [token.token_id for token in await run(alone, index)]


def test_the_wait_grows_with_what_is_ahead_and_not_with_what_is_behind(lab: Lab) -> None:
    lab.restart()
    pace = Pace()
    pace.step_s, pace.read_s = 0.01, 0.001

    def wait(urgency: Urgency, prompt: int = 100) -> float:
        return pace.first_token_s(lab.tokens, lab.slots, PREFILL_TOKENS, urgency, prompt)

    idle = wait(Urgency.FLEX)
    assert idle == pytest.approx(100 * 0.001 + 100 / PREFILL_TOKENS * 0.01)
    assert wait(Urgency.FLEX, 200) == pytest.approx(2 * idle)
    for number in range(6):
        lab.submit(ask(number, 50, 100, urgency=Urgency.FLEX))
        lab.step()
    assert wait(Urgency.PRIORITY) == idle
    assert wait(Urgency.FLEX) > idle + 2 * 90 * 0.01  # four wait, so two full rounds of two slots are ahead
    pace.used = 0.5
    assert wait(Urgency.FLEX) < idle + 2 * 90 * 0.01
    assert wait(Urgency.BATCH) >= wait(Urgency.FLEX)


async def test_an_idle_engine_quotes_what_it_measured(start_engine: StartEngine) -> None:
    engine = await start_engine("endless")
    short, long = engine.wait_ms(Urgency.STANDARD, 10), engine.wait_ms(Urgency.STANDARD, 400)
    assert 0 < short <= long
    await engine.stop()
    assert engine.wait_ms(Urgency.STANDARD, 10) == 0
