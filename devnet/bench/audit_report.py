"""The audit benchmark as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from devnet.bench.report import _table


def show(result: dict[str, Any], console: Console) -> None:
    """Print every part that was measured."""
    for dtype, part in result["profiles"].items():
        limits = part["profile"]
        console.print(
            f"[bold]{result['model']} in {dtype}[/bold]: a token is flagged beyond {limits['margin_milli'] / 1000}"
            f" logits, {limits['logprob_micro'] / 1e6} nats or {limits['projection_micro'] / 1e6} of the projection; p0"
            f" {limits['flag_ppm']} ppm"
        )
        if part["adversaries"]:
            _adversaries(part["adversaries"], console)
        if part["honest"]:
            _honest(part["honest"], console)
    if "documents" in result:
        _documents(result["documents"], console)
    if "conduct" in result:
        _conduct(result["conduct"], console)
    if "cost" in result:
        _cost(result["cost"], console)
    machine, load = result["machine"], result["load"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores; load {load['start'][0]} at the start, {load['end'][0]} at"
        f" the end; Python {machine['python']}, torch {machine['torch']}; {result['seconds']:.0f} s;"
        f" false slashes: {result['false_slashes']}"
    )


def _of(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.0f} ({spread['max']:.0f})"


def _adversaries(rows: dict[str, Any], console: Console) -> None:
    columns = ("caught", "tokens: median (max)", "jobs", "flag rate", "by", "TOPLOC caught", "TOPLOC tokens")
    table = _table("Audited tokens until a hard fail or E >= 10^6", "adversary", *columns)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['caught']} of {row['seeds']}",
            _of(row["tokens"]),
            _of(row["jobs"]),
            f"{row['flag_rate']:.3f}",
            ", ".join(f"{how} {count}" for how, count in row["by"].items()),
            f"{row['toploc']['caught']} of {row['seeds']}",
            _of(row["toploc"]["tokens"]),
        )
    console.print(table)


def _honest(rows: dict[str, Any], console: Console) -> None:
    columns = ("tokens", "flags", "flag rate", "largest E", "careers", "false slashes", "TOPLOC refuses")
    table = _table("Honest work", "variant", *columns)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['tokens']:,}",
            f"{row['flags']}",
            f"{row['flag_rate']:.1e}" if row["flags"] else "0",
            f"{row['largest_e']:.2f}",
            f"{row['careers']} x {row['jobs_each']} jobs",
            f"{row['false_slashes']}",
            f"{row['toploc_refused']} of {row['jobs']} jobs",
        )
    console.print(table)


def _documents(rows: dict[str, Any], console: Console) -> None:
    table = _table("Cheats in documents", "adversary", "jobs", "the client sees", "anybody can prove", "an audit finds")
    for name, row in rows.items():
        table.add_row(name, str(row["jobs"]), row["client"] or "-", row["proof"] or "-", row["audit"] or "-")
    console.print(table)


def _conduct(rows: dict[str, Any], console: Console) -> None:
    columns = ("seats", "credit", "others' credit", "penalties", "acquitted", "condemned", "undecided", "rounds")
    table = _table("Validators: credit a seat, penalties, and cases that ended wrongly", "conduct", *columns)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['seats']:.0f}",
            f"{row['credited_share']:.3f}",
            f"{row['honest_credited_share']:.3f}",
            f"{row['penalties']:.0f}",
            f"{row['guilty_acquitted']:.0f}",
            f"{row['innocent_condemned']:.0f}",
            f"{row['undecided']:.0f}",
            f"{row['rounds_a_case']:.2f}",
        )
    console.print(table)


def _cost(cost: dict[str, Any], console: Console) -> None:
    table = _table(
        "Audit CPU over generation CPU", "batch", "generation ms a token", "replay ms a token", "ratio", "aim"
    )
    for name, batch, row in ((name, batch, row) for name, rows in cost["cpu"].items() for batch, row in rows.items()):
        met = "" if row["met"] is None else " met" if row["met"] else " missed"
        aim = "-" if row["aim"] is None else f"{row['aim']}{met}"
        numbers = (f"{row[key]:.3f}" for key in ("generation_cpu_ms", "replay_cpu_ms", "ratio"))
        table.add_row(f"{name}, {batch}", *numbers, aim)
    console.print(table)
    console.print(
        f"Committed a token: {cost['bytes_a_token']} bytes, and {cost['bytes_of_routing']} in a mixture of experts"
        f" (TOPLOC: {cost['toploc_bytes_a_token']})"
    )
    if cost["gas"]:
        console.print("Gas: " + ", ".join(f"{name} {used:,}" for name, used in cost["gas"].items()))
