"""Doctored copies of a model directory: fewer bits, fewer layers. What a provider saves memory and time with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from node.engine.decoder import Decoder
from node.engine.spec import weight_files
from node.engine.thresholds import CALIBRATION_FILE
from node.engine.weights import Gated, Linear, Weights

_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_COUNT: Final = "num_hidden_layers"


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, in] -> the same matrix as `bits`-bit integers with one scale a row hold it, in fp32.

    Symmetric absmax rounding per output channel, as in LLM.int8() (Dettmers et al. 2022).
    """
    wide = weight.float()
    limit = (1 << bits - 1) - 1
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=1e-12) / limit
    return (wide / scale).round_().clamp_(-limit, limit) * scale


def with_fewer_bits(model_dir: Path, target: Path, bits: int) -> Path:
    """A copy whose layers' matrices are rounded to `bits`; embedding and head stay, as is usual."""

    def doctor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        quantised = _LAYER.match(name) is not None and tensor.ndim == 2
        return name, rounded(tensor, bits) if quantised else tensor

    return _copy(model_dir, target, doctor, {})


def with_layers(model_dir: Path, target: Path, keep: Callable[[int, int], bool]) -> Path:
    """A copy with those of its layers for which `keep(index, layers)` holds, in order."""
    layers = int(_config(model_dir)[_COUNT])
    kept = [index for index in range(layers) if keep(index, layers)]
    places = {old: new for new, old in enumerate(kept)}

    def doctor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        found = _LAYER.match(name)
        if found is None:
            return name, tensor
        place = places.get(int(found[1]))
        return None if place is None else (f"model.layers.{place}.{found[2]}", tensor)

    return _copy(model_dir, target, doctor, _shape(model_dir, kept))


def without_middle_layer(model_dir: Path, target: Path) -> Path:
    """One layer fewer: the middle one, whose loss shows least."""
    return with_layers(model_dir, target, lambda index, layers: index != layers // 2)


def half_the_layers(model_dir: Path, target: Path) -> Path:
    """Every other layer: a model of half the size with the same vocabulary."""
    return with_layers(model_dir, target, lambda index, layers: index % 2 == 0 or index == layers - 1)


def _shape(model_dir: Path, kept: Sequence[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {_COUNT: len(kept)}
    types = _config(model_dir).get("layer_types")
    if types:
        changes["layer_types"] = [types[index] for index in kept]
    return changes


def _config(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config


def _copy(
    model_dir: Path,
    target: Path,
    doctor: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None],
    changes: dict[str, Any],
) -> Path:
    target.mkdir(parents=True)
    weights = weight_files(model_dir)
    tensors: dict[str, torch.Tensor] = {}
    for path in weights:
        for name, tensor in load_file(path).items():
            made = doctor(name, tensor)
            if made is not None:
                tensors[made[0]] = made[1].contiguous()
    save_file(tensors, target / "model.safetensors")
    for path in model_dir.iterdir():
        beside = path.is_file() and path not in weights and path.suffix in (".json", ".jinja")
        if beside and "index" not in path.name and path.name != CALIBRATION_FILE:  # that is of the true weights
            shutil.copy(path, target / path.name)
    (target / "config.json").write_text(json.dumps({**_config(model_dir), **changes}))
    return target


class RoundedInputs(Linear):
    """A linear map whose inputs are rounded to 8 bits, one scale a row: what W8A8 kernels multiply.

    Source: ZeroQuant (Yao et al. 2022), dynamic per-token activations.
    """

    __slots__ = ("_inner",)

    def __init__(self, inner: Linear) -> None:
        self._inner = inner
        self.product = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        return self._inner(rounded(x, 8).to(x.dtype))


def round_inputs(decoder: Decoder) -> None:
    """Have every linear map in the decoder's layers round what it is given."""
    weights = decoder._weights
    layers = []
    for layer in weights.layers:
        mlps = tuple(Gated(RoundedInputs(mlp.gate_up), RoundedInputs(mlp.down)) for mlp in layer.mlps)
        fields = {name: getattr(layer, name) for name in type(layer).__dataclass_fields__}
        maps = {"qkv": RoundedInputs(layer.qkv), "out": RoundedInputs(layer.out), "mlps": mlps}
        layers.append(type(layer)(**{**fields, **maps}))
    decoder._weights = Weights(weights.embed, tuple(layers), weights.norm, weights.head)
    if hasattr(decoder, "_whole"):
        decoder._whole = None  # the one-call forward reads packed matrices; layer by layer goes through ours
