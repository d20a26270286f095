"""Following slots through reorganisations, on a chain that the test writes block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import pytest

from incentives.ledger import ChannelKey, SlotSeen
from node.chain.reader import BlockRef
from node.chain.watcher import TRAIL_BLOCKS, SlotWatcher
from node.ports import ChainUnavailable
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei
from tests.twins.wall_clock import WallClock

PROVIDER = Address(b"\x11" * 20)


def key(number: int) -> ChannelKey:
    return ChannelKey(PROVIDER, Address(bytes([number]) * 20))


class ScriptedChain:
    """Blocks as (fork, deposits set in it); `swap` runs once, after so many reads, to change the chain mid-look."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, dict[ChannelKey, int]]] = [(0, {})]
        self.reads = 0
        self.swap_at = -1
        self.swap: Callable[[], None] = lambda: None
        self.lag = 0

    def add(self, fork: int = 0, **deposits: int) -> None:
        self.blocks.append((fork, {key(int(name[1:])): amount for name, amount in deposits.items()}))

    def ref(self, number: int) -> BlockRef:
        def hash_of(height: int) -> Digest:
            forks = ",".join(str(fork) for fork, _ in self.blocks[: height + 1])
            return Digest(f"{height}:{hash(forks) & 0xFFFFFFFF:x}".encode().ljust(32, b"."))

        return BlockRef(number, hash_of(number), hash_of(number - 1) if number else Digest(b"\0" * 32), number)

    def _tick(self) -> None:
        self.reads += 1
        if self.reads == self.swap_at:
            self.swap()

    async def confirmed(self) -> BlockRef:
        self._tick()
        return self.ref(len(self.blocks) - 1 - self.lag)

    async def block(self, which: int | str | Digest) -> BlockRef:
        self._tick()
        for number in range(len(self.blocks)):
            if which in (number, self.ref(number).hash):
                return self.ref(number)
        raise ChainUnavailable("unknown block")

    async def changes(self, provider: Address, first: int, last: int) -> dict[int, set[ChannelKey]]:
        assert provider == PROVIDER
        self._tick()
        return {n: set(d) for n, (_, d) in enumerate(self.blocks) if first <= n <= last and d}

    async def slots(self, keys: Iterable[ChannelKey], block: int) -> dict[ChannelKey, SlotSeen | None]:
        self._tick()
        state: dict[ChannelKey, int] = {}
        for _, deposits in self.blocks[: block + 1]:
            state |= deposits
        owner = Address(b"\x22" * 20)
        return {k: SlotSeen(k, owner, Wei(state[k]), Wei(0), 0, block) if k in state else None for k in keys}


class Bench:
    """A watcher over a scripted chain, and what it reported: key number -> deposit, None when gone."""

    def __init__(self, from_block: int = 0) -> None:
        self.chain, self.believed, self.calls, self.fail = ScriptedChain(), dict[int, int | None](), 0, False
        self.watcher = SlotWatcher(self.chain, PROVIDER, self._report, WallClock(), from_block=from_block, poll_s=0.01)

    async def _report(self, seen: SlotSeen) -> None:
        if self.fail:
            raise RuntimeError("the journal is full")
        self.calls += 1
        self.believed[seen.key.client[0]] = None if seen.owner == ZERO_ADDRESS else seen.deposit

    async def look(self) -> dict[int, int | None]:
        await self.watcher.step()
        return self.believed


async def test_only_what_changed_is_reported_and_only_once() -> None:
    bench = Bench()
    bench.chain.add(k1=5, k2=6)
    assert await bench.look() == {1: 5, 2: 6}
    await bench.look()
    bench.chain.add(k1=5)  # an event that left the slot as it was
    bench.chain.add(k2=7)
    assert await bench.look() == {1: 5, 2: 7}
    assert bench.calls == 3


async def test_a_longer_fork_takes_back_what_only_the_old_one_had() -> None:
    bench = Bench()
    bench.chain.add(k1=5)
    for _ in range(4):
        bench.chain.add()
        await bench.look()
    bench.chain.add(k1=9, k2=3)
    assert await bench.look() == {1: 9, 2: 3}
    del bench.chain.blocks[4:]
    for _ in range(5):
        bench.chain.add(fork=1)
    bench.chain.add(fork=1, k3=1)
    assert await bench.look() == {1: 5, 2: None, 3: 1}


async def test_a_shorter_fork_is_followed_too() -> None:
    bench = Bench()
    for n in range(6):
        bench.chain.add(**{f"k{n + 1}": 1})
    await bench.look()
    del bench.chain.blocks[3:]
    bench.chain.add(fork=1)
    assert await bench.look() == {1: 1, 2: 1, 3: None, 4: None, 5: None, 6: None}


async def test_a_node_that_lags_takes_nothing_back() -> None:
    bench = Bench()
    for n in range(6):
        bench.chain.add(**{f"k{n + 1}": 1})
    believed = dict(await bench.look())
    bench.chain.lag = 3
    assert await bench.look() == believed
    bench.chain.lag = 0
    bench.chain.add(k1=2)
    assert (await bench.look())[1] == 2


async def test_a_fork_deeper_than_the_trail_makes_it_read_everything_again() -> None:
    bench = Bench()
    bench.chain.add(k1=5)
    bench.chain.add(k2=6)
    await bench.look()
    for _ in range(TRAIL_BLOCKS + 10):
        bench.chain.add()
    await bench.look()
    del bench.chain.blocks[2:]
    for _ in range(TRAIL_BLOCKS + 20):
        bench.chain.add(fork=1)
    bench.chain.add(fork=1, k3=7)
    assert await bench.look() == {1: 5, 2: None, 3: 7}


@pytest.mark.parametrize("moment", range(2, 12))
async def test_a_fork_at_any_moment_of_a_look_is_seen_through(moment: int) -> None:
    bench = Bench()
    bench.chain.add(k1=5)
    await bench.look()
    bench.chain.add(k1=6)
    bench.chain.add(k2=7)

    def swap() -> None:
        del bench.chain.blocks[2:]
        bench.chain.add(fork=1, k3=8)
        bench.chain.add(fork=1)
        bench.chain.add(fork=1)

    bench.chain.swap, bench.chain.swap_at = swap, bench.chain.reads + moment
    for _ in range(4):
        with contextlib.suppress(ChainUnavailable):  # asked for a block that is gone; `run` looks again
            await bench.look()
    if bench.chain.reads < bench.chain.swap_at:
        swap()
        await bench.look()
    assert {k: v for k, v in bench.believed.items() if v is not None} == {1: 5, 3: 8}


async def test_what_could_not_be_reported_is_reported_later() -> None:
    bench = Bench()
    bench.chain.add(k1=5, k2=6)
    bench.fail = True
    with pytest.raises(RuntimeError):
        await bench.look()
    bench.fail = False
    assert await bench.look() == {1: 5, 2: 6}


async def test_what_was_known_before_from_block_is_not_reported_again() -> None:
    bench = Bench(from_block=3)
    bench.chain.add(k1=5)
    bench.chain.add()
    bench.chain.add(k2=6)
    assert await bench.look() == {2: 6}
