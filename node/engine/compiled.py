"""Decoder and sampler over the compiled kernels: the same computation as their bases, in an eighth of the calls.

Matrix products are kernels.c's own in bf16 where the processor has the instruction, else oneDNN's; all between them is
kernels.c. A row's bits depend on nothing but its own stream: not on its company, nor on whether it was decoded or read
as part of a prompt, as long as oneDNN's packed products keep rows apart, which the tests check. So a text continued
elsewhere, or from a prefix cache, is the same text.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

from node.engine.decoder import Batch, Decoder, DecoderBase, Forward, mlp
from node.engine.kernels import (
    MAX_HEAD_DIM,
    AttentionShape,
    DenseLayer,
    DrawArrays,
    Kernels,
    KernelsUnavailable,
    build,
    default_cache,
    dense_layers,
)
from node.engine.sampler import Draw, Sampler
from node.engine.spec import ModelError, ModelSpec
from node.engine.weights import Layer, Weights, load_weights
from protocol.sampling import EDGE_LOGIT, EDGE_MASS, MICRO

COMPILE: Final = ("off", "auto", "on")
"""`off`: plain torch. `auto`: kernels where they can be had, else plain torch, and the log says why. `on`: kernels, or
the start is refused."""

NO_CUT: Final = 2.0
"""top_p of a row without one: more mass than there is, though sums of it round."""

_log = logging.getLogger(__name__)


def kernels_for(
    compile_option: str, spec: ModelSpec, dtype: torch.dtype, device: torch.device, threads: int, cache: Path | None
) -> Kernels | None:
    """The kernels to compute with, or None for plain torch. `cache`: where they are kept, None for the user's cache.

    Raises: ModelError for an unknown option, or when they are insisted on and cannot be had.
    """
    if compile_option not in COMPILE:
        raise ModelError(f"compile {compile_option!r} is not one of {', '.join(COMPILE)}")
    if compile_option == "off" or (compile_option == "auto" and device.type != "cpu"):
        return None
    try:
        if device.type != "cpu" or spec.head_dim > MAX_HEAD_DIM:
            raise KernelsUnavailable(f"there are none for {device.type} with heads of {spec.head_dim}")
        return Kernels(build(cache or default_cache()), dtype, threads)
    except KernelsUnavailable as exc:
        if compile_option == "on":
            raise ModelError(f"compiled kernels were asked for and cannot be had: {exc}") from exc
        _log.warning("computing without compiled kernels, several times slower: %s", exc)
        return None


def make_decoder(
    spec: ModelSpec, weights: Weights, slots: int, max_context: int, pool_blocks: int, kernels: Kernels | None
) -> Decoder:
    """The decoder that goes with `kernels`."""
    if kernels is None:
        return Decoder(spec, weights, slots, max_context, pool_blocks)
    return CompiledDecoder(spec, weights, slots, max_context, pool_blocks, kernels)


def open_decoder(
    model_dir: Path,
    spec: ModelSpec,
    dtype: str,
    device: torch.device,
    slots: int,
    max_context: int,
    pool_blocks: int,
    kernels: Kernels | None,
) -> DecoderBase:
    """A directory's decoder with its weights: ours, or its transformers module. Raises: ModelError."""
    if spec.module_parameters:
        from node.engine.module_decoder import ModuleDecoder  # transformers takes seconds to import

        return ModuleDecoder(model_dir, spec, dtype, device, slots, max_context, pool_blocks)
    weights = load_weights(model_dir, spec, dtype, device, kernels)
    return make_decoder(spec, weights, slots, max_context, pool_blocks, kernels)


def make_sampler(vocab: int, hidden: int, device: torch.device, kernels: Kernels | None) -> Sampler:
    """The sampler that goes with `kernels`."""
    return Sampler(vocab, hidden, device) if kernels is None else CompiledSampler(vocab, hidden, kernels)


