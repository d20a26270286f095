"""Replays of honest work find nothing; replays of altered work find it, at the very token."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.engine.compiled import kernels_for, make_sampler
from node.engine.engine import TorchEngine
from node.engine.generation import EngineError
from node.engine.grammar import Grammars
from node.engine.replay import GAP_MAX, TorchReplayer, _distance
from node.engine.sampler import Draw
from node.engine.spec import load_spec
from node.ports import EngineRequest, Replay, ReplayRequest, Sampling, Unreplayable, Urgency
from protocol import sampling
from protocol.errors import LocalProtocolError
from protocol.options import JobOptions, Syntax
from protocol.transcript import Row, pack_fp16, unpack_fp16
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import GREEDY, PAYER, WARM, Lab, ask, ids, seed
from tests.node.engine.models import SHIPPED
from tests.node.engine.test_module_decoder import SERVED, save

StartReplayer = Callable[..., Awaitable[TorchReplayer]]
CPU = torch.device("cpu")


@pytest.fixture
async def start_replayer(model_dir: Callable[[str], Path]) -> AsyncIterator[StartReplayer]:
    """Start a replayer in fp32 on the named model; all are stopped at the end."""
    replayers: list[TorchReplayer] = []

    async def start(name: str = "llama", **options: Any) -> TorchReplayer:
        replayer = TorchReplayer(model_dir(name), **{"dtype": "fp32", **options})
        replayers.append(replayer)
        await replayer.start()
        return replayer

    yield start
    for replayer in replayers:
        await replayer.stop()


async def rows_of(engine: Any, request: EngineRequest) -> tuple[Row, ...]:
    async with aclosing(await engine.submit(request)) as stream:
        return tuple([Row(token.token_id, token.logprob, token.projection, token.routing) async for token in stream])


def again(request: EngineRequest, rows: tuple[Row, ...], **changes: Any) -> ReplayRequest:
    made = ReplayRequest(request.prompt, rows, request.seed, request.sampling, request.options)
    return dataclasses.replace(made, **changes)


def flags(found: Replay, margin: float = 0.01, logprob: float = 0.001, projection: float = 0.002) -> list[int]:
    """Positions that are off by more than rounding between kernels in fp32 is, many times over."""
    numbers = zip(found.margins, found.logprobs, found.projections, found.routing, strict=True)
    return [i for i, (m, n, p, r) in enumerate(numbers) if m > margin or n > logprob or p > projection or not r]


# ------------------------------------------------------------------------------------------------- the margin by batch


@pytest.fixture(scope="module")
def samplers() -> list[Any]:
    """Torch's, and the compiled one, over 24 tokens."""
    spec = dataclasses.replace(load_spec(SHIPPED), vocab=24)
    kernels = kernels_for("on", spec, torch.float32, CPU, 1, None)
    return [make_sampler(24, 16, CPU, None), make_sampler(24, 16, CPU, kernels)]


GRID = st.integers(-24, 24).map(lambda n: n / 8)
"""Logits with many ties, and none at 0.15 from another, where fp32 and fp64 might disagree on who is above."""


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(st.lists(GRID, min_size=24, max_size=24), min_size=3, max_size=3),
    how=st.lists(
        st.tuples(
            st.sampled_from([0, 300_000, 1_000_000, 2_500_000]),
            st.sampled_from([1_000_000, 973_001, 613_001, 100_003]),
            st.sampled_from([0, 1, 2, 7, 23, 24, 900]),
        ),
        min_size=3,
        max_size=3,
    ),
    chosen=st.lists(st.integers(0, 23), min_size=3, max_size=3),
    banned=st.sets(st.integers(0, 23), max_size=6),
    number=st.integers(0, 1000),
)
def test_margins_and_gaps_are_those_of_the_protocols_reference(
    samplers: list[Any],
    logits: list[list[float]],
    how: list[tuple[int, int, int]],
    chosen: list[int],
    banned: set[int],
    number: int,
) -> None:
    rows = [[-math.inf if i in banned else x for i, x in enumerate(row)] for row in logits]
    draws = [Draw.at(seed(number), 10 + i, *rule) for i, rule in enumerate(how)]
    for sampler in samplers:
        found = sampler.look_back(torch.tensor(rows), torch.tensor(chosen), draws)
        for i, (row, token, rule) in enumerate(zip(rows, chosen, how, strict=True)):
            expected = sampling.margin(row, token, seed(number), 10 + i, *rule)
            scores = sorted(
                (x + rule[0] / 1e6 * sampling.noise(seed(number), 10 + i, k) for k, x in enumerate(row)), reverse=True
            )
            assert float(found[i, 0]) == pytest.approx(expected, abs=2e-5)
            assert float(found[i, 1]) == pytest.approx(scores[0] - scores[1], abs=2e-5)


