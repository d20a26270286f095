"""A profile of weights that another holds: the directory's own texts, the usual STE shape, and no claim to the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from node.engine.declared import declared_card, declared_profile, read_declared
from node.engine.profile import profile_of
from node.engine.spec import ModelError, load_spec
from tests.node.engine import models

DEMO = Path("devnet/model/tally-demo-4m")
SHAPE = ("body_parameters", "head_parameters", "layers", "heads", "head_dim", "window")
TEXTS = ("tokenizer_hash", "chat_template_hash", "special_policy_hash")


def written(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    """A directory as `--upstream` takes it: no weights."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (directory / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def demo_config(**changes: Any) -> dict[str, Any]:
    return {**json.loads((DEMO / "config.json").read_text()), **changes}


def test_the_same_texts_and_shape_and_nothing_of_the_weights() -> None:
    declared = read_declared(DEMO)
    ours, theirs = profile_of(DEMO), declared_profile(declared, "served", ids_shown=True)
    for name in (*TEXTS, *SHAPE):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("weights_root", "dtype_hash", "kv_dtype_hash", "engine_hash", "sampler_hash"):
        assert getattr(ours, name) != getattr(theirs, name), name
    assert (theirs.margin_milli, theirs.flag_ppm, theirs.moe_layers) == (0, 1_000_000, 0)
    other = declared_profile(declared, "another", ids_shown=True)
    assert other.weights_root != theirs.weights_root
    card = declared_card(declared, "name", theirs, 512)
    assert (card.model, card.max_context, card.eos_ids) == ("name", 512, (2, 0))


@pytest.mark.parametrize("name", [name for name in models.NAMES if name != "endless"])
def test_the_shape_is_that_of_the_engine_for_every_family_it_knows(name: str, tmp_path: Path) -> None:
    directory = models.save(name, tmp_path)
    spec, profile = load_spec(directory), declared_profile(read_declared(directory), "x", ids_shown=False)
    for field in SHAPE:
        assert getattr(profile, field) == getattr(spec, field), field
    assert profile.total_parameters - profile.active_parameters == spec.idle_parameters


def test_a_directory_without_weights_is_enough(tmp_path: Path) -> None:
    declared = read_declared(written(tmp_path, demo_config()))
    assert declared_profile(declared, "x", ids_shown=False).body_parameters == load_spec(DEMO).body_parameters


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"eos_token_id": None}, "ends a text"),
        ({"eos_token_id": "2"}, "ends a text"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_what_a_directory_has_to_say(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        declared_profile(read_declared(written(tmp_path, demo_config(**config))), "x", ids_shown=True)
