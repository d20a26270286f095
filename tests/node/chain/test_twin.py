"""The twin's accounting is the contracts' accounting: the same random life on both, and conservation at each step."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from incentives.ledger import ChannelKey
from node.chain.errors import ContractReverted, NotEnoughTally
from node.ports import ChainUnavailable
from protocol.signing import Signer
from protocol.units import Wei
from tests.node.chain.helpers import balanced, session, voucher
from tests.twins.chain_lab import LAB_OPTIONS, AnvilLab, ChainLab, MemoryLab, Node
from tests.twins.memory_chain import MemoryChain

STEPS = 50
KEYS = [session(i) for i in range(3)]


class Life:
    """Two users, two providers, three session keys each, and a die."""

    def __init__(self, lab: ChainLab, seed: int) -> None:
        self.lab, self.dice = lab, random.Random(seed)
        self.users: list[Node] = []
        self.earners: list[tuple[Signer, Node]] = []

    async def begin(self) -> Life:
        for _ in range(2):
            self.users.append(await self.lab.node(await self.lab.account(tally=5_000)))
            wallet = await self.lab.account()
            self.earners.append((wallet, await self.lab.node(wallet)))
        return self

    async def steps(self, count: int) -> AsyncIterator[object]:
        """What each step said: an amount, or the name of the refusal. The same dice give the same steps."""
        for _ in range(count):
            try:
                yield await self._step()
            except ContractReverted as refused:
                yield refused.name
            except NotEnoughTally as short:
                yield short.has

    async def _step(self) -> object:
        dice = self.dice
        key, user, (wallet, node) = dice.choice(KEYS), dice.choice(self.users), dice.choice(self.earners)
        channel = ChannelKey(wallet.address, key.address)
        match dice.choice(["open", "open", "settle", "settle", "settle", "settle", "ask", "exit", "collect", "wait"]):
            case "open":
                await user.open_channel(wallet.address, key.secret, Wei(dice.randrange(1, 900)))
            case "settle":
                items = [
                    voucher(self.lab.domain, dice.choice(KEYS), wallet.address, dice.randrange(2_000))
                    for _ in range(dice.randrange(1, 5))
                ]
                settled = await node.send_settlement(await node.prepare_settlement(wallet.address, items))
                return settled.paid, settled.fee, settled.claimed
            case "ask":
                await user.request_exit(channel)
            case "exit":
                await user.exit(channel)
            case "collect":
                await node.collect(wallet.address)
            case "wait":
                await self.lab.advance(LAB_OPTIONS.exit_delay // 2)
        return None

    async def books(self) -> object:
        """Everything that is owed and held, times and blocks left out; checked for conservation."""
        reader, providers = self.users[0], [wallet.address for wallet, _ in self.earners]
        channels = [ChannelKey(provider, key.address) for provider in providers for key in KEYS]
        await balanced(self.lab, reader, channels, providers)
        slots = [await reader.slot(channel) for channel in channels]
        earned = [await reader.earned(provider) for provider in providers]
        held = [await reader.token_balance(provider) for provider in providers]
        return [s and (s.owner, s.deposit, s.claimed, s.exit_at > 0) for s in slots], earned, held


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_twin_and_the_contracts_lead_the_same_life(seed: int, anvil_lab: AnvilLab) -> None:
    twin, real = await Life(MemoryLab(), seed).begin(), await Life(anvil_lab, seed).begin()
    said: list[object] = []
    real_steps = real.steps(STEPS)
    async for told in twin.steps(STEPS):
        assert await anext(real_steps) == told
        said.append(told)
        if len(said) % 10 == 0:
            assert await twin.books() == await real.books()
    assert await twin.books() == await real.books()
    assert sum(isinstance(told, str) for told in said) < STEPS / 2  # a life of refusals would prove little


@pytest.mark.parametrize("seed", range(20))
async def test_conservation_holds_at_every_step_of_the_twin(seed: int) -> None:
    life = await Life(MemoryLab(), seed).begin()
    async for _ in life.steps(STEPS):
        await life.books()


async def test_one_node_of_the_twin_can_be_down_or_behind_while_others_are_not() -> None:
    lab = MemoryLab()
    node, other = MemoryChain(lab.world), MemoryChain(lab.world)
    lab.world.mine(5)
    node.lag = 2
    assert ((await node.head()).number, (await other.head()).number) == (3, 5)
    node.down = True
    with pytest.raises(ChainUnavailable):
        await node.head()
    assert (await other.head()).number == 5
    node.down, node.lag = False, 0
    assert await node.head() == await other.head()


async def test_what_the_twin_loses_in_a_reorganisation_can_wait_in_the_pool_again() -> None:
    lab = MemoryLab()
    wallet, other = await lab.account(), session(9).address
    node = await lab.node(wallet)
    mined = await node.transfer(other, Wei(7))
    lab.world.reorg(1, repool=True)
    assert await node.token_balance(other) == 0
    await lab.mine()
    assert await node.token_balance(other) == 7
    assert lab.world.find(mined.transaction) is not None
