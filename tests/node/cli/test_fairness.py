"""`tally fairness`: an audit of a journal or of exported bundles, and proofs that anybody can check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from incentives.fault_json import encode as encode_proof
from incentives.faults import neighbours
from incentives.ledger import Role
from protocol.bundle import Bundle
from protocol.bundle_json import encode
from protocol.signing import Signer
from protocol.units import Digest
from tests.incentives.test_tree_faults import SOLD, absent, tree
from tests.incentives.trade import NODE, PAYERS, START, TARIFF, WALLET, altered, channel, last, sell
from tests.node.cli.conftest import Tally
from tests.node.cli.shop import furnish_shop

HOUR = 3_600


def written(where: Path, bundles: list[Bundle]) -> Path:
    where.mkdir(exist_ok=True)
    for number, bundle in enumerate(bundles):
        (where / f"{number:03}.json").write_text(encode(bundle))
    return where


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code in (0, 1) and result.stdout, result.output
    out: dict[str, Any] = json.loads(result.stdout)
    return out


@pytest.fixture
def sold(home: Path) -> list[Bundle]:
    """A provider's home with three jobs of one payer and two of another."""
    bundles = [*channel(3), *channel(2, PAYERS[1])]
    furnish_shop(home, Role.PROVIDER, bundles)
    return bundles


def test_an_honest_journal_has_nothing_to_explain(tally: Tally, sold: list[Bundle]) -> None:
    result = tally("fairness", "audit", "--json")
    out = found(result)
    assert result.exit_code == 0 and out["clean"] and out["faults"] == []
    assert (out["jobs"], out["payers"], out["providers"], out["receipts_without_tariff"]) == (5, 2, 1, 0)
    books = {row["client"]: row for row in out["channels"]}
    first = books["0x" + PAYERS[0].address.hex()]
    total = str(sum(last(bundle).total for bundle in sold[:3]))
    assert (first["receipted_wei"], first["vouched_wei"], first["missing_wei"]) == (total, total, "0")
    assert (first["claimed_wei"], first["unsettled_wei"]) == ("0", total)
    text = tally("fairness", "audit").stdout
    assert "nothing to explain" in text and "complete" in text and "jobs 5," in text


def test_the_buyers_journal_shows_the_same(tally: Tally, home: Path) -> None:
    furnish_shop(home, Role.CLIENT, channel(2))
    assert found(tally("fairness", "audit", "--journal", "--json"))["jobs"] == 2


def test_an_overcharge_is_proved_to_a_stranger(tally: Tally, tmp_path: Path, home: Path) -> None:
    bad = altered(sell(payer=PAYERS[1], nonce=5), total=10**18)
    where = written(tmp_path / "bundles", [*channel(2), bad])
    proofs = tmp_path / "proofs"
    result = tally("fairness", "audit", "--bundle", str(where), "--proofs", str(proofs), "--json")
    out = found(result)
    (fault,) = out["faults"]
    assert result.exit_code == 1 and not out["clean"]
    assert (fault["fault"], fault["job_id"]) == ("overcharge", "0x" + bad.job_id.hex())
    assert fault["excess_wei"] == str(10**18 - last(sell(payer=PAYERS[1], nonce=5)).total)
    assert not (home / "journal.db").exists() and not (home / "keys").exists()
    shown = tally("fairness", "verify", fault["proof"])
    assert shown.exit_code == 0 and "PROVED  overcharge" in shown.stdout and WALLET.address.hex() in shown.stdout
    assert json.loads(tally("fairness", "verify", fault["proof"], "--json").stdout)["holds"] is True
    path = Path(fault["proof"])
    path.write_text(path.read_text().replace(str(10**18), str(10**18 + 1)))
    forged = tally("fairness", "verify", str(path))
    assert forged.exit_code == 1 and "FAILS" in forged.stdout
    assert "FAULT" in tally("fairness", "audit", "--bundle", str(where), "--proofs", str(proofs)).stdout


