"""Which prefixes lie in the block pool: heads (protocol/cache.py) to pool blocks. The bytes are moved by the scheduler.

A head names a whole prefix under one payer's salt, so a hit never crosses payers and equal heads mean equal keys and
values. Contract: every block but a first has its parent in the cache, so that what is found is usable from token 0
on; a block that a receipt may promise (pinned, or held for a time) stays, and what finds no room is not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from protocol.units import Digest

HOLD_SLACK_S: Final = 120.0
"""How much longer than promised a prompt stays. Unit: seconds. The promise runs from the time in the final receipt,
which may be signed that long after the last token was made; doubling it holds memory for nothing."""


class _Block:
    """`pins`: open streams that stated it as kept. `until`: clock time before which it stays."""

    __slots__ = ("index", "pins", "until")

    def __init__(self, index: int) -> None:
        self.index = index
        self.pins = 0
        self.until = 0.0


class PrefixCache:
    """`blocks`: size of the pool. `clock`: seconds that never run backwards.

    Heads are those of `block_heads`: element k names the first k blocks, element 0 the salt. Least recently used goes
    first. A prefix counts as used after whatever extends it, so the first in order never has a child in the cache.
    """

    def __init__(self, blocks: int, clock: Callable[[], float]) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._clock = clock
        self._held: OrderedDict[Digest, _Block] = OrderedDict()

    def __len__(self) -> int:
        """Blocks in use."""
        return len(self._held)

    def find(self, heads: Sequence[Digest], most: int) -> list[int]:
        """Pool blocks of the longest prefix held, in order, at most `most`. Counts as use."""
        count = self.count(heads, most)
        self._touch(heads, count)
        return [self._held[head].index for head in heads[1 : count + 1]]

    def count(self, heads: Sequence[Digest], most: int) -> int:
        """How many blocks `find` would give."""
        most = min(most, len(heads) - 1)
        return next((k for k in range(most) if heads[k + 1] not in self._held), most)

    def add(self, heads: Sequence[Digest]) -> list[tuple[int, int]]:
        """Take pool blocks for the part of a prefix that is not held: (which block of the prefix, pool block).

        As many as there is room for, from the front; the caller copies them before anything else is asked here.
        """
        held = self.count(heads, len(heads) - 1)
        self._touch(heads, held)
        missing = heads[held + 1 :]
        own = frozenset(heads[1 : held + 1])
        if len(missing) > len(self._free):
            self._evict(len(missing) - len(self._free), own)
        taken = []
        for at, head in enumerate(missing[: len(self._free)], held):
            block = _Block(self._free.pop())
            self._held[head] = block
            taken.append((at, block.index))
        self._touch(heads, held + len(taken))
        return taken

    def pin(self, heads: Sequence[Digest]) -> bool:
        """Keep a whole prefix until `unpin`; False, and nothing pinned, when it is not all held or has no block."""
        if len(heads) < 2 or self.count(heads, len(heads) - 1) < len(heads) - 1:
            return False
        for head in heads[1:]:
            self._held[head].pins += 1
        return True

    def unpin(self, heads: Sequence[Digest], hold_s: int) -> None:
        """The stream that pinned it has ended; it was promised to stay `hold_s` longer, 0 for no promise."""
        until = self._clock() + (hold_s + HOLD_SLACK_S if hold_s else 0.0)
        for head in heads[1:]:
            block = self._held[head]
            block.pins -= 1
            block.until = max(block.until, until)

    def _touch(self, heads: Sequence[Digest], count: int) -> None:
        for k in range(count, 0, -1):
            self._held.move_to_end(heads[k])

    def _evict(self, wanted: int, own: frozenset[Digest]) -> None:
        """Free up to `wanted` blocks that nobody was promised, least recently used first."""
        now = self._clock()
        gone: list[Digest] = []
        for head, block in self._held.items():
            if len(gone) == wanted:
                break
            if not block.pins and block.until <= now and head not in own:
                gone.append(head)
        for head in gone:
            self._free.append(self._held.pop(head).index)
