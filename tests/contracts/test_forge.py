"""Runs forge's unit, fuzz and invariant tests, and its formatter's check."""

from __future__ import annotations

import json
import subprocess

import pytest

from contracts import FOLDER, tool

INVARIANTS = {f"I{n}" for n in range(1, 7)} | {f"R{n}" for n in range(1, 5)} | {f"C{n}" for n in range(1, 7)}


def forge(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("forge"), *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=560)


@pytest.mark.slow
def test_forge_tests_pass_and_cover_every_invariant() -> None:
    done = forge("test", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    suites = json.loads(done.stdout)
    names = [test for suite in suites.values() for test in suite["test_results"]]
    assert all(r["status"] == "Success" for suite in suites.values() for r in suite["test_results"].values())
    assert {part for name in names for part in name.split("_")} >= INVARIANTS


@pytest.mark.slow
def test_sources_are_formatted() -> None:
    done = forge("fmt", "--check")
    assert done.returncode == 0, done.stdout
