"""Per-request options: penalties, min_tokens, stops, continued output, alternatives, routing; bad ones refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.engine import adjust
from node.engine.adjust import Adjustment
from node.engine.decoder import Batch, Segment
from node.ports import EngineRequest, Sampling, Urgency
from protocol.options import JobOptions
from protocol.sampling import adjusted
from protocol.transcript import routing_fingerprint
from protocol.units import FinishReason
from tests.node.engine import models
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import CPU, GREEDY, WARM, Lab, Plain, ask, ids, seed

VOCAB = 20
PENALTIES = st.integers(-2000, 2000)


@given(
    options=st.builds(JobOptions, frequency_milli=PENALTIES, presence_milli=PENALTIES, min_tokens=st.integers(0, 12)),
    continued=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    tokens=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    logits=st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB),
)
def test_the_bias_is_that_of_the_protocols_reference(
    options: JobOptions, continued: list[int], tokens: list[int], logits: list[float]
) -> None:
    stops = frozenset({3, 7})
    adjustment = Adjustment(options, continued, stops, None, VOCAB, CPU)
    for token in tokens:
        adjustment.take(token)
    output = continued + tokens
    counts = {token: output.count(token) for token in output}
    banned = stops if len(output) < options.min_tokens else frozenset()
    expected = adjusted(dict(enumerate(logits)), options, counts, banned)
    got = torch.tensor([logits]) + adjust.bias([adjustment], VOCAB, CPU)
    assert got[0].tolist() == pytest.approx([expected[i] for i in range(VOCAB)], abs=1e-4)
    if adjustment.idle:
        assert expected == dict(enumerate(logits))


@pytest.fixture(scope="module")
def lab(model_dir: Callable[[str], Path]) -> Lab:
    return Lab(model_dir("llama"), slots=3)


@pytest.fixture(scope="module")
def plain(model_dir: Callable[[str], Path]) -> Plain:
    return Plain(model_dir("llama"))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    options=st.builds(
        JobOptions,
        frequency_milli=st.sampled_from([-1500, 0, 400, 2000]),
        presence_milli=st.sampled_from([-2000, 0, 1000]),
        min_tokens=st.sampled_from([0, 1, 7, 30]),
        stop_ids=st.sampled_from([(), (5,), tuple(range(1, 60))]),
        continued=st.sampled_from([0, 3, 12]),
    ),
    how=st.sampled_from([GREEDY, WARM, Sampling(1_500_000, 600_000, 7)]),
    number=st.integers(0, 50),
)
def test_tokens_are_those_of_the_protocols_sampler(
    lab: Lab, plain: Plain, options: JobOptions, how: Sampling, number: int
) -> None:
    """Beside a stream without options, whose tokens are what they are without company."""
    lab.restart()
    request, neighbour = ask(number, 15, 30, how=how, options=options), ask(200, 15, 30, how=WARM)
    streams = [lab.submit(neighbour), lab.submit(request)]
    lab.drain()
    assert [lab.text(stream) for stream in streams] == [plain.generate(neighbour), plain.generate(request)]


def test_a_continuation_counts_what_it_continues(lab: Lab) -> None:
    """Cut anywhere, the rest by another: penalties, min_tokens and the end fall where they would have."""
    options = JobOptions(frequency_milli=900, presence_milli=300, min_tokens=18, stop_ids=tuple(range(1, 40)))
    request = ask(3, 20, 40, options=options)
    whole = lab.run(request)
    assert len(whole) >= 18
    for cut in range(1, len(whole)):
        rest = EngineRequest(
            (*request.prompt, *whole[:cut]),
            request.seed,
            40 - cut,
            request.sampling,
            JobOptions(**{**{f: getattr(options, f) for f in options.__struct_fields__}, "continued": cut}),
        )
        assert whole[:cut] + lab.run(rest) == whole


def test_rows_without_options_are_sampled_without_a_bias(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed for them; once min_tokens is reached, nothing is for that stream either."""
    calls: list[tuple[int, bool]] = []
    choose = lab.sampler.choose

    def counted(logits: torch.Tensor, draws: object, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append((len(logits), bias is not None))
        return choose(logits, draws, bias)  # type: ignore[arg-type]

    lab.restart()
    monkeypatch.setattr(lab.sampler, "choose", counted)
    lab.submit(ask(1, 10, 12))
    lab.submit(ask(2, 10, 12, options=JobOptions(min_tokens=3)))
    lab.submit(ask(4, 10, 12))
    for _ in range(5):
        lab.step()
    assert calls == [(1, True), (2, False)] * 3 + [(3, False)] * 2


def test_alternatives_are_the_likeliest_of_the_unmodified_logits(lab: Lab, model_dir: Callable[[str], Path]) -> None:
    lab.restart()
    options = JobOptions(alternatives=5, frequency_milli=1000)
    request = ask(1, 20, 15, options=options)
    stream, bare = lab.submit(request), lab.submit(ask(2, 20, 15, options=JobOptions(alternatives=2)))
    lab.drain()
    model = models.reference(model_dir("llama"))
    text = lab.text(stream)
    with torch.inference_mode():
        rows = model(torch.tensor([[*request.prompt, *text]])).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    for token, row in zip(lab.tokens[stream], rows, strict=True):
        values, likeliest = row.topk(5)
        assert [token_id for token_id, _ in token.alternatives] == likeliest.tolist()
        got = [struct.unpack(">e", raw)[0] for _, raw in token.alternatives]
        assert got == pytest.approx(values.tolist(), abs=5e-3, rel=2e-3)
        own = struct.unpack(">e", token.logprob)[0]
        assert own == pytest.approx(float(row[token.token_id]), abs=5e-3, rel=2e-3)
    assert {len(token.alternatives) for token in lab.tokens[bare]} == {2}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_routing_fingerprints_the_experts_of_each_token(name: str, model_dir: Callable[[str], Path]) -> None:
    """In chunks and in company, the same as the routing of one forward over the whole text."""
    lab = Lab(model_dir(name), slots=3)
    lab.scheduler.chunk = 16
    requests = [ask(number, 20 + 7 * number, 12) for number in range(3)]
    streams = [lab.submit(request) for request in requests]
    lab.drain()
    alone = Plain(model_dir(name))
    for stream, request in zip(streams, requests, strict=True):
        text = (*request.prompt, *lab.text(stream))
        with torch.inference_mode():
            routing = alone._decoder.forward(Batch([], [], [], [Segment(0, 0, text[:-1])])).routing
        assert routing is not None
        rows = routing[len(request.prompt) - 1 :].tolist()
        assert [token.routing for token in lab.tokens[stream]] == [routing_fingerprint(row) for row in rows]
    assert len({token.routing for stream in streams for token in lab.tokens[stream]}) > 1


def test_a_dense_model_has_no_routing(lab: Lab) -> None:
    lab.restart()
    stream = lab.submit(ask(1, 10, 5))
    lab.drain()
    assert {token.routing for token in lab.tokens[stream]} == {b""}


async def test_stop_before_min_tokens_is_not_chosen(start_engine: StartEngine) -> None:
    engine = await start_engine("shipped")
    request = EngineRequest(ids(1, 10), seed(1), 30, WARM)
    whole = [token.token_id async for token in await engine.submit(request)]
    stop = whole[4]
    for least, ends in ((0, True), (5, True), (8, False)):
        options = JobOptions(stop_ids=(stop,), min_tokens=least)
        got = [token async for token in await engine.submit(EngineRequest(request.prompt, seed(1), 30, WARM, options))]
        early = [token.token_id for token in got[: max(0, least)]]
        assert (got[-1].finish, len(got)) == (FinishReason.STOP, 5) if ends and least < 5 else stop not in early[:4]
        if least == 8:
            assert len(got) >= 8
            assert stop not in early[:7]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (JobOptions(stop_ids=(101,)), "stop id 101 is outside"),
        (JobOptions(min_tokens=6), "min_tokens is 6, at most 5"),
        (JobOptions(continued=3), "continued is 3, the prompt has 2"),
        (JobOptions(frequency_milli=2001), "frequency_milli is 2001"),
        (JobOptions(presence_milli=-2001), "presence_milli is -2001"),
        (JobOptions(alternatives=21), "alternatives is 21"),
    ],
)
async def test_impossible_options_are_refused(options: JobOptions, reason: str, start_engine: StartEngine) -> None:
    engine = await start_engine()
    with pytest.raises(ValueError, match=reason):
        await engine.submit(EngineRequest((1, 2), seed(1), 5, options=options))
    with pytest.raises(ValueError, match="every token is a stop id"):
        await engine.submit(EngineRequest((1, 2), seed(1), 5, options=JobOptions(stop_ids=tuple(range(101)))))
    assert engine.stats().active == engine.stats().queued == 0


