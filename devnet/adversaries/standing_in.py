"""Putting one of ours in the place of one of the node's, in this process."""

from __future__ import annotations

import importlib
import sys


def stand_in(module: str, name: str, thing: object) -> None:
    """From now on `module.name` is `thing`, there and wherever the node has imported it by that name.

    Raises: AttributeError when the node knows no such name any more, so that an adversary cannot turn honest unseen.
    """
    place = importlib.import_module(module)
    honest = getattr(place, name)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("node.") and vars(other).get(name) is honest:
            setattr(other, name, thing)