class CompiledDecoder(Decoder):
    """Where the processor multiplies bf16, a forward of a dense model is one call; else a layer is four calls and four
    matrix products."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, slots: int, max_context: int, pool_blocks: int, kernels: Kernels
    ) -> None:
        super().__init__(spec, weights, slots, max_context, pool_blocks)
        self._kernels = kernels
        shape = AttentionShape(
            spec.heads, spec.kv_heads, spec.head_dim, spec.window, max_context, spec.eps, self._cos, self._sin
        )
        self._shape = kernels.shape(shape)
        self._held = [self.kv.layer(index).data_ptr() for index in range(spec.layers)]
        products = [_dense(layer, held) for layer, held in zip(weights.layers, self._held, strict=True)]
        dense = [layer for layer in products if layer is not None]
        self._whole = dense_layers(dense) if len(dense) == spec.layers else None

    def forward(self, batch: Batch) -> Forward:
        """As the base: rows of one slot in one batch see those before them."""
        packed = self._pack(batch)
        if self._whole is None:
            return self._by_layers(packed)
        spec, weights = self.spec, self._weights
        width = max(spec.qkv_rows, 2 * spec.intermediate)
        return Forward(
            self._kernels.forward(self._shape, self._whole, weights.embed, weights.norm, packed, width), None
        )

    def _by_layers(self, packed: torch.Tensor) -> Forward:
        """`packed`: [3, rows] int64, token ids, slots and positions."""
        spec, kernels = self.spec, self._kernels
        x = F.embedding(packed[0], self._weights.embed)
        y, places = torch.empty_like(x), packed[1:]
        attended = x.new_empty((x.shape[0], spec.heads * spec.head_dim))
        routing: list[torch.Tensor] = []
        add: torch.Tensor | None = None
        for layer, held in zip(self._weights.layers, self._held, strict=True):
            qkv = layer.qkv(kernels.add_norm(x, add, layer.input_norm, spec.eps, y))
            norms = (layer.q_norm, layer.k_norm)
            add = layer.out(kernels.attend(self._shape, qkv, norms, places, held, attended))
            normed = kernels.add_norm(x, add, layer.mlp_norm, spec.eps, y)
            add = mlp(layer, spec.moe, normed, routing, kernels.silu)
        hidden = kernels.add_norm(x, add, self._weights.norm, spec.eps, y)
        return Forward(hidden, torch.cat(routing, -1) if routing else None)


def _dense(layer: Layer, kv: int) -> DenseLayer | None:
    """The layer for the whole-forward kernel, or None when a part of it is not among the kernels."""
    if layer.router is not None:
        return None
    gated = layer.mlps[0]
    qkv, out, gate_up, down = layer.qkv.product, layer.out.product, gated.gate_up.product, gated.down.product
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    return DenseLayer((layer.input_norm, layer.q_norm, layer.k_norm, layer.mlp_norm), (qkv, out, gate_up, down), kv)


class CompiledSampler(Sampler):
    """Noise, scores, argmax and nucleus in one call; the fingerprint in another."""

    def __init__(self, vocab: int, hidden: int, kernels: Kernels) -> None:
        super().__init__(vocab, hidden, torch.device("cpu"))
        self._kernels = kernels
        self._rules: list[tuple[int, int, int]] = []
        self._cuts = self._arrays([])

    def _arrays(self, rules: Sequence[tuple[int, int, int]]) -> tuple[array[float], array[int], array[float]]:
        """Temperature, top_k and top_p of each row, from (temperature_micro, top_p_micro, top_k)."""
        return (
            array("f", [temperature / MICRO for temperature, _, _ in rules]),
            array("q", [top_k or self._vocab for _, _, top_k in rules]),
            array("d", [top_p / MICRO if top_p < MICRO else NO_CUT for _, top_p, _ in rules]),
        )

    def choose(self, logits: torch.Tensor, draws: Sequence[Draw], bias: torch.Tensor | None = None) -> torch.Tensor:
        """As the base."""
        if bias is not None:
            logits = logits + bias
        return self._kernels.choose(logits.contiguous(), self._drawn(draws))

    def look_back(self, logits: torch.Tensor, chosen: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """As the base."""
        edges = (EDGE_LOGIT, EDGE_MASS)
        return self._kernels.look_back(logits.contiguous(), chosen.contiguous(), self._drawn(draws), edges)

    def logprobs(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """As the base."""
        return self._kernels.logprob(logits.contiguous(), chosen.contiguous())

    def _drawn(self, draws: Sequence[Draw]) -> DrawArrays:
        rules = [(draw.temperature_micro, draw.top_p_micro, draw.top_k) for draw in draws]
        if rules != self._rules:  # from step to step the streams are mostly the same
            self._rules, self._cuts = rules, self._arrays(rules)
        return DrawArrays(array("I", [word for draw in draws for word in draw.keys]), *self._cuts)

    def fingerprints(
        self, logits: torch.Tensor, hidden: torch.Tensor, chosen: torch.Tensor, projections: torch.Tensor
    ) -> bytes:
        """As the base."""
        return self._kernels.fingerprint(logits.contiguous(), hidden.contiguous(), chosen, projections)
