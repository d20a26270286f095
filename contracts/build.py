"""Compiles the contracts with the pinned compiler and writes, or compares, contracts/artifacts/*.json.

Run `python -m contracts.build` after changing a source, `python -m contracts.build --check` to prove that the shipped
bytecode is what the sources give. Needs `npm ci --ignore-scripts` in contracts/ and nothing from the network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from contracts import FOLDER, SHIPPED, tool

ARTIFACTS: Final = FOLDER / "artifacts"


def compile_sources() -> None:
    """Run `forge build` over src/. Raises: subprocess.CalledProcessError with the compiler's output."""
    subprocess.run(
        [tool("forge"), "build", "--skip", "test", "--quiet"], cwd=FOLDER, check=True, capture_output=True, text=True
    )


def _from_output(name: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((FOLDER / "out" / f"{name}.sol" / f"{name}.json").read_text(encoding="utf-8"))
    settings = out["metadata"]["settings"]
    return {
        "contract": name,
        "abi": out["abi"],
        "bytecode": out["bytecode"]["object"],
        "deployedBytecode": out["deployedBytecode"]["object"],
        "compiler": "solc " + out["metadata"]["compiler"]["version"],
        "settings": {
            key: settings[key] for key in ("optimizer", "evmVersion", "metadata", "remappings") if key in settings
        },
    }


def outputs() -> dict[Path, str]:
    """Every artifact file and the text the last compilation gives it."""
    return {ARTIFACTS / f"{name}.json": json.dumps(_from_output(name), indent=1) + "\n" for name in SHIPPED}


def stale() -> list[Path]:
    """Artifacts that are missing or differ from the last compilation."""
    return [p for p, text in outputs().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]


def main(argv: list[str] | None = None) -> int:
    """Write the artifacts, or with `--check` name the stale ones and return 1."""
    parser = argparse.ArgumentParser(prog="python -m contracts.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming stale artifacts")
    check = parser.parse_args(argv).check
    try:
        compile_sources()
    except subprocess.CalledProcessError as exc:
        print(exc.stdout + exc.stderr, file=sys.stderr)
        return 2
    if check:
        found = stale()
        for path in found:
            print(f"stale: {path.relative_to(FOLDER.parent)} (run python -m contracts.build)", file=sys.stderr)
        return 1 if found else 0
    ARTIFACTS.mkdir(exist_ok=True)
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