def test_forged_receipts_are_no_evidence(tally: Tally, tmp_path: Path) -> None:
    forged = altered(sell(tokens=70), Signer.from_secret(b"\x77" * 32), total=10**18)
    out = found(tally("fairness", "audit", "--bundle", str(written(tmp_path / "b", [forged])), "--json"))
    assert out["faults"] == [] and out["receipts_dropped"] == 1 and not out["clean"]


def test_a_job_left_out_is_missed_in_the_books(tally: Tally, tmp_path: Path) -> None:
    jobs = channel(3)
    result = tally("fairness", "audit", "--bundle", str(written(tmp_path / "b", jobs[1:])), "--json")
    assert found(result)["channels"][0]["missing_wei"] == str(last(jobs[0]).total)


def test_a_committed_root_closes_on_the_whole_epoch_only(tally: Tally, tmp_path: Path, sold: list[Bundle]) -> None:
    epoch, root = last(sold[0]).received_at // 1000 // HOUR, tmp_path / "root.json"
    made = tally("fairness", "commit", str(epoch), "-o", str(root))
    assert made.exit_code == 0 and "5 jobs" in made.stderr
    assert found(tally("fairness", "audit", "--root", str(root), "--json"))["roots"][0]["closed"] is True
    some = written(tmp_path / "b", sold[:3])
    result = tally("fairness", "audit", "--bundle", str(some), "--root", str(root), "--json")
    (gap,) = found(result)["roots"]
    assert result.exit_code == 1 and (gap["closed"], gap["receipts_more"]) == (False, -2)
    assert gap["wei_more"] == str(-sum(last(bundle).total for bundle in sold[3:]))
    root.write_text(root.read_text().replace(f'"epoch": "{epoch}"', f'"epoch": "{epoch + 1}"'))
    assert "signature" in tally("fairness", "audit", "--root", str(root)).stderr