# --------------------------------------------------------------------------------------------------------- embeddings


async def test_vectors_are_the_means_of_the_reference_models_hidden_states(
    start_engine: StartEngine, model_dir: Callable[[str], Path]
) -> None:
    """Long and short texts, in chunks, among generations; cut to fewer dimensions and normalised again."""
    engine = await start_engine("llama", slots=3)
    model = models.reference(model_dir("llama"))
    texts = [ids(number, length) for number, length in enumerate((1, 20, 300, 512, 64, 5, 31, 32, 33, 200))]
    stream = await engine.submit(ask(50, 10, 40))
    for dimensions in (0, 12):
        vectors = await engine.embed(texts, dimensions, Urgency.FLEX)
        for text, vector in zip(texts, vectors, strict=True):
            got = torch.frombuffer(bytearray(vector), dtype=torch.float32)
            assert len(got) == (dimensions or engine.hidden_size)
            with torch.inference_mode():
                mean = model.model(torch.tensor([text])).last_hidden_state[0].mean(0)[: dimensions or None]
            assert torch.allclose(got, mean / mean.norm(), atol=1e-5)
            assert float(got.norm()) == pytest.approx(1, abs=1e-6)
    assert [token async for token in stream]
    assert (engine.stats().active, engine.stats().queued) == (0, 0)


