"""Every cheat that the project knows of exists, really cheats, and is seen by the check that is said to see it."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from devnet.adversaries.registry import ADVERSARIES, NoSuchAdversary, adversary, engines
from devnet.adversaries.scheduling import Speculating
from devnet.adversaries.standing_in import stand_in
from devnet.adversaries.validators import invented
from devnet.bench.audit import HONEST, Plan, careers, measure_adversary, measure_honest
from devnet.bench.audit_conduct import CONDUCTS, measure_conduct
from devnet.bench.audit_documents import measure_documents
from devnet.bench.audit_lab import Jobs, Looked, serve
from devnet.bench.toploc import TopLoc, compare
from devnet.cluster import MODEL_DIR
from incentives.verdicts import JobFinding, contradicts_itself, summarise
from node.engine.engine import TorchEngine
from node.engine.replay import TorchReplayer
from protocol.units import ZERO_DIGEST, Address, AuditOutcome, Digest, JobId

NAMES = {
    "provider": {
        "small-model",
        "prefill-trick",
        "layer-fewer",
        "int8-w8a8",
        "int8-weights",
        "int4",
        "wrong-temperature",
        "own-rng",
        "truncated-prompt",
        "padded-output",
        "altered-token",
        "lossy-speculation",
        "over-count",
        "false-cached",
        "overcharge",
        "equivocation",
        "late-and-silent",
        "omitted-receipt",
        "withheld",
        "squatter",
        "coupled-speculation",
    },
    "client": {"stops-vouchers", "replays", "overdraws", "races-exit"},
    "validator": {"copies", "rubber-stamps", "no-model", "colludes"},
}
"""Who the issue asks for, by role."""

BUDGET = Plan(dtypes=("fp32",), seeds=1, budget=24, honest_jobs=16, careers=300, career=50)
"""One seed, and as many jobs as it may take."""

SEES = {
    "small-model": {"hard fail"},
    "padded-output": {"stop rule"},
    "int8-weights": {"hard fail", "evidence"},
}
"""By what some are seen; by hard fail or evidence all others."""

BLIND_TO = {"prefill-trick", "wrong-temperature", "own-rng", "altered-token", "lossy-speculation", "padded-output"}
"""Cheats that leave activations true: what commits to activations alone passes them."""


def test_everybody_the_issue_names_is_there() -> None:
    found: dict[str, set[str]] = {}
    for one in ADVERSARIES:
        found.setdefault(one.role, set()).add(one.name)
        thing = one.thing()
        assert thing.__doc__, one.name
        assert one.how and one.gain and one.caught_by
    assert found == NAMES
    assert len(ADVERSARIES) == len({one.name for one in ADVERSARIES})
    assert [one.name for one in ADVERSARIES if one.honest] == ["coupled-speculation"]


def test_a_name_that_nobody_has_is_told() -> None:
    with pytest.raises(NoSuchAdversary, match="small-model"):
        adversary("nobody")


def test_a_place_that_the_node_no_longer_has_is_an_error_and_no_honest_run() -> None:
    with pytest.raises(AttributeError):
        stand_in("node.provider.server", "NoLongerThere", object)


def test_the_list_is_printed_and_every_name_becomes_a_node() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "devnet.adversaries", "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"\n{one.name} " in listed for one in ADVERSARIES)
    script = (
        "import sys\nfrom devnet.adversaries.registry import ADVERSARIES, adversary\n"
        "adversary(sys.argv[1]).install()\nprint('installed')"
    )
    for name in ("overcharge", "withheld", "stops-vouchers", "rubber-stamps"):  # engines load torch: tested below
        made = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=False)
        assert made.stdout == "installed\n", made.stderr


def test_an_installed_adversary_stands_wherever_the_node_imported_what_it_replaces() -> None:
    script = (
        "import node.validator.validator as v, node.provider.provider as p\n"
        "from devnet.adversaries.registry import adversary\n"
        "adversary('rubber-stamps').install(); adversary('copies').install()\n"
        "print(v.Auditor.__name__, v.Cases.__name__)"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert made.stdout == "RubberStamping Copying\n", made.stderr


# ------------------------------------------------------------------------------------------------------ documents


def test_every_false_document_is_seen_and_the_honest_ones_are_not() -> None:
    found = measure_documents()
    honest = found.pop("honest")
    assert not honest["caught"], honest
    assert all(row["caught"] for row in found.values()), found
    assert "completion_tokens" in found["over-count"]["client"] and "completion_tokens" in found["over-count"]["audit"]
    assert found["overcharge"]["proof"] == "overcharge"
    assert found["equivocation"]["proof"] == "two receipts of one step"
    assert found["false-cached"]["proof"] == "underreported cache hit" and found["false-cached"]["jobs"] == 2
    assert found["omitted-receipt"]["proof"] == "missing from the root"
    assert "withheld" in found["withheld"]["audit"]


# ------------------------------------------------------------------------------------------------------- conduct


def test_credit_goes_to_who_measured_and_no_third_of_a_committee_decides() -> None:
    found = measure_conduct(seeds=3, cases=200)
    assert set(found) == {conduct.name for conduct in CONDUCTS}
    assert found["honest"]["credited_share"] == found["honest"]["honest_credited_share"] == 1
    for name, row in found.items():
        assert row["honest_penalties"] == row["guilty_acquitted"] == row["innocent_condemned"] == 0, name
        if name != "honest":
            assert row["credited_share"] < 0.01, name
    assert (
        found["rubber-stamps"]["penalties"] > 0 and found["no-model"]["penalties"] > found["rubber-stamps"]["penalties"]
    )
    assert found["colludes, 1 of 3"]["rounds_a_case"] > 1, "a dissenter only has more people look"


@pytest.mark.parametrize("outcome", [AuditOutcome.PASS, AuditOutcome.IMPROBABLE])
def test_an_invented_verdict_holds_together_so_that_only_its_gaps_betray_it(outcome: AuditOutcome) -> None:
    made = invented(outcome)
    verdict = summarise(Address(b"v" * 20), Digest(ZERO_DIGEST), 0, made.findings, made.gaps, Digest(b"s" * 32), 1_000)
    assert verdict.outcome == outcome and not contradicts_itself(verdict, 1_000)


def test_a_career_with_a_condemned_job_counts_as_slashed() -> None:
    class _Profile:
        flag_ppm = 1_000

    fine = Looked(JobFinding(JobId(bytes(32)), AuditOutcome.PASS, 128), 0)
    bad = Looked(JobFinding(JobId(bytes(32)), AuditOutcome.IMPROBABLE, 128, 64, 8), 20)
    plan = Plan(careers=20, career=10)
    assert careers([fine], _Profile(), plan, "fine")["false_slashes"] == 0  # type: ignore[arg-type]
    assert careers([bad], _Profile(), plan, "bad")["false_slashes"] == 20  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- engines


async def _bench(dtype: str) -> tuple[TorchReplayer, TopLoc, Jobs]:
    replayer = TorchReplayer(MODEL_DIR, dtype)
    await replayer.start()
    return replayer, TopLoc(MODEL_DIR, dtype), Jobs(MODEL_DIR)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in engines() if not one.honest])
async def test_an_engine_that_cheats_is_caught(name: str) -> None:
    replayer, toploc, jobs = await _bench("fp32")
    try:
        row = await measure_adversary(adversary(name), BUDGET, "fp32", replayer, toploc, jobs)
    finally:
        await replayer.stop()
    assert row["caught"] == 1, row
    assert set(row["by"]) <= SEES.get(name, {"hard fail", "evidence"}), row
    if name in BLIND_TO:
        assert row["toploc"]["caught"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", HONEST)
async def test_honest_work_is_never_slashed(variant: str, dtype: str) -> None:
    replayer, toploc, jobs = await _bench(dtype)
    try:
        row = await measure_honest(variant, BUDGET, dtype, replayer, toploc, jobs)
    finally:
        await replayer.stop()
    assert row["false_slashes"] == 0 and row["not_passed"] == 0, row
    assert row["flag_rate"] < replayer.profile.flag_ppm / 1e6 or row["flags"] <= 2, row


@pytest.mark.slow
async def test_coupled_speculation_writes_the_very_same_text() -> None:
    jobs, outputs = Jobs(MODEL_DIR), []
    for engine in (
        TorchEngine(MODEL_DIR, "fp32", slots=4),
        adversary("coupled-speculation").thing()(MODEL_DIR, "fp32", slots=4),
    ):
        await engine.start()
        served = await serve(engine, [jobs.job(7, number) for number in range(6)])
        outputs.append([[token.token_id for token in one.tokens] for one in served])
        if len(outputs) == 2:
            assert isinstance(engine._scheduler, Speculating)
            assert engine._scheduler.kept_total > 0, "no draft was kept, so nothing was speculated"
        await engine.stop()
    assert outputs[0] == outputs[1]


@pytest.mark.slow
async def test_the_yardstick_passes_true_states_and_refuses_others() -> None:
    jobs, toploc = Jobs(MODEL_DIR), TopLoc(MODEL_DIR, "fp32")
    engine = TorchEngine(MODEL_DIR, "fp32", slots=2)
    await engine.start()
    (served,) = await serve(engine, [jobs.job(1, 1)])
    await engine.stop()
    assert toploc.refused_at(served) == 0
    assert compare(served.hidden[:32], served.hidden[:32]).exponents == 0
    assert compare(served.hidden[:32].flip(0), served.hidden[:32]).fails


async def test_who_is_late_and_silent_is_given_up_and_frees_its_slot() -> None:
    from devnet.adversaries import engines as module

    engine = module.LateAndSilent(MODEL_DIR, "fp32", slots=1)
    await engine.start()
    try:
        module_late, module.LATE_S = module.LATE_S, 0.0  # type: ignore[misc]
        stream = await engine.submit(Jobs(MODEL_DIR).job(1, 1))
        got = [await anext(stream) for _ in range(module.SILENT_AFTER)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(stream)
        await stream.aclose()
        assert len(got) == module.SILENT_AFTER and engine.stats().active == 0
    finally:
        module.LATE_S = module_late  # type: ignore[misc]
        await engine.stop()
