"""A price sheet as people write it (JSON or TOML), and as it travels once it is signed.

A sheet says everything a Tariff does, in TALLY per million tokens and plain factors; a tier that is null is not
offered. `provider`, `profile_id`, `sequence`, `valid_from` and `valid_until` may be null: they are filled in when it is
signed. What cannot be held exactly, or is out of bounds, is refused by the name of its field.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from node.config_values import Kind, count, factor, price, tally
from protocol.bundle_json import MalformedBundle, domain_json, parse, signed_json
from protocol.eip712 import Domain
from protocol.errors import FieldOutOfRange, TallyError
from protocol.messages import Tariff
from protocol.signing import verify
from protocol.tariff import MAX_MULTIPLIER_BPS, MAX_PRICE, check_tariff
from protocol.units import BPS, WEI_PER_TALLY, ZERO_ADDRESS, ZERO_DIGEST, Address, Digest

if TYPE_CHECKING:
    from node.config import NodeConfig

FORMAT: Final = "tallystick-tariff/1"
SIGNED_FORMAT: Final = "tallystick-signed-tariff/1"

MAX_SHEET_BYTES: Final = 256 * 1024
"""Largest sheet read. Unit: bytes. One has about 2 KB."""

MILLION: Final = 1_000_000


@dataclass
class TariffSheetError(TallyError):
    """A sheet that cannot be used: the field ("" for the whole), what is wrong, and what it may hold."""

    field: str
    problem: str
    expected: str = ""

    def __str__(self) -> str:
        wanted = f"; expected {self.expected}" if self.expected else ""
        return f"price sheet: {self.field or 'the text'} {self.problem}{wanted}"


def _hexadecimal(size: int) -> Kind:
    def read(value: Any) -> bytes:
        raw = bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else b""
        if len(raw) != size:
            raise ValueError(f"{value!r} has another length")
        return raw

    return Kind(f"0x and {2 * size} hexadecimal digits", read)


_MS: Final = count(0, (1 << 32) - 1)
_SECONDS: Final = count(0, (1 << 48) - 1)
TIERS: Final = ("flex", "standard", "priority")

FIELDS: Final[Mapping[str, tuple[str, Kind]]] = {
    "prices.prompt": ("prompt_price", price),
    "prices.cached": ("cached_price", price),
    "prices.completion": ("completion_price", price),
    "prices.reasoning": ("reasoning_price", price),
    "prices.embedding": ("embedding_price", price),
    "prices.per_request": ("per_request", tally),
    **{
        f"tiers.{tier}.{name}": (f"{tier}_{field}", kind)
        for tier in TIERS
        for name, field, kind in (
            ("factor", "bps", factor),
            ("ttft_ms", "ttft_ms", _MS),
            ("tpot_ms", "tpot_ms", _MS),
            ("refund", "refund_bps", factor),
        )
    },
    "long_context.threshold": ("long_context_threshold", _MS),
    "long_context.factor": ("long_context_bps", factor),
    "privacy_factor": ("privacy_bps", factor),
    "reserved_discount": ("reserved_discount_bps", factor),
    "cache_ttl_s": ("cache_ttl_s", _MS),
    "base.min": ("base_min_bps", factor),
    "base.max": ("base_max_bps", factor),
}
"""Key of a sheet -> (field of the Tariff, how it is written)."""

FILLED: Final[Mapping[str, tuple[str, Kind]]] = {
    "provider": ("provider", _hexadecimal(20)),
    "profile_id": ("profile_id", _hexadecimal(32)),
    "sequence": ("sequence", count(1, (1 << 64) - 1)),
    "valid_from": ("valid_from", _SECONDS),
    "valid_until": ("valid_until", _SECONDS),
}
"""The same for what signing fills in where it is null."""

_KEY_OF: Final = {field: key for key, (field, _) in {**FIELDS, **FILLED}.items()}

UNFILLED: Final = {
    "provider": ZERO_ADDRESS,
    "profile_id": ZERO_DIGEST,
    "sequence": 0,
    "valid_from": 0,
    "valid_until": 0,
}
"""What stands in the Tariff where the sheet has null."""


def bounds(field: str) -> str:
    """What a field of the Tariff may hold, beyond its type."""
    if field.endswith("_price"):
        most = MAX_PRICE * MILLION // WEI_PER_TALLY
        return f"0 to {most} TALLY per million tokens" + (", at most prices.prompt" if field == "cached_price" else "")
    if field == "per_request":
        return f"0 to {MAX_PRICE // WEI_PER_TALLY} TALLY"
    if field.endswith("refund_bps") or field == "reserved_discount_bps":
        return "a share from 0 to 1"
    if field == "base_max_bps":
        return f"base.min to {MAX_MULTIPLIER_BPS // BPS}"
    if field.endswith("_bps"):
        return f"a factor from 0 to {MAX_MULTIPLIER_BPS // BPS}; one tier at least above 0"
    if field == "multipliers":
        return "tier, context, privacy and base factors that multiply to 100 at most"
    return "an end after the start" if field == "valid_until" else ""


def checked(tariff: Tariff) -> Tariff:
    """The tariff, if it may be signed; open dates are let pass. Raises: TariffSheetError naming field and bounds."""
    open_ended = tariff.valid_until == 0
    try:
        check_tariff(replace(tariff, valid_until=max(1, tariff.valid_from + 1)) if open_ended else tariff)
    except FieldOutOfRange as exc:
        key = _KEY_OF.get(exc.field, "the factors together" if exc.field == "multipliers" else exc.field)
        raise TariffSheetError(key, f"is {exc.value!r}, out of bounds", bounds(exc.field)) from exc
    return tariff


def read_sheet(text: str, base: Tariff | None = None) -> Tariff:
    """A sheet in JSON or TOML. Every key must be there unless `base` gives it. Raises: TariffSheetError."""
    tree = _tree(text)
    if tree.pop("format", FORMAT) != FORMAT:
        raise TariffSheetError("format", "is of another kind", repr(FORMAT))
    for tier in TIERS:
        section = tree.get("tiers")
        if isinstance(section, dict) and tier in section and section[tier] is None:
            section[tier] = {"factor": "0", "ttft_ms": 0, "tpot_ms": 0, "refund": "0"}
    return checked(_tariff(_flat(tree, ""), base))


def with_values(tariff: Tariff, values: Mapping[str, str]) -> Tariff:
    """A tariff with some keys of a sheet set. Raises: TariffSheetError."""
    return checked(_tariff(dict(values), tariff))


def _tariff(given: dict[str, Any], base: Tariff | None) -> Tariff:
    known = {**FIELDS, **FILLED}
    values: dict[str, Any] = dict(UNFILLED)
    if base is not None:
        values = {field: getattr(base, field) for field, _ in known.values()}
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise TariffSheetError(key, "is unknown" + (f"; did you mean {close[0]}?" if close else ""))
        field, kind = known[key]
        if value is None and key in FILLED:
            continue
        try:
            values[field] = kind.parse(value)
        except (ValueError, ArithmeticError) as exc:
            raise TariffSheetError(key, f"cannot be used ({exc})", kind.form) from exc
    missing = [key for key, (field, _) in known.items() if field not in values]
    if missing:
        raise TariffSheetError(missing[0], "is missing", known[missing[0]][1].form)
    return Tariff(**values)


def _tree(text: str) -> dict[str, Any]:
    """Raises: TariffSheetError."""
    try:
        tree = json.loads(text, parse_float=Decimal) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError) as exc:
        raise TariffSheetError("", f"is no JSON ({exc})") from exc
    if tree is None:
        try:
            tree = tomllib.loads(text, parse_float=Decimal)
        except (ValueError, RecursionError) as exc:
            raise TariffSheetError("", f"is neither JSON nor TOML ({exc})") from exc
    if not tree:
        raise TariffSheetError("", "is empty", "a sheet as `tally tariff new` writes it")
    return dict(tree)


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out


# --------------------------------------------------------------------------------------------------------- writing


def sheet_json(tariff: Tariff) -> dict[str, Any]:
    """A tariff as a sheet; what was not filled in is null, a tier at factor 0 is null."""
    out: dict[str, Any] = {"format": FORMAT}
    for key, (field, kind) in {**FILLED, **FIELDS}.items():
        value = getattr(tariff, field)
        shown = None if key in FILLED and value == UNFILLED[key] else _written(kind, value)
        *path, name = key.split(".")
        place = out
        for part in path:
            place = place.setdefault(part, {})
        place[name] = shown
    for tier in TIERS:
        if getattr(tariff, f"{tier}_bps") == 0:
            out["tiers"][tier] = None
    return out


def _written(kind: Kind, value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    for written, scale in ((price, WEI_PER_TALLY // MILLION), (tally, WEI_PER_TALLY), (factor, BPS)):
        if kind is written:
            return decimal_text(value, scale)
    return value


def decimal_text(value: int, scale: int) -> str:
    """`value / scale` as an exact decimal; `scale`: a power of ten."""
    whole, rest = divmod(value, scale)
    return f"{whole}.{rest:0{len(str(scale)) - 1}d}".rstrip("0") if rest else str(whole)


def oddities(tariff: Tariff) -> list[str]:
    """What is lawful and probably not meant, one sentence each."""
    out = []
    if not any(
        getattr(tariff, name) for name in ("prompt_price", "completion_price", "reasoning_price", "per_request")
    ):
        out.append("everything but embeddings is free: anybody can fill all slots at no cost")
    elif tariff.completion_price < tariff.prompt_price:
        out.append("generated tokens are cheaper than prompt tokens, though they cost more to compute")
    if tariff.reasoning_price < tariff.completion_price:
        out.append("reasoning tokens are cheaper than other output: answers will be asked for as reasoning")
    if tariff.cached_price == tariff.prompt_price and tariff.prompt_price:
        out.append("cached tokens cost as much as computed ones: a hit saves the payer nothing")
    if tariff.prompt_price and not tariff.embedding_price:
        out.append("embeddings are free")
    offered = [(tier, getattr(tariff, f"{tier}_bps")) for tier in TIERS]
    out += [f"the {tier} tier has no price and is not offered" for tier, bps in offered if bps == 0]
    known = [(tier, bps) for tier, bps in offered if bps]
    for (slow, low), (fast, high) in pairwise(known):
        if high < low:
            out.append(f"the {fast} tier is cheaper than {slow}")
    for tier, _ in known:
        promised = getattr(tariff, f"{tier}_ttft_ms") or getattr(tariff, f"{tier}_tpot_ms")
        refund = getattr(tariff, f"{tier}_refund_bps")
        if promised and not refund:
            out.append(f"the {tier} tier promises times and gives nothing back when it misses them")
        if refund and not promised:
            out.append(f"the {tier} tier has a refund and promises no time, so it is never paid")
    for name, what in (("long_context_bps", "long prompts"), ("privacy_bps", "private jobs")):
        if getattr(tariff, name) < BPS:
            out.append(f"{what} are cheaper than others")
    if tariff.base_max_bps < BPS or tariff.base_min_bps > BPS:
        out.append("the base multiplier can never be x1")
    if tariff.reserved_discount_bps == BPS:
        out.append("jobs under a reservation cost nothing")
    return out


# --------------------------------------------------------------------------------------------------------------- signed


@dataclass(frozen=True, slots=True)
class SignedSheet:
    """A tariff under its node key's signature."""

    domain: Domain
    node_key: Address
    tariff: Tariff
    signature: bytes


