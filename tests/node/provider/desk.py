"""One provider's papers at a Court: its journal, its keys, and a chain whose time a test moves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from incentives.ledger import JobClosed, JobOpened, OutputKept, PromptKept, ReceiptIssued, Role, VoucherReceived
from node.ports import ModelCard
from node.provider.decoys import Decoys, Terms
from node.provider.epochs import Epochs
from protocol.eip712 import digest, hash_struct
from protocol.messages import Profile, Tariff, Voucher
from protocol.packing import pack
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Digest, FinishReason, JobId, Verifiability, Wei
from tests.protocol.dossiers import Case, served
from tests.protocol.sheets import SHEET
from tests.twins.engine_twin import EOS, EngineTwin
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_court import RULES, CourtWorld, MemoryCourt
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.memory_store import MemoryStore

EPOCH_S = RULES.epoch_seconds
START_S = 1_800_000_000


class ChainClock:
    """Wall time is the newest block's; sleeping mines."""

    def __init__(self, world: MemoryLedgerChain) -> None:
        self._world = world

    def now_ms(self) -> int:
        return self._world.head.state.timestamp * 1000

    def monotonic(self) -> float:
        return float(self._world.head.state.timestamp)

    async def sleep(self, seconds: float) -> None:
        self._world.mine(1, max(1, int(seconds)))


class CountingEntropy:
    """Another token every time, the same ones in every run."""

    def __init__(self) -> None:
        self._count = 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_128(b"entropy %d" % self._count).digest(size)


@dataclass
class Desk:
    """`await Desk.made()`; `epochs` is made anew by `restart`."""

    world: MemoryLedgerChain = field(default_factory=lambda: MemoryLedgerChain(epoch_seconds=0, timestamp=START_S))
    store: MemoryStore = field(default_factory=MemoryStore)
    engine: EngineTwin = field(default_factory=EngineTwin)
    wallet: Signer = field(default_factory=lambda: Signer.from_secret(b"\x61" * 32))
    node_key: Signer = field(default_factory=lambda: Signer.from_secret(b"\x31" * 32))
    forced_bps: int = 0
    running: dict[JobId, int] = field(default_factory=dict)

    @classmethod
    async def made(cls, **given: Any) -> Desk:
        desk = cls(**given)
        await desk.store.open()
        desk.world.fund(desk.wallet.address, 1000 * WEI_PER_TALLY, 10**18)
        await desk.chain.register_provider(desk.node_key.secret, Wei(100 * WEI_PER_TALLY))
        desk.restart()
        return desk

    def __post_init__(self) -> None:
        self.rules = replace(RULES, forced_bps=self.forced_bps)
        self.clock = ChainClock(self.world)
        self.entropy = CountingEntropy()
        self.chain = MemoryChain(self.world, self.wallet)
        self.court = MemoryCourt(CourtWorld(self.world, self.rules), self.chain)
        self.tariff = replace(
            SHEET,
            provider=self.wallet.address,
            profile_id=self.profile_id,
            valid_from=0,
            valid_until=1 << 40,
        )

    @property
    def profile(self) -> Profile:
        return self.engine.profile

    @property
    def profile_id(self) -> Digest:
        return Digest(hash_struct(self.profile))

    def restart(self, verifiability: Verifiability = Verifiability.REPLAY, *, court: bool = True) -> None:
        """The same journal and chain under a new process."""
        profile = self.profile
        card = ModelCard("twin", self.profile_id, profile, b"", "", {}, (EOS,), 4096)
        judged = self.court if court else None
        self.decoys = Decoys(
            self.wallet.address,
            self.node_key,
            self.engine,
            judged,
            self.store,
            self.chain,
            self.clock,
            self.entropy,
            card,
            self._terms,
            self.running.__setitem__,
            lambda job_id: self.running.pop(job_id, None),
        )
        self.epochs = Epochs(
            self.wallet.address,
            profile,
            verifiability,
            self.node_key,
            judged,
            self.store,
            self.clock,
            self.entropy,
            self.decoys,
            self.running.values,
        )

    def _terms(self) -> Terms | None:
        return Terms(self.tariff, Digest(digest(self.world.domain, self.tariff)), 10_000)

    async def keep_tariff(self, tariff: Tariff | None = None) -> None:
        """As the offering does when it takes a tariff up."""
        kept = tariff or self.tariff
        key = f"tariff/{digest(self.world.domain, kept).hex()}"
        await self.store.put_value(key, pack(kept) + self.node_key.sign(self.world.domain, kept))

    async def serve(
        self,
        number: int,
        *,
        tokens: int = 40,
        paid: bool = True,
        received_ms: int | None = None,
        profile: Profile | None = None,
        **request: Any,
    ) -> Case:
        """A job received now, closed in the journal, with its content unless it is private."""
        case = served(
            tokens,
            profile=profile or self.profile,
            provider=self.wallet.address,
            node_key=self.node_key,
            domain=self.world.domain,
            start=self.clock.now_ms() if received_ms is None else received_ms,
            nonce=number,
            **request,
        )
        shown = case.dossier
        job_id = case.entry.job_id
        signatures = shown.request_signature, shown.accept_signature
        opened = JobOpened(
            Role.PROVIDER,
            job_id,
            shown.request,
            signatures[0],
            shown.accept,
            signatures[1],
            "twin",
            shown.options,
        )
        issued = [ReceiptIssued(Digest(digest(self.world.domain, receipt)), receipt) for receipt in case.receipts]
        await self.store.write(opened, *issued)
        if not shown.request.is_private:
            kept = [
                OutputKept(Role.PROVIDER, job_id, step, (leaf,)) for step, leaf in enumerate(shown.content, start=1)
            ]
            await self.store.write(PromptKept(Role.PROVIDER, job_id, shown.salt, shown.prompt), *kept)
        if paid:
            last = case.receipts[-1]
            voucher = Voucher(self.wallet.address, last.total)
            await self.store.write(VoucherReceived(shown.request.client, job_id, last.step, voucher, b"v" * 65))
        await self.store.write(JobClosed(Role.PROVIDER, job_id, FinishReason.STOP, Wei(0), ""))
        await self.keep_tariff(shown.tariff)
        return case

    def pass_epoch(self, count: int = 1) -> None:
        """To the middle of a later epoch."""
        now = self.world.head.state.timestamp
        self.world.mine(1, count * EPOCH_S - now % EPOCH_S + EPOCH_S // 2)

    def epoch(self) -> int:
        return self.world.head.state.timestamp // EPOCH_S
