"""What a batch keeps on disk: answers, errors, and a state file by which a second run continues the first.

Contract: a line that was answered is in the output before it counts as finished, so a crash at any point leaves it
either finished or to be asked again; only lines that ran at that moment can be paid for twice. Files are appended to
line by line and synced; a last line that a crash tore is cut off. One run at a time holds the state file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from node.cli.batchfile import BadLine, BatchFile
from node.cli.failures import CommandFailed
from protocol.units import Wei

_VERSION: Final = 1

_BAD: Final = "batch_line_"
"""How ids of lines begin that could not be sent."""


@dataclass(slots=True)
class Totals:
    """The whole batch so far, over all its runs. Amounts in wei. `failed`: for good.

    `unsettled`: lines that ran when a run was killed, so that nobody knows here what they cost; `unsettled_most`: the
    most that they can have cost, as far as it was limited.
    """

    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    refund: int = 0
    unsettled: int = 0
    unsettled_most: int = 0

    def add(self, body: dict[str, Any]) -> None:
        """Count an answer's usage."""
        usage = body.get("usage") or {}
        tally = usage.get("tally") or {}
        self.prompt_tokens += int(usage.get("prompt_tokens", 0))
        self.completion_tokens += int(usage.get("completion_tokens", 0))
        self.refund += int(tally.get("refund_wei", 0))


