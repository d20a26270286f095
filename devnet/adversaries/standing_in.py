"""Putting one of ours in the place of one of the node's, in this process."""

from __future__ import annotations

import importlib


def stand_in(module: str, name: str, thing: object) -> None:
    """From now on `module.name` is `thing`. Raises: AttributeError when the node knows no such name any more, so that
    an adversary cannot silently turn honest."""
    place = importlib.import_module(module)
    getattr(place, name)
    setattr(place, name, thing)
