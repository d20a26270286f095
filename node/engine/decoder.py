"""The forward pass of one decoder over a packed batch, reading and writing its KV slots.

A batch packs rows of any streams: first one row for each stream that decodes, then whole segments of prompts being
prefilled. Every linear map runs once over all rows; only attention knows who is who. A slot holds one stream's keys and
values; the scheduler keeps occupied slots at the low end, so that decoding reads a view, not a copy.

Attention rounds differently with the lengths in its company, and prefill differently from decoding: that moves logits
by about 1e-5 in fp32, 1e-2 in bf16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from node.engine.kv import KvSlots
from node.engine.spec import ModelSpec, MoeSpec, RopeSpec
from node.engine.weights import Layer, Weights

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one prompt: `ids` at positions start, start + 1, ... of the stream in `slot`."""

    slot: int
    start: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward computes. Row i < len(slots) feeds `ids[i]` at `positions[i]` to the stream in `slots[i]`."""

    slots: Sequence[int]
    ids: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[Segment] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward gave, a row for each row of the batch.

    `hidden`: [rows, hidden], final-normed, dtype of the model. `routing`: [rows, moe_layers * chosen] int16, the ids
    of the experts chosen in each MoE layer in ascending order, layer after layer; None in a dense model.
    """

    hidden: torch.Tensor
    routing: torch.Tensor | None


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32. Sources: RoFormer (Su et al. 2021); position interpolation (Chen et al. 2023); Llama 3.1."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "default":
        return inverse
    wavelength = 2 * math.pi / inverse
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


