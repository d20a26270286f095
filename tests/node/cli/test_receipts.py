"""Receipts out of a real journal: listed, drawn, exported, and checked again from the file alone."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from incentives.ledger import Role
from node.gateway.control import ControlServer
from node.routes import journal_routes
from node.store.store import SqlStore
from protocol.bundle import Outcome, verify
from protocol.bundle_json import decode
from tests.node.cli.conftest import Tally, furnish
from tests.node.cli.sticks import DOMAIN, Recipe, make_bundle

BUNDLE = make_bundle()
LAST = BUNDLE.notches[-1]
PREFIX = LAST.digest.hex()[:7]


def test_list_shows_the_last_receipt_of_each_job(furnished: Path, tally: Tally) -> None:
    listed = tally("receipts", "list", "--json")
    assert listed.exit_code == 0, listed.output
    (row,) = json.loads(listed.stdout)
    assert row["digest"] == "0x" + LAST.digest.hex()
    assert (row["model"], row["finish"], row["total_wei"]) == ("tiny", "stop", str(LAST.receipt.total))
    text = tally("receipts", "list").stdout
    assert row["digest"][:12] in text and "both" in text
    assert len(json.loads(tally("receipts", "list", "--all", "--json").stdout)) == len(BUNDLE.notches)


def test_a_home_without_journal_says_so(home: Path, tally: Tally) -> None:
    result = tally("receipts", "list")
    assert result.exit_code == 1
    assert "there is no journal" in result.stderr and "next:" in result.stderr


@pytest.mark.parametrize("role", list(Role))
def test_show_draws_both_halves(home: Path, tally: Tally, role: Role) -> None:
    furnish(home, role, BUNDLE)
    drawn = tally("receipts", "show", PREFIX)
    assert drawn.exit_code == 0, drawn.output
    for part in ("PROVIDER", "CLIENT", "(ours)", "split: receipt 3 of 3", LAST.digest.hex(), "tokens"):
        assert part in drawn.stdout
    widths = {len(line) for line in drawn.stdout.splitlines() if line.startswith(("│", "╭", "╰"))}
    assert len(widths) == 1
    assert json.loads(tally("receipts", "show", PREFIX, "--json").stdout)["receipt"]["total"] == str(LAST.receipt.total)


@pytest.mark.parametrize("role", list(Role))
def test_export_is_whole_and_verifies_without_a_home(home: Path, tally: Tally, role: Role, tmp_path: Path) -> None:
    furnish(home, role, BUNDLE)
    file = tmp_path / "job.json"
    assert tally("receipts", "export", PREFIX, "-o", str(file)).exit_code == 0
    assert file.stat().st_mode & 0o777 == 0o600
    checks = verify(decode(file.read_text()))
    skipped = {check.name for check in checks if check.outcome is Outcome.SKIP}
    assert skipped == (set() if role is Role.CLIENT else {"token ids"})
    (home / "journal.db").unlink()
    (home / "deployment.json").unlink()
    verified = tally("receipts", "verify", str(file))
    assert verified.exit_code == 0, verified.output
    assert "FAIL" not in verified.stdout and verified.stdout.count("ok  ") >= 10


def test_export_without_the_key_needs_no_sign(furnished: Path, tally: Tally) -> None:
    (furnished / "keys" / "session.json").unlink()
    refused = tally("receipts", "export", PREFIX)
    assert refused.exit_code == 1 and "--no-sign" in refused.stderr
    bare = tally("receipts", "export", PREFIX, "--no-sign")
    assert bare.exit_code == 0
    assert {c.name for c in verify(decode(bare.stdout)) if c.outcome is Outcome.SKIP} == {"vouchers", "acknowledgement"}


def test_verify_from_the_journal(furnished: Path, tally: Tally) -> None:
    result = tally("receipts", "verify", "0x" + PREFIX, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    outcomes = {check["check"]: check["outcome"] for check in found["checks"]}
    assert outcomes["cost"] == outcomes["options"] == outcomes["work"] == "ok"


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ('"total": "', '"total": "9', "cost"),
        ('"cumulative": "', '"cumulative": "9', "vouchers"),
        ('"chain_id": "31337"', '"chain_id": "1"', "request"),
        ('"prompt_price": "1', '"prompt_price": "2', "tariff"),
        ('"options": "0x9', '"options": "0x8', "options"),
        ('"head_dim": 16', '"head_dim": 17', "work"),
    ],
)
def test_a_tampered_file_fails_with_exit_1(
    furnished: Path, tally: Tally, tmp_path: Path, old: str, new: str, check: str
) -> None:
    text = tally("receipts", "export", PREFIX).stdout
    assert old in text
    file = tmp_path / "tampered.json"
    file.write_text(text.replace(old, new, 1))
    result = tally("receipts", "verify", str(file))
    assert result.exit_code == 1
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("FAIL ")]
    assert check in failed
    assert result.stdout.splitlines()[-1].startswith("FAILED")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1]"])
def test_a_file_that_is_no_bundle_is_an_error_not_a_verdict(tally: Tally, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    result = tally("receipts", "verify", str(file))
    assert result.exit_code == 1 and "no receipt bundle" in result.stderr
    assert tally("receipts", "verify", str(tmp_path / "missing.json")).exit_code == 1


def test_a_job_without_receipts_is_not_called_proven(tally: Tally, tmp_path: Path) -> None:
    from dataclasses import replace

    from protocol.bundle_json import encode

    file = tmp_path / "empty.json"
    file.write_text(encode(replace(make_bundle(Recipe(completion_tokens=1)), notches=())))
    result = tally("receipts", "verify", str(file))
    assert result.exit_code == 1 and "no receipt" in result.stdout


@pytest.mark.parametrize("prefix", ["0x", "zz", "f", "00" * 33, "0" * 8])
def test_an_unknown_digest_is_explained(furnished: Path, tally: Tally, prefix: str) -> None:
    result = tally("receipts", "show", prefix)
    assert result.exit_code == 1 and "receipts list" in result.stderr


def test_status_shows_what_the_journal_knows(furnished: Path, tally: Tally) -> None:
    found = json.loads(tally("status", "--json").stdout)
    assert found["running"] is False
    assert found["journal"]["client"]["open_jobs"] == 0
    assert found["journal"]["last_receipt"]["digest"] == "0x" + LAST.digest.hex()
    text = tally("status").stdout
    assert "no node runs" in text and "TALLY" in text


def test_a_running_node_answers_for_its_journal(furnished: Path, tally: Tally) -> None:
    """The journal is locked while a node runs, so the same commands ask it instead."""
    ready, done = threading.Event(), threading.Event()

    async def node() -> None:
        store = SqlStore(furnished / "journal.db")
        await store.open()
        server = ControlServer(furnished / "control.sock", journal_routes(store, DOMAIN))
        await server.start()
        ready.set()
        await asyncio.to_thread(done.wait)
        await server.stop()
        await store.close()

    thread = threading.Thread(target=lambda: asyncio.run(node()))
    thread.start()
    try:
        assert ready.wait(20)
        (row,) = json.loads(tally("receipts", "list", "--json").stdout)
        assert row["digest"] == "0x" + LAST.digest.hex()
        assert tally("receipts", "verify", PREFIX).exit_code == 0
        missing = tally("receipts", "show", "dead")
        assert missing.exit_code == 1 and "no receipt's digest" in missing.stderr
    finally:
        done.set()
        thread.join(20)
