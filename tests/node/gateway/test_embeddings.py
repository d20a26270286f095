"""/v1/embeddings: by OpenAI's own SDK, which asks for base64, and by hand."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.gateway.embeddings import job_batches, parse_embeddings
from node.gateway.errors import ApiError
from node.ports import JobFailed
from protocol.errors import Refused
from protocol.options import EMBED_INCREMENT_TOKENS, MAX_EMBED_INPUTS
from protocol.units import JobKind, Tier
from tests.node.gateway.cards import card
from tests.node.gateway.serving import Served, ids, serving, unchunked
from tests.twins.fake_marketplace import Embed, Fail, FakeMarketplace, Finish, Hold, Start, vector_of


def market(*script: Any, **options: Any) -> FakeMarketplace:
    return FakeMarketplace(card(**options), script or (Embed(), Finish()))


async def embed(served: Served, texts: Any, **options: Any) -> Any:
    return await served.client().embeddings.create(**({"model": "tally-test", "input": texts} | options))


def floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


async def test_a_text_is_one_job_with_a_receipt() -> None:
    fake = market()
    async with serving(fake) as served:
        answer = await embed(served, "the quick fox")
    assert answer.object == "list" and answer.model == "tally-test"
    assert answer.data[0].embedding == pytest.approx(floats(vector_of(ids("the quick fox"))))
    assert math.isclose(sum(x * x for x in answer.data[0].embedding), 1.0, rel_tol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids("the quick fox"))
    tally = answer.usage.model_extra["tally"]
    assert len(tally["jobs"]) == len(tally["receipts"]) == 1 and int(tally["cost_wei"]) > 0
    spec = fake.specs[0]
    assert (spec.kind, spec.max_tokens, spec.options.inputs) == (JobKind.EMBED, 0, (len(ids("the quick fox")),))


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_both_encodings_say_the_same(form: str) -> None:
    async with serving(market()) as served:
        answer = await embed(served, ["hello", "world"], encoding_format=form)
        body = json.dumps({"model": "tally-test", "input": "hello", "encoding_format": form}).encode()
        raw = unchunked(await served.post(body, "/v1/embeddings"))
    if form == "float":
        assert answer.data[1].embedding == pytest.approx(floats(vector_of(ids("world"))))
    assert isinstance(raw["data"][0]["embedding"], list if form == "float" else str)


async def test_token_ids_are_taken_as_they_are() -> None:
    fake = market()
    async with serving(fake) as served:
        one = await embed(served, list(ids("hello")))
        two = await embed(served, [list(ids("hello")), list(ids("world"))])
        with pytest.raises(openai.BadRequestError) as caught:
            await embed(served, [[1], [10**6]])
    assert one.data[0].embedding == two.data[0].embedding == pytest.approx(floats(vector_of(ids("hello"))))
    assert caught.value.param == "input[1]"
    assert [spec.options.inputs for spec in fake.specs] == [
        (len(ids("hello")),),
        (len(ids("hello")), len(ids("world"))),
    ]


async def test_many_texts_are_several_jobs_in_order() -> None:
    texts = [f"text number {number}" for number in range(2 * MAX_EMBED_INPUTS + 5)]
    fake = market()
    async with serving(fake) as served:
        answer = await embed(served, texts, dimensions=4, extra_body={"service_tier": "flex"})
    assert [len(spec.options.inputs) for spec in fake.specs] == [MAX_EMBED_INPUTS, MAX_EMBED_INPUTS, 5]
    assert {(spec.tier, spec.options.dimensions) for spec in fake.specs} == {(Tier.FLEX, 4)}
    assert [item.index for item in answer.data] == list(range(len(texts)))
    for text, item in zip(texts, answer.data, strict=True):
        assert item.embedding == pytest.approx(floats(vector_of(ids(text), 4)))
    assert answer.usage.prompt_tokens == sum(len(ids(text)) for text in texts)
    assert len(answer.usage.model_extra["tally"]["jobs"]) == 3


@given(lengths=st.lists(st.sampled_from([1, 300, 2_048, 8_192, 9_000]), min_size=1, max_size=80))
def test_each_job_holds_what_may_be_lost_at_once_and_no_more(lengths: list[int]) -> None:
    texts = [(number,) * length for number, length in enumerate(lengths)]
    batches = job_batches(texts)
    assert [ids for batch in batches for ids in batch] == texts
    for batch in batches:
        assert 1 <= len(batch) <= MAX_EMBED_INPUTS
        assert len(batch) == 1 or sum(map(len, batch)) <= EMBED_INCREMENT_TOKENS


async def test_a_limit_is_shared_by_the_jobs() -> None:
    fake = market()
    async with serving(fake, max_price=10**12) as served:
        await embed(served, ["a text"] * (MAX_EMBED_INPUTS + 1))
    assert sum(spec.price_ceiling or 0 for spec in fake.specs) <= 10**12
    assert all(spec.price_ceiling for spec in fake.specs)


async def test_a_provider_without_embeddings_is_a_bad_request() -> None:
    async with serving(market(Fail(Refused("bad_request", "this provider serves no embeddings")))) as served:
        with pytest.raises(openai.BadRequestError, match="serves no embeddings"):
            await embed(served, "x")


async def test_what_was_bought_before_a_failure_is_told() -> None:
    fake = market(Start(), Embed(), Fail(JobFailed("nobody went on.")))
    async with serving(fake) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            await embed(served, "x")
        fake.script = (Embed(),)
        with pytest.raises(openai.InternalServerError):
            await embed(served, "x")
    assert caught.value.code == "job_failed"


async def test_leaving_closes_the_jobs() -> None:
    import asyncio

    hold = Hold()
    fake = market(hold)
    async with serving(fake) as served:
        waiting = asyncio.ensure_future(embed(served, "x"))
        await hold.reached.wait()
        waiting.cancel()
        await asyncio.wait_for(fake.was_closed.wait(), 10)
    assert fake.closed == 1


async def test_texts_above_the_context_are_named() -> None:
    fake = market(max_context=8)
    async with serving(fake) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await embed(served, ["short", "word " * 30])
    assert (caught.value.param, caught.value.code) == ("input[1]", "context_length_exceeded") and fake.specs == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [1, "a"]}, "input[0][1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1, -1]]}, "input[0][1]"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"model": ""}, "model"),
    ],
)
def test_a_bad_parameter_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_embeddings({"model": "tally-test", "input": "x", **change})
    assert (caught.value.status, caught.value.param) == (400, param)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3)
)


@given(st.dictionaries(st.sampled_from(["model", "input", "dimensions", "encoding_format", "x_tally"]), values))
@settings(max_examples=150, deadline=None)
def test_any_body_is_a_call_or_a_bad_request(body: dict[str, Any]) -> None:
    try:
        assert parse_embeddings(body).inputs
    except ApiError as exc:
        assert exc.status == 400
