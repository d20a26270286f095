"""Fixtures: one thread, model directories made once a session, engines that are stopped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from node.engine.engine import TorchEngine
from tests.node.engine import models

StartEngine = Callable[..., Awaitable[TorchEngine]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels of these models are shorter than it takes two threads to meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the named model: `shipped`, or one of models.NAMES."""
    made: dict[str, Path] = {"shipped": models.SHIPPED}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = models.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
async def start_engine(model_dir: Callable[[str], Path]) -> AsyncIterator[StartEngine]:
    """Start an engine in fp32 on the named model; all are stopped at the end."""
    engines: list[TorchEngine] = []

    async def start(name: str = "llama", **options: Any) -> TorchEngine:
        engine = TorchEngine(model_dir(name), **{"dtype": "fp32", "slots": 4, **options})
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.stop()
