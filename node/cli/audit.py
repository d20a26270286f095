"""`tally audit`: one receipted job replayed with the model's own weights, from what this home kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.failures import EXIT_FAILED, CommandFailed
from node.cli.session import Session, emit, hexed, json_option
from node.cli.tables import table

if TYPE_CHECKING:
    from node.config import NodeConfig
    from node.judging import Judged
    from node.ports import Kept
    from protocol.bundle import Bundle, Notch
    from protocol.dossier import Dossier, Examined
    from protocol.messages import Profile

Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class _Case:
    """A job at hand: its documents up to one receipt, and what was kept of its content."""

    bundle: Bundle
    notch: Notch
    role: str
    kept: Kept


@click.command()
@click.argument("receipt")
@click.option("--model", "model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
              required=True, help="Hugging Face model directory that the job says it was served with.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True,
              help="Number format of the weights, as the provider's.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where it computes, as torch names it.")
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.")
@click.option("--worst", type=click.IntRange(1, 10_000), default=10, show_default=True, help="So many tokens shown.")
@json_option
@click.pass_context
def audit(
    ctx: click.Context,
    receipt: str,
    model_dir: Path,
    dtype: str,
    device: str,
    threads: int | None,
    worst: int,
    as_json: bool,
) -> None:
    """Replay a job: would these weights have written those tokens? Exit status 1 when they would not.

    RECEIPT: the first digits of a receipt's digest in this home's journal, or a file that `tally receipts export`
    wrote of a job whose content this home kept. It works for jobs this home bought and for those it sold, also while
    its node runs.

    MARGIN: logits by which a better token was passed over, `none` where the token could not be drawn at all.
    LOGPROB and PROJECTION: how far the recorded fingerprint is from this machine's. Honest work stays below the
    profile's thresholds in all but a rate of tokens that the profile states.

    \b
    tally audit 3fa9 --model ./Qwen3-0.6B
    tally audit job.json --model ./Qwen3-0.6B --json
    """
    session = ctx.obj if isinstance(ctx.obj, Session) else Session()
    config = session.load()
    session.log(config, serving=False)
    from node.cli.running import run

    facts = run(_audit(session, config, receipt, (model_dir, dtype, threads, device), worst))
    if as_json:
        emit(facts)
    else:
        click.echo("\n".join(_lines(facts)))
    if facts["outcome"] != "PASS":
        ctx.exit(EXIT_FAILED)


async def _audit(
    session: Session, config: NodeConfig, receipt: str, where: tuple[Path, str, int | None, str], worst: int
) -> dict[str, Any]:
    from node.engine.replay import TorchReplayer

    case = await _case(session, config, receipt)
    dossier = _dossier(config, case)
    replayer = TorchReplayer(*where)
    await replayer.start()
    try:
        _same_profile(case, replayer.profile, where[0])
        _judgeable(replayer.profile, where[0])
        judged, examined = await _judged(case, dossier, replayer)
    finally:
        await replayer.stop()
    return _facts(case, judged, examined, replayer.profile, _decoder(where[0]), worst)


def _judgeable(profile: Profile, model_dir: Path) -> None:
    """Raises: CommandFailed when the profile grants honest work any number of flags."""
    from incentives.evidence import MAX_FLAG_PPM

    if profile.flag_ppm > MAX_FLAG_PPM:
        raise CommandFailed(
            f"{model_dir} is not calibrated in this number format, so its profile says nothing of how far honest work "
            "may be from a replay, and no job under it can be judged",
            kept="nothing was changed",
            do=f"its provider can serve under a calibrated profile: `tally profile calibrate --model {model_dir}`",
        )


# -------------------------------------------------------------------------------------------------------- what is kept


async def _case(session: Session, config: NodeConfig, receipt: str) -> _Case:
    """Raises: CommandFailed, NotInJournal, ControlRefused, StoreError."""
    from node.cli.ask import ask
    from node.routes import bundle_of, kept_of

    bundle = _file(receipt)
    if bundle is not None:
        notch, roles = bundle.notches[-1], ["client", "provider"]
    else:
        answer = await ask(session, config, "bundle", digest=receipt)
        bundle, roles = bundle_of(answer), [str(answer["role"])]
        notch = next(item for item in bundle.notches if hexed(item.digest) == answer["digest"])
    for role in roles:
        kept = kept_of(await ask(session, config, "kept", job_id=bundle.job_id.hex(), role=role))
        if kept is not None:
            return _Case(bundle, notch, role, kept)
    if bundle.request.is_private:
        raise CommandFailed(
            f"job {hexed(bundle.job_id)[:14]} was private: its prompt and output were kept by nobody",
            kept="its bills stand",
            do="`tally receipts verify` checks what was charged for it",
        )
    raise CommandFailed(
        f"the content of job {hexed(bundle.job_id)[:14]} is not in this home: it was shredded when its retention "
        "ended, never kept, or the job was another home's",
        kept="its bills stand",
        do="`tally receipts verify` checks what was charged for it; retention_hours, of the client's or provider's "
        "settings, keeps content for longer",
    )


def _file(receipt: str) -> Bundle | None:
    """The job in a file of that name; None when it looks like a digest. Raises: CommandFailed, MalformedBundle."""
    from node.cli.receipts import read_bundle

    path = Path(receipt)
    if not (path.is_file() or "/" in receipt or path.suffix == ".json"):
        return None
    bundle = read_bundle(path)
    if not bundle.notches:
        raise CommandFailed(f"{path} holds no receipt", do="`tally receipts export` writes one")
    return bundle


def _dossier(config: NodeConfig, case: _Case) -> Dossier:
    """The job as its provider would have to show it. Raises: CommandFailed."""
    from protocol.dossier import Dossier

    bundle, notch = case.bundle, case.notch
    if bundle.tariff is None:
        raise CommandFailed(
            "the job's tariff is not at hand, so its price cannot be checked",
            do="`tally receipts verify` says what else is missing",
        )
    signature = notch.receipt_signature or _own_signature(config, case)
    count = _covered(case)
    return Dossier(
        bundle.request,
        bundle.request_signature,
        bundle.accept,
        bundle.accept_signature,
        bundle.options,
        bundle.tariff,
        bundle.tariff_signature,
        notch.receipt,
        signature,
        case.kept.salt,
        case.kept.prompt,
        case.kept.content[:count],
    )


def _covered(case: _Case) -> int:
    """Leaves or vectors that the receipt is over; later ones may be kept as well."""
    from protocol.options import decode_options
    from protocol.units import LEAF_TOKENS, JobKind

    receipt = case.notch.receipt
    if case.bundle.request.kind == JobKind.EMBED:
        ends = accumulate(decode_options(case.bundle.options).inputs)
        return sum(end <= receipt.prompt_tokens for end in ends)
    return -(-receipt.completion_tokens // LEAF_TOKENS)


def _own_signature(config: NodeConfig, case: _Case) -> bytes:
    """A provider's journal keeps no signatures of its own: they come out the same each time. Raises: CommandFailed."""
    from node.app import password_of
    from node.keys import addresses, load

    ours = case.bundle.node_key
    names = [name for name, address in addresses(config.keys_dir).items() if address == ours]
    if not names:
        raise CommandFailed(
            f"the receipt's signature is not kept, and its key {hexed(ours)} is not in {config.keys_dir}",
            do="audit it in the home that served it, or in its client's",
        )
    return load(config.keys_dir, names[0], password_of(config)).sign(case.bundle.domain, case.notch.receipt)


