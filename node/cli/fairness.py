"""`tally fairness`: whether charges, books and service are what a provider published, from its documents alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click

from node.cli.failures import EXIT_FAILED, CommandFailed
from node.cli.params import Amount
from node.cli.session import Session, emit, hexed, json_option, pass_session, write_private
from protocol.units import Wei

if TYPE_CHECKING:
    from collections.abc import Callable

    from incentives.ledger import ChannelKey
    from node.cli.fairness_audit import Audit
    from node.config import NodeConfig
    from protocol.bundle import Bundle
    from protocol.units import Digest

T = TypeVar("T")

MAX_FILE_BYTES: Final = 64 << 20
"""Largest bundle, proof, root or scores file read. Unit: bytes. A receipt takes about 3 KB."""

MAX_JOBS: Final = 100_000
"""Most jobs of a journal audited at once, the newest. Each takes about 10 KB of memory."""


@click.group()
def fairness() -> None:
    """Audit a provider from tariffs, receipts and roots alone: charges, completeness, equal service, predation.

    \b
    tally fairness audit                              (this home's journal)
    tally fairness audit --bundle exported/ --json    (bundles of `tally receipts export`, from anybody)
    tally fairness verify fraud-proofs/overcharge-3fa9c2d1.json
    """


@fairness.command()
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), metavar="DIR|FILE",
              help="Exported bundle, or a directory of them; repeatable.")  # fmt: skip
@click.option("--journal", is_flag=True, help="This home's journal. [default: when no --bundle is given]")
@click.option("--root", "roots", multiple=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="An epoch's signed root, as `tally fairness commit` writes it; repeatable.")  # fmt: skip
@click.option("--scores", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="JSON of job id -> whole number, higher is worse: an auditor's quality score.")  # fmt: skip
@click.option("--declared-cost", type=Amount(), metavar="TALLY", help="Declared cost per STE; flags sales below it.")
@click.option("--chain", "on_chain", is_flag=True, help="Ask the chain what each channel has claimed.")
@click.option("--permutations", type=click.IntRange(19, 1_000_000), default=1_999, show_default=True,
              help="Exchanges of payers per comparison.")  # fmt: skip
@click.option("--window", type=click.IntRange(1, 10_080), default=60, show_default=True,
              help="Minutes within which jobs are compared.")  # fmt: skip
@click.option("--proofs", type=click.Path(file_okay=False, path_type=Path), default=Path("fraud-proofs"),
              show_default=True, help="Directory that proofs are written to, made when there is one.")  # fmt: skip
@json_option
@pass_session
@click.pass_context
def audit(
    ctx: click.Context,
    session: Session,
    bundles: tuple[Path, ...],
    journal: bool,
    roots: tuple[Path, ...],
    scores: Path | None,
    declared_cost: Wei | None,
    on_chain: bool,
    permutations: int,
    window: int,
    proofs: Path,
    as_json: bool,
) -> None:
    """Check every charge against its published tariff, books against settlement, and payers against one another.

    Exit 1 if anything is found. Each fault whose documents are signed is written as a proof that `tally fairness
    verify` checks without node or chain. BOOKS `complete`: the receipts here explain every voucher. A statistical FLAG
    is a difference beyond chance (permutation test within comparable jobs, Holm's correction, 5 % for the whole
    audit), no proof. PREDATION means sold below declared cost; a free tier is lawful.
    """
    from incentives.fault_json import decode_commitment
    from node.cli.fairness_audit import Question, text
    from node.cli.fairness_audit import as_json as audit_json
    from node.cli.fairness_audit import audit as audited

    given = [(bundle, False) for path in bundles for bundle in _bundles(path)]
    config = session.load() if journal or on_chain or not bundles else None
    claimed: dict[ChannelKey, Wei] = {}
    if journal or not bundles:
        assert config is not None
        own, claimed = _journal(session, config)
        given += [(bundle, True) for bundle in own]
    kept, dropped = _genuine(given)
    if on_chain:
        assert config is not None
        claimed |= _claimed(session, config, kept)
    question = Question(
        permutations,
        window * 60_000,
        claimed,
        [_read(path, decode_commitment, "signed root") for path in roots],
        {} if scores is None else _read(scores, _scores, "scores file"),
        declared_cost if declared_cost is not None else (config.economics.declared_cost if config else None) or None,
    )
    found = audited(kept, dropped, question)
    written = _write_proofs(found, proofs)
    if as_json:
        emit(audit_json(found, written))
    else:
        click.echo(text(found, written))
    if not found.clean:
        ctx.exit(EXIT_FAILED)


@fairness.command()
@click.argument("proof", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@click.pass_context
def verify(ctx: click.Context, proof: Path, as_json: bool) -> None:
    """Check a fraud PROOF from its own documents: no node, no journal, no chain. Exit 1 if it does not hold.

    What the file cannot show, the chain says: that its node key belongs to the provider's wallet (the Registry), how
    long an epoch is, and whether a commitment that was due came in time (the Court).
    """
    from incentives.fault_json import decode
    from incentives.faults import ProofFails, judge

    read = _read(proof, decode, "fraud proof")
    try:
        finding, problem = judge(read), ""
    except ProofFails as exc:
        finding, problem = None, str(exc)
    signed = [
        *(item.tariff.provider for item in read.tariffs),
        *(item.receipt.provider for item in read.receipts),
        *(item.commitment.provider for item in read.roots),
    ]
    accused = signed[0] if signed else bytes(20)
    if as_json:
        detail = finding.detail if finding else problem
        facts = {"provider": hexed(accused), "node_key": hexed(read.node_key), "chain_id": read.domain.chain_id}
        emit({"holds": finding is not None, "fault": read.fault.value, "detail": detail, **facts})
    elif finding:
        click.echo(f"PROVED  {finding.fault.value}: {finding.detail}")
        if finding.excess > 0:
            click.echo(f"        {finding.excess} wei above the published price")
        click.echo(f"        signed by node key {hexed(read.node_key)} for provider {hexed(accused)}")
    else:
        click.echo(f"FAILS   {problem}")
    if finding is None:
        ctx.exit(EXIT_FAILED)


@fairness.command()
@click.argument("epoch", type=click.IntRange(0, (1 << 63) - 1))
@click.option("--epoch-seconds", type=click.IntRange(1, (1 << 32) - 1), default=3_600, show_default=True,
              help="Length of an epoch; EPOCH is the Unix time divided by it.")  # fmt: skip
@click.option("--profile", metavar="ID", help="First digits of the profile's id, where several were served.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File; standard output if none.")
@pass_session
def commit(session: Session, epoch: int, epoch_seconds: int, profile: str | None, output: Path | None) -> None:
    """Sign the Merkle-sum root over the jobs this provider received in EPOCH, for others to audit against.

    Leaves are the jobs of one profile received in the epoch, in order of their id, each with its last acknowledged
    receipt: the tree that a provider commits to at the Court, without a lot. An epoch that is not over is refused: what
    came in later would be missing under this provider's own signature.
    """
    from incentives.fairness import epoch_leaves
    from incentives.fault_json import SignedCommitment, encode_commitment
    from node.app import password_of
    from node.cli.ask import domain_of
    from node.keys import addresses, load
    from protocol import merkle
    from protocol.messages import Commitment
    from protocol.units import ZERO_DIGEST

    _over(epoch, epoch_seconds)
    config = session.load()
    own, _ = _journal(session, config)
    wallet = addresses(config.keys_dir).get("wallet")
    if wallet is None:
        raise CommandFailed(f"there is no wallet in {config.home}", kept="nothing was signed", do="`tally init`")
    served = sorted({bytes(bundle.request.profile_id) for bundle in own if bundle.request.provider == wallet})
    profile_id = _profile(served, profile)
    entries = epoch_leaves(own, wallet, profile_id, epoch, epoch_seconds)
    root = merkle.root(entries)
    node_key = load(config.keys_dir, "node", password_of(config))
    commitment = Commitment(wallet, profile_id, epoch, root.hash, len(entries), root.total, ZERO_DIGEST)
    domain = domain_of(config)
    signature = node_key.sign(domain, commitment)
    text = encode_commitment(SignedCommitment(domain, node_key.address, epoch_seconds, commitment, signature))
    if output is None:
        click.echo(text, nl=False)
    else:
        write_private(output, text)
        click.echo(f"wrote {output}: {len(entries)} jobs, {root.total} wei", err=True)


def _profile(served: Sequence[bytes], named: str | None) -> Digest:
    """The one profile of `served` whose id begins with `named`. Raises: CommandFailed."""
    from protocol.units import Digest

    digits = (named or "").lower().removeprefix("0x")
    fits = [profile_id for profile_id in served if profile_id.hex().startswith(digits)]
    if len(fits) == 1:
        return Digest(fits[0])
    shown = ", ".join("0x" + profile_id.hex()[:12] for profile_id in fits or served) or "none"
    problem = f"{len(fits)} profiles that this home served fit" if named else f"this home served {len(served)} profiles"
    raise CommandFailed(f"{problem}: {shown}", kept="nothing was signed", do="name one with --profile")


def _over(epoch: int, epoch_seconds: int) -> None:
    """Raises: CommandFailed when the epoch still runs or is yet to come."""
    from node.system import SystemClock

    now = SystemClock().now_ms() // 1000
    if now < (epoch + 1) * epoch_seconds:
        newest = now // epoch_seconds - 1
        raise CommandFailed(
            f"epoch {epoch} is not over: a root signed now would leave out what still ends in it",
            kept="nothing was signed",
            do=f"the newest epoch that is over is {newest}" if newest >= 0 else "take shorter epochs: --epoch-seconds",
        )


# ---------------------------------------------------------------------------------------------------------------- input


def _read(path: Path, decode: Callable[[str], T], what: str) -> T:
    """Raises: CommandFailed naming the file and what is wrong with it."""
    from protocol.bundle_json import MalformedBundle
    from protocol.errors import TallyError

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise CommandFailed(f"{path} is above {MAX_FILE_BYTES} bytes and was not read")
        return decode(raw.decode("utf-8"))
    except OSError as exc:
        raise CommandFailed(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise CommandFailed(f"{path} is no {what}: it is not UTF-8 text") from exc
    except MalformedBundle as exc:
        raise CommandFailed(f"{path} is no {what}: {exc.at or 'the text'} {exc.problem}") from exc
    except CommandFailed:
        raise
    except TallyError as exc:
        raise CommandFailed(f"{path}: {exc}") from exc


def _bundles(path: Path) -> list[Bundle]:
    """Of one file, or of every *.json in a directory. Raises: CommandFailed."""
    from protocol.bundle_json import decode

    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise CommandFailed(f"{path} holds no *.json file", do="`tally receipts export DIGEST -o FILE` writes one")
    return [_read(file, decode, "receipt bundle") for file in files]


def _scores(text: str) -> dict[bytes, int]:
    """Raises: CommandFailed."""
    try:
        tree = json.loads(text)
        out = {bytes.fromhex(name.removeprefix("0x")): value for name, value in tree.items()}
    except (ValueError, AttributeError, RecursionError) as exc:
        raise CommandFailed(f"the scores are no JSON object of job id -> number: {exc}") from exc
    for job_id, value in out.items():
        if type(value) is not int or not 0 <= value < 1 << 64 or len(job_id) != 32:
            raise CommandFailed("each score must be a job id of 64 hexadecimal digits and a whole number from 0 up")
    return out


def _journal(session: Session, config: NodeConfig) -> tuple[list[Bundle], dict[ChannelKey, Wei]]:
    """Jobs of this home with a receipt, and what its channels have claimed. Raises: CommandFailed, StoreError."""
    from incentives.ledger import ChannelKey, Role
    from node.cli.ask import asking
    from node.cli.running import run
    from node.routes import bundle_of
    from protocol.units import Address

    session.log(config, serving=False)

    async def read() -> tuple[list[Bundle], dict[ChannelKey, Wei]]:
        out: dict[str, Bundle] = {}
        async with asking(session, config) as call:
            for role in Role:
                for job_id in (await call("jobs", role=role.value, limit=MAX_JOBS))["jobs"]:
                    bundle = bundle_of(await call("job_bundle", job_id=job_id, role=role.value))
                    if bundle.notches:
                        out[job_id] = bundle
            rows = (await call("channels"))["channels"]
        claimed = {
            ChannelKey(*(Address(bytes.fromhex(row[side][2:])) for side in ("provider", "client"))): Wei(
                int(row["claimed_wei"])
            )
            for row in rows
        }
        return list(out.values()), claimed

    return run(read())


def _claimed(session: Session, config: NodeConfig, bundles: Sequence[Bundle]) -> dict[ChannelKey, Wei]:
    """What the chain has paid on each channel of the bundles. Raises: ChainError, KeystoreError."""
    from incentives.fairness import channel_books
    from node.cli.running import run

    session.log(config, serving=False)
    keys = [books.key for books in channel_books(bundles, {})]

    async def look() -> dict[ChannelKey, Wei]:
        from node.app import wallet_chain

        async with wallet_chain(config) as (chain, _):
            slots = [await chain.slot(key) for key in keys]
        return {key: slot.claimed for key, slot in zip(keys, slots, strict=True) if slot is not None}

    return run(look())


def _genuine(given: Sequence[tuple[Bundle, bool]]) -> tuple[list[Bundle], int]:
    """Bundles without receipts that their node key did not sign, and how many those were."""
    from node.cli.fairness_audit import genuine

    kept = [genuine(bundle, own=own) for bundle, own in given]
    before = sum(len(bundle.notches) for bundle, _ in given)
    return kept, before - sum(len(bundle.notches) for bundle in kept)


def _write_proofs(found: Audit, directory: Path) -> dict[int, str]:
    """Index of each proved fault -> its file. Raises: CommandFailed."""
    from incentives.fault_json import encode

    out: dict[int, str] = {}
    for index, fault in enumerate(found.faults):
        if fault.proof is None:
            continue
        digits = (fault.receipt if any(fault.receipt) else fault.job_id).hex()[:12]
        name = f"{fault.finding.fault.value.replace(' ', '-')}-{digits}.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise CommandFailed(f"{directory} cannot be made: {exc.strerror}", do="name another with --proofs") from exc
        write_private(directory / name, encode(fault.proof))
        out[index] = str(directory / name)
    return out
