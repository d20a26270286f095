"""The prefix cache: what is found is what was kept, promises are kept, payers never meet, and reading is skipped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node.engine.kv import kv_bytes_per_token
from node.engine.prefix_cache import HOLD_SLACK_S, PrefixCache
from node.engine.spec import load_spec
from node.ports import EngineRequest, EngineToken, Urgency
from protocol.cache import BLOCK_TOKENS, block_heads
from protocol.units import Digest
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import GREEDY, PAYER, Lab, ask, ids, seed

OTHER = seed(99)
POOL = 6
HOLD_S = 10


class CacheMachine(RuleBasedStateMachine):
    """Chains that share beginnings, over a small pool, with pins and time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cache = PrefixCache(POOL, lambda: self.now)
        self.chains = [
            block_heads(salt, ids(3, shared) + ids(number, 4 * BLOCK_TOKENS - shared))
            for number, salt, shared in ((1, PAYER, 64), (2, PAYER, 64), (3, PAYER, 0), (4, OTHER, 64))
        ]
        self.pins: list[tuple[Digest, ...]] = []
        self.promised: list[tuple[float, tuple[Digest, ...]]] = []

    def chain(self, which: int, length: int) -> tuple[Digest, ...]:
        return self.chains[which][: length + 1]

    @rule(which=st.integers(0, 3), length=st.integers(0, 4))
    def add(self, which: int, length: int) -> None:
        heads = self.chain(which, length)
        before = self.cache.count(heads, length)
        taken = self.cache.add(heads)
        assert [at for at, _ in taken] == list(range(before, before + len(taken)))
        assert self.cache.count(heads, length) == before + len(taken)
        if before + len(taken) < length:  # it stopped for want of room, not of will
            assert len(self.cache) == POOL

    @rule(which=st.integers(0, 3), most=st.integers(0, 4))
    def find(self, which: int, most: int) -> None:
        found = self.cache.find(self.chains[which], most)
        assert len(found) == self.cache.count(self.chains[which], most) <= most
        assert len(set(found)) == len(found)

    @rule(which=st.integers(0, 3), length=st.integers(0, 4))
    def pin(self, which: int, length: int) -> None:
        heads = self.chain(which, length)
        if self.cache.pin(heads):
            assert length > 0
            self.pins.append(heads)

    @rule(which=st.integers(0, 100))
    def unpin(self, which: int) -> None:
        if self.pins:
            heads = self.pins.pop(which % len(self.pins))
            self.cache.unpin(heads, HOLD_S)
            self.promised.append((self.now + HOLD_S, heads))

    @rule(seconds=st.sampled_from([1.0, 4.0, 40.0, 140.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def promises_are_kept(self) -> None:
        for heads in [*self.pins, *(heads for until, heads in self.promised if self.now < until)]:
            assert self.cache.count(heads, 9) == len(heads) - 1

    @invariant()
    def the_pool_is_shared_out_once(self) -> None:
        used = [block.index for block in self.cache._held.values()]
        assert sorted([*used, *self.cache._free]) == list(range(POOL))

    @invariant()
    def every_block_has_its_parent(self) -> None:
        for heads in self.chains:
            held = [head in self.cache._held for head in heads[1:]]
            assert held == sorted(held, reverse=True)


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestCacheMachine = CacheMachine.TestCase


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = PrefixCache(4, lambda: 0.0)
    one, two, three = (block_heads(PAYER, ids(number, 64)) for number in (1, 2, 3))
    cache.add(one)
    cache.add(two)
    cache.find(one, 2)
    cache.add(three[:2])
    assert [cache.count(heads, 2) for heads in (one, two, three)] == [2, 1, 1]


@pytest.fixture(scope="module")
def lab(model_dir: Callable[[str], Path]) -> Lab:
    return Lab(model_dir("endless"), slots=2, pool_blocks=16)


def flags(lab: Lab, request: EngineRequest) -> tuple[int, bool, int]:
    """(cached tokens, kept, tokens computed for its prompt) of one request, run to its end."""
    before = lab.read
    stream = lab.submit(request)
    lab.drain()
    first = lab.tokens[stream][0]
    return first.cached_tokens, first.kept, lab.read - before


def test_the_same_prompt_is_read_once(lab: Lab) -> None:
    lab.restart()
    assert flags(lab, ask(1, 100, 3, salt=PAYER)) == (0, True, 100)
    assert flags(lab, ask(1, 100, 3, salt=PAYER)) == (96, True, 4)
    assert flags(lab, ask(1, 96, 3, salt=PAYER)) == (64, True, 32)  # the last token is computed, so no whole hit
    assert flags(lab, ask(1, 97, 3, salt=PAYER)) == (96, True, 1)
    assert flags(lab, ask(1, 31, 3, salt=PAYER)) == (0, False, 31)
    assert flags(lab, ask(2, 100, 3, salt=PAYER)) == (0, True, 100)
    assert (lab.scheduler.prompt_total, lab.scheduler.cached_total) == (524, 256)


def test_payers_never_meet_and_no_salt_means_no_cache(lab: Lab) -> None:
    lab.restart()
    assert flags(lab, ask(1, 100, 3, salt=PAYER)) == (0, True, 100)
    assert flags(lab, ask(1, 100, 3, salt=OTHER)) == (0, True, 100)
    used = len(lab.cache)
    assert flags(lab, ask(1, 100, 3)) == (0, False, 100)
    assert flags(lab, ask(3, 100, 3)) == (0, False, 100)
    assert len(lab.cache) == used


def test_the_next_turn_of_a_chat_hits_the_last_answer(lab: Lab) -> None:
    lab.restart()
    turn = ask(4, 40, 60, salt=PAYER)
    answer = lab.run(turn)
    longer = EngineRequest((*turn.prompt, *answer, *ids(5, 10)), seed(6), 4, GREEDY, salt=PAYER)
    assert flags(lab, longer) == (96, True, 14)  # of 99 tokens that were in the slot


def test_two_that_come_together_read_the_prefix_once(lab: Lab) -> None:
    lab.restart()
    common = ids(8, 300)
    streams = [
        lab.submit(EngineRequest((*common, *ids(number, 20)), seed(number), 5, GREEDY, salt=PAYER)) for number in (1, 2)
    ]
    lab.drain()
    assert [lab.tokens[stream][0].cached_tokens for stream in streams] == [0, 288]
    assert lab.read == 320 + 32
    # one more urgent does not wait for one less urgent
    lab.restart()
    for number, urgency in ((1, Urgency.FLEX), (2, Urgency.PRIORITY)):
        prompt = (*common, *ids(number, 20))
        lab.submit(EngineRequest(prompt, seed(number), 5, GREEDY, urgency=urgency, salt=PAYER))
        lab.step()
    second = list(lab.tokens)[1]
    while not lab.tokens[second]:
        lab.step()
    assert lab.steps <= 3


def test_a_prefix_whose_reader_is_cancelled_is_read_by_the_next(lab: Lab) -> None:
    lab.restart()
    common = ids(8, 400)
    first, second = (
        lab.submit(EngineRequest((*common, *ids(number, 20)), seed(number), 5, GREEDY, salt=PAYER)) for number in (1, 2)
    )
    lab.step()
    lab.cancel(first)
    lab.drain()
    assert lab.tokens[second][0].cached_tokens == 256  # what the first had read by then
    assert lab.tokens[second][0].kept


def test_a_full_pool_states_what_it_does_not_keep(model_dir: Callable[[str], Path]) -> None:
    """What was promised stays for its time; a prompt that finds no room is served and not stated as kept."""
    lab = Lab(model_dir("endless"), pool_blocks=4)
    promised, other = ask(1, 100, 3, salt=PAYER, hold_s=60), ask(2, 100, 3, salt=PAYER)
    assert flags(lab, promised) == (0, True, 100)
    assert flags(lab, other) == (0, False, 100)
    lab.now = 59.0
    assert flags(lab, promised) == (96, True, 4)
    lab.now = 59.0 + 60.0 + HOLD_SLACK_S
    assert flags(lab, other) == (32, True, 68)  # one block had found room before
    assert flags(lab, ask(3, 100, 3, salt=PAYER)) == (0, True, 100)  # nobody promised to hold the other


def test_no_pool_at_all(model_dir: Callable[[str], Path]) -> None:
    lab = Lab(model_dir("endless"), pool_blocks=0)
    for _ in range(2):
        assert flags(lab, ask(1, 100, 3, salt=PAYER)) == (0, False, 100)


async def test_the_engine_states_hits_on_every_token(
    start_engine: StartEngine, model_dir: Callable[[str], Path]
) -> None:
    """Through the thread and the event loop, within a budget of two slots and some blocks."""
    token = kv_bytes_per_token(load_spec(model_dir("endless")), "fp32")
    engine = await start_engine("endless", slots=2, max_context=200, kv_budget_bytes=700 * token)
    request = ask(1, 130, 20, salt=PAYER)

    async def run() -> list[EngineToken]:
        return [out async for out in await engine.submit(request)]

    first, *rest = [await run() for _ in range(3)]
    assert {(out.cached_tokens, out.kept) for out in first} == {(0, True)}
    for again in rest:
        assert {(out.cached_tokens, out.kept) for out in again} == {(128, True)}
        assert [out.token_id for out in again] == [out.token_id for out in first]
    stats = engine.stats()
    assert (stats.prompt_total, stats.cached_total) == (390, 256)
    assert stats.kv_bytes <= 700 * token
    together = await asyncio.gather(*(run() for _ in range(6)))
    assert all([out.token_id for out in got] == [out.token_id for out in first] for got in together)
