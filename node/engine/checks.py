"""What a request must be before anything runs. Pure; raises ValueError saying what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from node.engine.spec import ModelSpec
from node.ports import EngineRequest
from protocol.errors import FieldOutOfRange
from protocol.options import MAX_ALTERNATIVES, PENALTY_ONE, JobOptions
from protocol.sampling import check_sampling

MAX_PENALTY_MILLI: Final = 2 * PENALTY_ONE
"""Largest penalty either way, as OpenAI's API has it. Unit: logits x 1000."""


def check_request(request: EngineRequest, spec: ModelSpec, context: int) -> None:
    """Raises: ValueError."""
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens is {request.max_tokens}, at least 1 is needed")
    check_text(request.prompt, spec, context)
    length = len(request.prompt) + request.max_tokens
    if length > context:
        raise ValueError(
            f"prompt of {len(request.prompt)} tokens plus max_tokens {request.max_tokens} is {length}, "
            f"the context holds {context}"
        )
    if len(request.seed) != 32 or len(request.salt) not in (0, 32):
        raise ValueError(
            f"seed and salt must be 32 bytes, a salt may be absent; got {len(request.seed)} and {len(request.salt)}"
        )
    try:
        check_sampling(request.sampling.temperature_micro, request.sampling.top_p_micro, request.sampling.top_k)
    except FieldOutOfRange as exc:
        raise ValueError(str(exc)) from exc
    _check_options(request.options, request, spec)


def check_text(ids: Sequence[int], spec: ModelSpec, context: int) -> None:
    """Raises: ValueError for a text that is empty, too long or holds what is no token."""
    if not ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    if len(ids) > context:
        raise ValueError(f"a text of {len(ids)} tokens, the context holds {context}")
    low, high = min(ids), max(ids)
    if low < 0 or high >= spec.vocab:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {spec.vocab}")


def _check_options(options: JobOptions, request: EngineRequest, spec: ModelSpec) -> None:
    if not 0 <= options.continued <= len(request.prompt):
        raise ValueError(f"continued is {options.continued}, the prompt has {len(request.prompt)} tokens")
    if not 0 <= options.min_tokens <= options.continued + request.max_tokens:
        raise ValueError(f"min_tokens is {options.min_tokens}, at most {request.max_tokens} more can come")
    for token_id in options.stop_ids:
        if not 0 <= token_id < spec.vocab:
            raise ValueError(f"stop id {token_id} is outside the vocabulary of {spec.vocab}")
    if len({*options.stop_ids, *spec.eos_ids}) >= spec.vocab:
        raise ValueError("every token is a stop id: nothing could be written")
    for name in ("frequency_milli", "presence_milli"):
        value = getattr(options, name)
        if not -MAX_PENALTY_MILLI <= value <= MAX_PENALTY_MILLI:
            raise ValueError(f"{name} is {value}, penalties are from -2 to 2")
    if not 0 <= options.alternatives <= min(MAX_ALTERNATIVES, spec.vocab):
        raise ValueError(f"alternatives is {options.alternatives}, at most {MAX_ALTERNATIVES} are reported")


def check_inputs(inputs: Sequence[Sequence[int]], dimensions: int, spec: ModelSpec, context: int) -> None:
    """Texts to be embedded. Raises: ValueError."""
    if not inputs:
        raise ValueError("there is no text to embed")
    if not 0 <= dimensions <= spec.hidden:
        raise ValueError(f"dimensions is {dimensions}, this model's vectors have {spec.hidden}")
    for ids in inputs:
        check_text(ids, spec, context)
