"""A receipt drawn as what it is: a tally stick, notched for the increments, split between the two who signed it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from node.cli import money
from protocol.bundle import Bundle, Notch
from protocol.tariff import MULTIPLIER_ONE
from protocol.units import FinishReason, Tier

WIDTH: Final = 78
MAX_NOTCHES: Final = 48


def draw(bundle: Bundle, notch: Notch, model: str, role: str) -> str:
    """Several lines, WIDTH wide. `role`: which half is this home's."""
    receipt = notch.receipt
    count = len(bundle.notches)
    more = "" if count <= MAX_NOTCHES else f" +{count - MAX_NOTCHES}"
    cuts = " ".join("┃" if item is notch else "│" for item in bundle.notches[:MAX_NOTCHES]) + more
    ours = {"provider": (" (ours)", ""), "client": ("", " (ours)")}[role]
    halves = [
        f"╭{'─' * WIDTH}╮",
        _row(f"PROVIDER{ours[0]}  wallet 0x{receipt.provider.hex()}"),
        _row(f"  node key 0x{bundle.node_key.hex()}"),
        _row(f"  receipt  {_seal(notch.receipt_signature, role == 'provider')}"),
        _row(cuts),
        f"├{'╌' * WIDTH}┤  split: receipt {receipt.step} of {count}",
        _row(cuts),
        _row(f"CLIENT{ours[1]}  session key 0x{receipt.client.hex()}"),
        _row(f"  voucher  {_voucher(notch, role)}"),
        _row(f"  ack      {_ack(notch, role)}"),
        f"╰{'─' * WIDTH}╯",
    ]
    return "\n".join([f"receipt  0x{notch.digest.hex()}", *halves, *_lines(bundle, notch, model)])


def _row(text: str) -> str:
    return f"│ {text[: WIDTH - 2]:<{WIDTH - 2}} │"


def _seal(signature: bytes, ours: bool) -> str:
    if signature:
        return f"signed 0x{signature.hex()[:16]}…"
    return "signed by this home, as `receipts export` shows" if ours else "not signed"


def _voucher(notch: Notch, role: str) -> str:
    if notch.voucher is None:
        return "none: this increment was not paid"
    return f"{money.amount(notch.voucher.cumulative)} in all, {_seal(notch.voucher_signature, role == 'client')}"


def _ack(notch: Notch, role: str) -> str:
    if not notch.receipt.is_final:
        return "an interim receipt is acknowledged by its voucher"
    return _seal(notch.ack_signature, role == "client")


def _lines(bundle: Bundle, notch: Notch, model: str) -> list[str]:
    receipt, request = notch.receipt, bundle.request
    at = datetime.fromtimestamp(receipt.received_at / 1000, UTC)
    fresh, plain = receipt.prompt_tokens - receipt.cached_tokens, receipt.completion_tokens - receipt.reasoning_tokens
    lines = [
        f"job      0x{receipt.job_id.hex()}",
        f"model    {model or '?'}, tier {Tier(request.tier).name.lower()}, {at:%Y-%m-%d %H:%M:%S}Z, "
        f"{FinishReason(receipt.finish_reason).name.lower()}",
        _priced("prompt", fresh, receipt.prompt_line),
        _priced("cached", receipt.cached_tokens, receipt.cached_line),
        _priced("output", plain, receipt.completion_line),
    ]
    if receipt.reasoning_tokens:
        lines.append(_priced("thought", receipt.reasoning_tokens, receipt.reasoning_line))
    if receipt.multiplier != MULTIPLIER_ONE:
        # Exact: four basis-point factors have at most 16 decimals.
        whole, rest = divmod(receipt.multiplier, MULTIPLIER_ONE)
        lines.append(f"factor   x {whole}{('.' + f'{rest:016d}').rstrip('0') if rest else ''}")
    if receipt.per_request:
        lines.append(f"request  {money.amount(receipt.per_request)}")
    if receipt.refund:
        lines.append(f"refund   {money.amount(receipt.refund)} (a promise of the tier was missed)")
    return [*lines, f"total    {money.amount(receipt.total)}"]


def _priced(name: str, tokens: int, wei: int) -> str:
    return f"{name:8} {tokens:>9,} tokens  {money.amount(wei)}"
