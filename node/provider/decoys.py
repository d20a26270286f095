"""Forced errors: now and then a provider must serve wrong on purpose, so that looking away never pays.

The secret and the beacon of its last commitment tell a provider, and nobody else, that the next one has to hold an
error. It then makes a job of its own through the real engine, alters tokens before the receipt is issued, and shows
the secret when it is found guilty of it. Validators who passed that job did not look. The job is bought by a key that
is thrown away; nobody owes anything for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

from incentives.audit_draw import is_forced
from incentives.ledger import CommitmentMade, JobClosed, JobOpened, OutputKept, PromptKept, ReceiptIssued, Role
from node.ports import (
    Chain,
    Clock,
    Court,
    CourtRules,
    Engine,
    EngineFull,
    EngineRequest,
    Entropy,
    ModelCard,
    Sampling,
    Store,
    Urgency,
)
from protocol.eip712 import digest
from protocol.messages import Accept, JobRequest, Tariff
from protocol.metering import opens_reasoning
from protocol.options import JobOptions, encode_options, options_hash
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.tariff import tier_terms
from protocol.transcript import Leaf, Row, prompt_hash
from protocol.units import (
    LEAF_TOKENS,
    MAX_AMOUNT,
    ZERO_DIGEST,
    Address,
    Digest,
    FinishReason,
    JobId,
    JobKind,
    Tier,
    Wei,
)
from protocol.work import Work, nonce_commitment

log = logging.getLogger("tally.provider.decoys")

DECOY_TOKENS: Final = 2 * LEAF_TOKENS
"""Output of a planted error. Unit: tokens. Two leaves look like any short answer, and hold enough altered tokens."""

ALTER_EVERY: Final = 3
"""Every third token is altered: 21 of 64. At the highest flag rate that the Court grants (2 %) so many have a tail far
below 1e-9; the 8 that are the least would not, and every second token would be easier to tell from a real cheat."""

PROMPT_TOKENS: Final = 48
"""Length of its prompt. Unit: tokens, drawn at random: no payer's words are used for it."""

DEADLINE_MS: Final = 600_000


@dataclass(frozen=True, slots=True)
class Terms:
    """What a planted job is agreed under: the newest tariff in force with its hash, and the base multiplier."""

    tariff: Tariff
    tariff_hash: Digest
    base_bps: int


