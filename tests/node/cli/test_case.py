"""`tally validator`, `tally case` and `tally audit` over the Court's twin and jobs of a market in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from incentives.faults import Placed
from incentives.ledger import Role, VerdictMade
from incentives.verdicts import JobFinding, TokenMark, findings_json
from node.chain.deployment import Deployment
from node.client.claims import Claims, Place, Places
from node.config import NodeConfig
from node.keys import save
from node.ports import Chain
from node.store.store import SqlStore
from protocol import merkle
from protocol.bundle import Bundle
from protocol.eip712 import digest
from protocol.merkle import Entry
from protocol.units import WEI_PER_TALLY, Address, AuditOutcome, Digest, JobId, Wei
from tests.node.chain.court_bench import STAKE, CourtBench, entries, verdict
from tests.node.cli.conftest import Tally, furnish
from tests.node.cli.sticks import NODE, SESSION, WALLET, make_bundle
from tests.spine.lab import Market, idle, run, spec
from tests.twins.chain_lab import MemoryLab
from tests.twins.engine_twin import EngineTwin
from tests.twins.replayer_twin import Altering, ReplayerTwin


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    """A chain with a Court; the commands act for WALLET there."""
    lab = MemoryLab()
    lab.world.fund(WALLET.address, 1_000 * WEI_PER_TALLY, 10**18)

    @asynccontextmanager
    async def wallet_chain(config: NodeConfig) -> AsyncIterator[Any]:
        yield await lab.node(WALLET), WALLET

    @asynccontextmanager
    async def reading_chain(config: NodeConfig) -> AsyncIterator[Any]:
        yield await lab.node(None)

    def court_of(chain: Chain) -> Any:
        return lab.court(chain)  # type: ignore[arg-type]

    monkeypatch.setattr("node.app.wallet_chain", wallet_chain)
    monkeypatch.setattr("node.app.reading_chain", reading_chain)
    monkeypatch.setattr("node.app.court_of", court_of)
    return lab


def asked(tally: Tally, *args: str) -> Any:
    """The JSON that a command prints."""
    result = tally(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_wallet_enlists_shows_its_standing_and_retires(furnished: Path, tally: Tally, lab: MemoryLab) -> None:
    assert "no: `tally validator enlist`" in tally("validator", "status").stdout
    asked(tally, "validator", "enlist", "--yes")
    assert "is enlisted already" in tally("validator", "enlist", "--yes").stderr
    facts = asked(tally, "validator", "status")
    assert facts["enlisted"] and facts["stake_wei"] == str(100 * WEI_PER_TALLY) and facts["validators"] == 1
    asked(tally, "validator", "retire", "--unbond", "--yes")
    facts = asked(tally, "validator", "status")
    assert not facts["enlisted"] and facts["unbonding_wei"] == str(100 * WEI_PER_TALLY)
    assert "unbonding  100 TALLY" in tally("validator", "status").stdout
    assert "can be withdrawn from" in tally("validator", "withdraw", "--yes").stderr
    lab.world.advance(10_000)
    asked(tally, "validator", "withdraw", "--yes")
    assert lab.world.head.state.tally[WALLET.address] == 1_000 * WEI_PER_TALLY


def test_too_little_stake_is_said_before_anything_is_sent(furnished: Path, tally: Tally, lab: MemoryLab) -> None:
    (furnished / "config.toml").write_text('[validator]\nstake = "5"\n')
    result = tally("validator", "enlist", "--yes")
    assert result.exit_code == 1 and "must hold 100 TALLY" in result.stderr
    assert WALLET.address not in lab.world.head.state.node_keys


def test_without_a_commitment_there_is_no_case(furnished: Path, tally: Tally, lab: MemoryLab) -> None:
    assert "there are no cases" in tally("case", "list").stdout
    assert asked(tally, "case", "list") == []
    result = tally("case", "show", "3fa9")
    assert result.exit_code == 1 and "no case begin" in result.stderr.replace("begins", "begin")


def test_a_case_is_listed_and_shown_with_what_this_home_found(furnished: Path, tally: Tally, lab: MemoryLab) -> None:
    bench = CourtBench(lab)
    key = asyncio.run(_guilty(bench, furnished))
    [row] = asked(tally, "case", "list")
    assert row["case"] == "0x" + key.hex() and row["state"] == "closed" and row["outcome"] == "IMPROBABLE"
    assert row["votes"] == "3 IMPROBABLE" and row["slashed_wei"] == str(STAKE)
    assert "3 IMPROBABLE" in tally("case", "list").stdout
    facts = asked(tally, "case", "show", key.hex()[:8])
    assert len(facts["members"]) == 3 and facts["members"][0]["flags"] == 30
    assert facts["evidence"] > 1e6 and facts["slashed_wei"] == str(STAKE)
    [here] = facts["verdicts_here"]
    assert here["findings"][0]["marks"] == [[7, 1234, 5_250, 1_000, 2_500]]
    shown = tally("case", "show", key.hex()[:8]).stdout
    assert "closed: IMPROBABLE" in shown and "slashed    200 TALLY" in shown
    line = next(line for line in shown.splitlines() if "1234" in line)
    assert line.split()[1:] == ["7", "1234", "5.25", "0.001", "0.0025"]


async def _guilty(bench: CourtBench, home: Path) -> Digest:
    """An executed case, and a verdict on it in the home's journal."""
    await bench.open(validators=3)
    key = await bench.drawn()
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    await bench.until(case.until)
    await bench.court.execute(key)
    player = bench.validators[0]
    made = verdict(player, key, AuditOutcome.IMPROBABLE)
    mark = TokenMark(7, 1234, 5_250, 1_000, 2_500)
    finding = JobFinding(JobId(b"\x09" * 32), AuditOutcome.IMPROBABLE, 64, 30, 0, 5_250, "30 of 64", (mark,))
    store = SqlStore(home / "journal.db")
    await store.open()
    await store.write(VerdictMade(made, digest(bench.court.domain, made), findings_json([finding])))
    await store.close()
    return key


