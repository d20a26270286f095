"""The validator role whole: stakes, enlists, follows the Court and works on every case that is not over.

What it must not forget is in the journal: its verdicts, and the block from which open cases are found again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from node.background import Background, log_bug
from node.ports import (
    CaseState,
    Chain,
    ChainError,
    ChainUnavailable,
    Clock,
    Court,
    CourtEvent,
    Directory,
    Entropy,
    Store,
    StoreError,
    Transport,
)
from node.validator.audit import Auditor
from node.validator.cases import Cases, EncodeProof
from node.validator.shelf import Shelf
from protocol.errors import TallyError
from protocol.signing import Signer
from protocol.units import Address, Digest, Wei

log = logging.getLogger("tally.validator")

RETRY_S: Final = 2.0
"""Pause before a chain that did not answer at the start is tried again. Unit: s."""

CURSOR: Final = "validator.block"
"""Setting in the journal: a block below every one that an open case's commitment is in."""

CURSOR_BLOCKS: Final = 64
"""How far that block lies behind, and by how much it moves on. Unit: blocks. As deep as a reorganisation is taken to
go; cases that are over are known by their own events, so reading them again costs nothing but the reading."""

_OVER: Final = (CaseState.CLOSED, CaseState.UNDECIDED)


class TooLittleStake(TallyError):
    """The configured stake is below what the Court asks of validators."""


@dataclass(frozen=True, slots=True)
class ValidatorSettings:
    """What the operator chose. `stake`: wei to hold staked. `poll_s`: between looks at the Court."""

    stake: Wei
    poll_s: float
    max_audits: int = 4
    auto_draw: bool = True


class Validator:
    """One validator wallet's node. `start` returns when it is enlisted and follows the Court."""

    def __init__(
        self,
        settings: ValidatorSettings,
        wallet: Address,
        node_key: Signer,
        shelf: Shelf,
        store: Store,
        chain: Chain,
        court: Court,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
        encode_proof: EncodeProof,
    ) -> None:
        self._settings, self._wallet, self._node_key, self._shelf = settings, wallet, node_key, shelf
        self._store, self._chain, self._court, self._clock = store, chain, court, clock
        self._auditor = Auditor(wallet, shelf, store, chain, court, transport, directory, clock, entropy)
        self._woken = asyncio.Event()
        self.cases = Cases(
            wallet,
            self._auditor,
            shelf,
            store,
            chain,
            court,
            clock,
            entropy,
            encode_proof,
            settings.max_audits,
            settings.auto_draw,
            self._woken.set,
        )
        self.background = Background(clock)
        self._next = self._cursor = 0
        self._open: dict[Digest, int] = {}  # commitment -> block it was posted in
        self._working: dict[Digest, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register, stake, enlist, and go on where the journal says. The transport must be running.

        Raises: TooLittleStake, ChainError, StoreError. An RPC that does not answer is waited for.
        """
        while True:
            try:
                await self._join()
                break
            except ChainUnavailable as exc:
                log.warning("the chain does not answer, trying again every %g s: %s", RETRY_S, exc)
                await self._clock.sleep(RETRY_S)
        stored = await self._store.get_value(CURSOR)
        self._next = self._cursor = int.from_bytes(stored, "big") if stored else 0
        kept = "verdicts are in the journal, and their windows go on"
        self._task = self.background.start("following the Court", self._follow, kept)

    async def _join(self) -> None:
        rules = await self._court.rules()
        if self._settings.stake < rules.validator_stake:
            raise TooLittleStake(
                f"validators must hold {rules.validator_stake} wei of TALLY staked, and validator.stake is "
                f"{self._settings.stake}; nothing was sent. Raise validator.stake"
            )
        await self._chain.register_provider(self._node_key.secret, self._settings.stake)
        if self._wallet not in await self._court.validators():
            await self._court.enlist()
            log.info("enlisted as a validator: committees are drawn with 0x%s from now on", self._wallet.hex())

    async def stop(self) -> None:
        """Stop looking; whatever was begun goes on at the next start. Idempotent."""
        task, self._task = self._task, None
        tasks = [*([task] if task else []), *self._working.values()]
        for item in tasks:
            item.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.cases.stop()
        await self._shelf.stop()

    async def _follow(self) -> None:
        """Look at the Court for ever. Raises: ChainError, StoreError, and may then be called again."""
        while True:
            self._woken.clear()
            await self.look()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next look is due, or a case can go on at once."""
        waits = [
            asyncio.ensure_future(self._clock.sleep(self._settings.poll_s)),
            asyncio.ensure_future(self._woken.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def look(self) -> None:
        """One look: new commitments, and a step in every open case. Raises: ChainError, StoreError."""
        self._auditor.notice()
        events, following = await self._court.events(self._next)
        for event in events:
            self._see(event)
        for key in list(self._open):
            if key not in self._working:
                task = asyncio.create_task(self._work(key), name=f"case 0x{key.hex()[:8]}")
                self._working[key] = task
                task.add_done_callback(lambda ended, key=key: self._worked(key, ended))  # type: ignore[misc]
        self._next = following
        await self._keep_cursor()

    def _see(self, event: CourtEvent) -> None:
        if event.name == "Committed":
            self._open.setdefault(event.case_id, event.block)
        over = event.name == "Concluded" and event.values.get("state") in _OVER
        if over or event.name in ("Executed", "Answered"):
            self._open.pop(event.case_id, None)

    async def _work(self, key: Digest) -> None:
        try:
            if await self.cases.advance(key):
                self._open.pop(key, None)
        except (ChainError, StoreError) as exc:
            log.warning("case 0x%s waits: %s", key.hex()[:8], exc)

    def _worked(self, key: Digest, task: asyncio.Task[None]) -> None:
        log_bug(task)
        self._working.pop(key, None)

    async def _keep_cursor(self) -> None:
        """The first block that a restart must read again. Raises: StoreError."""
        block = max(0, min([self._next, *self._open.values()]) - CURSOR_BLOCKS)
        if block >= self._cursor + CURSOR_BLOCKS:
            await self._store.put_value(CURSOR, block.to_bytes(8, "big"))
            self._cursor = block

    async def status(self) -> dict[str, object]:
        """Plain JSON values for `tally status`; amounts as decimal strings of wei."""
        totals = self.cases.totals
        return {
            "role": "validator",
            "wallet": "0x" + self._wallet.hex(),
            "models": self._shelf.names(),
            "cases_open": len(self._open),
            "audits_running": self.cases.looking,
            "audits": totals.audits,
            "jobs_audited": totals.jobs,
            "tokens_audited": totals.tokens,
            "tokens_flagged": totals.flags,
            "found_guilty": totals.guilty,
            "faults_proved": totals.proofs,
            "replay_s": round(self._shelf.replay_s, 3),
            "background": self.background.status(),
            **await self._standing(),
        }

    async def _standing(self) -> dict[str, object]:
        """What the chain says of this validator, or that it does not answer."""
        try:
            async with asyncio.timeout(3):
                credited, missed = await self._court.credits(self._wallet)
                stake = await self._chain.stake_of(self._wallet)
                enlisted = self._wallet in await self._court.validators()
        except (TallyError, TimeoutError) as exc:
            return {"standing": f"unknown: {exc or 'no answer in 3 s'}"}
        return {
            "enlisted": enlisted,
            "stake_wei": str(stake.active),
            "credited_tokens": credited,
            "reveals_missed": missed,
        }
