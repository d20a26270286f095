"""What a command says when it fails, and the exit code it fails with.

0 done; 1 a failure that the text explains; 2 wrong usage; 70 a fault of ours (sysexits' EX_SOFTWARE), with the
traceback in a file; 130 interrupted by Ctrl-C, 143 by SIGTERM before it was serving.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from protocol.errors import TallyError

EXIT_FAILED: Final = 1
EXIT_FAULT: Final = 70
EXIT_INTERRUPTED: Final = 130

_Advice = tuple[str, str, str, str]
_ADVICE: Final[tuple[_Advice, ...]] = (
    # module, class, what was kept safe, what to do next; the first class that fits
    (
        "node.config_values",
        "ConfigError",
        "nothing was started or changed",
        "correct it where it was written; then `tally config show --origin` lists every setting and where it is from",
    ),
    (
        "node.keys",
        "KeystoreError",
        "the key files are as they were",
        "`tally init` makes missing files; `tally doctor`",
    ),
    (
        "node.ports",
        "StoreError",
        "everything acknowledged before is in the journal; nothing of this step was signed",
        "`tally doctor` checks the journal; `tally status` shows whether a node runs in this home",
    ),
    (
        "node.ports",
        "ChainUnavailable",
        "receipts, vouchers and confirmed escrow stay valid while the chain is away",
        "check chain.rpc_url (`tally config show`), then try again",
    ),
    (
        "node.ports",
        "ChainError",
        "receipts and vouchers are in the journal",
        "`tally doctor` checks chain and contracts",
    ),
    (
        "node.ports",
        "TransportError",
        "nothing was sent or paid beyond what the journal holds",
        "check --listen and --bootstrap (`tally config show`), then try again",
    ),
    ("node.ports", "NoProvider", "nothing was sent or paid", "`tally market` shows what is on offer, and its limits"),
    (
        "node.ports",
        "InsufficientFunds",
        "only acknowledged tokens were paid",
        "`tally wallet show` shows balance and channels; `tally wallet deposit` adds to a channel",
    ),
    (
        "node.ports",
        "JobFailed",
        "acknowledged tokens are paid, nothing else",
        "`tally receipts list` shows what was paid",
    ),
    ("protocol.errors", "Refused", "nothing was paid", "`tally market` shows what each provider accepts"),
    (
        "node.routes",
        "NotInJournal",
        "nothing was changed",
        "`tally receipts list` shows the digests; give at least the first two digits",
    ),
    (
        "incentives.price_sheets",
        "SheetError",
        "sheets that were imported before stay as they were",
        "the form is that of https://openrouter.ai/api/v1/models",
    ),
    (
        "node.upstream.urls",
        "UrlRefused",
        "nothing was sent",
        "check the URL; it may be one that somebody else gave you",
    ),
    (
        "node.upstream.http",
        "UpstreamError",
        "nothing was started or paid",
        "check the server, its URL and key (`tally config show`), then try again",
    ),
    (
        "node.tariff_sheet",
        "TariffSheetError",
        "nothing was signed or sent",
        "`tally tariff new` writes a sheet with every field",
    ),
    ("protocol.bundle_json", "MalformedBundle", "", "`tally receipts export` writes the file that is expected here"),
    (
        "node.gateway.control",
        "ControlUnknown",
        "nothing was changed",
        "`tally status` shows what runs in this home; `tally --home DIR ...` takes another",
    ),
    ("node.gateway.control", "ControlRefused", "", ""),
    (
        "node.gateway.control",
        "ControlUnavailable",
        "nothing was changed",
        "start one with `tally provider run` or `tally gateway run`",
    ),
)


class CommandFailed(TallyError):
    """A command that cannot do what was asked, in its own words: what happened, what was kept, what to do."""

    def __init__(self, what: str, *, kept: str = "", do: str = "") -> None:
        super().__init__(what)
        self.kept = kept
        self.do = do


class Interrupted(Exception):
    """A signal ended the command after a clean stop. `code`: the exit code, 128 + its number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted ({code})")
        self.code = code


class Fault(Exception):
    """An exception that nobody expected. `kept_in`: the file with its traceback, None when none could be written."""

    def __init__(self, cause: Exception, kept_in: Path | None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.kept_in = kept_in


def _advice(exc: TallyError) -> tuple[str, str]:
    """(what was kept safe, what to do next), "" where there is nothing to add to the error's own text."""
    if isinstance(exc, CommandFailed):
        return exc.kept, exc.do
    for module, name, kept, then in _ADVICE:
        # An error's class is imported when it is raised, so whatever is not imported cannot be it.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(exc, kind):
            return kept, then
    return "", "`tally doctor` checks this node from the keys to the chain"


def told(exc: TallyError) -> str:
    """An error as it is shown: what happened, what was kept safe, what to do next."""
    kept, then = _advice(exc)
    lines = [f"error: {str(exc) or type(exc).__name__}"]
    if kept:
        lines.append(f"kept safe: {kept}")
    if then:
        lines.append(f"next: {then}")
    return "\n".join(lines)


def keep_traceback(exc: BaseException, home: Path | None) -> Path | None:
    """Write the traceback to a private file, in the home if there is one; None when nothing can be written."""
    import tempfile
    import time
    import traceback

    from node.log import clean

    text = clean("".join(traceback.format_exception(exc)))
    name = f"tally-fault-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    for directory in (home, Path(tempfile.gettempdir())):
        if directory is None or not directory.is_dir():
            continue
        try:
            file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as out:
                out.write(text)
        except OSError:
            continue
        return directory / name
    return None


def told_fault(fault: Fault) -> str:
    """An unexpected exception as it is shown."""
    then = f"report it with the traceback in {fault.kept_in}" if fault.kept_in else "run it again; no log could be kept"
    return (
        f"error: tally itself failed: {type(fault.cause).__name__}: {fault.cause}\n"
        f"kept safe: whatever was signed is in the journal; a restart continues from there\n"
        f"next: {then}"
    )