def signed_text(signed: SignedSheet) -> str:
    """As JSON, ending in a newline; `sheet` is the same for people to read."""
    tree = {
        "format": SIGNED_FORMAT,
        "domain": domain_json(signed.domain),
        "node_key": "0x" + signed.node_key.hex(),
        "tariff": signed_json(signed.tariff, signed.signature),
        "sheet": sheet_json(signed.tariff),
    }
    return json.dumps(tree, indent=1) + "\n"


def read_signed(text: str) -> SignedSheet:
    """The inverse; the signature is checked and the readable part must say the same. Raises: TariffSheetError."""
    if not is_signed(text):
        raise TariffSheetError("", "is no signed tariff; `tally tariff sign SHEET -o FILE` makes one of a sheet")
    try:
        top = parse(text).object("format", "domain", "node_key", "tariff", "sheet")
        signed = SignedSheet(
            top["domain"].domain(),
            Address(top["node_key"].hexadecimal(20)),
            *top["tariff"].signed(Tariff),
        )
        verify(signed.domain, signed.tariff, signed.signature, signed.node_key)
    except MalformedBundle as exc:
        raise TariffSheetError(exc.at, exc.problem) from exc
    except TallyError as exc:
        raise TariffSheetError("tariff", str(exc)) from exc
    if top["sheet"].value != sheet_json(checked(signed.tariff)):
        raise TariffSheetError("sheet", "says something else than the signed tariff beside it")
    return signed


