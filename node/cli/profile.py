"""`tally profile`: what a model directory computes, how honest work of it is told from other work, and the Court."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.failures import CommandFailed
from node.cli.onchain import confirm, need_wallet, on_chain, run_quietly, tell, yes_option
from node.cli.session import Session, emit, hexed, json_option, pass_session
from node.cli.tables import table

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.config import NodeConfig
    from node.ports import Mined
    from protocol.messages import Profile
    from protocol.signing import Signer

model_option = click.option(
    "--model", type=click.Path(path_type=Path), metavar="DIR", help="Model directory. [default: provider.model_dir]"
)
dtype_option = click.option(
    "--dtype", type=click.Choice(["auto", "bf16", "fp32"]), help="Number format. [default: provider.dtype]"
)


@click.group()
def profile() -> None:
    """Profiles: a model directory in one number format, with the thresholds an audit judges its work by.

    \b
    tally profile calibrate --model ./my-model      (minutes; once per model and number format)
    tally profile show --model ./my-model
    tally profile register --model ./my-model       (before anybody can be judged under it)
    """


@profile.command()
@model_option
@dtype_option
@click.option("--tokens", type=click.IntRange(500), metavar="N", help="Output tokens to measure. [default: 32000]")
@click.option("--quick", is_flag=True, help="Few tokens, few variants: more flags are granted.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Names the requests that are made.")
@click.option("--force", is_flag=True, help="Replace a calibration; the profile gets another id.")
@json_option
@pass_session
def calibrate(
    session: Session,
    model: Path | None,
    dtype: str | None,
    tokens: int | None,
    quick: bool,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Measure how far honest work of a model may be from its replay, and write calibration.json beside its weights.

    The model generates in every way a provider may run it, and each generation is replayed. Thresholds and the rate of
    flags granted to honest work become part of the profile, whose id changes with them: tariffs and reservations of
    the old id no longer apply, and the file must travel with the weights.
    """
    from node.engine.calibration import QUICK_TOKENS, QUICK_VARIANTS, TOKENS, VARIANTS, calibrate, with_entry, write
    from node.engine.profile import resolve_dtype, stored_parameters
    from node.engine.spec import weight_files

    config = session.load()
    directory, wanted = _model(config, model), dtype or config.provider.dtype
    resolved = resolve_dtype(wanted, stored_parameters(weight_files(directory)))
    before = _entries(directory)
    if resolved in before.get("dtypes", {}) and not force:
        raise CommandFailed(
            f"{directory} is calibrated for {resolved} already",
            kept="nothing was measured or written",
            do="`tally profile show` shows it; --force replaces it, and makes another profile: tariffs and "
            "reservations of the old one no longer apply",
        )
    old = _profile_id(directory, wanted)
    with _progress(as_json) as say:
        count, variants = tokens or (QUICK_TOKENS if quick else TOKENS), QUICK_VARIANTS if quick else VARIANTS
        entry = run_quietly(session, config, calibrate(directory, wanted, count, seed, say, variants))
    path = write(directory, with_entry(before, directory, resolved, entry))
    new = _profile_id(directory, wanted)
    if as_json:
        emit({"file": str(path), "dtype": resolved, "profile_before": old, "profile": new, **entry})
        return
    click.echo("\n".join(_entry_lines(resolved, entry)))
    click.echo(f"written to {path}", err=True)
    if old != new:
        click.echo(
            f"the profile is {new} now{f', no longer {old}' if old else ''}: sign a tariff for it "
            f"(`tally tariff sign --model`), and register it once (`tally profile register`)",
            err=True,
        )


@profile.command()
@model_option
@dtype_option
@json_option
@pass_session
def show(session: Session, model: Path | None, dtype: str | None, as_json: bool) -> None:
    """The profile of a model directory: its id, hashes, shape and thresholds, and what they were measured on."""
    config = session.load()
    directory = _model(config, model)
    found, resolved = _profile(directory, dtype or config.provider.dtype)
    entry = _entries(directory).get("dtypes", {}).get(resolved)
    values = {name: hexed(value) if isinstance(value, bytes) else value for name, value in _fields(found).items()}
    if as_json:
        emit({"profile_id": _id(found), "dtype": resolved, "profile": values, "calibration": entry})
        return
    click.echo(table(["profile", _id(found)], [["dtype", resolved], *([n, str(v)] for n, v in values.items())]))
    if entry is None:
        click.echo("\nnot calibrated: the thresholds are wide defaults; `tally profile calibrate` measures its own")
    else:
        click.echo("\n" + "\n".join(_entry_lines(resolved, entry)))


