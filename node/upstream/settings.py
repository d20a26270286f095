"""What a person says about a server outside: frozen settings, told to the parts of this folder by the node."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from protocol.units import Wei


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


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """A platform jobs may be sent to. `ceiling`: most wei per token, prompt or output; a request's own price within it.

    `tally_usd`: USD that one TALLY is worth. `models`: (name here, name there). `most`: most wei of one job.
    """

    url: str
    ceiling: Wei
    tally_usd: Decimal
    most: Wei
    key_file: Path | None = None
    models: tuple[tuple[str, str], ...] = ()
    allow_private: bool = False
