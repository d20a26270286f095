"""The result as tables on a terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

RESULTS: Final = Path("bench-results")


def keep(result: dict[str, Any], path: Path | None, prefix: str) -> None:
    """Write the result as JSON to `path`, or to a file of RESULTS named by the time, and say where."""
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{prefix}{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"written to {path}", err=True)


def show(result: dict[str, Any], console: Console) -> None:
    """Print every part that was measured."""
    if "throughput" in result:
        _throughput(result["throughput"], console)
    if "first_token" in result:
        _first_token(result["first_token"], console)
    if "signatures" in result:
        _signatures(result["signatures"], console)
    if "gas" in result:
        _gas(result["gas"], console)
    machine, load = result["machine"], result["load"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores; load {load['start'][0]} at the start, {load['end'][0]} at"
        f" the end; fsync {machine['fsync_ms']} ms; model {result['model']}; Python {machine['python']},"
        f" torch {machine['torch']}; {result['seconds']:.0f} s"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _spread(value: dict[str, Any], form: str = "{:,.0f}") -> str:
    low, high = value["iqr"]
    return f"{form.format(value['median'])} ({form.format(low)} to {form.format(high)})"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "[green]met[/green]" if met else "[red]missed[/red]"


def _throughput(measured: dict[str, Any], console: Console) -> None:
    table = _table("Tokens/s: median (interquartile range)", "streams", "bare engine", "gateway", "ratio", "aim", "")
    cpu = _table(
        "CPU seconds per 1,000 tokens", "streams", "bare engine", "provider", "gateway", "client", "cores bare", "full"
    )
    for streams, row in measured.items():
        table.add_row(
            streams,
            _spread(row["bare_tokens_per_s"]),
            _spread(row["full_tokens_per_s"]),
            _spread(row["ratio"], "{:.3f}"),
            f"{row['aim']}",
            _verdict(row["met"]),
        )
        seconds = row["cpu_s_per_1k_tokens"]
        parts = (f"{seconds[name]:.3f}" for name in ("bare_engine", "provider", "gateway", "client"))
        cpu.add_row(streams, *parts, f"{row['cores_busy']['bare']:.2f}", f"{row['cores_busy']['full']:.2f}")
    console.print(table)
    console.print(cpu)


def _first_token(measured: dict[str, Any], console: Console) -> None:
    table = _table("Time to the first token, ms", "bare engine", "gateway", "added p50", "added p95", "aim p50", "")
    added = measured["added_ms"]
    table.add_row(
        _spread(measured["bare_ms"], "{:.1f}"),
        _spread(measured["full_ms"], "{:.1f}"),
        f"{added['median']:.1f}",
        f"{added['p95']:.1f}",
        f"{measured['aim_ms']:.0f}",
        _verdict(measured["met"]),
    )
    console.print(table)


def _signatures(measured: dict[str, Any], console: Console) -> None:
    steps = list(next(iter(measured.values())))
    table = _table("Documents, microseconds a call", "document", *steps)
    for name, row in measured.items():
        table.add_row(name, *(f"{row[step]['median']:.1f}" for step in steps))
    console.print(table)


def _gas(measured: dict[str, Any], console: Console) -> None:
    table = _table("Settlement gas", "pairs", "gas", "gas a pair", "aim at 100", "")
    for count, used in measured["gas"].items():
        last = count == str(measured["aim_at"])
        table.add_row(
            count,
            f"{used:,}",
            f"{measured['gas_per_pair'][count]:,}",
            f"{measured['aim']:,}" if last else "",
            _verdict(measured["met"]) if last else "",
        )
    console.print(table)