def test_a_displaced_embedding_is_the_same(model_dir: Callable[[str], Path]) -> None:
    from node.engine.generation import embedding

    for saved_tokens in (0, 1_000):
        lab = Lab(model_dir("llama"), slots=1, saved_tokens=saved_tokens)
        vectors = []
        for disturb in (False, True):
            stream = embedding(ids(1, 400), 0, Urgency.BATCH)
            lab.take(stream)
            lab.step()
            if disturb:
                lab.submit(ask(2, 20, 5))
            lab.drain()
            vectors.append(torch.frombuffer(bytearray(lab.vectors[stream]), dtype=torch.float32))
        assert lab.scheduler.preempted_total == 1
        assert torch.allclose(*vectors, atol=1e-6)


async def test_embeddings_refused_and_cancelled(start_engine: StartEngine) -> None:
    import asyncio

    engine = await start_engine("endless", slots=1)
    for texts, dimensions, reason in (
        ([], 0, "no text"),
        ([()], 0, "empty"),
        ([(1,), (101,)], 0, "token id 101"),
        ([(1,) * 513], 0, "513 tokens, the context holds 512"),
        ([(1,)], 49, "dimensions is 49"),
        ([(1,)], -1, "dimensions is -1"),
    ):
        with pytest.raises(ValueError, match=reason):
            await engine.embed(texts, dimensions, Urgency.FLEX)
    blocker = await engine.submit(ask(1, 4, 400))
    await anext(blocker)
    task = asyncio.create_task(engine.embed([ids(1, 100)] * 3, 0, Urgency.STANDARD))
    while engine.stats().queued < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await blocker.aclose()
    assert len(await engine.embed([ids(1, 10)], 0, Urgency.BATCH)) == 1
    assert engine.stats().queued == 0
