"""Every failure is one message that says what happened, what is safe and what to do, and an exit code."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from node.chain.errors import NotEnoughTally
from node.cli.failures import CommandFailed, Interrupted, told
from node.cli.main import TallyGroup
from node.cli.session import Session
from node.keys import KeystoreError
from node.ports import (
    ChainError,
    ChainUnavailable,
    InsufficientFunds,
    JobFailed,
    NoProvider,
    StoreError,
    TransportError,
)
from node.routes import NotInJournal
from protocol.errors import Refused, TallyError
from protocol.units import Address
from tests.node.cli.conftest import Tally


def invoke(error: BaseException, home: Path) -> tuple[int, str]:
    @click.group(cls=TallyGroup)
    @click.pass_context
    def group(ctx: click.Context) -> None:
        ctx.obj = Session(home=home)

    @group.command()
    def act() -> None:
        raise error

    result = CliRunner().invoke(group, ["act"])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "error",
    [
        StoreError("s"),
        ChainUnavailable("c"),
        NotEnoughTally("open", Address(b"\1" * 20), 1, 2),
        NoProvider("n"),
        InsufficientFunds("i"),
        JobFailed("j"),
        TransportError("t"),
        KeystoreError("k"),
        NotInJournal("d"),
        Refused("busy", "later"),
        CommandFailed("x", kept="y", do="z"),
    ],
)
def test_an_error_of_ours_says_all_three_and_exits_1(error: TallyError, home: Path) -> None:
    code, said = invoke(error, home)
    assert code == 1
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "kept safe", "next"]
    assert str(error) in lines[0]
    assert list(home.iterdir()) == []


def test_the_more_special_advice_wins() -> None:
    assert "confirmed escrow" in told(ChainUnavailable("x"))
    assert "confirmed escrow" not in told(ChainError("x"))


def test_an_unexpected_exception_keeps_its_traceback_in_a_private_file(home: Path) -> None:
    from node.log import redact

    redact("abcdefgh-secret")
    code, said = invoke(RuntimeError("boom abcdefgh-secret"), home)
    assert code == 70
    (log,) = home.iterdir()
    assert str(log) in said and "Traceback" not in said
    assert log.stat().st_mode & 0o777 == 0o600
    assert "RuntimeError: boom [redacted]" in log.read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(143), 143), (click.UsageError("u"), 2), (click.Abort(), 130)],
)
def test_other_exit_codes(error: BaseException, code: int, home: Path) -> None:
    assert invoke(error, home)[0] == code


@pytest.mark.parametrize("words", [["nonsense"], ["run"], ["provider", "run", "--slots", "x"], ["wallet", "send"]])
def test_wrong_usage_is_2(tally: Tally, words: list[str]) -> None:
    result = tally(*words, stdin="")
    assert result.exit_code == 2
    assert "Usage:" in result.stderr or "Error:" in result.stderr


def test_a_global_option_in_the_wrong_place_is_explained(tally: Tally) -> None:
    result = tally("status", "--home", "x")
    assert result.exit_code == 2 and "tally --home VALUE COMMAND" in result.stderr


def test_a_bad_setting_names_its_key(tally: Tally) -> None:
    result = tally("provider", "run", "--price-prompt", "0.1.2")
    assert result.exit_code == 1
    assert "provider.prompt_price (flag)" in result.stderr and "config show --origin" in result.stderr


def test_a_file_that_is_no_bundle_does_not_send_anybody_to_the_doctor(tally: Tally, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    result = tally("receipts", "verify", str(tmp_path / "job.json"))
    assert result.exit_code == 1 and "receipts export" in result.stderr and "doctor" not in result.stderr


def test_an_order_by_the_job_needs_one(tally: Tally) -> None:
    result = tally("market", "--sort", "job")
    assert result.exit_code == 2 and "--job or --prompt" in result.stderr


def test_too_little_tally_is_told_in_tally() -> None:
    short = str(NotEnoughTally("stake", Address(b"\x07" * 20), 99 * 10**18 + 5 * 10**17, 5000 * 10**18))
    assert short == f"stake needs 5000 TALLY and wallet 0x{'07' * 20} has 99.5; nothing was sent"
