"""An OpenAI client, the gateway, a real router and provider, the real engine with the shipped model: one process."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from incentives.ledger import Role
from node.engine.card import load_card
from node.engine.engine import TorchEngine
from protocol.units import JobKind, Tier
from tests.node.gateway.serving import Served, serving
from tests.spine.lab import MODEL, Buyer, Market, Seller

SHIPPED = Path(__file__).parents[2] / "devnet" / "model" / "tally-demo-4m"
HELLO: list[Any] = [{"role": "user", "content": "Define the word river."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "lake"]},
        "deep": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 12},
        "next": {"type": "array", "items": {"$ref": "#/$defs/small"}, "maxItems": 2},
    },
    "required": ["kind", "deep", "name", "next"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
}
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'answer with <tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call><|im_end|>\n'
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Shop:
    served: Served
    buyer: Buyer
    seller: Seller

    async def ask(self, **options: Any) -> Any:
        return await self.served.client().chat.completions.create(
            **({"model": MODEL, "messages": HELLO, "temperature": 0.8, "max_tokens": 1600} | options)
        )


@asynccontextmanager
async def shop(model_dir: Path = SHIPPED) -> AsyncIterator[Shop]:
    engine = TorchEngine(model_dir, "fp32", slots=4, max_context=2048, threads=1)
    await engine.start()
    try:
        card = load_card(model_dir, MODEL, engine.profile, engine.max_context)
        async with Market() as market:
            seller = await market.seller(engine=engine, card=card)  # type: ignore[arg-type]
            buyer = await market.buyer(stall_s=30.0)
            async with serving(buyer.router) as served:
                yield Shop(served, buyer, seller)
    finally:
        await engine.stop()


def check(value: Any) -> None:
    """Whether a value is as SCHEMA has it."""
    assert set(value) == {"kind", "deep", "name", "next"}
    assert value["kind"] in ("river", "lake") and isinstance(value["deep"], bool)
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert len(value["next"]) <= 2 and all(isinstance(item, int) and 0 <= item <= 9 for item in value["next"])


async def test_a_schema_is_kept_token_by_token_and_paid_with_a_receipt() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA, "strict": True}}
    async with shop() as made:
        answer = await made.ask(response_format=wanted, logprobs=True, top_logprobs=3)
        choice = answer.choices[0]
        check(json.loads(choice.message.content))
        assert choice.finish_reason == "stop"
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
        again = await made.ask(response_format={"type": "json_object"}, max_tokens=120)
        assert again.choices[0].message.content.lstrip().startswith("{")
        receipts = await made.buyer.store.receipts(role=Role.CLIENT, final_only=True)
    assert len(receipts) == 2 and all(row.receipt.kind == JobKind.GENERATE for row in receipts)
    assert "0x" + receipts[0].digest.hex() in answer.usage.tally["receipts"] + again.usage.tally["receipts"]


async def test_a_schema_that_no_grammar_can_follow_is_a_bad_request_before_any_charge() -> None:
    import openai

    broken = {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}}
    async with shop() as made:
        with pytest.raises(openai.BadRequestError, match="grammar"):
            await made.ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": broken}})
        assert await made.buyer.store.receipts() == []
        assert (await made.ask(max_tokens=3)).usage.completion_tokens == 3


async def test_embeddings_are_unit_vectors_with_a_receipt_of_their_kind() -> None:
    texts = [f"the river number {number} is long" for number in range(35)]
    async with shop() as made:
        client = made.served.client()
        many = await client.embeddings.create(model=MODEL, input=texts)
        small = await client.embeddings.create(model=MODEL, input=texts[0], dimensions=16)
        receipts = await made.buyer.store.receipts(role=Role.CLIENT, final_only=True)
    assert [item.index for item in many.data] == list(range(35))
    for item in [*many.data, *small.data]:
        assert math.isclose(math.hypot(*item.embedding), 1.0, rel_tol=1e-4)
    assert len(many.data[0].embedding) == 256 and len(small.data[0].embedding) == 16
    assert many.data[0].embedding != many.data[1].embedding
    assert [row.receipt.kind for row in receipts] == [JobKind.EMBED] * 3
    assert many.usage.prompt_tokens + small.usage.prompt_tokens == sum(row.receipt.prompt_tokens for row in receipts)


async def test_a_cache_key_has_a_cache_of_its_own() -> None:
    talk = [{"role": "user", "content": "The river is long and the lake is deep. " * 30}]
    hits = []
    async with shop() as made:
        for key in ("mine", "mine", "yours", None, None):
            named = {} if key is None else {"prompt_cache_key": key}
            answer = await made.ask(messages=talk, max_tokens=2, **named)
            hits.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert hits[0] == hits[2] == hits[3] == 0 and hits[1] == hits[4] > 0


async def test_batch_jobs_have_receipts_of_their_kind() -> None:
    async with shop() as made:
        answer = await made.ask(max_tokens=8, extra_body={"x_tally": {"batch": True}, "min_tokens": 8})
        (row,) = await made.buyer.store.receipts(role=Role.CLIENT, final_only=True)
    assert answer.usage.completion_tokens == 8
    assert (row.receipt.kind, row.receipt.tier) == (JobKind.BATCH, Tier.FLEX)


async def test_a_required_call_fits_its_functions_schema(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHIPPED, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": HERMES}))
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("water", "other")]
    async with shop(model) as made:
        whole = await made.ask(tools=tools, tool_choice={"type": "function", "function": {"name": "water"}})
        chunks = [chunk async for chunk in await made.ask(tools=tools, tool_choice="required", stream=True)]
    [call] = whole.choices[0].message.tool_calls
    assert call.function.name == "water" and whole.choices[0].finish_reason == "tool_calls"
    check(json.loads(call.function.arguments))
    deltas = [delta for chunk in chunks if chunk.choices for delta in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name in ("water", "other") and deltas[0].id
    check(json.loads("".join(delta.function.arguments for delta in deltas)))
