"""The engine against transformers: the same greedy tokens, the same fingerprints, the same operation counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from node.engine.profile import profile_of
from node.engine.thresholds import UNCALIBRATED
from node.ports import EngineRequest, EngineToken, Sampling
from protocol import metering, sampling, transcript
from protocol.units import FinishReason
from tests.node.engine import models
from tests.node.engine.conftest import StartEngine

SEED = bytes(range(32))
MICRO = sampling.MICRO


def prompts(vocab: int, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    rng = random.Random(11)
    return [tuple(rng.randrange(1, vocab - 1) for _ in range(length)) for length in lengths]


@pytest.mark.parametrize("name", ["shipped", *models.NAMES])
async def test_greedy_equals_transformers_token_for_token(
    name: str, start_engine: StartEngine, model_dir: Callable[[str], Path]
) -> None:
    """Batched together, prefilled in chunks, more streams than slots; EOS ends a stream as it ends generate."""
    engine = await start_engine(name)
    model = models.reference(model_dir(name))
    asked = prompts(engine.vocab_size, (1, 5, 40, 300, 17, 64))

    async def run(prompt: tuple[int, ...]) -> list[EngineToken]:
        return [token async for token in await engine.submit(EngineRequest(prompt, SEED, 30, Sampling(0)))]

    for prompt, got in zip(asked, await asyncio.gather(*map(run, asked)), strict=True):
        assert [token.token_id for token in got] == models.greedy(model, list(prompt), 30)
        assert all(token.finish is FinishReason.OPEN for token in got[:-1])
        ends = got[-1].token_id == model.generation_config.eos_token_id
        assert got[-1].finish is (FinishReason.STOP if ends else FinishReason.LENGTH)


@pytest.mark.parametrize("name", ["shipped", "qwen3", "mixtral"])
async def test_an_independent_prefill_finds_no_margin_and_the_same_fingerprints(
    name: str, start_engine: StartEngine, model_dir: Callable[[str], Path]
) -> None:
    """What a validator does: one prefill over prompt and output by other code, then margins and fingerprints."""
    engine = await start_engine(name)
    model = models.reference(model_dir(name))
    drawn = Sampling(800_000, 950_000, 40)
    for prompt in prompts(engine.vocab_size, (9, 70)):
        out = [token async for token in await engine.submit(EngineRequest(prompt, SEED, 24, drawn))]
        ids = [*prompt, *(token.token_id for token in out)]
        with torch.inference_mode():
            result = model(torch.tensor([ids]), output_hidden_states=True)
        for index, token in enumerate(out):
            position = len(prompt) + index
            logits = result.logits[0, position - 1]
            gap = sampling.margin(logits.tolist(), token.token_id, SEED, position, 800_000, 950_000, 40)
            assert gap < 1e-3
            logprob = transcript.unpack_fp16(token.logprob)[0]
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token.token_id]), rel=2e-3, abs=2e-3)
            hidden = result.hidden_states[-1][0, position - 1].tolist()
            again = transcript.unpack_fp16(transcript.project(SEED, hidden))
            assert transcript.unpack_fp16(token.projection) == pytest.approx(again, rel=2e-3, abs=4e-3)


async def test_honest_bf16_is_not_flagged(start_engine: StartEngine, model_dir: Callable[[str], Path]) -> None:
    """Tokens flip between bf16 kernels, here even of other code, but only near-ties: margins stay in the noise."""
    engine = await start_engine("shipped", dtype="bf16")
    model = models.reference(model_dir("shipped"), torch.bfloat16)

    async def run(prompt: tuple[int, ...]) -> list[int]:
        return [token.token_id async for token in await engine.submit(EngineRequest(prompt, SEED, 30))]

    asked = prompts(engine.vocab_size, (12, 40, 100))
    gaps = []
    for prompt, out in zip(asked, await asyncio.gather(*map(run, asked)), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *out]])).logits[0].float()
        for position, token_id in enumerate(out, len(prompt)):
            row = logits[position - 1].tolist()
            gaps.append(1000 * sampling.margin(row, token_id, SEED, position, MICRO, MICRO, 0))
    limit = UNCALIBRATED["bf16"].margin_milli
    assert sum(gap > limit for gap in gaps) <= 1
    assert max(gaps) < 2 * limit


@pytest.mark.parametrize("name", ["dense", "llama", "qwen2", "qwen3", "mistral-window", "mixtral", "qwen3-moe"])
def test_ste_formula_counts_what_torch_counts(name: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Within 1 % of FlopCounterMode, token by token: the cached ones first, uncounted, then the rest."""
    directory = models.save(name, tmp_path / name, num_key_value_heads=6) if name == "qwen2" else model_dir(name)
    model = models.transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    usage = metering.Usage(prompt=40, cached=16, completion=20, reasoning=0)
    ids = torch.tensor([prompts(90, (60,))[0]])
    counter = FlopCounterMode(display=False)
    with torch.inference_mode():
        past = model.model(ids[:, : usage.cached], use_cache=True).past_key_values
        with counter:
            for i in range(usage.cached, usage.prompt + usage.completion):
                body = model.model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
                if usage.prompt - 1 <= i < usage.prompt + usage.completion - 1:
                    model.lm_head(body.last_hidden_state)
    counted = counter.get_total_flops()
    assert metering.flops(profile_of(directory), usage) == pytest.approx(counted, rel=0.01)
