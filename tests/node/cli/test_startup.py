"""The command line starts without what it does not need, and finds commands that other packages add."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from node.cli import lazy
from node.cli.main import COMMANDS, cli
from tests.node.cli.conftest import Tally

HEAVY = ("torch", "transformers", "libp2p", "trio", "web3", "aiohttp", "sqlmodel", "sqlalchemy", "rich", "eth_account")


@pytest.mark.parametrize("words", [["--help"], ["status"], ["status", "--json"], ["run", "--help"], ["init", "--help"]])
def test_nothing_heavy_is_imported(words: list[str], tmp_path: Path) -> None:
    code = f"""
import json, sys
from node.cli.main import cli
try:
    cli(["--home", {str(tmp_path)!r}, *{words!r}], prog_name="tally")
except SystemExit as exc:
    assert exc.code == 0, exc.code
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_help_lists_every_command_with_its_line(tally: Tally) -> None:
    text = tally("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert name in text and line in text


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_loads_and_teaches(tally: Tally, name: str) -> None:
    result = tally(name, "--help")
    assert result.exit_code == 0
    assert "Usage: tally" in result.stdout and len(result.stdout.splitlines()) > 5


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
    return found


def test_every_command_has_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    for path, command in every_command(cli):
        assert command.help, path
        for param in command.params:
            assert isinstance(param, click.Argument) or getattr(param, "help", None), (path, param.name)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("greet", "tests.node.cli.plugin_of_a_test:greet", lazy.PLUGINS),
        EntryPoint("broken", "tests.node.cli.no_such_module:x", lazy.PLUGINS),
        EntryPoint("wrong", "tests.node.cli.plugin_of_a_test:NO_COMMAND", lazy.PLUGINS),
        EntryPoint("status", "tests.node.cli.plugin_of_a_test:greet", lazy.PLUGINS),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == lazy.PLUGINS else [])


@pytest.mark.usefixtures("plugin")
def test_help_names_plugins_without_importing_them(tally: Tally) -> None:
    sys.modules.pop("tests.node.cli.plugin_of_a_test", None)
    text = tally("--help").stdout
    assert "greet" in text and "broken" in text
    assert "tests.node.cli.plugin_of_a_test" not in sys.modules


@pytest.mark.usefixtures("plugin")
def test_a_plugin_runs_and_never_shadows_a_command_of_ours(tally: Tally) -> None:
    assert tally("greet").stdout == "hello from a plugin\n"
    assert "no node runs" in tally("status").stdout


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", ["broken", "wrong"])
def test_a_plugin_that_does_not_load_is_one_clear_error(tally: Tally, name: str) -> None:
    result = tally(name)
    assert result.exit_code == 1
    assert name in result.stderr and "Traceback" not in result.stderr


def test_shell_completion_offers_the_commands() -> None:
    asked = CliRunner().invoke(
        cli,
        [],
        prog_name="tally",
        env={"_TALLY_COMPLETE": "bash_complete", "COMP_WORDS": "tally re", "COMP_CWORD": "1"},
    )
    assert "plain,receipts" in asked.stdout
    source = CliRunner().invoke(cli, [], prog_name="tally", env={"_TALLY_COMPLETE": "zsh_source"})
    assert "#compdef tally" in source.stdout