# -------------------------------------------------------------------------------------------------------------- judging


def _same_profile(case: _Case, ours: Profile, model_dir: Path) -> None:
    """Raises: CommandFailed when DIR is another model, or computes otherwise."""
    from protocol.eip712 import hash_struct

    wanted, found = case.bundle.request.profile_id, hash_struct(ours)
    if wanted == found:
        return
    theirs, what = case.bundle.profile, "profile"
    if theirs is not None:
        differing = [name for name in theirs.__slots__ if getattr(theirs, name) != getattr(ours, name)]
        what = ", ".join(differing) or what
    raise CommandFailed(
        f"the job is of profile {hexed(wanted)[:14]}, and {model_dir} is {hexed(found)[:14]}: they differ in {what}",
        kept="nothing was judged",
        do="give the model directory (and --dtype) that the job was served with",
    )


async def _judged(case: _Case, dossier: Dossier, replayer: Any) -> tuple[Judged, Examined | None]:
    """The finding; a dossier whose documents fail is forged without a replay."""
    from node.judging import Judged, forged, judge
    from protocol.dossier import Forged, examine
    from protocol.merkle import Entry

    bundle, receipt = case.bundle, case.notch.receipt
    entry = Entry(bundle.job_id, case.notch.digest, receipt.total)  # type: ignore[arg-type]
    try:
        examined = examine(dossier, entry, bundle.domain, {bundle.node_key}, replayer.profile)
    except Forged as exc:
        return Judged(forged(bundle.job_id, exc.reason)), None
    return await judge(bundle.job_id, examined, replayer.profile, replayer), examined