class Book:
    """Output, errors and state of one batch. Use as a context manager."""

    def __init__(self, batch: BatchFile, output: Path, errors: Path) -> None:
        self._batch = batch
        self.output = output
        self.errors = errors
        self.state = output.with_name(output.name + ".state")
        self._files: dict[Path, BinaryIO] = {}
        self.finished: set[str] = set()
        self.tries: dict[str, int] = {}
        self.totals = Totals()

    def __enter__(self) -> Book:
        """Take up where the last run stopped. Raises: CommandFailed; nothing was sent."""
        try:
            self._lock()
            self._load()
        except OSError as exc:
            self._close()
            raise CommandFailed(
                f"{exc.filename or self.state} cannot be used: {exc.strerror}",
                kept="nothing was sent",
                do="choose another place with --output and --errors",
            ) from exc
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    # ------------------------------------------------------------------------------------------------ writing

    def start(self, custom_id: str, most: Wei | None) -> None:
        """A line is about to be sent; it may cost `most` wei, None when only the gateway limits it."""
        self._append(self.state, {"started": custom_id, "most_wei": str(most or 0)})

    def done(self, custom_id: str, entry: dict[str, Any], cost: int) -> None:
        """A line was answered."""
        self._append(self.output, entry)
        self._end(custom_id, "done", cost)
        self.totals.done += 1
        self.totals.add(entry["response"]["body"])

    def failed(self, custom_id: str, entry: dict[str, Any], cost: int, *, final: bool) -> None:
        """A line was not answered; asking again would change nothing when it is `final`."""
        self._append(self.errors, entry)
        self._end(custom_id, "failed" if final else "again", cost)
        self.totals.failed += final

    def _end(self, custom_id: str, how: str, cost: int) -> None:
        self._append(self.state, {"ended": custom_id, "how": how, "cost_wei": str(cost)})
        self.tries[custom_id] = self.tries.get(custom_id, 0) + 1
        self.totals.cost += cost
        if how != "again":
            self.finished.add(custom_id)

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        """Raises: CommandFailed; what was appended before is on disk."""
        try:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = path.open("ab")
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as exc:
            raise CommandFailed(
                f"{path} cannot be written: {exc.strerror}",
                kept="everything written before is on disk; running lines may be asked again",
                do="make room, then run the same command again",
            ) from exc

    # ------------------------------------------------------------------------------------------------ loading

    def _lock(self) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        file = self._files[self.state] = self.state.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise CommandFailed(
                f"another run of this batch holds {self.state}", kept="nothing was sent", do="wait until it ends"
            ) from exc

    def _load(self) -> None:
        """Raises: CommandFailed, OSError."""
        answers = {str(entry["custom_id"]): entry for entry in _entries(self.output)}
        open_lines: dict[str, int] = {}
        ended: dict[str, str] = {}
        for entry in _entries(self.state):
            self._remember(entry, open_lines, ended)
        if self.state.stat().st_size == 0:
            self._append(self.state, {"version": _VERSION, "input_sha256": self._batch.sha256})
        lost = sorted(name for name, how in ended.items() if how == "done" and name not in answers)
        if lost:
            raise CommandFailed(
                f"{self.output} lacks {len(lost)} answers that {self.state.name} says were paid, such as {lost[0]!r}",
                kept="nothing was sent",
                do="put the output file back, or remove the state file to buy them again",
            )
        for name, entry in answers.items():
            self.totals.done += 1
            self.totals.add(entry["response"]["body"])
            if name in open_lines:  # answered, and killed before that was noted
                del open_lines[name]
                self.totals.cost += cost_of(entry["response"]["body"])
        self.totals.unsettled += len(open_lines)
        self.totals.unsettled_most += sum(open_lines.values())
        self.finished = {*answers, *(name for name, how in ended.items() if how == "failed")}
        self._renew_errors({name for name, how in ended.items() if how == "failed"})

    def _remember(self, entry: dict[str, Any], open_lines: dict[str, int], ended: dict[str, str]) -> None:
        """One entry of the state file. Raises: CommandFailed when it is another batch's."""
        if "input_sha256" in entry:
            if entry["input_sha256"] != self._batch.sha256 or entry.get("version") != _VERSION:
                raise CommandFailed(
                    f"{self.output} belongs to another input than {self._batch.path} is now",
                    kept="nothing was sent, and the files are as they were",
                    do="choose another --output, or put the old input back",
                )
        elif "started" in entry:
            name = str(entry["started"])
            if name in open_lines:  # it ran when a run was killed, and what it cost then stays unknown
                self.totals.unsettled += 1
                self.totals.unsettled_most += open_lines[name]
            open_lines[name] = int(entry["most_wei"])
        elif "ended" in entry:
            name = str(entry["ended"])
            open_lines.pop(name, None)
            ended[name] = str(entry["how"])
            self.tries[name] = self.tries.get(name, 0) + 1
            self.totals.cost += int(entry["cost_wei"])

    def _renew_errors(self, final: set[str]) -> None:
        """Keep the errors that stay, drop those of lines that are asked again, and list the lines that are wrong."""
        kept = [
            entry
            for entry in _entries(self.errors)
            if entry.get("custom_id") in final and not str(entry.get("id")).startswith(_BAD)
        ]
        self.totals.failed = len(kept)
        entries = [*kept, *(bad_entry(bad) for bad in self._batch.bad)]
        if not entries and not self.errors.exists():
            return
        fresh = self.errors.with_name(self.errors.name + ".new")
        with fresh.open("wb") as file:
            file.writelines(msgspec.json.encode(entry) + b"\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.errors)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def bad_entry(bad: BadLine) -> dict[str, Any]:
    """A line that cannot be sent, as the error file lists it."""
    error = {"code": bad.code, "message": bad.message, "line": bad.number}
    return {"id": f"{_BAD}{bad.number}", "custom_id": bad.custom_id, "response": None, "error": error}


def cost_of(body: dict[str, Any]) -> int:
    """Wei that an answer, or what came before its error, cost."""
    usage = body.get("usage") or body.get("error") or {}
    tally = usage.get("tally") or {} if isinstance(usage, dict) else {}
    return int(tally.get("cost_wei", 0))


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file of ours; a torn last line is cut off it. Raises: CommandFailed, OSError."""
    if not path.exists():
        return
    whole = _mend(path)
    with path.open("rb") as file:
        for number, raw in enumerate(_lines(file, whole), 1):
            try:
                entry = msgspec.json.decode(raw)
            except (msgspec.MsgspecError, UnicodeError) as exc:
                raise CommandFailed(
                    f"{path} is damaged at line {number}",
                    kept="nothing was sent, and the file is as it was",
                    do="repair or remove that line, or choose another --output",
                ) from exc
            if not isinstance(entry, dict):
                raise CommandFailed(f"{path} is no file of a batch", kept="nothing was sent", do="choose --output")
            yield entry


def _lines(file: BinaryIO, whole: int) -> Iterable[bytes]:
    while file.tell() < whole:
        yield file.readline()


def _mend(path: Path) -> int:
    """Cut what follows the last line break; returns the size that is left."""
    size = path.stat().st_size
    with path.open("rb+") as file:
        at = size
        while at > 0:
            step = min(at, 1 << 16)
            file.seek(at - step)
            found = file.read(step).rfind(b"\n")
            if found >= 0:
                at = at - step + found + 1
                break
            at -= step
        if at != size:
            file.truncate(at)
            os.fsync(file.fileno())
    return at
