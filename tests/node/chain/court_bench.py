"""What tests of the Court port say often: validators with stake, a provider that commits, members that judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eth_hash.auto import keccak

from incentives.audit_draw import case_key, lot_of, pack_gaps
from node.ports import CaseRecord, CaseState, Court
from protocol import merkle
from protocol.eip712 import digest, hash_struct
from protocol.merkle import Entry
from protocol.messages import Commitment, Profile, Verdict
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Address, AuditOutcome, Digest, JobId, Wei
from tests.node.chain.helpers import session
from tests.twins.chain_lab import CourtLab, Node
from tests.twins.engine_twin import profile

PROFILE: Profile = profile(b"judged")
STAKE = Wei(200 * WEI_PER_TALLY)
GAPS = pack_gaps(range(100, 1_700, 100))
OTHER_GAPS = pack_gaps(range(5_100, 6_700, 100))


def entries(count: int, name: bytes = b"") -> tuple[Entry, ...]:
    """A tree's entries in order, a thousand wei each."""
    jobs = [JobId(keccak(b"job %d " % i + name)) for i in range(count)]
    return tuple(merkle.ordered(Entry(job, Digest(keccak(b"receipt" + job)), Wei(1_000)) for job in jobs))


class Player:
    """A staked wallet with its view of chain and Court."""

    def __init__(self, wallet: Signer, key: Signer, node: Node, court: Court) -> None:
        self.wallet, self.key, self.node, self.court = wallet, key, node, court

    @property
    def address(self) -> Address:
        return self.wallet.address

    async def stake(self) -> int:
        return (await self.node.stake_of(self.address)).active


class CourtBench:
    """A provider, validators, a registered profile; `case` is of the provider's epoch."""

    def __init__(self, lab: CourtLab) -> None:
        self.lab = lab
        self.validators: list[Player] = []

    async def open(self, validators: int = 4) -> CourtBench:
        self.provider = await self.player(1)
        for number in range(validators):
            player = await self.player(10 + number)
            await player.court.enlist()
            self.validators.append(player)
        self.rules = await self.provider.court.rules()
        await self.provider.court.register_profile(PROFILE)
        return self

    async def player(self, number: int) -> Player:
        wallet, key = await self.lab.account(), session(number)
        node = await self.lab.node(wallet)
        await node.register_provider(key.secret, STAKE)
        return Player(wallet, key, node, self.lab.court(node))

    @property
    def court(self) -> Court:
        return self.provider.court

    async def timestamp(self) -> int:
        return (await self.provider.node.head()).timestamp

    async def until(self, second: int) -> None:
        """Chain time reaches `second`."""
        await self.lab.advance(max(1, second - await self.timestamp()))

    async def commit(
        self, epoch: int | None = None, jobs: Sequence[Entry] | None = None, secret: bytes = b"s"
    ) -> Digest:
        """Post a commitment of the epoch that just ended; its key."""
        if epoch is None:
            epoch = await self.timestamp() // self.rules.epoch_seconds
        await self.until((epoch + 1) * self.rules.epoch_seconds + 1)
        jobs = entries(3) if jobs is None else jobs
        root = merkle.root(jobs)
        made = Commitment(
            self.provider.address,
            hash_struct(PROFILE),
            epoch,
            root.hash,
            len(jobs),
            root.total,
            lot_of(secret.rjust(32, b"\0")),
        )
        await self.court.post_commitment(made, self.provider.key.sign(self.court.domain, made))
        return case_key(self.provider.address, hash_struct(PROFILE), epoch)

    async def drawn(self, **how: object) -> Digest:
        """A commitment whose case is open."""
        key = await self.commit(**how)  # type: ignore[arg-type]
        await self.lab.mine(2)
        await self.validators[0].court.draw(key)
        return key

    async def case(self, key: Digest) -> CaseRecord:
        found = await self.court.case(key)
        assert found is not None
        return found

    async def members(self, key: Digest) -> list[Player]:
        """The players of the present round, in the order of the draw."""
        seats = [member.validator for member in (await self.case(key)).members]
        by_address = {player.address: player for player in self.validators}
        return [by_address[address] for address in seats]

    async def vote(self, key: Digest, verdicts: Sequence[Verdict]) -> None:
        """Submit and reveal these verdicts, whoever else sits there."""
        by_address = {player.address: player for player in self.validators}
        domain = self.court.domain
        for verdict in verdicts:
            await by_address[Address(verdict.validator)].court.submit(key, digest(domain, verdict))
        case = await self.case(key)
        if case.state is CaseState.SUBMIT:
            await self.until(case.until)
        for verdict in verdicts:
            await by_address[Address(verdict.validator)].court.reveal(verdict)

    async def judge(self, key: Digest, outcome: AuditOutcome, **changes: object) -> CaseRecord:
        """All members find the same, and it is counted."""
        members = await self.members(key)
        round_ = (await self.case(key)).round
        await self.vote(key, [verdict(player, key, outcome, round_, **changes) for player in members])
        await self.validators[0].court.conclude(key)
        return await self.case(key)


def verdict(player: Player, key: Digest, outcome: AuditOutcome, round_: int = 0, **changes: object) -> Verdict:
    """A verdict over 64 tokens whose numbers fit its outcome."""
    bad = {AuditOutcome.IMPROBABLE: (30, 0), AuditOutcome.VOID: (1, 1)}.get(outcome, (0, 0))
    made = Verdict(
        validator=player.address,
        case_id=key,
        round=round_,
        outcome=outcome,
        tokens=64,
        flags=bad[0],
        voids=bad[1],
        worst_tokens=64,
        worst_flags=bad[0],
        worst_voids=bad[1],
        gaps=GAPS,
        results_root=Digest(b"\x05" * 32),
        salt=Digest(keccak(b"salt" + player.address)),
    )
    return replace(made, **changes)  # type: ignore[arg-type]
