"""What providers said they keep of prompts, as either side remembers it: what a hit is at least, by those promises.

A receipt that states less than an earlier one guarantees does not recompute at the client, and the two of them, with
the tariff both name, are the proof (protocol/cache.py). A provider that lost its cache in a restart charges by what it
had promised before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from protocol.cache import BLOCK_TOKENS, hit_limit
from protocol.errors import ReceiptMismatch
from protocol.messages import JobRequest, Tariff, WorkReceipt
from protocol.units import ZERO_DIGEST, Address, Digest

REMEMBERED: Final = 4096
"""Final receipts remembered, the latest. Each is under 1 KiB; doubling it finds breaches of promises further back."""


class Prefixes:
    """Final receipts by provider, payer and the prompt they say is kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Address, Address, Digest], WorkReceipt] = OrderedDict()

    def remember(self, final: WorkReceipt) -> None:
        """A job ended with this receipt."""
        if not final.is_kept or final.prompt_head == ZERO_DIGEST:
            return
        key = (Address(final.provider), Address(final.client), Digest(final.prompt_head))
        self._kept[key] = final
        self._kept.move_to_end(key)
        while len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)

    def due(
        self,
        job: JobRequest | WorkReceipt,
        tariff: Tariff,
        heads: tuple[Digest, ...],
        received_at: int,
    ) -> int:
        """Tokens of a job's prompt that are promised as cached. `heads`: its block heads. `received_at`: Unix ms."""
        if not tariff.cache_ttl_s:
            return 0
        for head in reversed(heads[1:]):
            kept = self._kept.get((Address(job.provider), Address(job.client), head))
            if kept is None or kept.tariff_hash != job.tariff_hash:
                continue
            if 0 <= received_at - kept.finished_at <= tariff.cache_ttl_s * 1000:
                return min(kept.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS, hit_limit(job.prompt_tokens))
        return 0

    def check(self, receipt: WorkReceipt, tariff: Tariff, heads: tuple[Digest, ...]) -> None:
        """Raises: ReceiptMismatch when the receipt's hit is below what its provider had promised.

        `heads`: block heads of the receipt's prompt. Without a token the prompt was not read to its end.
        """
        due = self.due(receipt, tariff, heads, receipt.received_at) if receipt.completion_tokens else 0
        if receipt.cached_tokens < due:
            raise ReceiptMismatch("cached_tokens", receipt.cached_tokens, f"at least {due}, as was promised")
