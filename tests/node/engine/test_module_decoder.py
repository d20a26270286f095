"""Architectures served through their transformers module: the tokens of transformers, or a refusal that says why."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from node.engine.compiled import open_decoder
from node.engine.decoder import Batch, DecoderBase, Segment
from node.engine.engine import TorchEngine
from node.engine.module_decoder import ModuleDecoder
from node.engine.profile import profile_of
from node.engine.spec import ModelError, load_spec
from node.ports import EngineRequest, Sampling
from protocol import metering
from tests.node.engine import models

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 100,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 6}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma2": ("Gemma2Config", {**GROUPED, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"num_key_value_heads": 2, "logits_scaling": 4.0}),
    "starcoder2": ("Starcoder2Config", {"num_key_value_heads": 2, "sliding_window": 12}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("MambaConfig", {"state_size": 4}, "without plain sizes|computes attention itself"),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 6}, "not supported"),
    "experts": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    "sinks": ("GptOssConfig", {**GROUPED, "num_local_experts": 2}, "mixture of experts"),
}


def save(kind: str, extra: dict[str, Any], target: Path) -> Path:
    config = getattr(transformers, kind)(**{**SIZES, **extra})
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    (target / "tokenizer.json").write_text("{}")
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return target


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(*SERVED[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


_OPEN: dict[str, tuple[DecoderBase, Any]] = {}


def pair(name: str, served: Callable[[str], Path]) -> tuple[DecoderBase, Any]:
    """Our decoder and the plain model, kept over Hypothesis' examples."""
    if name not in _OPEN:
        spec = load_spec(served(name))
        run = open_decoder(served(name), spec, "fp32", CPU, 3, min(128, spec.max_positions), 0, None)
        _OPEN[name] = run, models.reference(served(name))
    return _OPEN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
@settings(max_examples=5, deadline=None)
@given(number=st.integers(0, 1 << 20))
def test_cut_and_mixed_at_random_it_computes_the_plain_forward(
    name: str, number: int, served: Callable[[str], Path]
) -> None:
    run, model = pair(name, served)
    assert isinstance(run, ModuleDecoder)
    rng = random.Random(number)
    texts = [[rng.randrange(1, 100) for _ in range(rng.randrange(2, 50))] for _ in range(3)]
    fed = [0, 0, 0]
    while any(fed[i] < len(texts[i]) for i in range(3)):
        left = [i for i in range(3) if fed[i] < len(texts[i])]
        chosen = rng.sample(left, rng.randrange(1, len(left) + 1))
        decode = [i for i in chosen if rng.random() < 0.5]
        counts = {i: 1 if i in decode else rng.randrange(1, len(texts[i]) - fed[i] + 1) for i in chosen}
        order = [*decode, *(i for i in chosen if i not in decode)]
        batch = Batch(
            decode,
            [texts[i][fed[i]] for i in decode],
            [fed[i] for i in decode],
            [Segment(i, fed[i], tuple(texts[i][fed[i] : fed[i] + counts[i]])) for i in order if i not in decode],
        )
        with torch.inference_mode():
            logits, at = run.logits(run.forward(batch).hidden), 0
            for i in order:
                expected = model(torch.tensor([texts[i][: fed[i] + counts[i]]]), use_cache=False).logits[0, fed[i] :]
                assert torch.allclose(logits[at : at + counts[i]], expected, rtol=1e-3, atol=1e-3)
                fed[i] += counts[i]
                at += counts[i]


@pytest.mark.parametrize("name", ["gpt-neox", "gemma2", "starcoder2"])
async def test_the_engine_writes_what_generate_writes(name: str, served: Callable[[str], Path]) -> None:
    model = models.reference(served(name))
    engine = TorchEngine(served(name), "fp32", slots=2, threads=1)
    await engine.start()
    try:
        asked = [tuple(random.Random(i).randrange(1, 99) for _ in range(n)) for i, n in enumerate((3, 30, 11))]

        async def run(prompt: tuple[int, ...]) -> list[int]:
            stream = await engine.submit(EngineRequest(prompt, bytes(32), 20, Sampling(0)))
            return [token.token_id async for token in stream]

        for prompt, got in zip(asked, await asyncio.gather(*map(run, asked)), strict=True):
            assert got == models.greedy(model, list(prompt), 20)
    finally:
        await engine.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-neox", "phi", "gpt2", "olmo2"])
def test_ste_formula_counts_what_torch_counts(name: str, served: Callable[[str], Path]) -> None:
    """Token by token, the cached ones first, uncounted."""
    model = transformers.AutoModelForCausalLM.from_pretrained(served(name), attn_implementation="eager").eval()
    usage = metering.Usage(prompt=40, cached=16, completion=20, reasoning=0)
    ids = torch.tensor([[random.Random(1).randrange(1, 100) for _ in range(60)]])
    counter = FlopCounterMode(display=False)
    with torch.inference_mode():
        past = model.base_model(ids[:, : usage.cached], use_cache=True).past_key_values
        with counter:
            for i in range(usage.cached, usage.prompt + usage.completion):
                body = model.base_model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
                if usage.prompt - 1 <= i < usage.prompt + usage.completion - 1:
                    model.get_output_embeddings()(body.last_hidden_state)
    assert metering.flops(profile_of(served(name)), usage) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_window_in_some_layers_only_ends_the_context(served: Callable[[str], Path]) -> None:
    """Metering knows one window for all layers: within the smallest, none cuts anything."""
    spec = load_spec(served("gemma2"))
    assert (spec.window, spec.max_positions) == (0, 64)
    assert (load_spec(served("starcoder2")).window, load_spec(served("gpt-neox")).window) == (12, 0)


def test_a_window_the_config_does_not_tell_is_refused(served: Callable[[str], Path]) -> None:
    """Metering would charge for keys that nobody looked at."""
    spec = replace(load_spec(served("starcoder2")), window=0)
    with pytest.raises(ModelError, match=r"windows that its config does not tell: \[12\]"):
        open_decoder(served("starcoder2"), spec, "fp32", CPU, 2, 64, 0, None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_what_can(name: str, tmp_path: Path) -> None:
    kind, extra, message = REFUSED[name]
    directory = save(kind, extra, tmp_path / name)
    with pytest.raises(ModelError, match=message) as caught:
        open_decoder(directory, load_spec(directory), "fp32", CPU, 2, 64, 0, None)
    assert "supported are LlamaForCausalLM" in str(caught.value)


def test_a_module_that_fails_its_proof_is_refused(
    served: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose positions come from elsewhere would: here the scale of its logits is lost."""
    monkeypatch.setattr(ModuleDecoder, "logits", lambda self, hidden: 2 * self._head(hidden).float())
    with pytest.raises(ModelError, match="does not compute the same in parts as in one piece"):
        open_decoder(served("phi"), load_spec(served("phi")), "fp32", CPU, 2, 64, 0, None)


def test_code_from_the_directory_is_never_run(served: Callable[[str], Path], tmp_path: Path) -> None:
    directory = save(*SERVED["phi"], tmp_path / "phi")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot read"):
        load_spec(directory)
    assert not (tmp_path / "ran").exists()
