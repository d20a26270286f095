"""Keys and values: one slot for each running stream, and a pool of prefix-cache blocks beside them.

All layers lie in one tensor, so that moving a stream, keeping a block or loading a prefix is one copy, not one a layer.
Memory is taken from the system as it is first written, not when the slots are made.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from node.engine.spec import ModelSpec
from protocol.cache import BLOCK_TOKENS


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * (4 if dtype == "fp32" else 2)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory page by page as they are written, where torch.zeros would touch all of it at once."""
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # a tenth faster to attend to: fewer addresses to translate
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


@dataclass(frozen=True, slots=True)
class SavedKv:
    """A stream's keys and values in host memory, bit for bit: [layers, 2 * kv_heads, length, head_dim]."""

    tensor: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.tensor.shape[2])

    @property
    def bytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())


class KvSlots:
    """Slots and block pool of one model. Used by one thread.

    `slots`: [layers, slots, 2 * kv_heads, max_context, head_dim], key heads then value heads; `layer(i)` is one
    layer's view. `pool`: [pool_blocks, layers, 2 * kv_heads, BLOCK_TOKENS, head_dim]. Both in the model's dtype.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        max_context: int,
        pool_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = 2 * spec.kv_heads
        self.count, self.max_context, self.pool_blocks = slots, max_context, pool_blocks
        self._slots = _zeros((spec.layers, slots, heads, max_context, spec.head_dim), dtype, device)
        self._pool = _zeros((pool_blocks, spec.layers, heads, BLOCK_TOKENS, spec.head_dim), dtype, device)

    @property
    def bytes(self) -> int:
        """Memory of slots and pool when all of it has been written."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._slots, self._pool))

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers."""
        return int(self._slots[:, 0, :, :1].numel() * self._slots.element_size())

    def layer(self, index: int) -> torch.Tensor:
        """[slots, 2 * kv_heads, max_context, head_dim], a view."""
        return self._slots[index]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot into another slot."""
        self._slots[:, target, :, :length] = self._slots[:, source, :, :length]

    def store_block(self, slot: int, position: int, block: int) -> None:
        """Copy BLOCK_TOKENS tokens of a slot, from `position` on, into a pool block."""
        self._pool[block] = self._slots[:, slot, :, position : position + BLOCK_TOKENS]

    def load_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """Copy pool blocks, in order, to positions 0, 1, ... of a slot."""
        if not blocks:
            return
        held = self._slots[:, slot, :, : len(blocks) * BLOCK_TOKENS].unflatten(2, (len(blocks), BLOCK_TOKENS))
        chosen = torch.tensor(blocks, device=self._pool.device)
        held.copy_(self._pool[chosen].permute(1, 2, 0, 3, 4))

    def save(self, slot: int, length: int) -> SavedKv:
        """The first `length` tokens of a slot, copied to host memory."""
        held = self._slots[:, slot, :, :length]
        return SavedKv(held.clone() if held.device.type == "cpu" else held.cpu())

    def restore(self, slot: int, saved: SavedKv) -> None:
        """Copy a saved stream into a slot, any slot."""
        self._slots[:, slot, :, : saved.length] = saved.tensor
