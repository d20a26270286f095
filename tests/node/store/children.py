"""Programs that the store's tests run as processes of their own, to kill them, starve them or lock them out.

`python -m tests.node.store.children NAME DIRECTORY ...`; what a program is sure of it writes at once to stdout.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from node import crashpoints
from node.ports import StoreError
from node.store import SqlStore
from tests.node.store import samples as s


def _say(file: int, text: str) -> None:
    os.write(file, f"{text}\n".encode())  # unbuffered: it is there when the next instruction kills us


async def _one_by_one(path: Path, out: int) -> None:
    """Write every kind of record, saying the number of each call that returned."""
    store = SqlStore(path)
    await store.open()
    for number, call in enumerate(s.one_of_each()):
        await store.write(*call)
        _say(out, str(number))
    await store.close()


async def _burst(path: Path, out: int) -> None:
    """Many calls of two records at the same time."""
    store = SqlStore(path)
    await store.open()

    async def one(number: int) -> None:
        await store.write(s.opened(number), s.issued(number, 1, 5))
        _say(out, str(number))

    for start in range(0, 120, 40):
        await asyncio.gather(*[one(number) for number in range(start, start + 40)])
    await store.close()


def crash(directory: Path, program: str, points: Sequence[str]) -> None:
    """Run a program once for each crash point, each in a fork, and say how it ended."""
    run = {"one_by_one": _one_by_one, "burst": _burst}[program]
    for point in points:
        home = directory / point
        home.mkdir()
        child = os.fork()
        if child == 0:
            crashpoints.arm(point)
            out = os.open(home / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            asyncio.run(run(home / "journal.db", out))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        _say(1, f"{point} {os.waitstatus_to_exitcode(status)}")


async def starve(path: Path) -> None:
    """Write until no file may grow, then on with the limit lifted; says the numbers of the calls that returned."""
    store = SqlStore(path)
    await store.open()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    number = 0
    try:
        while True:
            await store.write(s.opened(number), s.issued(number, 1, 5))
            number += 1
    except StoreError as exc:
        _say(1, f"refused {number} {exc}")
    calls = [store.write(s.opened(n), s.issued(n, 1, 5)) for n in (5000, 5001)]  # more than what found no room
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    _say(1, f"group {[type(outcome).__name__ for outcome in outcomes]}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.write(s.opened(number), s.issued(number, 1, 5))
    _say(1, f"recovered {number}")
    await store.close()


async def hold(path: Path) -> None:
    """Open the store, say so, and wait to be killed."""
    store = SqlStore(path)
    try:
        await store.open()
    except StoreError as exc:
        _say(1, f"refused {exc}")
        return
    _say(1, "holding")
    await asyncio.sleep(600)


def main(arguments: Sequence[str]) -> None:
    name, directory, *rest = arguments
    if name == "crash":
        crash(Path(directory), rest[0], rest[1:])
    else:
        asyncio.run({"starve": starve, "hold": hold}[name](Path(directory) / "journal.db"))


if __name__ == "__main__":
    main(sys.argv[1:])