def test_an_epoch_that_is_not_over_is_not_signed(
    tally: Tally, tmp_path: Path, sold: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = (last(sold[0]).received_at // 1000 // HOUR + 1) * HOUR
    epoch, root = str(end // HOUR - 1), tmp_path / "root.json"
    monkeypatch.setattr("node.system.SystemClock.now_ms", lambda _: end * 1000 - 1)
    early = tally("fairness", "commit", epoch, "-o", str(root))
    assert early.exit_code == 1 and not root.exists(), early.output
    assert f"epoch {epoch} is not over" in early.stderr and f"that is over is {end // HOUR - 2}" in early.stderr
    monkeypatch.setattr("node.system.SystemClock.now_ms", lambda _: end * 1000)
    assert tally("fairness", "commit", epoch, "-o", str(root)).exit_code == 0


def test_a_job_left_out_of_a_commitment_is_proved_to_a_stranger(tally: Tally, tmp_path: Path) -> None:
    job, *rest = sorted(SOLD, key=lambda bundle: bundle.job_id)
    entries, root = tree(rest)
    around = neighbours(entries, job.job_id)
    assert around is not None
    path = tmp_path / "missing.json"
    path.write_text(encode_proof(absent(job, root, around)))
    shown = tally("fairness", "verify", str(path), "--json")
    assert shown.exit_code == 0
    told = json.loads(shown.stdout)
    assert (told["holds"], told["fault"]) == (True, "job missing from the commitment")
    assert told["provider"] == "0x" + WALLET.address.hex()
    path.write_text(encode_proof(absent(rest[0], root, around)))
    assert tally("fairness", "verify", str(path)).exit_code == 1


def test_one_profile_is_committed_at_a_time(tally: Tally, tmp_path: Path, home: Path) -> None:
    other = replace(TARIFF, profile_id=Digest(b"\x07" * 32))
    jobs = [sell(nonce=1), sell(nonce=2, tariff=other)]
    furnish_shop(home, Role.PROVIDER, jobs)
    epoch = str(last(jobs[0]).received_at // 1000 // HOUR)
    unsure = tally("fairness", "commit", epoch)
    assert unsure.exit_code == 1 and "2 profiles" in unsure.stderr and "--profile" in unsure.stderr
    made = tally("fairness", "commit", epoch, "--profile", "0x0707")
    assert json.loads(made.stdout)["commitment"]["document"]["profile_id"] == "0x" + "07" * 32
    assert json.loads(made.stdout)["commitment"]["document"]["count"] == 1
    assert tally("fairness", "commit", epoch, "--profile", "0xff").exit_code == 1


def served(slow: int) -> list[Bundle]:
    """Twelve jobs of each of two payers in one hour, alike but for the time to the first token."""
    out = []
    for number in range(24):
        payer, wait = PAYERS[number % 2], 150 + number * 3 + (slow if number % 2 else 0)
        out.append(sell(payer=payer, nonce=number, at=START + number * 1_000, ttft_ms=wait, tokens=4))
    return out


def test_a_payer_that_is_served_later_is_flagged(tally: Tally, tmp_path: Path) -> None:
    alike = written(tmp_path / "alike", served(0))
    assert not any(
        row["flagged"] for row in found(tally("fairness", "audit", "--bundle", str(alike), "--json"))["service"]
    )
    apart = written(tmp_path / "apart", served(400))
    result = tally("fairness", "audit", "--bundle", str(apart), "--json")
    rows = [row for row in found(result)["service"] if row["flagged"]]
    assert {row["metric"] for row in rows} == {"ttft_ms"} and len(rows) == 2
    worse = next(row for row in rows if row["worse"])
    assert worse["payer"] == "0x" + PAYERS[1].address.hex() and worse["median"] > worse["others"]
    text = tally("fairness", "audit", "--bundle", str(apart)).stdout
    assert "is served worse" in text and "ttft_ms" in text
    few = tally("fairness", "audit", "--bundle", str(apart), "--permutations", "19").stdout
    assert "so few permutations" in few


def test_an_auditors_scores_are_compared_too(tally: Tally, tmp_path: Path) -> None:
    bundles = served(0)
    where = written(tmp_path / "b", bundles)
    scores = {"0x" + bundle.job_id.hex(): 100 + number * (number % 2) for number, bundle in enumerate(bundles)}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    result = tally("fairness", "audit", "--bundle", str(where), "--scores", str(tmp_path / "scores.json"), "--json")
    assert {row["metric"] for row in found(result)["service"] if row["flagged"]} == {"score"}
    (tmp_path / "scores.json").write_text('{"0x00": 1}')
    broken = tally("fairness", "audit", "--bundle", str(where), "--scores", str(tmp_path / "scores.json"))
    assert broken.exit_code == 1 and "64 hexadecimal digits" in broken.stderr


def test_sales_below_a_declared_cost_are_flagged(
    tally: Tally, sold: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    ste, revenue = (sum(getattr(last(b), name) for b in sold) for name in ("ste_micro", "total"))
    even = revenue * 10**6 // ste
    fair = tally("fairness", "audit", "--declared-cost", f"0.{even:018d}", "--json")
    assert fair.exit_code == 0 and found(fair)["sold"][0]["below_cost"] is False
    sunk = tally("fairness", "audit", "--declared-cost", f"0.{even + 1:018d}")
    assert sunk.exit_code == 1 and "PREDATION" in sunk.stdout
    monkeypatch.setenv("TALLY_ECONOMICS_DECLARED_COST", "1")
    assert "PREDATION" in tally("fairness", "audit").stdout


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x00", '{"format": "tallystick-fault/9"}', "[" * 2_000])
def test_what_is_no_document_is_refused_by_name(tally: Tally, tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    for args in (
        ("verify", str(path)),
        ("audit", "--bundle", str(path)),
        ("audit", "--bundle", str(path), "--root", str(path)),
    ):
        result = tally("fairness", *args)
        assert result.exit_code == 1 and "odd.json is no" in result.stderr and "Traceback" not in result.output


def test_where_there_is_nothing_to_audit(tally: Tally, tmp_path: Path, home: Path) -> None:
    assert "no journal" in tally("fairness", "audit").stderr
    assert "no *.json" in tally("fairness", "audit", "--bundle", str(home)).stderr
    assert "cannot be read" in tally("fairness", "verify", str(tmp_path / "none.json")).stderr
    assert NODE.address != WALLET.address
