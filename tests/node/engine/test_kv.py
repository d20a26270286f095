"""KV slots: every copy carries exactly the tokens it names, in all layers, and touches nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.kv import KvSlots, kv_bytes_per_token
from node.engine.spec import ModelSpec, load_spec
from protocol.cache import BLOCK_TOKENS
from tests.node.engine import models

SLOTS, CONTEXT, BLOCKS = 3, 4 * BLOCK_TOKENS, 5


def spec() -> ModelSpec:
    return replace(load_spec(models.SHIPPED), layers=2, kv_heads=3, head_dim=4)


def filled(number: int, dtype: torch.dtype = torch.float32) -> KvSlots:
    kv = KvSlots(spec(), SLOTS, CONTEXT, BLOCKS, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(number)
    for index in range(2):
        kv.layer(index).copy_(torch.randn(kv.layer(index).shape, generator=generator))
    return kv


def content(kv: KvSlots, slot: int) -> torch.Tensor:
    """[layers, 2 * kv_heads, max_context, head_dim], a copy."""
    return torch.stack([kv.layer(index)[slot] for index in range(2)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(0, 2), st.integers(0, CONTEXT), st.integers(0, 99))
def test_move_carries_the_length_and_nothing_more(source: int, target: int, length: int, number: int) -> None:
    kv = filled(number)
    before = [content(kv, slot) for slot in range(SLOTS)]
    kv.move(source, target, length)
    expected = [tensor.clone() for tensor in before]
    expected[target][:, :, :length] = before[source][:, :, :length]
    for slot in range(SLOTS):
        assert torch.equal(content(kv, slot), expected[slot])


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(BLOCKS)), st.integers(0, 4), st.integers(0, 2), st.integers(0, 99))
def test_blocks_come_back_in_the_order_asked_for(order: list[int], count: int, target: int, number: int) -> None:
    """Stored from odd positions of two slots, loaded into a third place from position 0 on."""
    kv = filled(number)
    before = [content(kv, slot) for slot in range(SLOTS)]
    stored = {}
    for block in range(BLOCKS):
        slot, position = block % SLOTS, 7 * block
        kv.store_block(slot, position, block)
        stored[block] = before[slot][:, :, position : position + BLOCK_TOKENS]
    kv.load_blocks(target, order[:count])
    after = content(kv, target)
    for place, block in enumerate(order[:count]):
        assert torch.equal(after[:, :, place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS], stored[block])
    assert torch.equal(after[:, :, count * BLOCK_TOKENS :], before[target][:, :, count * BLOCK_TOKENS :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_stream_survives_its_slot(dtype: torch.dtype) -> None:
    kv = filled(3, dtype)
    before = content(kv, 1)
    saved = kv.save(1, 21)
    assert (saved.length, saved.bytes) == (
        21,
        21 * kv_bytes_per_token(spec(), str(dtype).replace("torch.float32", "fp32")),
    )
    for index in range(2):
        kv.layer(index).zero_()
    kv.restore(2, saved)
    assert torch.equal(content(kv, 2)[:, :, :21], before[:, :, :21])
    assert not content(kv, 2)[:, :, 21:].any()


def test_bytes_are_those_of_all_slots_and_blocks() -> None:
    tokens = SLOTS * CONTEXT + BLOCKS * BLOCK_TOKENS
    assert filled(0).bytes == tokens * kv_bytes_per_token(spec(), "fp32")
