"""`tally receipts`: what was signed for every token, shown, checked, and taken along."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.failures import EXIT_FAILED, CommandFailed
from node.cli.session import Session, emit, json_option, pass_session, write_private
from node.cli.tables import table

if TYPE_CHECKING:
    from node.config import NodeConfig
    from protocol.bundle import Bundle, Check

MAX_BUNDLE_BYTES: Final = 64 << 20
"""Largest bundle file read. A receipt takes about 3 KB, so this is a job of 600,000 tokens."""


@click.group()
def receipts() -> None:
    """Receipts: each token that was paid is covered by one, signed by both sides.

    \b
    tally receipts list
    tally receipts show 3fa9
    tally receipts export 3fa9 > job.json
    tally receipts verify job.json        (anywhere, without a node or a chain)
    """


@receipts.command("list")
@click.option("--role", type=click.Choice(["provider", "client"]), help="Only jobs this home sold, or bought.")
@click.option("--all", "every", is_flag=True, help="Interim receipts too, not only the last of each job.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Newest so many.")
@json_option
@pass_session
def list_(session: Session, role: str | None, every: bool, limit: int, as_json: bool) -> None:
    """Newest receipts first.

    HALVES: `both` when each side's signature is here, `voucher` when the payment is but the final acknowledgement is
    not, `ours` when only this side signed.
    """
    found = _ask(session, session.load(), "receipts", role=role, final=not every, limit=limit)["receipts"]
    if as_json:
        emit(found)
        return
    rows = [
        (
            datetime.fromtimestamp(row["at_ms"] / 1000).astimezone().strftime("%m-%d %H:%M:%S"),
            row["digest"][:12],
            row["role"],
            row["model"],
            str(row["prompt_tokens"]),
            str(row["completion_tokens"]),
            money.tally(int(row["total_wei"])),
            row["finish"],
            _halves(row),
        )
        for row in found
    ]
    head = ("TIME", "DIGEST", "ROLE", "MODEL", ">PROMPT", ">OUTPUT", ">COST TALLY", "FINISH", "HALVES")
    click.echo(table(head, rows) if rows else "no receipts yet")


def _halves(row: dict[str, Any]) -> str:
    held = row["signatures"]
    if held["receipt"] and held["voucher"] and (held["ack"] or not row["final"]):
        return "both"
    return "voucher" if held["voucher"] else "ours"


@receipts.command()
@click.argument("digest")
@json_option
@pass_session
def show(session: Session, digest: str, as_json: bool) -> None:
    """Draw the stick that DIGEST (its first digits are enough) belongs to, both halves."""
    from node.routes import bundle_of
    from protocol.bundle_json import document_json

    answer = _ask(session, session.load(), "bundle", digest=digest)
    bundle = bundle_of(answer)
    notch = next(item for item in bundle.notches if "0x" + item.digest.hex() == answer["digest"])
    if as_json:
        parts = {"digest": answer["digest"], "role": answer["role"], "model": answer["model"]}
        emit({**parts, "receipt": document_json(notch.receipt), "steps": len(bundle.notches)})
        return
    from node.cli.stick import draw

    click.echo(draw(bundle, notch, answer["model"], answer["role"]))


@receipts.command()
@click.argument("digest_or_file")
@json_option
@click.pass_context
def verify(ctx: click.Context, digest_or_file: str, as_json: bool) -> None:
    """Recompute a job's digests, signatures, counts, cost, vouchers and step chain; exit 1 if any fails.

    DIGEST_OR_FILE: the first digits of a receipt's digest, or a file that `tally receipts export` wrote; a file needs
    neither node nor journal nor chain. `skip` means that the documents at hand do not hold what a check needs.
    """
    from protocol.bundle import passed
    from protocol.bundle import verify as checked

    bundle = _bundle(ctx.obj, digest_or_file)
    checks = checked(bundle)
    good = passed(checks) and bool(bundle.notches)
    if as_json:
        listed = [{"check": c.name, "outcome": c.outcome.value, "detail": c.detail} for c in checks]
        emit({"ok": good, "job_id": "0x" + bundle.job_id.hex(), "checks": listed})
    else:
        click.echo("\n".join(_line(check) for check in checks))
        verdict = f"job 0x{bundle.job_id.hex()[:12]} holds, receipts: {len(bundle.notches)}" if good else "FAILED"
        click.echo(verdict if bundle.notches else "FAILED: there is no receipt")
    if not good:
        ctx.exit(EXIT_FAILED)


def _line(check: Check) -> str:
    colour = {"ok": "green", "FAIL": "red", "skip": "yellow"}[check.outcome.value]
    return f"{click.style(f'{check.outcome.value:4}', fg=colour)}  {check.name:20} {check.detail}"


def _bundle(session: Session, digest_or_file: str) -> Bundle:
    """From a file when there is one of that name, else from the journal."""
    path = Path(digest_or_file)
    looks_like_file = path.is_file() or "/" in digest_or_file or path.suffix == ".json"
    if not looks_like_file:
        from node.routes import bundle_of

        return bundle_of(_ask(session, session.load(), "bundle", digest=digest_or_file))
    return read_bundle(path)


def read_bundle(path: Path) -> Bundle:
    """A file that `export` wrote. Raises: CommandFailed, MalformedBundle."""
    from protocol.bundle_json import decode

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BUNDLE_BYTES + 1)
        if len(raw) > MAX_BUNDLE_BYTES:
            raise CommandFailed(f"{path} is above {MAX_BUNDLE_BYTES} bytes and was not read")
        return decode(raw.decode("utf-8"))
    except OSError as exc:
        raise CommandFailed(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise CommandFailed(f"{path} is no receipt bundle: it is not UTF-8 text") from exc


@receipts.command()
@click.argument("digest")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File; standard output if none.")
@click.option("--sign/--no-sign", default=True, help="Add this side's own signatures, which the journal need not keep.")
@pass_session
def export(session: Session, digest: str, output: Path | None, sign: bool) -> None:
    """Write the whole job DIGEST belongs to as one self-contained JSON bundle.

    It holds request, acceptance, tariff, all receipts, vouchers and signatures; it holds no prompt and no text (on the
    client's side the ids of the generated tokens). Own signatures are deterministic, so adding them signs nothing new.
    """
    from node.routes import bundle_of
    from protocol.bundle_json import encode

    config = session.load()
    answer = _ask(session, config, "bundle", digest=digest)
    bundle = bundle_of(answer)
    text = encode(_completed(config, bundle, answer["role"]) if sign else bundle)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_private(output, text)
        click.echo(f"wrote {output}; check it anywhere with: tally receipts verify {output}", err=True)


def _completed(config: NodeConfig, bundle: Bundle, role: str) -> Bundle:
    """With our own signatures on what the journal says we signed. Raises: KeystoreError, CommandFailed."""
    from node.app import password_of
    from node.keys import addresses, load
    from protocol.messages import ReceiptAck

    ours = bundle.node_key if role == "provider" else bundle.request.client
    names = [name for name, address in addresses(config.keys_dir).items() if address == ours]
    if not names:
        raise CommandFailed(
            f"the key 0x{ours.hex()}, which signed this side's half, is not in {config.keys_dir}",
            kept="nothing was written",
            do="--no-sign exports without it",
        )
    signer = load(config.keys_dir, names[0], password_of(config))
    domain = bundle.domain
    if role == "provider":
        # A receipt is signed right after it was journaled, and the same bytes come out each time.
        signed = [
            replace(notch, receipt_signature=notch.receipt_signature or signer.sign(domain, notch.receipt))
            for notch in bundle.notches
        ]
    else:
        signed = [
            replace(
                notch,
                voucher_signature=notch.voucher_signature
                or (signer.sign(domain, notch.voucher) if notch.voucher else b""),
                ack_signature=notch.ack_signature
                or (signer.sign(domain, ReceiptAck(notch.digest)) if notch.receipt.is_final else b""),
            )
            for notch in bundle.notches
        ]
    return replace(bundle, notches=tuple(signed))


def _ask(session: Session, config: NodeConfig, route: str, **params: Any) -> dict[str, Any]:
    from node.cli.ask import ask
    from node.cli.running import run

    session.log(config, serving=False)
    return run(ask(session, config, route, **params))
