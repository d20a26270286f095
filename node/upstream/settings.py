"""What a person says about a server outside: frozen settings, told to the parts of this folder by the node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """A server to serve through. `url`: its base, ending in /v1 as a rule. `model` "": the only one it has.

    `key_file`: its first line is sent as a bearer token. `slots`: requests at a time. `max_queue`: requests that may
    wait here. `allow_private`: private networks may be dialled; this machine always may.
    """

    url: str
    model: str = ""
    key_file: Path | None = None
    slots: int = 8
    max_queue: int = 64
    allow_private: bool = False
