"""A GGUF of the demo model, made once, and servers of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.upstream.llama import DEMO, Servers


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.node.upstream.gguf_export import export  # torch, which fast tests do without

    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    export(DEMO, path)
    return path


@pytest.fixture
def servers(gguf: Path) -> Iterator[Servers]:
    made = Servers(gguf)
    yield made
    made.stop()
