"""`python -m devnet.bench.audit` (`make audit-bench`): who is caught, how soon, and at what cost; and who is not.

Adversaries run until each of their seeds is caught or the budget of jobs is spent; honest variants of the engine run a
fixed number of jobs, whose findings are then resampled into long careers. Validators are played against each other by
the committee's rules. Nothing here passes or fails but one figure: false slashes, which must be 0.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from devnet.adversaries.registry import Adversary, engines
from devnet.bench import facts
from devnet.bench.audit_conduct import measure_conduct
from devnet.bench.audit_cost import measure_cost
from devnet.bench.audit_documents import measure_documents
from devnet.bench.audit_lab import Jobs, Looked, Served, Watched, look, serve, serve_preempting
from devnet.bench.audit_report import show
from devnet.bench.models import random_model
from devnet.bench.report import keep
from devnet.bench.toploc import PROOF_BYTES, TopLoc
from devnet.cluster import MODEL_DIR
from incentives.evidence import SLASH_AT, WAD, Evidence
from node.engine.engine import TorchEngine
from node.engine.replay import TorchReplayer
from protocol.messages import Profile
from protocol.transcript import LOGPROB_BYTES, PROJECTION_BYTES, ROUTING_BYTES
from protocol.units import AuditOutcome

GAS_SNAPSHOT: Final = Path(__file__).parents[2] / "contracts" / "gas-snapshot.json"

VERDICT_STEPS: Final = ("commit", "draw", "submit", "reveal", "conclude", "execute", "answer", "appeal", "prove")
"""Calls of the Court, as they are named in the gas snapshot."""

HONEST: Final = (
    "batch 1",
    "batch 8",
    "batch 16",
    "cached",
    "2 threads",
    "preempted",
    "plain torch",
    "coupled speculation",
)
"""Honest ways to run one profile: the company a stream has, its prefix from the cache, other thread counts, displaced
in the middle, torch's kernels instead of ours, and speculation that changes no token."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `seeds`: independent runs of each adversary. `budget`: audited jobs after which an uncaught one
    counts as missed. `honest_jobs`: of each honest variant. `careers`: resampled streams, of `career` jobs each.
    `cost_models`: in SHAPES, beside the model itself.
    """

    model_dir: Path = MODEL_DIR
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    seeds: int = 20
    budget: int = 24
    honest_jobs: int = 48
    careers: int = 300
    career: int = 100
    conduct_seeds: int = 20
    conduct_cases: int = 500
    cost_repeats: int = 3
    cost_models: tuple[str, ...] = ("100m",)
    only: tuple[str, ...] = ()


QUICK: Final[dict[str, Any]] = {
    "dtypes": ("fp32",),
    "seeds": 2,
    "budget": 3,
    "honest_jobs": 4,
    "careers": 20,
    "career": 10,
    "conduct_seeds": 2,
    "conduct_cases": 50,
    "cost_repeats": 1,
    "cost_models": (),
}
"""Shows that everything runs. Its figures mean little."""

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------- adversaries


@dataclass(slots=True)
class _Run:
    """One seed of one adversary."""

    watched: Watched
    toploc_tokens: int = 0
    toploc_caught: bool = False


async def _wave(engine: TorchEngine, jobs: Jobs, seeds: Sequence[int], number: int) -> list[Served]:
    """One more job of every seed."""
    return await serve(engine, [jobs.job(seed, number) for seed in seeds])


async def measure_adversary(
    who: Adversary, plan: Plan, dtype: str, replayer: TorchReplayer, toploc: TopLoc, jobs: Jobs
) -> dict[str, Any]:
    """Every seed until it is caught or the budget is spent."""
    runs = [_Run(Watched()) for _ in range(plan.seeds)]
    engine: TorchEngine = who.thing()(plan.model_dir, dtype, slots=16)
    await engine.start()
    try:
        for number in range(plan.budget):
            open_seeds = [seed for seed, run in enumerate(runs) if not run.watched.caught]
            if not open_seeds:
                break
            for seed, served in zip(open_seeds, await _wave(engine, jobs, open_seeds, number), strict=True):
                runs[seed].watched.take(replayer.profile, await look(replayer, served))
                _see(runs[seed], toploc.refused_at(served), len(served.tokens))
    finally:
        await engine.stop()
    return _caught(runs)


def _see(run: _Run, refused_at: int, tokens: int) -> None:
    if not run.toploc_caught:
        run.toploc_tokens += refused_at or tokens
        run.toploc_caught = bool(refused_at)


def _caught(runs: Sequence[_Run]) -> dict[str, Any]:
    caught = [run.watched for run in runs if run.watched.caught]
    refused = [run.toploc_tokens for run in runs if run.toploc_caught]
    replayed = sum(run.watched.replayed for run in runs)
    return {
        "seeds": len(runs),
        "caught": len(caught),
        "detection_rate": len(caught) / len(runs),
        "tokens": _spread([watched.tokens for watched in caught]),
        "jobs": _spread([watched.jobs for watched in caught]),
        "by": {name: sum(w.caught == name for w in caught) for name in sorted({w.caught for w in caught})},
        "replayed_tokens": replayed,
        "flag_rate": sum(run.watched.flags for run in runs) / max(1, replayed),
        "toploc": {"caught": len(refused), "tokens": _spread(refused)},
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    return {"median": median(values), "max": max(values)} if values else None


# --------------------------------------------------------------------------------------------------------------- honest


async def _honest_jobs(variant: str, plan: Plan, dtype: str, jobs: Jobs, who: type[TorchEngine]) -> list[Served]:
    """The jobs of one honest variant. Raises: ValueError for a variant that did not happen."""
    slots = {"batch 1": 1, "batch 8": 8, "preempted": max(1, plan.honest_jobs // 12)}.get(variant, 16)
    options: dict[str, Any] = {"threads": 2} if variant == "2 threads" else {}
    options |= {"compile_option": "off"} if variant == "plain torch" else {}
    engine = who(plan.model_dir, dtype, slots=slots, max_queue=4 * plan.honest_jobs, **options)
    await engine.start()
    try:
        requests = [jobs.job(1_000_000 + HONEST.index(variant), number) for number in range(plan.honest_jobs)]
        if variant == "preempted":
            served = await serve_preempting(engine, requests)
            if not engine.stats().preempted_total:
                raise ValueError("no stream was displaced: there were too few jobs to measure that")
            return served
        if variant != "cached":
            return await serve(engine, requests)
        salted = [replace(request, salt=bytes(32)) for request in requests]
        await serve(engine, [replace(request, seed=bytes(24) + request.seed[:8], max_tokens=1) for request in salted])
        served = await serve(engine, salted)
        if not all(one.tokens[0].cached_tokens for one in served):
            raise ValueError("a prompt that was just read did not come from the prefix cache")
        return served
    finally:
        await engine.stop()


def careers(looked: Sequence[Looked], profile: Profile, plan: Plan, name: str) -> dict[str, Any]:
    """Long honest lives made of the jobs that were looked at, drawn with repetition: how close any comes to a slash."""
    rng = random.Random(name)
    most, slashes = Evidence().value, 0
    for _ in range(plan.careers):
        evidence, slashed = Evidence(), False
        for found in rng.choices(looked, k=plan.career):
            one = found.finding
            evidence = evidence.after(one.tokens, one.flags, one.voids, profile.flag_ppm)
            most = max(most, evidence.value)
            slashed = slashed or bool(found.caught_at) or evidence.value >= SLASH_AT
        slashes += slashed
    return {"careers": plan.careers, "jobs_each": plan.career, "largest_e": most / WAD, "false_slashes": slashes}


async def measure_honest(
    variant: str, plan: Plan, dtype: str, replayer: TorchReplayer, toploc: TopLoc, jobs: Jobs
) -> dict[str, Any]:
    """Flag rate, careers, and how often TOPLOC refuses the same work."""
    who: type[TorchEngine] = TorchEngine
    if variant == "coupled speculation":
        who = next(one for one in engines() if one.honest).thing()
    served = await _honest_jobs(variant, plan, dtype, jobs, who)
    looked = [await look(replayer, one) for one in served]
    tokens = sum(one.finding.tokens for one in looked)
    flags = sum(one.finding.flags for one in looked)
    return {
        "jobs": len(looked),
        "tokens": tokens,
        "flags": flags,
        "flag_rate": flags / max(1, tokens),
        "voids": sum(one.finding.voids for one in looked),
        "not_passed": sum(one.finding.outcome is not AuditOutcome.PASS for one in looked),
        "toploc_refused": sum(bool(toploc.refused_at(one)) for one in served),
        **careers(looked, replayer.profile, plan, f"{variant} {dtype}"),
    }


# ------------------------------------------------------------------------------------------------------------ the whole


async def _dtype(plan: Plan, dtype: str, say: Say) -> dict[str, Any]:
    """All adversaries and honest variants under one profile."""
    replayer, toploc, jobs = TorchReplayer(plan.model_dir, dtype), TopLoc(plan.model_dir, dtype), Jobs(plan.model_dir)
    await replayer.start()
    adversaries: dict[str, Any] = {}
    honest: dict[str, Any] = {}
    try:
        for who in engines():
            if not who.honest and (not plan.only or who.name in plan.only):
                say(f"{dtype}: {who.name}")
                adversaries[who.name] = await measure_adversary(who, plan, dtype, replayer, toploc, jobs)
                gc.collect()  # an engine is a cycle, and holds its slots until then
        for variant in HONEST:
            if not plan.only or variant in plan.only:
                say(f"{dtype}: honest, {variant}")
                honest[variant] = await measure_honest(variant, plan, dtype, replayer, toploc, jobs)
                gc.collect()
        profile = replayer.profile
    finally:
        await replayer.stop()
    limits = ("margin_milli", "logprob_micro", "projection_micro", "flag_ppm")
    return {
        "profile": {name: getattr(profile, name) for name in limits},
        "adversaries": adversaries,
        "honest": honest,
    }


def gas() -> dict[str, int]:
    """Gas of what a verdict takes, step by step, as contracts/gas-snapshot.json has it."""
    found: dict[str, int] = json.loads(GAS_SNAPSHOT.read_text())
    return {name: used for name, used in found.items() if any(step in name.lower() for step in VERDICT_STEPS)}


async def _cpu(plan: Plan, say: Say) -> dict[str, Any]:
    """By model, what replays cost beside generations; the random ones show how that depends on size."""
    rows = {plan.model_dir.name: await measure_cost(plan.model_dir, "bf16", repeats=plan.cost_repeats, say=say)}
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as scratch:
        for name in plan.cost_models:
            folder = random_model(name, Path(scratch) / name)
            rows[name] = await measure_cost(folder, "bf16", repeats=plan.cost_repeats, say=say)
    return rows


async def measure(plan: Plan, say: Say) -> dict[str, Any]:
    """The whole result, ready for JSON."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as scratch:
        machine = facts.machine(Path(scratch))
    result: dict[str, Any] = {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "load": {"start": facts.load()},
        "model": plan.model_dir.name,
        "profiles": {dtype: await _dtype(plan, dtype, say) for dtype in plan.dtypes},
    }
    if not plan.only:
        say("documents")
        result["documents"] = measure_documents()
        say("validators' conduct")
        result["conduct"] = measure_conduct(plan.conduct_seeds, plan.conduct_cases)
        result["cost"] = {
            "cpu": await _cpu(plan, say),
            "bytes_a_token": LOGPROB_BYTES + PROJECTION_BYTES,
            "bytes_of_routing": ROUTING_BYTES,
            "toploc_bytes_a_token": round(PROOF_BYTES / 32, 2),
            "gas": gas(),
        }
    honest = [row for part in result["profiles"].values() for row in part["honest"].values()]
    result["false_slashes"] = sum(row["false_slashes"] for row in honest)
    result["load"]["end"] = facts.load()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures little.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Where the JSON goes.")
@click.option("--seeds", type=click.IntRange(1), help="Independent runs of each adversary.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(("fp32", "bf16")), help="These profiles only.")
@click.option("--only", multiple=True, help="These adversaries and honest variants only; may be given repeatedly.")
def main(quick: bool, path: Path | None, **wanted: Any) -> None:
    """Tokens and jobs until a cheat is caught, by profile; honest variants; validators; what auditing costs."""
    plan = replace(Plan(), **QUICK) if quick else Plan()
    plan = replace(plan, **{name: value for name, value in wanted.items() if value not in (None, ())})
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        result = asyncio.run(measure(plan, lambda line: progress.update(task, description=line)))
    show(result, Console())
    keep(result, path, "audit-")
    if result["false_slashes"]:
        raise SystemExit(f"{result['false_slashes']} honest careers were slashed")


if __name__ == "__main__":
    main()