class DecoderBase(ABC):
    """What the scheduler steps: KV slots (`kv`) and a forward pass over them. Used by one thread."""

    def __init__(
        self, spec: ModelSpec, slots: int, max_context: int, pool_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.slots, self.max_context = spec, slots, max_context
        self.device, self.dtype = device, dtype
        self.kv = KvSlots(spec, slots, max_context, pool_blocks, dtype, device)

    @abstractmethod
    def forward(self, batch: Batch) -> Forward:
        """Run the batch, writing its keys and values."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab] fp32."""

    def _pack(self, batch: Batch) -> torch.Tensor:
        """[3, rows] int64: token ids, slots and positions of all rows."""
        ids = [*batch.ids]
        slots = [*batch.slots]
        positions = [*batch.positions]
        for part in batch.segments:
            ids += part.ids
            slots += [part.slot] * len(part.ids)
            positions += range(part.start, part.start + len(part.ids))
        return torch.tensor([ids, slots, positions], device=self.device)


class Decoder(DecoderBase):
    """Our own forward pass of the architectures in spec.SUPPORTED."""

    def __init__(self, spec: ModelSpec, weights: Weights, slots: int, max_context: int, pool_blocks: int = 0) -> None:
        super().__init__(spec, slots, max_context, pool_blocks, weights.embed.dtype, weights.embed.device)
        self._weights = weights
        angles = torch.outer(torch.arange(max_context).float(), inverse_frequencies(spec.rope, spec.head_dim))
        cos, sin = angles.cos(), angles.sin()
        # [max_context, 1, head_dim]; the sine carries the sign of rotate_half, so that rotating is a roll
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1).to(self.device, self.dtype)
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(self.device, self.dtype)
        self._columns = torch.arange(max_context, device=self.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab] fp32."""
        return self._weights.head.wide(hidden)

    def forward(self, batch: Batch) -> Forward:
        """Run the batch, writing its keys and values."""
        packed = self._pack(batch)
        attend = _Attention(self, batch, packed[1], packed[2])
        cos, sin = self._cos[packed[2]], self._sin[packed[2]]  # [rows, 1, head_dim]
        x = F.embedding(packed[0], self._weights.embed)
        routing: list[torch.Tensor] = []
        for index, layer in enumerate(self._weights.layers):
            x = x + self._attention(layer, self.kv.layer(index), self._norm(x, layer.input_norm), cos, sin, attend)
            x = x + mlp(layer, self.spec.moe, self._norm(x, layer.mlp_norm), routing)
        return Forward(self._norm(x, self._weights.norm), torch.cat(routing, -1) if routing else None)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.eps)

    def _attention(
        self,
        layer: Layer,
        kv: torch.Tensor,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: _Attention,
    ) -> torch.Tensor:
        spec = self.spec
        rotated = spec.heads + spec.kv_heads
        qkv = layer.qkv(x).view(x.shape[0], -1, spec.head_dim)  # [rows, q + k + v heads, head_dim]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._norm(qkv[:, : spec.heads], layer.q_norm)
            k = self._norm(qkv[:, spec.heads : rotated], layer.k_norm)
            qk = torch.cat((q, k), 1)
        else:
            qk = qkv[:, :rotated]
        qk = torch.addcmul(qk * cos, qk.roll(spec.head_dim // 2, -1), sin)
        attend.write(kv, qk[:, spec.heads :], qkv[:, rotated:])
        return layer.out(attend.read(kv, qk[:, : spec.heads]))


class _Attention:
    """Who attends to what in one batch: computed once, used by every layer."""

    def __init__(self, decoder: Decoder, batch: Batch, slots: torch.Tensor, positions: torch.Tensor) -> None:
        spec = decoder.spec
        self._spec, self._batch = spec, batch
        self._slots, self._positions = slots, positions
        self._count = len(batch.slots)
        self._dense = list(batch.slots) == list(range(self._count))
        self._length = max(batch.positions, default=-1) + 1
        self._columns = decoder._columns
        self._mask = self._decode_mask(decoder.dtype) if self._count else None
        self._segment_masks = [self._segment_mask(part, decoder.dtype) for part in batch.segments]

    def _visible(self, columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[queries, columns] bool: not later than the query, and inside its window."""
        visible = columns <= positions[:, None]
        if self._spec.window:
            visible &= columns > positions[:, None] - self._spec.window
        return visible

    def _additive(self, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)

    def _decode_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[streams, 1, 1, length], or None when every stream sees exactly `length` tokens."""
        windowed = 0 < self._spec.window < self._length
        if min(self._batch.positions) + 1 == self._length and not windowed:
            return None
        visible = self._visible(self._columns[: self._length], self._positions[: self._count])
        return self._additive(visible, dtype)[:, None, None]

    def _segment_mask(self, part: Segment, dtype: torch.dtype) -> torch.Tensor | None:
        """[tokens, start + tokens], or None for plain causal."""
        end = part.start + len(part.ids)
        if part.start == 0 and not 0 < self._spec.window < end:
            return None
        return self._additive(self._visible(self._columns[:end], self._columns[part.start : end]), dtype)

    def write(self, kv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the rows' keys and values, [rows, kv_heads, head_dim] each."""
        kv[self._slots, :, self._positions] = torch.cat((keys, values), 1)

    def read(self, kv: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """[rows, heads, head_dim] -> [rows, heads * head_dim]."""
        parts = []
        if self._count:
            parts.append(self._read_decoding(kv, q[: self._count]))
        row = self._count
        for part, mask in zip(self._batch.segments, self._segment_masks, strict=True):
            parts.append(self._read_segment(kv, q[row : row + len(part.ids)], part, mask))
            row += len(part.ids)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_decoding(self, kv: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        spec, n = self._spec, self._count
        held = kv[:n] if self._dense else kv.index_select(0, self._slots[:n])
        held = held[:, :, : self._length]
        # the queries of one key head stand as its rows: [streams, kv_heads, heads / kv_heads, head_dim]
        q = q.view(n, spec.kv_heads, -1, spec.head_dim)
        out = F.scaled_dot_product_attention(
            q, held[:, : spec.kv_heads], held[:, spec.kv_heads :], attn_mask=self._mask
        )
        return out.reshape(n, -1)

    def _read_segment(
        self, kv: torch.Tensor, q: torch.Tensor, part: Segment, mask: torch.Tensor | None
    ) -> torch.Tensor:
        spec, tokens = self._spec, len(part.ids)
        held = kv[part.slot : part.slot + 1, :, : part.start + tokens]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),  # [1, heads, tokens, head_dim]
            held[:, : spec.kv_heads],
            held[:, spec.kv_heads :],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=spec.heads != spec.kv_heads,
        )
        return out.squeeze(0).transpose(0, 1).reshape(tokens, -1)


def _silu(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, gate then up] -> silu(gate) * up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def mlp(
    layer: Layer, moe: MoeSpec | None, x: torch.Tensor, routing: list[torch.Tensor], silu: Activation = _silu
) -> torch.Tensor:
    """[rows, hidden] -> [rows, hidden]; with a router, the weighted sum of each row's chosen experts.

    A router's choice is appended to `routing`, [rows, chosen] int16 in ascending order.
    """
    if layer.router is None or moe is None:
        return layer.mlps[0].down(silu(layer.mlps[0].gate_up(x)))
    scores = F.softmax(layer.router(x).float(), -1)
    weights, chosen = scores.topk(moe.chosen, -1)  # [rows, chosen] each
    routing.append(chosen.sort(-1).values.to(torch.int16))
    if moe.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, rank = torch.where(chosen == expert)
        gated = layer.mlps[expert]
        out.index_add_(0, rows, gated.down(silu(gated.gate_up(x[rows]))) * weights[rows, rank, None])
    return out
