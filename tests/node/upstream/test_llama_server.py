"""Against a real llama_cpp.server: jobs through provider, router and receipts, with the tokens that it wrote."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from incentives.ledger import Role
from node.engine.declared import declared_card, declared_profile, read_declared
from node.ports import JobSpec, JobStarted, JobTokens, ModelCard, Sampling
from node.system import SystemClock
from node.upstream.engine import ModelTexts, UpstreamEngine
from node.upstream.http import HttpServer
from node.upstream.settings import UpstreamSettings
from node.upstream.texts import Texts
from protocol.options import JobOptions
from protocol.units import FinishReason, Verifiability
from tests.node.upstream.llama import DEMO, SERVED, Servers
from tests.spine.lab import MODEL, Market, idle, run

pytestmark = pytest.mark.slow

TEXTS = Texts((DEMO / "tokenizer.json").read_bytes())
CHAT = "<|im_start|>user\nTell me of a lion<|im_end|>\n<|im_start|>assistant\n"


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[tuple[UpstreamEngine, ModelCard]]:
    declared = read_declared(DEMO)
    engine = UpstreamEngine(
        UpstreamSettings(url, slots=1),
        ModelTexts(declared.tokenizer_json, declared.eos_ids, declared.bos_id, declared.context),
        lambda able: declared_profile(declared, able.model, ids_shown=able.ids_out),
        SystemClock(),
    )
    await engine.start()
    try:
        yield engine, declared_card(declared, MODEL, engine.profile, engine.max_context)
    finally:
        await engine.stop()


async def asked_directly(url: str, prompt: str, **changes: Any) -> dict[str, Any]:
    """What the server writes when nothing is in between; `pieces`: token by token, as it streams them."""
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    body = {"model": SERVED, "prompt": prompt, **neutral, **changes}
    async with HttpServer(url) as server:
        found = await server.post("/completions", body)
        events = await server.stream("/completions", {**body, "stream": True})
        pieces = [event["choices"][0]["text"] async for event in events]
        await events.aclose()
    choice: dict[str, Any] = found["choices"][0]
    return {**choice, "usage": found["usage"], "pieces": [piece for piece in pieces if piece]}


def job(prompt: str, max_tokens: int, temperature_micro: int = 0, options: JobOptions | None = None) -> JobSpec:
    spec = JobSpec(MODEL, TEXTS.encode(prompt), max_tokens, Sampling(temperature_micro, 1_000_000, 0))
    return spec if options is None else JobSpec(MODEL, spec.prompt, max_tokens, spec.sampling, options)


async def test_a_job_is_billed_by_the_tokens_that_the_server_wrote(servers: Servers) -> None:
    url, _ = servers.start()
    prompt = "The first book of the history of the world"
    async with serving(url) as (engine, card), Market() as market:
        able = engine.abilities
        assert able.seeds and able.top_k and able.min_tokens and not able.ids_in and not able.ids_out
        seller, buyer = await market.seller(engine=engine, card=card), await market.buyer()
        (offer,) = await buyer.router.market()
        assert offer.verifiability is Verifiability.NONE, "nobody can check what this server writes"
        tokens, done, _ = await run(buyer, job(prompt, 100))
        direct = await asked_directly(url, prompt, temperature=0, max_tokens=100)
        pieces = [TEXTS.behind(tuple(tokens[:i]), (token,)) for i, token in enumerate(tokens)]
        assert pieces == direct["pieces"], "token by token what the server wrote"
        assert done.prompt_tokens == direct["usage"]["prompt_tokens"] == len(TEXTS.encode(prompt))
        assert done.completion_tokens == direct["usage"]["completion_tokens"] == 100
        assert done.finish is FinishReason.LENGTH and done.cached_tokens == 0
        assert done.cost == done.prompt_tokens * 10**10 + 100 * 10**11
        await idle(seller)
        (row,) = await seller.store.receipts(role=Role.PROVIDER, final_only=True)
        assert row.receipt.completion_tokens == 100 and row.receipt.total == done.cost
        assert row.voucher is not None


async def test_a_chat_ends_with_its_end_token_and_a_seed_repeats_itself(servers: Servers) -> None:
    url, _ = servers.start()
    async with serving(url) as (engine, card), Market() as market:
        await market.seller(engine=engine, card=card)
        buyer = await market.buyer()
        tokens, done, _ = await run(buyer, job(CHAT, 200))
        direct = await asked_directly(url, CHAT, temperature=0, max_tokens=200)
        assert done.finish is FinishReason.STOP and direct["finish_reason"] == "stop"
        assert tokens[-1] == card.eos_ids[0] and TEXTS.behind((), tokens[:-1]) == direct["text"]
        assert done.completion_tokens == direct["usage"]["completion_tokens"] + 1, "the end token, as anywhere"
        warm = [await run(buyer, job(CHAT, 40, 1_200_000)) for _ in range(2)]
        assert warm[0][0] != warm[1][0], "each job has a seed of its own"
        long, _, _ = await run(buyer, job(CHAT, 60, options=JobOptions(min_tokens=50)))
        assert len(long) >= 50


async def test_a_killed_server_is_failed_over(servers: Servers) -> None:
    (url, process), (other, _) = servers.start(), servers.start()
    prompt = "The first book of the history of the world"
    whole = await asked_directly(url, prompt, temperature=0, max_tokens=400)
    async with serving(url) as (engine, card), serving(other) as (spare, spare_card), Market() as market:
        assert card.profile_id == spare_card.profile_id
        first = await market.seller(engine=engine, card=card, completion_price=10**10)
        await market.seller(engine=spare, card=spare_card)
        buyer = await market.buyer()
        tokens: list[int] = []
        by: list[bytes] = []
        async for event in buyer.router.run(job(prompt, 400)):
            if isinstance(event, JobStarted):
                by.append(event.provider)
            if isinstance(event, JobTokens):
                if not tokens:
                    process.send_signal(signal.SIGKILL)
                tokens += event.token_ids
        assert by[0] == first.wallet.address and len(by) == 2, "the cheaper one began, the other went on"
        assert TEXTS.behind((), tokens) == whole["text"]
