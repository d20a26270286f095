"""Named places where a test can kill this process with SIGKILL: what a power cut does at the worst moment.

`TALLY_CRASH_AT=name[:count]` kills at the count-th pass (first by default) of `crash_point(name)`. The environment is
read once, at import. In production nothing is armed and a pass costs one lookup in an empty dictionary.

The names below are those of the store; another folder declares its own beside the code that passes them:

    AFTER_SIGNING = declare("provider.receipt.signed")
    crash_point(AFTER_SIGNING)
"""

from __future__ import annotations

import os
import signal
import typing
from typing import Final

from incentives.ledger import Record

CRASH_POINTS: Final[dict[str, None]] = {}
"""Every declared name, in the order of declaration (a dictionary, because a set has no order to enumerate in)."""

_armed: Final[dict[str, int]] = {}
"""Name -> passes left until the process dies. Empty in production."""


def declare(name: str) -> str:
    """Make `name` a crash point and return it. Declaring a name again changes nothing."""
    CRASH_POINTS[name] = None
    return name


def arm(spec: str) -> None:
    """Die at `name[:count]`, or disarm with an empty text. Raises: ValueError for a count that is no positive number.

    The name is not checked: a module that declares it may be imported later.
    """
    _armed.clear()
    if not spec:
        return
    name, _, count = spec.partition(":")
    if count and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"TALLY_CRASH_AT={spec}: expected name or name:count with a count of 1 or more")
    _armed[name] = int(count or 1)


def crash_point(name: str) -> None:
    """Die here if this is the armed point and its count is reached; otherwise do nothing."""
    if name in _armed:
        _pass(name)


def _pass(name: str) -> None:
    _armed[name] -= 1
    if _armed[name] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


STORE_WRITE_BEFORE: Final = declare("store.write.before")
"""All records of a group are in the transaction; nothing is committed."""

STORE_WRITE_AFTER: Final = declare("store.write.after")
"""The group is committed and synced; no caller knows it yet."""

STORE_BEFORE: Final[dict[type, str]] = {
    kind: declare(f"store.{kind.__name__}.before") for kind in typing.get_args(Record)
}
"""As `store.write.before`, passed once for each record of that kind in the group."""

STORE_AFTER: Final[dict[type, str]] = {
    kind: declare(f"store.{kind.__name__}.after") for kind in typing.get_args(Record)
}
"""As `store.write.after`, passed once for each record of that kind in the group."""

arm(os.environ.get("TALLY_CRASH_AT", ""))