@given(number=st.floats(-60_000, 60_000, width=32))
@example(-8.0034)  # rounds to a power of two, where numbers outwards are twice as far apart as inwards
def test_rounding_alone_is_no_distance(number: float) -> None:
    raw = pack_fp16([number])
    assert _distance(raw, np.array([number]))[0] == 0
    (claimed,) = unpack_fp16(raw)
    step = math.ulp(abs(claimed)) * 2.0**42 if abs(claimed) >= 2.0**-14 else 2.0**-24
    off = claimed + math.copysign(20 * step, claimed)
    if abs(off) < 65_000:
        assert _distance(raw, np.array([off]))[0] == pytest.approx(19.5 * step)


def test_no_number_is_infinitely_far() -> None:
    """Else a record of NaN would be within every distance."""
    raw = np.array([np.nan, np.inf, 1.0], ">f2").tobytes()
    assert _distance(raw, np.array([1.0, 1.0, np.nan])).tolist() == [math.inf] * 3


# -------------------------------------------------------------------------------------------------------- honest work

HONEST = {
    "plain": ask(1, 9, 40, how=Sampling(1_000_000)),
    "greedy": ask(2, 9, 40, how=GREEDY),
    "cuts": ask(3, 30, 40, how=WARM),
    "narrow": ask(4, 30, 40, how=Sampling(1_700_000, 500_000, 5)),
    "penalties": ask(5, 20, 40, options=JobOptions(frequency_milli=700, presence_milli=-400)),
    "continued": ask(6, 40, 40, options=JobOptions(frequency_milli=900, min_tokens=50, continued=22)),
    "late stop": ask(7, 5, 40, options=JobOptions(min_tokens=12, stop_ids=tuple(range(1, 60)))),
    "long": ask(8, 300, 60, how=WARM),
    "cached": ask(8, 300, 60, how=WARM, salt=PAYER),
}


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("name", ["llama", "dense", "mistral-window", "llama-bias", "qwen3", "mixtral", "qwen3-moe"])
async def test_honest_work_is_never_flagged(
    start_engine: StartEngine, start_replayer: StartReplayer, name: str, compiled: str
) -> None:
    """Generated by one kind of kernels in company, replayed by the other and by its own."""
    engine = await start_engine(name, slots=6, compile_option=compiled)
    outputs = await asyncio.gather(*(rows_of(engine, request) for request in HONEST.values()))
    for kind in ("off", "on"):
        replayer = await start_replayer(name, compile_option=kind)
        assert replayer.profile == engine.profile
        for what, request, rows in zip(HONEST, HONEST.values(), outputs, strict=True):
            found = await replayer.replay(again(request, rows))
            assert not flags(found), (what, kind)
            assert len(found.margins) == len(found.gaps) == len(rows)
            assert set(found.ends) <= {len(rows) - 1}, what


async def test_the_shipped_model_in_bf16_replays_to_the_bit(
    start_engine: StartEngine, start_replayer: StartReplayer
) -> None:
    """With the compiled kernels a row's bits know no company: all that is left is the rounding of what is claimed."""
    engine = await start_engine("shipped", dtype="bf16", slots=8, compile_option="on")
    requests = [ask(i, 20 + i, 60, how=WARM) for i in range(8)]
    outputs = await asyncio.gather(*(rows_of(engine, request) for request in requests))
    replayer = await start_replayer("shipped", dtype="bf16", compile_option="on")
    for request, rows in zip(requests, outputs, strict=True):
        found = await replayer.replay(again(request, rows))
        assert max(found.margins) == 0
        assert not flags(found, 0, 1e-5, 1e-5)