# -------------------------------------------------------------------------------------------------------------- telling


def _facts(
    case: _Case, judged: Judged, examined: Examined | None, profile: Profile, decode: Decode | None, worst: int
) -> dict[str, Any]:
    from incentives.evidence import TAIL_ONE
    from incentives.verdicts import tail_of

    finding = judged.finding
    rows = _tokens(judged, examined, decode)
    rows.sort(key=lambda row: (-row["margin_milli"], -row["projection_micro"], -row["logprob_micro"], row["index"]))
    limits = {"margin_milli": profile.margin_milli, "logprob_micro": profile.logprob_micro}
    return {
        "job_id": hexed(case.bundle.job_id),
        "receipt": hexed(case.notch.digest),
        "role": case.role,
        "provider": hexed(case.bundle.request.provider),
        "profile": hexed(case.bundle.request.profile_id),
        "outcome": finding.outcome.name,
        "detail": finding.detail,
        "tokens": finding.tokens,
        "flags": finding.flags,
        "voids": finding.voids,
        "probability": tail_of(finding, profile.flag_ppm) / TAIL_ONE,
        "flag_rate_granted": profile.flag_ppm / 10**6,
        "thresholds": {**limits, "projection_micro": profile.projection_micro},
        "worst": rows[:worst],
    }


def _tokens(judged: Judged, examined: Examined | None, decode: Decode | None) -> list[dict[str, Any]]:
    """Every output token with its numbers; [] where nothing was replayed token by token."""
    from incentives.verdicts import scaled_up

    if judged.replay is None or examined is None:
        return []
    replay, flagged = judged.replay, {mark.index for mark in judged.finding.marks}
    numbers = zip(replay.margins, replay.logprobs, replay.projections, strict=True)
    return [
        {
            "index": index,
            "token_id": row.token_id,
            "text": decode(row.token_id) if decode is not None else None,
            "margin_milli": scaled_up(margin, 1_000),
            "logprob_micro": scaled_up(logprob, 10**6),
            "projection_micro": scaled_up(projection, 10**6),
            "flagged": index in flagged,
        }
        for index, (row, (margin, logprob, projection)) in enumerate(zip(examined.rows, numbers, strict=True))
    ]


def _decoder(model_dir: Path) -> Decode | None:
    """Texts of tokens, where the directory has a tokenizer."""
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))


def _lines(facts: dict[str, Any]) -> list[str]:
    from node.cli.case import far

    rows = [
        (
            str(row["index"]),
            repr(row["text"]) if row["text"] is not None else str(row["token_id"]),
            far(row["margin_milli"], 1_000),
            far(row["logprob_micro"], 10**6),
            far(row["projection_micro"], 10**6),
            "flagged" if row["flagged"] else "",
        )
        for row in facts["worst"]
    ]
    limits = facts["thresholds"]
    lines = [
        f"job        {facts['job_id']}",
        f"provider   {facts['provider']}",
        f"thresholds margin {far(limits['margin_milli'], 1_000)} logits, log-probability "
        f"{far(limits['logprob_micro'], 10**6)} nats, projection {far(limits['projection_micro'], 10**6)}",
    ]
    if rows:
        head = (">POSITION", "TOKEN", ">MARGIN", ">LOGPROB", ">PROJECTION", "")
        lines += ["", f"the worst {len(rows)} of {facts['tokens']} tokens", table(head, rows), ""]
    told = f"{facts['flags']} of {facts['tokens']} tokens flagged, {facts['voids']} far off"
    lines.append(f"{facts['outcome']}: {facts['detail'] or told}")
    if facts["flags"]:
        chance = f"honest work has as many with a probability of {facts['probability']:.3g} at most"
        lines.append(f"{chance}; it is granted {facts['flag_rate_granted']:.2g} flags a token")
    return lines
