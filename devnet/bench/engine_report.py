"""Ratios from the waves' figures, and tables on a terminal."""

from __future__ import annotations

import statistics
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from devnet.bench.workload import summary

Rates = dict[str, dict[str, dict[int, list[float]]]]
"""Tokens a second: streams -> rival -> threads -> one value a repeat."""

AIMS: Final[dict[tuple[str, str], float]] = {
    ("llama.cpp", "1"): 0.8,
    ("llama.cpp", "16"): 1.1,
    ("llama.cpp", "32"): 1.1,
    ("continuous", "1"): 4.0,
    ("continuous", "16"): 4.0,
    ("continuous", "32"): 4.0,
}
"""Rival and streams -> smallest ratio of our tokens/s to its, on a CPU."""

SAMPLING_AIM: Final = 0.03
"""Largest share of a step that seeded sampling and fingerprints may take beyond a plain argmax."""

SHARED_PROMPT_AIM: Final = 8.0
"""How many times sooner the first token of a cached 1,000-token prompt must come."""


def evaluate(rates: Rates, weight_bytes: int, bytes_per_s: float | None) -> dict[str, Any]:
    """Each rival at its best number of threads; our ratio to it, repeat by repeat; share of the memory bound.

    At one stream every token reads all weights once: bandwidth over their bytes bounds the tokens a second.
    """
    tokens: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for streams, by_rival in rates.items():
        best = {rival: max(found, key=lambda t: statistics.median(found[t])) for rival, found in by_rival.items()}
        tokens[streams] = {
            rival: {"threads": threads, "tokens_per_s": summary(by_rival[rival][threads], 1)}
            for rival, threads in best.items()
        }
        if "tally" not in best:
            continue
        ours = by_rival["tally"][best["tally"]]
        ratios[streams] = {}
        for rival, threads in best.items():
            if rival == "tally":
                continue
            pairs = zip(ours, by_rival[rival][threads], strict=False)  # one that fell silent has fewer
            row = summary([mine / theirs for mine, theirs in pairs], 3)
            aim = AIMS.get((rival, streams))
            ratios[streams][rival] = {**row, "aim": aim, "met": None if aim is None else row["median"] >= aim}
    out = {"waves": tokens, "ratios": ratios}
    one = tokens.get("1", {}).get("tally")
    if one is not None and bytes_per_s:
        out["share_of_memory_bound"] = round(one["tokens_per_s"]["median"] * weight_bytes / bytes_per_s, 3)
    return out


def show(result: dict[str, Any], console: Console) -> None:
    """Print everything that was measured, and what could not be."""
    for name, model in result["models"].items():
        _waves(name, model, console)
        _own(model, result, console)
        for rival, why in model["missing"].items():
            console.print(f"[red]missing[/red]: {rival}: {why}", highlight=False)
    machine, load, plan = result["machine"], result["load"], result["plan"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores; load {load['start'][0]} at the start, {load['end'][0]} at"
        f" the end; bf16 on {plan['device']}, prompt {plan['prompt']}, output {plan['output']}; Python"
        f" {machine['python']}, torch {machine['torch']}; {result['seconds']:.0f} s",
        highlight=False,
    )


def _spread(value: dict[str, Any], form: str) -> str:
    low, high = value["iqr"]
    return f"{form.format(value['median'])} ({form.format(low)} to {form.format(high)})"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "[green]met[/green]" if met else "[red]missed[/red]"


def _waves(name: str, model: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{name}: tokens/s and our ratio, median (interquartile range)", title_justify="left")
    for index, column in enumerate(("streams", "engine", "threads", "tokens/s", "ours to it", "aim", "")):
        table.add_column(column, justify="right" if index > 1 else "left")
    for streams, rivals in model["waves"].items():
        for rival, row in rivals.items():
            ratio = model["ratios"].get(streams, {}).get(rival)
            table.add_row(
                streams,
                rival,
                str(row["threads"]),
                _spread(row["tokens_per_s"], "{:,.0f}"),
                _spread(ratio, "{:.2f}") if ratio else "",
                f"{ratio['aim']}" if ratio and ratio["aim"] else "",
                _verdict(ratio["met"]) if ratio else "",
            )
    console.print(table)


def _own(model: dict[str, Any], result: dict[str, Any], console: Console) -> None:
    if "sampling_share" in model:
        parts = []
        for streams, share in model["sampling_share"].items():
            parts.append(f"{100 * share:.1f} % at {streams} {_verdict(share <= SAMPLING_AIM)}")
        console.print("Seeded sampling and fingerprints, share of a step: " + ", ".join(parts), highlight=False)
    if "shared_prompt" in model:
        shared = model["shared_prompt"]
        console.print(
            f"First token of a shared {shared['tokens']}-token prompt: {_spread(shared['cold_ms'], '{:.1f}')} ms, from"
            f" the prefix cache {_spread(shared['hit_ms'], '{:.1f}')} ms, {_spread(shared['sooner'], '{:.1f}')} times"
            f" sooner {_verdict(shared['sooner']['median'] >= SHARED_PROMPT_AIM)}",
            highlight=False,
        )
    if "share_of_memory_bound" in model:
        console.print(
            f"One stream reaches {100 * model['share_of_memory_bound']:.0f} % of what reading the weights once a token"
            f" allows ({model['bytes_per_s'] / 1e9:.1f} GB/s on {result['plan']['device']})",
            highlight=False,
        )
