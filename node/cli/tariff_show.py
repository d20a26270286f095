"""What `tally tariff show` finds and says: a sheet's fields, and what they come to."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incentives.basket import million_up
from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.market_rows import factor
from node.cli.session import Session, hexed
from node.cli.tables import table
from node.tariff_sheet import FIELDS, TIERS, is_signed, oddities, read_file, read_sheet, read_signed, sheet_json
from protocol.bundle_json import Node, document_json
from protocol.messages import Tariff
from protocol.tariff import Basis, multiplier_of, tier_terms
from protocol.units import BPS, ZERO_DIGEST, Digest, Tier

if TYPE_CHECKING:
    from node.config import NodeConfig


@dataclass(frozen=True, slots=True)
class Found:
    """A tariff and where it is from. `hash`: zero for a sheet that nobody signed."""

    tariff: Tariff
    hash: Digest
    source: str


def found_tariff(session: Session, what: str, bootstrap: tuple[str, ...]) -> list[Found]:
    """A file's, a hash's, or those of a provider's offers. Raises: TariffSheetError, CommandFailed."""
    from protocol.eip712 import digest

    if re.fullmatch(r"0x[0-9a-fA-F]{64}", what) or re.fullmatch(r"0x[0-9a-fA-F]{40}", what):
        return _known(session, what.lower(), bootstrap)
    text = read_file(Path(what))
    if is_signed(text):
        signed = read_signed(text)
        tariff_hash = digest(signed.domain, signed.tariff)
        return [Found(signed.tariff, tariff_hash, f"{what}, signed by {hexed(signed.node_key)}")]
    return [Found(read_sheet(text), ZERO_DIGEST, f"{what}, not signed")]


def _known(session: Session, what: str, bootstrap: tuple[str, ...]) -> list[Found]:
    from node.cli.running import run

    config = session.load(transport__bootstrap=bootstrap or None)
    session.log(config, serving=False)
    found = run(_look(session, config, what))
    if not found:
        is_hash = len(what) == 66
        raise CommandFailed(
            f"no tariff of {'hash' if is_hash else 'provider'} {what} is in this home's journal or on the market",
            do="`tally market` shows who offers what; --bootstrap names peers to ask",
        )
    return found


async def _look(session: Session, config: NodeConfig, what: str) -> list[Found]:
    """In the journal by hash, else in the market. Raises: ChainError, TransportError, StoreError."""
    from node.cli.ask import ask, domain_of
    from protocol.eip712 import digest

    if len(what) == 66:
        kept = None
        with suppress(CommandFailed):  # no journal yet
            kept = (await ask(session, config, "tariff", hash=what))["tariff"]
        if kept is not None:
            sheet = Node("tariff", kept["document"]).document(Tariff)
            return [Found(sheet, Digest(bytes.fromhex(what[2:])), "this home's journal")]
    out = []
    for offer in await _offers(session, config):
        sheet = Node("tariff", offer["tariff"]).document(Tariff)
        tariff_hash = digest(domain_of(config), sheet)
        if what in (hexed(tariff_hash), offer["provider"]):
            out.append(Found(sheet, tariff_hash, f"offer of {offer['model']}, base {factor(offer['base_bps'])}"))
    return out


async def _offers(session: Session, config: NodeConfig) -> list[dict[str, Any]]:
    from node.gateway.control import ControlUnavailable

    try:
        offers: list[dict[str, Any]] = (await session.control().call("market"))["offers"]
    except ControlUnavailable:
        from node.app import client_app
        from node.routes import market_routes

        async with client_app(config) as app:
            await app.directory.refresh()
            offers = (await market_routes(app.marketplace, app.chain)["market"]({}))["offers"]
    return offers


# ---------------------------------------------------------------------------------------------------------------- shown


