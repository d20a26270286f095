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
OUT: Final = FOLDER / "out"


def compile_sources(out: Path, *paths: str) -> None:
    """Run `forge build` over `paths` (default: all but the tests) into `out`, its cache beside it.

    Raises: subprocess.CalledProcessError with the compiler's output.
    """
    command = [str(tool("forge")), "build", *(paths or ("--skip", "test")), "--quiet"]
    command += ["--out", str(out), "--cache-path", str(out.with_name("cache"))]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)


def _from_output(out: Path, name: str) -> dict[str, Any]:
    compiled: dict[str, Any] = json.loads((out / f"{name}.sol" / f"{name}.json").read_text(encoding="utf-8"))
    settings = compiled["metadata"]["settings"]
    return {
        "contract": name,
        "abi": compiled["abi"],
        "bytecode": compiled["bytecode"]["object"],
        "deployedBytecode": compiled["deployedBytecode"]["object"],
        "compiler": "solc " + compiled["metadata"]["compiler"]["version"],
        "settings": {key: settings[key] for key in ("optimizer", "evmVersion", "metadata", "remappings")},
    }


def outputs(out: Path) -> dict[Path, str]:
    """Every artifact file and the text that the compilation in `out` gives it."""
    return {ARTIFACTS / f"{name}.json": json.dumps(_from_output(out, name), indent=1) + "\n" for name in SHIPPED}


def stale(out: Path) -> list[Path]:
    """Artifacts that are missing or differ from the compilation in `out`."""
    return [p for p, text in outputs(out).items() if not p.is_file() or p.read_text(encoding="utf-8") != text]


def main(argv: list[str] | None = None) -> int:
    """Write the artifacts, or with `--check` name the stale ones and return 1."""
    parser = argparse.ArgumentParser(prog="python -m contracts.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming stale artifacts")
    check = parser.parse_args(argv).check
    try:
        compile_sources(OUT)
    except subprocess.CalledProcessError as exc:
        print(exc.stdout + exc.stderr, file=sys.stderr)
        return 2
    if check:
        found = stale(OUT)
        for path in found:
            print(f"stale: {path.relative_to(FOLDER.parent)} (run python -m contracts.build)", file=sys.stderr)
        return 1 if found else 0
    ARTIFACTS.mkdir(exist_ok=True)
    for path, text in outputs(OUT).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
