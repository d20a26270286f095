"""Weights from safetensors into the few fused matrices that the decoder multiplies by.

Every tensor of the files must be used, and every tensor needed must be there with its shape: a checkpoint that is
quantised, truncated or of another model is refused by the name of the tensor, not served wrongly.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from node.engine.kernels import Kernels, Product
from node.engine.spec import ModelError, ModelSpec, weight_files

TORCH_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_IGNORED_SUFFIXES: Final = (".rotary_emb.inv_freq",)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch multiply by matrices that oneDNN has packed.

    The operators are torch's own private ones (its inductor uses them), so they are tried, not assumed.
    """
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(2, 16, dtype=dtype), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


class Linear:
    """x -> x @ weight.T + bias, with the weight packed for the CPU where that can be done.

    Packed once, it is not packed at every product: 2x as fast for 1 to 16 rows in fp32. And a row of the result is
    the same bits whatever the other rows are, which plain matrix products are not. `product`: ours, where the
    processor multiplies bf16 in one instruction; else oneDNN's, else torch's.
    """

    __slots__ = ("_bias", "_packed", "_weight", "product")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, kernels: Kernels | None = None) -> None:
        """`weight`: [out, in]; `bias`: [out]."""
        self._packed, self._weight, self._bias = False, weight, bias
        self.product: Product | None = None
        if kernels is not None and kernels.multiplies and weight.shape[1] % 2 == 0:
            self.product = kernels.product(weight, bias)
            self._weight = weight.new_empty(0)
        elif weight.device.type == "cpu" and _packs(weight.dtype):
            self._packed, self._weight = True, torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        if self.product is not None:
            return self.product(x)
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """As a call, the numbers as fp32."""
        return self(x).float() if self.product is None else self.product(x, wide=True)


@dataclass(frozen=True, slots=True)
class Gated:
    """One SiLU-gated MLP: gate and up stacked, [2 * intermediate, hidden]; down, [hidden, intermediate]."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `qkv`: query, key and value rows stacked, [(heads + 2 * kv_heads) * head_dim, hidden].

    `router`, [experts, hidden], is None in a dense layer, which has exactly one MLP.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear
    mlp_norm: torch.Tensor
    router: Linear | None
    mlps: tuple[Gated, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model. `embed`: [vocab, hidden]. `head`: [vocab, hidden], from the same numbers when tied."""

    embed: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear


class _Reader:
    """Tensors by name over all files, remembering which were taken."""

    def __init__(
        self, files: list[Path], dtype: torch.dtype, device: torch.device, stack: ExitStack, kernels: Kernels | None
    ) -> None:
        self._dtype, self._device, self._kernels = dtype, device, kernels
        self._where: dict[str, Any] = {}
        for path in files:
            handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            self._where.update(dict.fromkeys(handle.keys(), handle))
        self._unused = set(self._where)

    def has(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Raises: ModelError when the tensor is missing or has another shape."""
        if name not in self._where:
            raise ModelError(f"the weight files hold no tensor {name}: they do not belong to this config.json")
        tensor = self._where[name].get_tensor(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ModelError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floats of shape {shape}")
        self._unused.discard(name)
        return tensor.to(device=self._device, dtype=self._dtype)

    def stack(self, rows: dict[str, int], *rest: int) -> torch.Tensor:
        """Several tensors on top of one another."""
        return torch.cat([self.take(name, count, *rest) for name, count in rows.items()])

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return Linear(weight, bias, self._kernels)

    def check_all_used(self, tied: bool) -> None:
        """Raises: ModelError naming a tensor that nothing used."""
        left = {name for name in self._unused if not name.endswith(_IGNORED_SUFFIXES)}
        left -= {"lm_head.weight"} if tied else set()
        if left:
            raise ModelError(
                f"the weight files hold {len(left)} tensors this architecture does not use, such as {min(left)}; "
                "quantised or extended checkpoints are not supported"
            )


def load_weights(
    model_dir: Path, spec: ModelSpec, dtype: str, device: torch.device, kernels: Kernels | None = None
) -> Weights:
    """Read all weights, as `dtype` (fp32 or bf16), onto `device`, packed for `kernels`. Raises: ModelError."""
    try:
        with ExitStack() as stack:
            reader = _Reader(weight_files(model_dir), TORCH_DTYPES[dtype], device, stack, kernels)
            embed = reader.take("model.embed_tokens.weight", spec.vocab, spec.hidden)
            head = embed if spec.tied else reader.take("lm_head.weight", spec.vocab, spec.hidden)
            layers = tuple(_layer(reader, spec, i) for i in range(spec.layers))
            norm = reader.take("model.norm.weight", spec.hidden)
            reader.check_all_used(spec.tied)
    except (SafetensorError, OSError) as exc:
        raise ModelError(f"the weight files of {model_dir} cannot be read ({exc}): download them again") from exc
    return Weights(embed, layers, norm, Linear(head, None, kernels))


def _layer(reader: _Reader, spec: ModelSpec, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    qkv_bias = out_bias = q_norm = k_norm = None
    if reader.has(attention + "q_proj.bias"):
        qkv_bias = reader.stack({f"{attention}{x}_proj.bias": n for x, n in rows.items()})
    if reader.has(attention + "o_proj.bias"):
        out_bias = reader.take(attention + "o_proj.bias", spec.hidden)
    if spec.qk_norm:
        q_norm = reader.take(attention + "q_norm.weight", spec.head_dim)
        k_norm = reader.take(attention + "k_norm.weight", spec.head_dim)
    router, mlps = _mlps(reader, spec, prefix, index)
    return Layer(
        input_norm=reader.take(prefix + "input_layernorm.weight", spec.hidden),
        qkv=reader.linear(
            reader.stack({f"{attention}{x}_proj.weight": n for x, n in rows.items()}, spec.hidden), qkv_bias
        ),
        q_norm=q_norm,
        k_norm=k_norm,
        out=reader.linear(reader.take(attention + "o_proj.weight", spec.hidden, q_rows), out_bias),
        mlp_norm=reader.take(prefix + "post_attention_layernorm.weight", spec.hidden),
        router=router,
        mlps=mlps,
    )


def _mlps(reader: _Reader, spec: ModelSpec, prefix: str, index: int) -> tuple[Linear | None, tuple[Gated, ...]]:
    moe = spec.moe
    if moe is None or index in moe.dense_layers:
        names = (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj", f"{prefix}mlp.down_proj")
        return None, (_gated(reader, names, spec.hidden, spec.intermediate),)
    block = f"{prefix}block_sparse_moe." if reader.has(f"{prefix}block_sparse_moe.gate.weight") else f"{prefix}mlp."
    experts = tuple(
        _gated(reader, _expert_names(f"{block}experts.{i}.", spec), spec.hidden, moe.intermediate)
        for i in range(moe.experts)
    )
    return reader.linear(reader.take(f"{block}gate.weight", moe.experts, spec.hidden)), experts


def _expert_names(prefix: str, spec: ModelSpec) -> tuple[str, str, str]:
    """Gate, up, down: Mixtral calls them w1, w3, w2."""
    if spec.architecture == "MixtralForCausalLM":
        return f"{prefix}w1", f"{prefix}w3", f"{prefix}w2"
    return f"{prefix}gate_proj", f"{prefix}up_proj", f"{prefix}down_proj"


def _gated(reader: _Reader, names: tuple[str, str, str], hidden: int, inner: int) -> Gated:
    gate, up, down = (f"{name}.weight" for name in names)
    return Gated(
        reader.linear(reader.stack({gate: inner, up: inner}, hidden)), reader.linear(reader.take(down, hidden, inner))
    )
