"""The contracts as the rest of the house uses them: shipped artifacts, and the pinned tools that rebuild them.

Running a node needs `artifact` only, which reads a file of this package; `tool` needs `npm ci --ignore-scripts`.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent

SHIPPED: Final = ("TallyToken", "Escrow", "Registry", "Faults", "Court", "Reservations")
"""Contracts that are deployed, in the order they are deployed in."""


@functools.cache
def artifact(name: str) -> dict[str, Any]:
    """`abi`, `bytecode`, `deployedBytecode`, `compiler` and `settings` of a shipped contract.

    Raises: FileNotFoundError for a name not in SHIPPED.
    """
    loaded: dict[str, Any] = json.loads((FOLDER / "artifacts" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def tool(name: str) -> Path:
    """Native binary of `anvil`, `forge` or `cast` for this machine.

    Not node_modules/.bin, whose entries are node scripts that spawn the binary: a signal to one may leave the other
    running. Raises: FileNotFoundError when it was not installed.
    """
    system = {"linux": "linux", "darwin": "darwin", "win32": "win32"}.get(sys.platform, sys.platform)
    machine = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    suffix = ".exe" if system == "win32" else ""
    path = FOLDER / "node_modules" / "@foundry-rs" / f"{name}-{system}-{machine}" / "bin" / f"{name}{suffix}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `npm ci --ignore-scripts` in {FOLDER}")
    return path