def is_signed(text: str) -> bool:
    """Whether a text is meant as a signed tariff."""
    try:
        tree = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.get("format") == SIGNED_FORMAT


def read_file(path: Path) -> str:
    """Raises: TariffSheetError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SHEET_BYTES + 1)
        if len(raw) > MAX_SHEET_BYTES:
            raise TariffSheetError("", f"in {path} is above {MAX_SHEET_BYTES} bytes and was not read")
        return raw.decode("utf-8")
    except OSError as exc:
        raise TariffSheetError("", f"in {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise TariffSheetError("", f"in {path} is not UTF-8") from exc


def served_tariff(path: Path, wallet: Address, profile_id: Digest) -> Tariff:
    """What a provider serves under by a file: a sheet with sequence 0, or a signed tariff as it is.

    Raises: TariffSheetError, also when the file names another provider or profile than the one that serves.
    """
    text = read_file(path)
    tariff = read_signed(text).tariff if is_signed(text) else replace(read_sheet(text), sequence=0)
    for key, ours in (("provider", wallet), ("profile_id", profile_id)):
        named = getattr(tariff, key)
        if named not in (ours, UNFILLED[key]):
            raise TariffSheetError(key, f"is 0x{named.hex()}, and this node serves as 0x{ours.hex()}")
    return replace(tariff, provider=wallet, profile_id=profile_id)


def wanted_tariff(config: NodeConfig, wallet: Address, profile_id: Digest) -> Tariff:
    """The price sheet the configuration describes, or its `tariff_file` holds. Raises: TariffSheetError.

    Sequence and dates are filled in when it is logged; a signed tariff has its own.
    """
    prices = config.provider
    if prices.tariff_file is not None:
        return served_tariff(prices.tariff_file, wallet, profile_id)
    return Tariff(
        provider=wallet,
        sequence=0,
        profile_id=profile_id,
        prompt_price=prices.prompt_price,
        cached_price=prices.cached_price,
        completion_price=prices.completion_price,
        reasoning_price=prices.reasoning_price,
        per_request=prices.per_request,
        flex_bps=prices.flex_factor,
        standard_bps=prices.standard_factor,
        priority_bps=prices.priority_factor,
        flex_ttft_ms=prices.flex_ttft_ms,
        standard_ttft_ms=prices.standard_ttft_ms,
        priority_ttft_ms=prices.priority_ttft_ms,
        flex_tpot_ms=prices.flex_tpot_ms,
        standard_tpot_ms=prices.standard_tpot_ms,
        priority_tpot_ms=prices.priority_tpot_ms,
        flex_refund_bps=prices.refund_share,
        standard_refund_bps=prices.refund_share,
        priority_refund_bps=prices.refund_share,
        long_context_threshold=prices.long_context_threshold,
        long_context_bps=prices.long_context_factor,
        privacy_bps=prices.privacy_factor,
        reserved_discount_bps=prices.reserved_discount,
        embedding_price=prices.embedding_price,
        cache_ttl_s=prices.cache_ttl,
        base_min_bps=prices.base_min_factor,
        base_max_bps=prices.base_max_factor,
        valid_from=0,
        valid_until=0,
    )
