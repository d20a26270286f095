"""What providers said they keep of our prompts: a hit that was promised and is priced as a miss is found at once.

A receipt that states less than an earlier one guarantees does not recompute, and the two of them, with the tariff both
name, are the proof (protocol/cache.py).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from protocol.cache import BLOCK_TOKENS, hit_limit
from protocol.errors import ReceiptMismatch
from protocol.messages import Tariff, WorkReceipt
from protocol.units import ZERO_DIGEST, Address, Digest

REMEMBERED: Final = 4096
"""Final receipts remembered, the latest. Each is under 1 KiB; doubling it finds breaches of promises further back."""


class Prefixes:
    """Final receipts by provider and the prompt they say is kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Address, Digest], WorkReceipt] = OrderedDict()

    def remember(self, final: WorkReceipt) -> None:
        """A job ended with this receipt."""
        if not final.is_kept or final.prompt_head == ZERO_DIGEST:
            return
        key = (Address(final.provider), Digest(final.prompt_head))
        self._kept[key] = final
        self._kept.move_to_end(key)
        while len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)

    def check(self, receipt: WorkReceipt, tariff: Tariff, heads: tuple[Digest, ...]) -> None:
        """Raises: ReceiptMismatch when the receipt's hit is below what its provider had promised.

        `heads`: block heads of the receipt's prompt.
        """
        if not (tariff.cache_ttl_s and receipt.completion_tokens):
            return  # nothing was promised, or the prompt was not read to its end
        limit = hit_limit(receipt.prompt_tokens)
        for head in reversed(heads[1:]):
            kept = self._kept.get((Address(receipt.provider), head))
            if kept is None or kept.tariff_hash != receipt.tariff_hash:
                continue
            if 0 <= receipt.received_at - kept.finished_at <= tariff.cache_ttl_s * 1000:
                due = min(kept.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS, limit)
                if receipt.cached_tokens < due:
                    raise ReceiptMismatch("cached_tokens", receipt.cached_tokens, f"at least {due}, as was promised")
                return