def test_preempted_streams_are_not_flagged(model_dir: Callable[[str], Path]) -> None:
    """Displaced with their keys kept, and with them computed again."""
    for saved_tokens in (10_000, 0):
        lab = Lab(model_dir("llama"), slots=2, saved_tokens=saved_tokens)
        slow = [lab.submit(ask(i, 30, 40, urgency=Urgency.BATCH)) for i in range(2)]
        for _ in range(10):
            lab.step()
        fast = [lab.submit(ask(10 + i, 30, 20, urgency=Urgency.PRIORITY)) for i in range(2)]
        lab.drain()
        assert lab.scheduler.preempted_total == 2
        streams = [*slow, *fast]
        rows = [tuple(Row(t.token_id, t.logprob, t.projection, t.routing) for t in lab.tokens[s]) for s in streams]

        async def look(requests: list[ReplayRequest]) -> list[Replay]:
            replayer = TorchReplayer(model_dir("llama"), "fp32")
            await replayer.start()
            try:
                return [await replayer.replay(request) for request in requests]
            finally:
                await replayer.stop()

        asked = [again(stream.request, made) for stream, made in zip(streams, rows, strict=True)]
        assert not any(flags(found) for found in asyncio.run(look(asked)))


async def test_a_grammar_is_followed_again(start_engine: StartEngine, start_replayer: StartReplayer) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    options = JobOptions(syntax=Syntax.JSON_SCHEMA, grammar=schema, min_tokens=3)
    engine, replayer = await start_engine("shipped"), await start_replayer("shipped")
    request = ask(1, 12, 60, how=Sampling(1_000_000), options=options)
    rows = await rows_of(engine, request)
    assert not flags(await replayer.replay(again(request, rows)))
    free = await rows_of(engine, dataclasses.replace(request, options=JobOptions()))
    found = await replayer.replay(again(request, free))
    assert found.margins[0] == math.inf  # it does not begin an object
    assert found.margins[-1] == math.inf  # nor can anything that follows be of the grammar
    assert max(found.gaps) <= GAP_MAX


@pytest.mark.parametrize("name", ["gpt-neox", "gemma2", "starcoder2"])
async def test_another_architecture_is_replayed_by_its_module(name: str, tmp_path: Path) -> None:
    directory = save(*SERVED[name], tmp_path)
    engine, replayer = TorchEngine(directory, "fp32", slots=3), TorchReplayer(directory, "fp32")
    await engine.start()
    await replayer.start()
    try:
        requests = [ask(i, 10 + i, 30) for i in range(3)]
        outputs = await asyncio.gather(*(rows_of(engine, request) for request in requests))
        for request, rows in zip(requests, outputs, strict=True):
            assert not flags(await replayer.replay(again(request, rows)))
    finally:
        await engine.stop()
        await replayer.stop()


# ------------------------------------------------------------------------------------------------------- altered work


@pytest.fixture
async def honest(start_engine: StartEngine) -> tuple[EngineRequest, tuple[Row, ...]]:
    request = ask(3, 30, 60, how=WARM)
    return request, await rows_of(await start_engine("endless"), request)


async def test_an_altered_token_is_flagged_where_it_stands(
    honest: tuple[EngineRequest, tuple[Row, ...]], start_replayer: StartReplayer
) -> None:
    request, rows = honest
    replayer = await start_replayer("endless")
    for at in (0, 17, 59):
        altered = list(rows)
        altered[at] = altered[at]._replace(token_id=(rows[at].token_id + 1) % 100)
        found = await replayer.replay(again(request, tuple(altered)))
        assert flags(found)[0] == at


async def test_another_seed_temperature_or_prompt_is_flagged(
    honest: tuple[EngineRequest, tuple[Row, ...]], start_replayer: StartReplayer
) -> None:
    request, rows = honest
    replayer = await start_replayer("endless")
    assert not flags(await replayer.replay(again(request, rows)))
    lies: list[dict[str, Any]] = [
        {"seed": seed(99)},
        {"sampling": Sampling(1_400_000, 950_000, 40)},
        {"prompt": request.prompt[1:]},
        {"prompt": (*request.prompt[:-1], 7)},
        {"options": JobOptions(frequency_milli=2000)},
    ]
    for lie in lies:
        assert len(flags(await replayer.replay(again(request, rows, **lie)))) > 3, lie


async def test_other_experts_are_flagged(start_engine: StartEngine, start_replayer: StartReplayer) -> None:
    request = ask(3, 20, 20)
    rows = await rows_of(await start_engine("mixtral"), request)
    altered = [*rows[:4], rows[4]._replace(routing=bytes(8)), rows[5]._replace(routing=b""), *rows[6:]]
    replayer = await start_replayer("mixtral")
    found = await replayer.replay(again(request, tuple(altered)))
    assert [i for i, same in enumerate(found.routing) if not same] == [4, 5]


async def test_text_after_its_end_is_told(start_engine: StartEngine, start_replayer: StartReplayer) -> None:
    """A job that wrote on behind a stop: every such place is among the ends."""
    request = ask(3, 20, 20, options=JobOptions(stop_ids=(5, 6)))
    rows = tuple(Row(token, b"\0\0", bytes(16)) for token in (4, 5, 9, 100, 6))
    assert (await (await start_replayer()).replay(again(request, rows))).ends == (1, 3, 4)


