"""What is shipped is what the sources compile to, and what is installed is what the lock file pins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from contracts import FOLDER, SHIPPED, artifact, build


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compilation from nothing: no cache of an earlier one is trusted."""
    folder = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(folder)
    return folder


@pytest.mark.slow
def test_shipped_artifacts_are_what_the_sources_give(out: Path) -> None:
    assert build.stale(out) == []


@pytest.mark.slow
def test_a_flipped_digit_of_bytecode_is_found(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "artifacts"
    shutil.copytree(build.ARTIFACTS, folder)
    escrow = folder / "Escrow.json"
    loaded = json.loads(escrow.read_text())
    loaded["bytecode"] = loaded["bytecode"][:-1] + ("0" if loaded["bytecode"][-1] != "0" else "1")
    escrow.write_text(json.dumps(loaded, indent=1) + "\n")
    monkeypatch.setattr(build, "ARTIFACTS", folder)
    assert build.stale(out) == [escrow]


def test_artifacts_carry_what_a_reader_needs() -> None:
    for name in SHIPPED:
        shipped = artifact(name)
        assert {"abi", "bytecode", "deployedBytecode", "compiler", "settings"} <= shipped.keys()
        assert shipped["compiler"].startswith("solc 0.8.37")
        assert shipped["settings"]["evmVersion"] == "prague"
        assert len(shipped["deployedBytecode"]) // 2 < 24_576, "EIP-170"


def test_versions_are_pinned_exactly_and_name_no_mirror() -> None:
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    locked = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    assert all(version[0].isdigit() for version in wanted.values())
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
        assert locked[f"node_modules/{name}"]["integrity"]
    for package in locked.values():
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/")