@profile.command()
@model_option
@dtype_option
@yes_option
@json_option
@pass_session
def register(session: Session, model: Path | None, dtype: str | None, yes: bool, as_json: bool) -> None:
    """Put a profile on the Court's list, so that providers can be judged under it. Anybody may, once per profile."""
    config = need_wallet(session)
    found, _ = _profile(_model(config, model), dtype or config.provider.dtype)

    async def act(chain: Web3Chain, _: Signer) -> Mined | None:
        from node.app import court_of
        from protocol.eip712 import hash_struct
        from protocol.units import Digest

        court = court_of(chain)
        if await court.profile_registered(Digest(hash_struct(found))):
            return None
        confirm(yes, f"register profile {_id(found)}, which grants honest work {found.flag_ppm} flags per million")
        return await court.register_profile(found)

    mined = on_chain(session, config, act)
    if mined is not None:
        tell(mined, as_json, profile=_id(found))
    elif as_json:
        emit({"profile": _id(found), "transaction": None})
    else:
        click.echo(f"profile {_id(found)} is registered already; nothing was sent")


# ---------------------------------------------------------------------------------------------------------------- parts


def _model(config: NodeConfig, given: Path | None) -> Path:
    """Raises: CommandFailed."""
    directory = given or config.provider.model_dir
    if directory is None:
        raise CommandFailed("no model directory is named", do="give --model DIR, or set provider.model_dir")
    return directory


def _profile(directory: Path, dtype: str) -> tuple[Profile, str]:
    """The profile and its number format. Raises: ModelError."""
    from node.engine.profile import profile_of, resolve_dtype, stored_parameters
    from node.engine.spec import weight_files

    return profile_of(directory, dtype), resolve_dtype(dtype, stored_parameters(weight_files(directory)))


def _id(found: Profile) -> str:
    from protocol.eip712 import hash_struct

    return hexed(hash_struct(found))


def _profile_id(directory: Path, dtype: str) -> str | None:
    """None where the calibration that lies there fits nothing any more."""
    from node.engine.spec import ModelError

    with suppress(ModelError):
        return _id(_profile(directory, dtype)[0])
    return None


def _fields(found: Profile) -> dict[str, Any]:
    return {name: getattr(found, name) for name in type(found).__slots__}


def _entries(directory: Path) -> dict[str, Any]:
    """The calibration file's content; empty when there is none or it is no JSON object."""
    from node.engine.thresholds import CALIBRATION_FILE

    with suppress(OSError, ValueError):
        read = json.loads((directory / CALIBRATION_FILE).read_text())
        if isinstance(read, dict) and isinstance(read.get("dtypes"), dict):
            return read
    return {}


def _entry_lines(dtype: str, entry: dict[str, Any]) -> list[str]:
    """A calibration for people."""
    limits, held = entry["thresholds"], entry["held"]
    out = [
        f"{dtype}: a token is flagged beyond {limits['margin_milli'] / 1e3:g} logits, "
        f"{limits['logprob_micro'] / 1e6:g} nats or {limits['projection_micro'] / 1e4:g} % of the projection's length",
        f"honest work is granted {limits['flag_ppm']:,} flags per million tokens; {held['flags']} of "
        f"{entry['tokens']['held']:,} were flagged, {held['flags_with_room']} with the noise of other processors",
    ]
    other = entry["other_dtype"]
    out += [f"the same weights in {other['dtype']}: {other['flags']} of {other['tokens']} tokens flagged", ""]
    rows = [
        [v["name"], v["kernels"], f"{v['tokens']:,}", *(f"{v[name]:.2g}" for name in _NUMBERS)]
        for v in entry["variants"]
    ]
    out.append(table(["honest work", "kernels", ">tokens", ">logits off", ">nats off", ">projection off"], rows))
    return out


_NUMBERS = ("margins", "logprobs", "projections")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the weights", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
