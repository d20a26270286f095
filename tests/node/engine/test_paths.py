"""Cached, chunked, batched, displaced, beside others that come and go: every stream says what it says alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.engine.generation import Generation
from node.ports import EngineRequest, Urgency
from protocol.cache import BLOCK_TOKENS, hit_limit
from protocol.options import NO_OPTIONS, JobOptions
from tests.node.engine.lab import GREEDY, WARM, Lab, Plain, ids, seed

MODELS = ("dense", "llama", "mistral-window", "mixtral", "qwen3-moe")
OPTIONS = (
    NO_OPTIONS,
    NO_OPTIONS,
    JobOptions(frequency_milli=700, presence_milli=-300),
    JobOptions(min_tokens=9, stop_ids=tuple(range(1, 30))),
    JobOptions(min_tokens=6, presence_milli=900, stop_ids=(7, 8, 9), continued=4),
)


@dataclass(frozen=True)
class Job:
    """One stream: `shared` tokens of a common text, `own` of its own, `gap` steps after the last; perhaps cancelled."""

    shared: int
    own: int
    count: int
    urgency: Urgency
    greedy: bool
    salt: bytes
    options: JobOptions
    gap: int
    cancel_after: int | None
    slow_until: int

    def request(self, number: int) -> EngineRequest:
        prompt = ids(7_000, self.shared) + ids(number, self.own)
        how = GREEDY if self.greedy else WARM
        return EngineRequest(prompt, seed(number), self.count, how, self.options, self.urgency, self.salt)


JOBS = st.lists(
    st.builds(
        Job,
        shared=st.sampled_from([0, 32, 64, 96, 130]),
        own=st.sampled_from([4, 9, 33, 70]),
        count=st.sampled_from([1, 10, 17, 24]),
        urgency=st.sampled_from(Urgency),
        greedy=st.booleans(),
        salt=st.sampled_from([b"", seed(1), seed(1), seed(2)]),
        options=st.sampled_from(OPTIONS),
        gap=st.sampled_from([0, 1, 5, 14]),
        cancel_after=st.sampled_from([None, None, None, 2, 11]),
        slow_until=st.sampled_from([0, 0, 0, 80]),
    ),
    min_size=4,
    max_size=8,
)
SIZES = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([0, 5, 9, 60]))
"""Slots, pool blocks."""

SAVED_TOKENS = (0, 80, 10_000)
"""Host room for displaced streams: none, for some, for all."""


@cache
def lab_of(directory: Path, compiled: str, slots: int, pool_blocks: int, saved_tokens: int) -> Lab:
    return Lab(directory, slots, pool_blocks, saved_tokens, compile_option=compiled)


@cache
def alone(directory: Path, compiled: str, request: EngineRequest) -> list[int]:
    return plain_of(directory, compiled).generate(request)


@cache
def plain_of(directory: Path, compiled: str) -> Plain:
    return Plain(directory, compiled)


def play(lab: Lab, jobs: list[Job], seen: Counter[str]) -> dict[Generation, Job]:
    """Run all jobs through the lab as they come, with the shortest chunks there can be."""
    streams: dict[Generation, Job] = {}
    born: dict[Generation, int] = {}
    times = list(accumulate(job.gap for job in jobs))
    while len(streams) < len(jobs) or lab.scheduler.has_work() or lab.slow:
        while len(streams) < len(jobs) and times[len(streams)] <= lab.steps:
            job = jobs[len(streams)]
            stream = lab.submit(job.request(len(streams)))
            streams[stream], born[stream] = job, lab.steps
            if job.slow_until:
                lab.slow.add(stream)
        for stream, job in streams.items():
            if job.cancel_after is not None and lab.steps == born[stream] + job.cancel_after:
                lab.cancel(stream)
            if stream in lab.slow and lab.steps >= job.slow_until:
                lab.slow.remove(stream)
                stream.taken = stream.produced
        lab.scheduler.chunk = min(lab.scheduler.chunk, 24)
        lab.step()
        for stream in streams:
            seen["saved"] += stream.waiting and stream.produced > 0 and stream.saved is not None
            seen["computed again"] += stream.waiting and stream.produced > 1 and stream.fed == 0
        assert lab.steps < 3_000
    seen["hit"] += lab.scheduler.cached_total
    return streams


def check(lab: Lab, jobs: list[Job], seen: Counter[str]) -> None:
    lab.restart()
    streams = play(lab, jobs, seen)
    assert not lab.errors
    for stream, job in streams.items():
        whole = alone(lab.directory, lab.compiled, stream.request)
        got = lab.text(stream)
        assert got == whole[: len(got)] if job.cancel_after is not None else got == whole
        seen = {(token.cached_tokens, token.kept) for token in lab.tokens[stream]}
        assert len(seen) <= 1
        for cached, kept in seen:
            assert cached % BLOCK_TOKENS == 0
            assert 0 <= cached <= hit_limit(len(stream.request.prompt))
            assert (cached, kept) == (0, False) or job.salt
    assert lab.scheduler.active == len(lab.scheduler._waiting) == 0
    assert len(lab.cache) <= lab.decoder.kv.pool_blocks
    assert lab.scheduler._saved_room == lab._saved_bytes


def check_many(directory: Path, compiled: str, examples: int) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(jobs=JOBS, sizes=SIZES)
    def play_them(jobs: list[Job], sizes: tuple[int, int]) -> None:
        for saved_tokens in SAVED_TOKENS:
            check(lab_of(directory, compiled, *sizes, saved_tokens), jobs, seen)

    play_them()
    assert min(seen["hit"], seen["saved"], seen["computed again"]) > 0, seen


@pytest.mark.parametrize(("name", "compiled"), [("llama", "auto"), ("mistral-window", "off"), ("qwen3-moe", "off")])
def test_every_path_gives_the_tokens_of_the_plain_forward(
    name: str, compiled: str, model_dir: Callable[[str], Path]
) -> None:
    check_many(model_dir(name), compiled, 5)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["off", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_many_times(name: str, compiled: str, model_dir: Callable[[str], Path]) -> None:
    check_many(model_dir(name), compiled, 80)
