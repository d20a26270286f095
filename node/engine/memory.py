"""How the KV budget is split: slots for running streams, host copies of displaced ones, blocks of the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from node.engine.kv import kv_bytes_per_token
from node.engine.spec import ModelError, ModelSpec
from protocol.cache import BLOCK_TOKENS

KV_BUDGET_BYTES: Final = 2 << 30
"""Default memory for keys and values. Unit: bytes. The context is cut to what fits; doubling it doubles the context or
slots a large model can be given, or the prefixes that are remembered, and the memory taken when all are full."""

MIN_CONTEXT: Final = 256
"""Shortest context worth serving when the budget decides. Unit: tokens."""

SLOT_PERCENT: Final = 75
"""Share of the budget that slots may take when the context is ours to choose. Unit: percent. The rest remembers
prefixes; raising it to 100 gives a large model a third more context and no cache."""

SAVED_PERCENT: Final = 6
"""Share of the budget for streams that made room for more urgent ones. Unit: percent. What does not fit is computed
again when its turn comes; doubling it halves that work under pressure and takes as much from the prefix cache."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """`context`: longest prompt plus output, tokens. `pool_blocks`: prefix-cache blocks. `*_bytes`: what each may take.

    The three byte counts together are at most the budget.
    """

    context: int
    pool_blocks: int
    slot_bytes: int
    pool_bytes: int
    saved_bytes: int


def plan_memory(spec: ModelSpec, dtype: str, slots: int, max_context: int | None, kv_budget_bytes: int) -> MemoryPlan:
    """Split `kv_budget_bytes`: first `slots` of the context, then host copies, then the prefix cache.

    `max_context` None: what the model was made for, or what the slots' share of the budget holds.
    Raises: ModelError when what was asked for does not fit; says the numbers.
    """
    if max_context is not None and not 0 < max_context <= spec.max_positions:
        raise ModelError(f"max_context {max_context} is not in 1..{spec.max_positions}, what the model was made for")
    wanted = max_context or spec.max_positions
    per_token = kv_bytes_per_token(spec, dtype)
    needed = wanted if max_context is not None else min(wanted, MIN_CONTEXT)
    if slots * needed * per_token > kv_budget_bytes:
        raise ModelError(
            f"{slots} slots of {needed} tokens need {slots * needed * per_token} bytes of KV memory and leave none for "
            f"the prefix cache, the budget is {kv_budget_bytes}: lower slots or max_context, or raise the KV budget"
        )
    shared = kv_budget_bytes * SLOT_PERCENT // 100 // (slots * per_token)
    context = min(wanted, max(needed, shared))
    slot_bytes = slots * context * per_token
    saved_bytes = min(kv_budget_bytes - slot_bytes, kv_budget_bytes * SAVED_PERCENT // 100)
    block_bytes = BLOCK_TOKENS * per_token
    pool_blocks = (kv_budget_bytes - slot_bytes - saved_bytes) // block_bytes
    return MemoryPlan(context, pool_blocks, slot_bytes, pool_blocks * block_bytes, saved_bytes)