def test_a_claim_pays_for_the_jobs_of_this_home_once(home: Path, tally: Tally, lab: MemoryLab) -> None:
    bundle = make_bundle(domain=lab.domain)
    furnish(home, Role.CLIENT, bundle)
    key, amount = asyncio.run(_slashed(CourtBench(lab), home, lab, bundle))
    before = lab.world.head.state.tally[WALLET.address]
    result = tally("case", "claim", key.hex()[:8])
    assert result.exit_code == 0 and "TALLY for 1 job\n" in result.stdout, result.stderr
    assert lab.world.head.state.tally[WALLET.address] == before + amount
    facts = asked(tally, "case", "claim", key.hex()[:8])
    assert (facts["jobs"], facts["amount_wei"]) == (0, "0") and "paid before" in facts["why"]
    assert lab.world.head.state.tally[WALLET.address] == before + amount


async def _slashed(bench: CourtBench, home: Path, lab: MemoryLab, bundle: Bundle) -> tuple[Digest, int]:
    """An executed case with a job of this home, whose place it remembers; and what that job cost."""
    await bench.open(validators=3)
    receipt = bundle.notches[-1].receipt
    ours = Entry(bundle.job_id, digest(lab.domain, receipt), Wei(receipt.total))
    jobs = tuple(merkle.ordered([*entries(3), ours]))
    chain = await lab.node(WALLET)
    await chain.open_channel(bench.provider.address, SESSION.secret, Wei(WEI_PER_TALLY))
    key = await bench.drawn(jobs=jobs)
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    await bench.until(case.until)
    await bench.court.execute(key)
    store = SqlStore(home / "journal.db")
    await store.open()
    at = jobs.index(ours)
    places = Places(1, (Place(Placed(ours, at, merkle.prove(jobs, at))),))
    await Claims(WALLET.address, store, chain, lab.court(chain)).remember(key, places)
    await store.close()
    return key, receipt.total


