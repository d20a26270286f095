"""`tally case`: the Court's cases, who judged them and what was found."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.session import Session, emit, hexed, json_option, pass_session
from node.cli.tables import short, table

if TYPE_CHECKING:
    from node.chain.court import Web3Court
    from node.config import NodeConfig
    from node.ports import CaseMember, CaseRecord, CommitmentRecord, CourtEvent
    from protocol.units import Digest

WAD: Final = 10**18

CLAIM_S: Final = 300.0
"""How long a running node may take over a claim. Unit: s. One transaction per job, each waiting for its block."""

MARKS_SHOWN: Final = 20
"""Flagged tokens that `tally case show` lists, the worst. `--json` has all that the journal kept."""


@click.group()
def case() -> None:
    """Cases: a provider's commitment, the validators drawn to look at it, and what they found.

    \b
    tally case list
    tally case show 3fa9
    tally case claim 3fa9
    """


@case.command("list")
@click.option("--provider", metavar="ADDRESS", default="", help="Only cases of this provider's wallet (first digits).")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="Newest so many.")
@json_option
@pass_session
def list_(session: Session, provider: str, limit: int, as_json: bool) -> None:
    """Newest cases first, as the Court has them now.

    STATE: `waiting` before the draw, `submit` and `reveal` while validators judge, `answer` while the accused may
    answer or appeal, then `closed` or `undecided`.
    """
    wanted = provider.lower().removeprefix("0x")
    found = _on_court(session, lambda court, _: _cases(court, wanted, limit))
    if as_json:
        emit(found)
        return
    rows = [
        (
            short(row["case"]),
            short(row["provider"]),
            str(row["epoch"]),
            str(row["jobs"]),
            row["state"],
            str(row["round"]),
            row["outcome"],
            row["votes"],
            money.tally(int(row["slashed_wei"])) if int(row["slashed_wei"]) else "-",
        )
        for row in found
    ]
    head = ("CASE", "PROVIDER", ">EPOCH", ">JOBS", "STATE", ">ROUND", "OUTCOME", "VOTES", ">SLASHED TALLY")
    click.echo(table(head, rows) if rows else "no commitment was made yet, so there are no cases")


async def _cases(court: Web3Court, provider: str, limit: int) -> list[dict[str, Any]]:
    events, _ = await court.events(0)
    made = [e for e in events if e.name == "Committed" and e.about.hex().startswith(provider)]
    return [await _row(court, event) for event in reversed(made[-limit:])]


async def _row(court: Web3Court, event: CourtEvent) -> dict[str, Any]:
    case, epoch = await court.case(event.case_id), event.values["epoch"]
    jobs = event.values["count"]
    row = {"case": hexed(event.case_id), "provider": hexed(event.about), "epoch": epoch, "jobs": jobs}
    if case is None:
        state = "waiting" if jobs else "empty"
        return {**row, "state": state, "round": 0, "outcome": "-", "votes": "-", "slashed_wei": "0"}
    votes = [outcome_name(m.verdict.outcome) for m in case.members if m.verdict is not None]
    told = ", ".join(f"{votes.count(name)} {name}" for name in dict.fromkeys(votes)) or "-"
    return {
        **row,
        "state": case.state.name.lower(),
        "round": case.round + 1,
        "outcome": outcome_name(case.outcome) if case.state.name in ("ANSWER", "CLOSED") else "-",
        "votes": told,
        "slashed_wei": str(case.slashed),
    }


def outcome_name(outcome: int) -> str:
    """`PASS`, `IMPROBABLE` and so on."""
    from protocol.units import AuditOutcome

    return AuditOutcome(outcome).name


@case.command()
@click.argument("case_id", metavar="ID")
@json_option
@pass_session
def show(session: Session, case_id: str, as_json: bool) -> None:
    """One case (its first digits are enough): members, verdicts, evidence, slash.

    Where this home is a validator's that sat on it, also which tokens it flagged and how far off they were.
    """
    digits = case_id.lower().removeprefix("0x")
    facts = _on_court(session, lambda court, config: _facts(session, config, court, digits))
    if as_json:
        emit(facts)
        return
    click.echo("\n".join(_lines(facts)))


async def _facts(session: Session, config: NodeConfig, court: Web3Court, digits: str) -> dict[str, Any]:
    key = await _key(court, digits)
    made, case = await court.commitment(key), await court.case(key)
    if made is None:
        raise CommandFailed("the commitment is not deep enough in the chain yet", do="try again in a moment")
    found = _commitment_json(made) if case is None else {**_commitment_json(made), **_case_json(case)}
    found["verdicts_here"] = await _own_verdicts(session, config, key.hex())
    return found


async def _key(court: Web3Court, digits: str) -> Digest:
    """The case that begins with these digits. Raises: CommandFailed."""
    from protocol.units import Digest

    events, _ = await court.events(0)
    ids = list(dict.fromkeys(e.case_id for e in events if e.name == "Committed" and e.case_id.hex().startswith(digits)))
    if len(ids) != 1:
        raise CommandFailed(
            f"{'no case' if not ids else f'{len(ids)} cases'} begin with {digits!r}",
            kept="nothing was changed",
            do="`tally case list` shows them; give more digits",
        )
    return Digest(ids[0])


@case.command()
@click.argument("case_id", metavar="ID")
@json_option
@pass_session
def claim(session: Session, case_id: str, as_json: bool) -> None:
    """Claim what is due for jobs bought from this home when their provider was slashed (the case's first digits).

    A running gateway claims by itself; this is for one that was off. The money goes to the wallet that pays for the
    channel. Where nothing is due the reason is said, and nothing is sent.
    """
    digits = case_id.lower().removeprefix("0x")
    key = _on_court(session, lambda court, _: _key(court, digits))
    done = _claimed(session, session.load(), hexed(key))
    if as_json:
        emit(done)
        return
    if done["jobs"]:
        click.echo(f"paid {money.amount(int(done['amount_wei']))} for {done['jobs']} job{'s' * (done['jobs'] != 1)}")
    if done["why"]:
        click.echo(f"{'not all' if done['jobs'] else 'nothing'} was claimed: {done['why']}")


def _claimed(session: Session, config: NodeConfig, case_id: str) -> dict[str, Any]:
    """By the node that runs in this home, else with its journal and wallet. Raises: ControlRefused, TallyError."""
    from node.cli.onchain import run_quietly
    from node.gateway.control import ControlUnavailable

    async def work() -> dict[str, Any]:
        from node.app import court_of, journal, wallet_chain
        from node.client.claims import Claims
        from node.routes import claim_routes

        try:
            return await session.control().call("claim", case=case_id, timeout_s=CLAIM_S)
        except ControlUnavailable:
            pass
        if not config.journal.exists():
            raise CommandFailed(
                f"there is no journal in {config.home}: nothing was bought from here",
                do="--home names another home",
            )
        async with journal(config) as store, wallet_chain(config) as (chain, me):
            claims = Claims(me.address, store, chain, court_of(chain))
            return await claim_routes(claims)["claim"]({"case": case_id})

    done: dict[str, Any] = run_quietly(session, config, work())
    return done


def _commitment_json(made: CommitmentRecord) -> dict[str, Any]:
    return {
        "case": hexed(made.key),
        "provider": hexed(made.provider),
        "profile": hexed(made.profile_id),
        "epoch": made.epoch,
        "jobs": made.count,
        "total_wei": str(made.total),
        "root": hexed(made.root),
        "jobs_before": made.earlier,
        "state": "waiting" if made.count else "empty",
    }


def _case_json(case: CaseRecord) -> dict[str, Any]:
    return {
        "state": case.state.name.lower(),
        "round": case.round + 1,
        "until": case.until,
        "outcome": outcome_name(case.outcome),
        "evidence": case.evidence / WAD,
        "slashed_wei": str(case.slashed),
        "was_forced": case.was_forced,
        "members": [_member_json(member) for member in case.members],
    }


def _member_json(member: CaseMember) -> dict[str, Any]:
    verdict = member.verdict
    row: dict[str, Any] = {"validator": hexed(member.validator), "submitted": any(member.submitted)}
    if verdict is None:
        return {**row, "outcome": None}
    return {
        **row,
        "outcome": outcome_name(verdict.outcome),
        "tokens": verdict.tokens,
        "flags": verdict.flags,
        "voids": verdict.voids,
        "worst": [verdict.worst_flags, verdict.worst_voids, verdict.worst_tokens],
        "credited": member.credited,
    }


async def _own_verdicts(session: Session, config: NodeConfig, case_id: str) -> list[dict[str, Any]]:
    """What this home's journal says it found; [] where it is no validator's, or judged another case."""
    from node.cli.ask import ask

    if not config.journal.exists():
        return []
    verdicts: list[dict[str, Any]] = (await ask(session, config, "verdicts", case=case_id))["verdicts"]
    return verdicts


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"case       {facts['case']}",
        f"provider   {facts['provider']}",
        f"profile    {facts['profile']}",
        f"epoch      {facts['epoch']}: {facts['jobs']} jobs, {money.amount(int(facts['total_wei']))}",
        f"state      {_state(facts)}",
    ]
    if "members" in facts:
        lines.append(f"evidence   {facts['evidence']:.6g} against the provider; 1000000 condemns by itself")
        lines.append(f"slashed    {money.amount(int(facts['slashed_wei']))}")
        lines += ["", f"round {facts['round']}", _members(facts["members"])]
    for verdict in facts["verdicts_here"]:
        lines += ["", *_own(verdict)]
    return lines


def _state(facts: dict[str, Any]) -> str:
    state = str(facts["state"])
    if state in ("submit", "reveal", "answer"):
        return f"{state}, until {datetime.fromtimestamp(facts['until']).astimezone():%m-%d %H:%M:%S}"
    if state == "closed":
        return f"closed: {facts['outcome']}" + (", an error that was due" if facts["was_forced"] else "")
    return state


def _members(members: list[dict[str, Any]]) -> str:
    rows = []
    for member in members:
        if member["outcome"] is None:
            told = ("submitted" if member["submitted"] else "silent", "-", "-", "-", "")
        else:
            numbers = (str(member[name]) for name in ("tokens", "flags", "voids"))
            told = (member["outcome"], *numbers, "credited" if member["credited"] else "")
        rows.append((member["validator"], *told))
    return table(("VALIDATOR", "VERDICT", ">TOKENS", ">FLAGS", ">FAR OFF", ""), rows)


def _own(verdict: dict[str, Any]) -> list[str]:
    """What this home found, job by job, and its worst tokens."""
    findings = verdict["findings"]
    rows = [
        (short("0x" + row["job_id"]), row["outcome"], str(row["tokens"]), str(row["flags"]), row["detail"])
        for row in findings
    ]
    lines = [
        f"found here, round {verdict['round'] + 1}: {verdict['outcome']}",
        table(("JOB", "FINDING", ">TOKENS", ">FLAGS", ""), rows),
    ]
    marks = [(row["job_id"], *mark) for row in findings for mark in row["marks"]]
    worst = sorted(marks, key=lambda mark: (-mark[3], -mark[5], -mark[4]))[:MARKS_SHOWN]
    if worst:
        shown = [
            (short("0x" + job), str(index), str(token), far(margin, 1_000), far(logprob, 10**6), far(projection, 10**6))
            for job, index, token, margin, logprob, projection in sorted(worst)
        ]
        head = ("JOB", ">POSITION", ">TOKEN", ">MARGIN", ">LOGPROB", ">PROJECTION")
        lines += ["", f"flagged tokens, the worst {len(worst)} of {len(marks)} kept", table(head, shown)]
    return lines


def far(value: int, scale: int) -> str:
    """A distance in thousandths or millionths as a decimal; `none` for a token that could not be drawn at all."""
    from incentives.verdicts import BEYOND

    return "none" if value >= BEYOND else f"{value / scale:.4g}"


def _on_court(session: Session, look: Any) -> Any:
    """Run `look(court, config)` with the Court, read only. Raises: ChainError."""
    from node.cli.running import run

    config = session.load()
    session.log(config, serving=False)

    async def work() -> Any:
        from node.app import court_of, reading_chain

        async with reading_chain(config) as chain:
            return await look(court_of(chain), config)

    return run(work())