class Decoys:
    """Plants what is due in the running epoch, beside real jobs."""

    def __init__(
        self,
        wallet: Address,
        signer: Signer,
        engine: Engine,
        court: Court | None,
        store: Store,
        chain: Chain,
        clock: Clock,
        entropy: Entropy,
        card: ModelCard,
        terms: Callable[[], Terms | None],
        accept: Callable[[JobId, int], None],
        close: Callable[[JobId], None],
    ) -> None:
        """`terms`: None while no tariff is in force. `accept`, `close`: tell the server that a job accepted at that
        Unix ms is running, and that it is over."""
        self._wallet = wallet
        self._domain = chain.domain
        self._signer = signer
        self._engine = engine
        self._court = court
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._model = card.model
        self._eos = frozenset(card.eos_ids)
        self._terms = terms
        self._accept, self._close = accept, close
        self._settled: Digest | None = None  # the commitment whose obligation is known and met, or known to be none
        self.planted = 0

    async def planted_in(self, epoch: int) -> JobId:
        """The job planted in that epoch, or zero."""
        return JobId(await self._store.get_value(self._slot(epoch)) or ZERO_DIGEST)

    def _slot(self, epoch: int) -> str:
        return f"provider/decoy/{self._domain.separator().hex()}/{self._wallet.hex()}/{epoch}"

    async def plant_if_due(
        self, rules: CourtRules, epoch: int, last_made: Callable[[], Awaitable[CommitmentMade | None]]
    ) -> None:
        """Plant an error in the running epoch when the last commitment obliges, once it has a beacon, and there is a
        real job for it to stand beside. Raises: ChainError, StoreError.

        A beacon that comes only after the next commitment was made obliges nobody: it could not be known in time.
        """
        if not rules.forced_bps or self._court is None:
            return
        last = await last_made()
        if last is None or last.key == self._settled:
            return
        record = await self._court.commitment(last.key)
        if record is None or record.beacon == ZERO_DIGEST:
            return
        if not is_forced(last.secret, record.beacon, rules.forced_bps):
            self._settled = last.key
            return
        if last.commitment.epoch >= epoch or not await self._has_jobs(epoch, rules):
            return
        if not any(await self.planted_in(epoch)):
            await self._plant(epoch, rules)
        self._settled = last.key

    async def _has_jobs(self, epoch: int, rules: CourtRules) -> bool:
        newest = await self._store.jobs(Role.PROVIDER, limit=16)
        return any(row.opened_at_ms // 1000 // rules.epoch_seconds == epoch for row in newest)

    async def _plant(self, epoch: int, rules: CourtRules) -> None:
        terms = self._terms()
        if terms is None:
            return
        try:
            await _Planting(self, terms, epoch, rules.epoch_seconds).run()
        except (EngineFull, ValueError) as exc:
            log.warning("an error was due in epoch %d and could not be planted: %s", epoch, exc)
        else:
            self.planted += 1
            log.info("planted the error that was due in epoch %d; validators have to find it", epoch)


class _Planting:
    """One planted job, from its request to its last receipt."""

    def __init__(self, decoys: Decoys, terms: Terms, epoch: int, epoch_s: int) -> None:
        self._of = decoys
        self._terms = terms
        self._epoch, self._epoch_s = epoch, epoch_s
        self._began = decoys._clock.monotonic()

    async def run(self) -> None:
        """Raises: EngineFull, ValueError, StoreError."""
        of = self._of
        buyer = Signer.from_secret(of._entropy.token(32))
        word = of._entropy.token(4 * PROMPT_TOKENS)
        vocab = of._engine.vocab_size
        prompt = tuple(int.from_bytes(word[at : at + 4], "big") % vocab for at in range(0, len(word), 4))
        profile = of._engine.profile
        options = JobOptions(min_tokens=DECOY_TOKENS, reasoning_open=opens_reasoning(profile, prompt))
        encoded = encode_options(options)
        salt, nonce = of._entropy.token(32), of._entropy.token(32)
        request = self._request(buyer, prompt_hash(salt, prompt), options_hash(encoded), nonce)
        job_id = JobId(digest(of._domain, request))
        seed = derive_seed(job_id, request.client_nonce, nonce)
        accept = Accept(Digest(job_id), Digest(nonce), seed, of._clock.now_ms())
        if accept.accepted_at // 1000 // self._epoch_s != self._epoch:
            raise ValueError("the epoch ended at this moment, and the error is due in no later one")
        if not self._terms.tariff.valid_from <= accept.accepted_at // 1000 < self._terms.tariff.valid_until:
            raise ValueError("the price sheet in force ended at this moment")
        opened = JobOpened(
            Role.PROVIDER,
            job_id,
            request,
            buyer.sign(of._domain, request),
            accept,
            of._signer.sign(of._domain, accept),
            of._model,
            encoded,
        )
        work = Work.start(job_id, request, options, self._terms.tariff, profile, accept, ())
        self._began = of._clock.monotonic()
        of._accept(job_id, accept.accepted_at)
        try:
            await of._store.put_value(of._slot(self._epoch), job_id)
            await of._store.write(opened, PromptKept(Role.PROVIDER, job_id, salt, prompt))
            engine_request = EngineRequest(prompt, seed, DECOY_TOKENS, Sampling(), options, Urgency.STANDARD)
            await self._deliver(work, engine_request)
        finally:
            of._close(job_id)

    def _request(self, buyer: Signer, prompt: Digest, options: Digest, nonce: bytes) -> JobRequest:
        of = self._of
        tariff = self._terms.tariff
        tier = next(tier for tier in (Tier.STANDARD, Tier.FLEX, Tier.PRIORITY) if tier_terms(tariff, tier)[0])
        return JobRequest(
            provider=of._wallet,
            client=buyer.address,
            profile_id=tariff.profile_id,
            kind=JobKind.GENERATE,
            prompt_hash=prompt,
            prompt_tokens=PROMPT_TOKENS,
            max_tokens=DECOY_TOKENS,
            temperature_micro=1_000_000,
            top_p_micro=1_000_000,
            top_k=0,
            options_hash=options,
            tier=tier,
            is_private=False,
            tariff_hash=self._terms.tariff_hash,
            base_bps=self._terms.base_bps,
            reservation=ZERO_DIGEST,
            price_ceiling=MAX_AMOUNT,
            client_nonce=Digest(of._entropy.token(32)),
            provider_commitment=nonce_commitment(nonce),
            client_box_key=Digest(of._entropy.token(32)),
            deadline=of._clock.now_ms() + DEADLINE_MS,
            parent_job=ZERO_DIGEST,
            parent_seed=ZERO_DIGEST,
        )

    async def _deliver(self, work: Work, request: EngineRequest) -> None:
        """Tokens into receipts, every third one altered. Nothing is sent: there is nobody to send it to."""
        of, index = self._of, 0
        detail = "an error planted on purpose, because the last commitment obliged to it"
        try:
            async with aclosing(await of._engine.submit(request)) as tokens:
                async for token in tokens:
                    token_id = self._altered(token.token_id) if index % ALTER_EVERY == 1 else token.token_id
                    row = Row(token_id, token.logprob, token.projection, token.routing)
                    work = work.take((row,), self._now_ms(work))
                    index += 1
                    if work.room == 0:
                        finish = FinishReason.LENGTH if index == DECOY_TOKENS else FinishReason.OPEN
                        work = await self._issue(work, finish)
        finally:
            reason = FinishReason.LENGTH if index == DECOY_TOKENS else FinishReason.ERROR
            await of._store.write(JobClosed(Role.PROVIDER, work.job_id, reason, Wei(0), detail))

    def _now_ms(self, work: Work) -> int:
        """The job's own clock, as in Delivery: even from its acceptance on, whatever the machine's is set to."""
        return work.received_at + int((self._of._clock.monotonic() - self._began) * 1000)

    def _altered(self, token_id: int) -> int:
        """Another token of the vocabulary that ends no text."""
        other = token_id
        while other == token_id or other in self._of._eos:
            other = int.from_bytes(self._of._entropy.token(4), "big") % self._of._engine.vocab_size
        return other

    async def _issue(self, work: Work, finish: FinishReason) -> Work:
        finished_at = 0 if finish is FinishReason.OPEN else self._now_ms(work)
        leaf = Leaf.of(work.pending).to_bytes()
        after, receipt = work.receipt(finish, finished_at, Wei(0))
        receipt_digest = digest(self._of._domain, receipt)
        await self._of._store.write(
            ReceiptIssued(receipt_digest, receipt), OutputKept(Role.PROVIDER, work.job_id, receipt.step, (leaf,))
        )
        return replace(after, previous=receipt_digest)