# --------------------------------------------------------------------------------------------------- what is no request


async def test_what_could_never_have_been_served_is_refused(start_replayer: StartReplayer) -> None:
    replayer = await start_replayer()
    request, row = ask(1, 10, 5), Row(5, b"\0\0", bytes(16))
    good = again(request, (row,) * 5)
    await replayer.replay(good)
    bad: list[dict[str, Any]] = [
        {"prompt": ()},
        {"prompt": (101,)},
        {"rows": (row._replace(token_id=101),)},
        {"rows": (row._replace(logprob=b""),)},
        {"rows": (row._replace(routing=b"1"),)},
        {"prompt": ids(1, 510)},
        {"seed": b"short"},
        {"sampling": Sampling(-1)},
        {"options": JobOptions(continued=11)},
        {"options": JobOptions(min_tokens=600)},
    ]
    for change in bad:
        with pytest.raises(ValueError):
            await replayer.replay(dataclasses.replace(good, **change))
    small = await start_replayer(max_context=12)
    with pytest.raises(EngineError, match="nothing was judged"):
        await small.replay(good)


async def test_what_another_machine_may_do_is_held_against_nobody(
    start_replayer: StartReplayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow validator, or one of little memory, must not call an honest job forged."""
    replayer = await start_replayer("shipped")
    options = JobOptions(syntax=Syntax.JSON_SCHEMA, grammar='{"type": "integer"}')

    async def too_slow(self: Grammars, source: str) -> None:
        raise ValueError("it takes too much time or memory to compile; simplify it")

    monkeypatch.setattr(Grammars, "_check", too_slow)
    with pytest.raises(Unreplayable, match="this machine"):
        await replayer.replay(again(ask(1, 10, 5, options=options), (Row(5, b"\0\0", bytes(16)),)))
    small = await start_replayer(max_context=12)
    with pytest.raises(EngineError, match="nothing was judged"):
        await small.embed([ids(1, 40)], 16)


async def test_a_defect_of_the_replayer_is_no_fault_of_the_text(
    start_replayer: StartReplayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError says that nobody can have served it; one out of the numbers themselves must not."""
    replayer = await start_replayer()

    def broken(self: TorchReplayer, request: ReplayRequest, matcher: object) -> Replay:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(TorchReplayer, "_replay", broken)
    with pytest.raises(EngineError, match="nothing was judged"):
        await replayer.replay(again(ask(1, 10, 5), (Row(5, b"\0\0", bytes(16)),)))


async def test_a_job_without_output_gives_nothing(start_replayer: StartReplayer) -> None:
    found = await (await start_replayer()).replay(again(ask(1, 10, 5), ()))
    assert found == Replay((), (), (), (), (), ())


async def test_embeddings_are_the_engines(start_engine: StartEngine, start_replayer: StartReplayer) -> None:
    texts = [ids(i, 20 + 90 * i) for i in range(3)]
    made = await (await start_engine()).embed(texts, 16, Urgency.STANDARD)
    replayer = await start_replayer()
    for ours, theirs in zip(await replayer.embed(texts, 16), made, strict=True):
        assert np.frombuffer(ours, "<f4") == pytest.approx(np.frombuffer(theirs, "<f4"), abs=1e-5)
    with pytest.raises(ValueError):
        await replayer.embed(texts, 1000)


async def test_it_runs_once_and_stops_at_any_time(model_dir: Callable[[str], Path]) -> None:
    replayer = TorchReplayer(model_dir("endless"), "fp32")
    with pytest.raises(LocalProtocolError):
        _ = replayer.profile
    request = again(ask(1, 10, 5), (Row(5, b"\0\0", bytes(16)),) * 400)
    with pytest.raises(EngineError):
        await replayer.replay(request)
    await replayer.start()
    with pytest.raises(LocalProtocolError):
        await replayer.start()
    waiting = [asyncio.ensure_future(replayer.replay(request)) for _ in range(6)]
    await asyncio.sleep(0)
    await replayer.stop()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, Replay | EngineError) for end in ended)
    assert any(isinstance(end, EngineError) for end in ended)
    await replayer.stop()
    await replayer.start()
    cancelled = asyncio.ensure_future(replayer.replay(request))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert len((await replayer.replay(request)).margins) == 400
    await replayer.stop()
