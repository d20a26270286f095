"""Memory that runs out: at start and in a step. It costs at most one stream, and the others notice nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from node.engine.decoder import Batch, Forward
from node.engine.engine import TorchEngine
from node.engine.generation import EngineError
from node.engine.scheduler import MIN_PREFILL_TOKENS, PREFILL_TOKENS
from node.engine.spec import ModelError
from node.ports import Urgency
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import PAYER, Lab, ask

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
FAILURES = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_MESSAGE), MemoryError())


@pytest.fixture
def lab(model_dir: Callable[[str], Path]) -> Lab:
    return Lab(model_dir("endless"), slots=3)


def fail_when(lab: Lab, monkeypatch: pytest.MonkeyPatch, when: Callable[[Batch], bool], error: Exception) -> None:
    forward = lab.decoder.forward

    def limited(batch: Batch) -> Forward:
        if when(batch):
            raise error
        return forward(batch)

    monkeypatch.setattr(lab.decoder, "forward", limited)


@pytest.mark.parametrize("error", FAILURES)
def test_a_step_without_memory_reads_less_at_a_time(
    error: Exception, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream ends and no token changes; the chunk grows back once there is memory."""
    requests = [ask(number, 200, 20, salt=PAYER) for number in range(3)]
    expected = [lab.run(request) for request in requests]
    lab.restart()
    fail_when(lab, monkeypatch, lambda batch: sum(len(part.ids) for part in batch.segments) > 40, error)
    streams = [lab.submit(request) for request in requests]
    lab.drain()
    assert not lab.errors
    assert [lab.text(stream) for stream in streams] == expected
    assert lab.scheduler.chunk < PREFILL_TOKENS


def test_what_fits_nowhere_ends_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that cannot be read in the smallest chunks; then one stream too many to decode: the least urgent."""
    requests = [ask(number, 30, 20) for number in range(2)]
    expected = [lab.run(request) for request in requests]
    lab.restart()
    fail_when(lab, monkeypatch, lambda batch: any(part.start >= 64 for part in batch.segments), FAILURES[0])
    streams = [lab.submit(request) for request in requests]
    hopeless = lab.submit(ask(5, 300, 20))
    lab.drain()
    assert list(lab.errors) == [hopeless]
    assert "too little memory" in str(lab.errors[hopeless])
    assert [lab.text(stream) for stream in streams] == expected
    assert lab.scheduler.chunk < 2 * MIN_PREFILL_TOKENS + 40

    lab.restart()
    fail_when(lab, monkeypatch, lambda batch: len(batch.slots) > 2, FAILURES[0])
    streams = [lab.submit(request) for request in requests]
    least = lab.submit(ask(6, 10, 20, urgency=Urgency.FLEX))
    lab.drain()
    assert list(lab.errors) == [least]
    assert [lab.text(stream) for stream in streams] == expected
    assert lab.scheduler.active == 0


def test_copies_that_find_no_memory_are_done_without(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hit, or a displaced stream computed again: slower, and the same tokens."""
    request, urgent = ask(1, 100, 20, salt=PAYER, urgency=Urgency.FLEX), [ask(number, 9, 5) for number in (2, 3, 4)]
    expected = lab.run(request)

    def no_memory(*args: object) -> None:
        raise FAILURES[1]

    monkeypatch.setattr(lab.decoder.kv, "load_blocks", no_memory)
    monkeypatch.setattr(lab.decoder.kv, "save", no_memory)
    stream = lab.submit(request)
    lab.step()
    for other in urgent:
        lab.submit(other)
    lab.step()
    assert (stream.slot, stream.saved, stream.fed) == (-1, None, 0)
    lab.drain()
    assert lab.text(stream) == expected
    assert lab.tokens[stream][0].cached_tokens == 0
    assert lab.scheduler._saved_room == lab._saved_bytes


async def test_the_engine_delivers_the_error_to_its_stream_alone(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine("endless", compile_option="off")
    whole = [token.token_id async for token in await engine.submit(ask(1, 20, 60))]
    decoder = engine._decoder
    assert decoder is not None
    forward = decoder.forward

    def limited(batch: Batch) -> Forward:
        if any(part.start >= 64 for part in batch.segments):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)

    monkeypatch.setattr(decoder, "forward", limited)
    fine, hopeless = await engine.submit(ask(1, 20, 60)), await engine.submit(ask(2, 400, 60))
    with pytest.raises(EngineError, match="others go on"):
        await anext(hopeless)
    await hopeless.aclose()
    with pytest.raises(EngineError, match="too little memory"):
        await engine.embed([ask(3, 400, 1).prompt], 0, Urgency.FLEX)
    assert [token.token_id async for token in fine] == whole
    assert (engine.stats().active, engine.stats().queued) == (0, 0)


async def test_a_model_that_does_not_fit_is_a_model_error(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object) -> None:
        raise RuntimeError(CPU_MESSAGE)

    monkeypatch.setattr("node.engine.compiled.load_weights", no_memory)
    engine = TorchEngine(model_dir("llama"))
    with pytest.raises(ModelError, match="no memory for the weights, .* bytes of slots"):
        await engine.start()
    monkeypatch.undo()
    await engine.start()
    await engine.stop()