def test_a_claim_that_is_not_due_says_why(furnished: Path, tally: Tally, lab: MemoryLab) -> None:
    key = asyncio.run(_guilty(CourtBench(lab), furnished))
    result = tally("case", "claim", key.hex()[:8])
    assert result.exit_code == 0 and "nothing was claimed: no job of this home" in result.stdout
    result = tally("case", "claim", "ffff")
    assert result.exit_code == 1 and "no case begin" in result.stderr.replace("begins", "begin")


# --------------------------------------------------------------------------------------------------------------- audit


def sold(home: Path, monkeypatch: pytest.MonkeyPatch, engine: EngineTwin, **changes: object) -> str:
    """A job this home bought from `engine`; its last receipt's digest."""
    monkeypatch.setattr("node.engine.replay.TorchReplayer", lambda *_: ReplayerTwin(EngineTwin()))
    (home / "password").write_text("correct horse\n")
    (home / "password").chmod(0o600)
    save(home / "keys", "wallet", "correct horse", WALLET.secret, scrypt_n=1024)
    save(home / "keys", "node", "correct horse", NODE.secret, scrypt_n=1024)
    return asyncio.run(_buy(home, engine, changes))


async def _buy(home: Path, engine: EngineTwin, changes: dict[str, object]) -> str:
    async with Market() as market:
        domain = market.world.domain
        others = (Address(bytes([n]) * 20) for n in range(1, 6))
        token, registry, *rest = others
        Deployment(domain.chain_id, token, domain.verifying_contract, registry, *rest, 0).save(home / "deployment.json")
        seller = await market.seller(engine=engine)
        buyer = await market.buyer(store=SqlStore(home / "journal.db"))
        await run(buyer, spec(100, **changes))
        await idle(seller)
        [row] = await buyer.store.receipts(role=Role.CLIENT, final_only=True)
        return row.digest.hex()


def test_an_honest_job_passes_its_audit(home: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sold(home, monkeypatch, EngineTwin())
    facts = asked(tally, "audit", name[:8], "--model", str(home))
    assert (facts["outcome"], facts["tokens"], facts["flags"]) == ("PASS", 100, 0) and len(facts["worst"]) == 10
    result = tally("audit", name[:8], "--model", str(home), "--worst", "3")
    assert result.exit_code == 0 and "PASS: 0 of 100 tokens flagged" in result.stdout
    file = home / "job.json"
    assert tally("receipts", "export", name[:8], "--no-sign", "-o", str(file)).exit_code == 0
    assert tally("audit", str(file), "--model", str(home)).exit_code == 0


def test_a_cheat_fails_it_with_the_tokens_that_show_it(
    home: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sold(home, monkeypatch, Altering())
    result = tally("audit", name[:8], "--model", str(home), "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["outcome"] == "IMPROBABLE" and facts["flags"] > 5 and facts["probability"] < 1e-9
    assert facts["worst"][0]["flagged"] and facts["worst"][0]["margin_milli"] == 5_000
    shown = tally("audit", name[:8], "--model", str(home)).stdout
    assert "IMPROBABLE" in shown and "flagged" in shown and "honest work has as many" in shown


def test_a_private_job_has_nothing_to_replay(home: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sold(home, monkeypatch, EngineTwin(), private=True)
    result = tally("audit", name[:8], "--model", str(home))
    assert result.exit_code == 1 and "was private" in result.stderr


def test_another_model_is_named_and_nothing_is_judged(
    home: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sold(home, monkeypatch, EngineTwin())
    other = EngineTwin()
    other.profile = replace(other.profile, layers=3)
    monkeypatch.setattr("node.engine.replay.TorchReplayer", lambda *_: ReplayerTwin(other))
    result = tally("audit", name[:8], "--model", str(home))
    assert result.exit_code == 1 and "they differ in layers" in result.stderr


def test_a_receipt_that_is_not_here_is_said_to_be_missing(furnished: Path, tally: Tally) -> None:
    result = tally("audit", "ffffffff", "--model", str(furnished))
    assert result.exit_code == 1 and "no receipt's digest begins with" in result.stderr