def effective(tariff: Tariff) -> list[dict[str, Any]]:
    """Prices per million tokens in wei for each tier on offer, context, privacy and base multiplier.

    Base multipliers: the least, x1 where it lies between, and the most that the tariff allows.
    """
    bases = sorted({tariff.base_min_bps, *((BPS,) if tariff.base_min_bps < BPS < tariff.base_max_bps else ()),
                    tariff.base_max_bps})  # fmt: skip
    prices = ("prompt_price", "cached_price", "completion_price", "reasoning_price", "embedding_price")
    out = []
    for tier, long, private, base in product(Tier, (False, True), (False, True), bases):
        if tier_terms(tariff, tier)[0] == 0:
            continue
        length = tariff.long_context_threshold + 1 if long else 0
        multiplier = multiplier_of(tariff, Basis(tier=tier, private=private, base_bps=base), length)
        row: dict[str, Any] = {"tier": tier.name.lower(), "long": long, "private": private, "base_bps": base}
        out.append(row | {name: str(million_up(getattr(tariff, name), multiplier)) for name in prices})
    return out


def shown_json(found: Found) -> dict[str, Any]:
    """All of it; amounts are wei as decimal strings."""
    return {
        "source": found.source,
        "tariff_hash": None if found.hash == ZERO_DIGEST else hexed(found.hash),
        "tariff": document_json(found.tariff),
        "sheet": sheet_json(found.tariff),
        "per_million_wei": effective(found.tariff),
        "notes": oddities(found.tariff),
    }


def lines(found: Found) -> list[str]:
    """All of it, for people."""
    tariff, sheet = found.tariff, sheet_json(found.tariff)
    out = [f"from           {found.source}"]
    if found.hash != ZERO_DIGEST:
        out.append(f"hash           {hexed(found.hash)}")
    for name in ("provider", "profile_id", "sequence"):
        out.append(f"{name:14} {sheet[name] if sheet[name] is not None else 'filled in when it is signed'}")
    for name in ("valid_from", "valid_until"):
        at = getattr(tariff, name)
        out.append(f"{name:14} {_date(at) if at else 'filled in when it is signed'}")
    plain = [key for key in FIELDS if not key.startswith("tiers.")]
    width = max(len(key) for key in plain)
    out += ["", *(f"{key:{width}}  {_value(sheet, key)}{_unit(key)}" for key in plain), ""]
    head = ("TIER", ">FACTOR", ">TTFT PROMISED", ">TPOT PROMISED", ">REFUND")
    out += [table(head, [_tier(tariff, tier) for tier in TIERS]), "", "TALLY per million tokens:"]
    out.append(_effective_table(tariff))
    return [*out, *(f"note: {sentence}" for sentence in oddities(tariff))]


def _value(sheet: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        sheet = sheet[part]
    return sheet


def _unit(key: str) -> str:
    if key == "prices.per_request":
        return " TALLY a job"
    if key.startswith("prices."):
        return " TALLY per million tokens"
    return {"long_context.threshold": " tokens", "cache_ttl_s": " s"}.get(key, "")


def _tier(tariff: Tariff, name: str) -> tuple[str, ...]:
    bps, ttft, tpot, refund = tier_terms(tariff, Tier[name.upper()])
    if bps == 0:
        return (name, "not offered", "", "", "")
    promises = (f"{ms} ms" if ms else "-" for ms in (ttft, tpot))
    share = f"{refund * 100 // BPS}.{refund % 100:02d} %" if refund else "-"
    return (name, factor(bps), *promises, share)


def _effective_table(tariff: Tariff) -> str:
    head = ("TIER", "CONTEXT", "PRIVACY", ">BASE", ">PROMPT", ">CACHED", ">OUTPUT", ">REASONING", ">EMBEDDING")
    rows = []
    for row in effective(tariff):
        if (row["long"] and tariff.long_context_bps == BPS) or (row["private"] and tariff.privacy_bps == BPS):
            continue  # the same prices as the row before
        side = ">" if row["long"] else "<="
        context = "any" if tariff.long_context_bps == BPS else f"{side}{tariff.long_context_threshold}"
        privacy = "any" if tariff.privacy_bps == BPS else "private" if row["private"] else "plain"
        names = ("prompt_price", "cached_price", "completion_price", "reasoning_price", "embedding_price")
        amounts = (money.tally(int(row[name])) for name in names)
        rows.append((row["tier"], context, privacy, factor(row["base_bps"]), *amounts))
    return table(head, rows)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
