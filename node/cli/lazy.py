"""A group that imports a command only when it is called, so that `tally --help` does not wait for what it won't use.

Commands of this package are a table of name -> (import path, one line). Other packages add theirs as entry points of
the group `tally.commands`; they too are imported only when called.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from protocol.errors import TallyError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PLUGINS: Final = "tally.commands"
"""The entry point group: `[project.entry-points."tally.commands"] name = "module:click_command"`."""


class BrokenPlugin(TallyError):
    """A command that another package adds cannot be loaded."""


class LazyGroup(click.Group):
    """A group whose commands are given as name -> ("module:attribute", short help)."""

    def __init__(
        self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, plugins: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})
        self._plugins = plugins

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands in the order of the table, then those of plugins by name."""
        own = [*self._lazy, *(name for name in super().list_commands(ctx) if name not in self._lazy)]
        return [*own, *sorted(name for name in self._found() if name not in own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command. Raises: BrokenPlugin."""
        if cmd_name in self._lazy:
            return _imported(self._lazy[cmd_name][0])
        known = super().get_command(ctx, cmd_name)
        if known is not None:
            return known
        plugin = self._found().get(cmd_name)
        return None if plugin is None else _loaded(plugin)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands from the table alone: nothing is imported for it."""
        plugins = self._found()
        rows = []
        for name in self.list_commands(ctx):
            if name in self._lazy:
                rows.append((name, self._lazy[name][1]))
            elif name in self.commands:
                rows.append((name, self.commands[name].get_short_help_str()))
            else:
                rows.append((name, f"Added by {plugins[name].module}; see `tally {name} --help`."))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def _found(self) -> dict[str, EntryPoint]:
        if not self._plugins:
            return {}
        from importlib.metadata import entry_points

        return {entry.name: entry for entry in entry_points(group=PLUGINS)}


def _imported(where: str) -> click.Command:
    module, _, attribute = where.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


def _loaded(plugin: EntryPoint) -> click.Command:
    try:
        command = plugin.load()
    except (ImportError, AttributeError) as exc:
        raise BrokenPlugin(
            f"the command {plugin.name!r}, which {plugin.module} adds, cannot be loaded: {exc}. "
            f"All other commands work; install that package again"
        ) from exc
    if not isinstance(command, click.Command):
        raise BrokenPlugin(f"{plugin.value}, registered as the command {plugin.name!r}, is no click command")
    return command
