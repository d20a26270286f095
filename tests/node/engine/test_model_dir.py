"""Model directories: what is refused and how it is said; profiles; the size of the KV memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.engine.card import load_card
from node.engine.engine import TorchEngine
from node.engine.kv import kv_bytes_per_token
from node.engine.memory import plan_memory
from node.engine.profile import profile_of, resolve_dtype
from node.engine.spec import ModelError, load_spec
from node.engine.weights import load_weights
from protocol.card import special_policy_hash
from tests.node.engine import models
from tests.node.engine.conftest import StartEngine


@pytest.fixture
def copied(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "missing or malformed"),
        ({"num_key_value_heads": 4}, "do not fit together"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1.0}}, "partial rotary"),
    ],
)
def test_unsupported_configs_are_refused_by_name(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit(copied / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        TorchEngine(copied)


def test_windows_in_some_layers_are_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = models.save("qwen3", tmp_path / "mixed", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelError, match="some layers only"):
        TorchEngine(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_broken_files_are_named(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"\xff not what it should be")
    with pytest.raises(ModelError, match=name):
        TorchEngine(copied)
    (copied / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        TorchEngine(copied)


def test_no_directory() -> None:
    with pytest.raises(ModelError, match="no directory"):
        TorchEngine(Path("/nonexistent/model"))


def test_missing_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        profile_of(copied)


def test_tensors_missing_extra_or_of_another_shape(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)

    def load(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file)
        load_weights(copied, load_spec(copied), "fp32", torch.device("cpu"))

    key = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"no tensor {key}"):
        load({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(ModelError, match="does not use, such as model.layers.1.extra"):
        load({**tensors, "model.layers.1.extra": torch.zeros(1)})
    with pytest.raises(ModelError, match="expected floats of shape"):
        load({**tensors, key: torch.zeros(3, 3)})
    with pytest.raises(ModelError, match="expected floats"):
        load({**tensors, key: tensors[key].to(torch.int8)})


async def test_sharded_weights_are_the_same_model(
    copied: Path, tmp_path: Path, model_dir: Callable[[str], Path], start_engine: StartEngine
) -> None:
    models.reference(copied).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copied / name, tmp_path / "shards" / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    spec = load_spec(tmp_path / "shards")
    one = load_weights(copied, spec, "fp32", torch.device("cpu"))
    many = load_weights(tmp_path / "shards", spec, "fp32", torch.device("cpu"))
    probe = torch.randn(3, spec.hidden)
    assert torch.equal(one.head(probe), many.head(probe))
    assert torch.equal(one.layers[1].qkv(probe), many.layers[1].qkv(probe))
    a, b = profile_of(copied), profile_of(tmp_path / "shards")
    assert a.total_parameters == b.total_parameters


def test_profile_changes_with_whatever_changes_a_token(copied: Path) -> None:
    before = profile_of(copied, "fp32")
    assert profile_of(copied, "fp32") == before == profile_of(copied, "auto")
    assert profile_of(copied, "bf16").dtype_hash != before.dtype_hash
    edit(copied / "config.json", rms_norm_eps=1e-4)
    after = profile_of(copied, "fp32")
    assert dataclasses.replace(after, weights_root=before.weights_root) == before != after
    edit(copied / "tokenizer_config.json", chat_template="other")
    assert profile_of(copied, "fp32").chat_template_hash != before.chat_template_hash
    edit(copied / "tokenizer_config.json", bos_token={"content": "<other>"})
    assert profile_of(copied, "fp32").special_policy_hash != before.special_policy_hash


def test_card_has_what_its_profile_binds(copied: Path) -> None:
    profile = profile_of(copied)
    card = load_card(copied, "m", profile, 64)
    assert special_policy_hash(card.special, card.eos_ids) == profile.special_policy_hash
    assert hashlib.sha256(card.tokenizer_json).digest() == profile.tokenizer_hash
    assert hashlib.sha256(card.chat_template.encode()).digest() == profile.chat_template_hash


def test_parameter_counts_equal_transformers(model_dir: Callable[[str], Path]) -> None:
    for name in ("shipped", "llama", "mixtral"):
        model = models.reference(model_dir(name))
        profile = profile_of(model_dir(name))
        assert profile.total_parameters == sum(p.numel() for p in model.parameters())
        idle = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) // 2 if name == "mixtral" else 0
        assert profile.active_parameters == profile.total_parameters - idle


def test_dtype_names() -> None:
    assert resolve_dtype("auto", 4_000_000) == "fp32"
    assert resolve_dtype("auto", 8_000_000_000) == "bf16"
    assert resolve_dtype("auto", 4_000_000, "cuda") == "bf16"
    with pytest.raises(ModelError, match="int4"):
        resolve_dtype("int4", 1)


async def test_memory_is_split_within_the_kv_budget(
    model_dir: Callable[[str], Path], start_engine: StartEngine
) -> None:
    spec = load_spec(model_dir("llama"))
    token = 4 * kv_bytes_per_token(spec, "fp32")
    assert plan_memory(spec, "fp32", 4, None, 10**9).context == spec.max_positions
    assert plan_memory(spec, "fp32", 4, None, 400 * token + 3).context == 300  # three quarters of it
    assert plan_memory(spec, "bf16", 4, None, 200 * token).context == 300
    assert plan_memory(spec, "fp32", 4, None, 300 * token).context == 256  # rather the shortest worth serving
    asked = plan_memory(spec, "fp32", 4, 400, 400 * token)
    assert (asked.context, asked.pool_blocks, asked.saved_bytes) == (400, 0, 0)
    for budget in (300 * token, 1000 * token, 10**9):
        plan = plan_memory(spec, "fp32", 4, None, budget)
        assert 0 <= budget - plan.slot_bytes - plan.saved_bytes - plan.pool_bytes < 32 * token
        assert plan.slot_bytes == plan.context * token
    with pytest.raises(ModelError, match="4 slots of 256 tokens .* leave none for the prefix cache"):
        plan_memory(spec, "fp32", 4, None, 200 * token)
    with pytest.raises(ModelError, match="4 slots of 400 tokens"):
        plan_memory(spec, "fp32", 4, 400, 300 * token)
    with pytest.raises(ModelError, match="what the model was made for"):
        plan_memory(spec, "fp32", 4, spec.max_positions + 1, 10**9)
    engine = await start_engine(max_context=100, kv_budget_bytes=200 * token)
    assert engine.max_context == 100
    assert 100 * token < engine.stats().kv_bytes <= 200 * token


def test_a_device_that_is_not_there(model_dir: Callable[[str], Path]) -> None:
    for name in ("cuda:99", "no-device"):
        with pytest.raises(ModelError, match=name):
            TorchEngine(model_dir("llama"), device=name)


def test_reasoning_marks_are_tokens_that_the_template_uses(copied: Path) -> None:
    def marks(template: str, *texts: str) -> tuple[int, int]:
        added = [{"id": 50 + i, "content": text, "special": False} for i, text in enumerate(texts)]
        edit(copied / "tokenizer.json", added_tokens=added)
        edit(copied / "tokenizer_config.json", chat_template=template)
        profile = profile_of(copied)
        return profile.reasoning_start, profile.reasoning_end

    assert marks("{{ '<think>' }}", "<s>", "<think>", "</think>") == (51, 52)
    assert marks("{{ x.split('</think>') }}", "</think>", "<think>") == (51, 50)
    assert marks("no word of it", "<think>", "</think>") == (0, 0)
    assert marks("{{ '<think>' }}", "<think>") == (0, 0)
    assert marks("[THINK]", "<think>", "</think>", "[THINK]", "[/THINK]") == (52, 53)


def test_profile_tells_the_routers(model_dir: Callable[[str], Path]) -> None:
    fields = ("moe_layers", "experts", "experts_chosen")
    shapes = {name: profile_of(model_dir(name)) for name in ("llama", "mixtral", "qwen3-moe")}
    assert [[getattr(profile, field) for field in fields] for profile in shapes.values()] == [
        [0, 0, 0],
        [2, 4, 2],
        [1, 4, 2],
    ]


def test_the_grammar_library_is_part_of_the_profile(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = profile_of(copied)
    monkeypatch.setattr("node.engine.profile.version", lambda name: "0.0.1")
    assert profile_of(copied).sampler_hash != before.sampler_hash


def test_importing_the_package_or_a_profile_needs_no_torch() -> None:
    code = "import sys, node.engine, node.engine.profile; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
