"""The client role whole: finds providers, runs a job, fails over exactly, and keeps the books straight.

Contract: every token reaches the caller once and in order, whichever providers wrote it; each provider is paid for its
own acknowledged increments, and nothing else; every job that began is closed in the journal.

Failover is exact because sampling is seed-locked: the next provider of the same profile continues from the last
acknowledged token with the first job's seed and writes what the first would have written. Tokens that were already
delivered but not acknowledged come again, are compared, and are not delivered twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final

from incentives.ledger import JobClosed, Role
from incentives.prefixes import Prefixes
from incentives.selection import MAX_QUOTES, Candidate, Needs, basis_for, rank, rule_out
from node.background import Background
from node.client.accounts import Accounts
from node.client.attempt import Attempt, Parent, Tools
from node.client.catalogue import Catalogue
from node.ports import (
    Clock,
    Directory,
    Entropy,
    InsufficientFunds,
    JobDone,
    JobEvent,
    JobFailed,
    JobPaid,
    JobSpec,
    JobStarted,
    JobTokens,
    JobVectors,
    MarketEntry,
    ModelCard,
    NoProvider,
    PeerAddress,
    Store,
    StoreError,
    Transport,
    TransportError,
)
from node.shredding import Shredder
from protocol.errors import Overspend, Refused, RemoteProtocolError, TallyError
from protocol.frames import JOB_PROTOCOL, RefusalCode
from protocol.messages import WorkReceipt
from protocol.offers import CheckedOffer
from protocol.tariff import worst_case_up
from protocol.units import MAX_AMOUNT, ZERO_DIGEST, Address, Digest, FinishReason, JobId, Tier, Verifiability, Wei

log = logging.getLogger("tally.client")

DIAL_TIMEOUT_S: Final = 5.0
CANCEL_TIMEOUT_S: Final = 5.0
"""How long a cancelled job may take to give its final receipt. Unit: s. Past it what was vouched for stands."""

PENALTY_S: Final = 60.0
"""How long one failure of a provider counts against it. Unit: s. A restart takes less; doubling it doubles how long a
provider that is well again stays unused."""

MAX_ATTEMPTS: Final = 4
"""Providers one stream may pass through. Unit: attempts. Each pays a prefill of everything so far again."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """`ceiling`: most wei per job where the caller names none. `stall_s`: silence taken for a stalled provider.

    `keep_content`: prompts and transcripts stay in the journal, sealed, for `retention_hours`.
    """

    ceiling: Wei
    stall_s: float = 60.0
    keep_content: bool = True
    retention_hours: int = 168


@dataclass(slots=True)
class _Progress:
    """One stream over all its attempts. `delivered`: tokens the caller has; `acked`: those a continuation starts after.
    `vectors`: embeddings the caller has.

    `tried`: providers not to be asked again; those of them that only refused are in `refused` too.
    """

    spec: JobSpec
    deadline_ms: int
    delivered: list[int] = field(default_factory=list)
    acked: list[int] = field(default_factory=list)
    vectors: int = 0
    parent: Parent | None = None
    attempts: list[Attempt] = field(default_factory=list)
    tried: set[Address] = field(default_factory=set)
    refused: set[Address] = field(default_factory=set)

    @property
    def cost(self) -> Wei:
        return Wei(sum(attempt.total for attempt in self.attempts))

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.spec.prompt + tuple(self.acked)

    @property
    def max_tokens(self) -> int:
        return self.spec.max_tokens - len(self.acked)


class Router:
    """Implements the Marketplace port."""

    def __init__(
        self,
        settings: ClientSettings,
        accounts: Accounts,
        store: Store,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._store = store
        self._transport = transport
        self._directory = directory
        self._clock = clock
        self._entropy = entropy
        self._tools = Tools(
            accounts, store, clock, entropy, settings.stall_s, Prefixes(), keeps_content=settings.keep_content
        )
        self.shredder = Shredder(Role.CLIENT, settings.retention_hours, store, clock)
        self.background = Background(clock)
        self._shredding: asyncio.Task[None] | None = None
        self._catalogue = Catalogue(transport, directory)
        self._penalties: dict[Address, tuple[int, float]] = {}  # failures, and when the last one was
        self._winding_down: set[asyncio.Task[None]] = set()
        self.jobs_done = 0
        self.jobs_failed = 0

    async def start(self) -> None:
        """Recover the books: jobs that a crash left open end at what was vouched for. Raises: StoreError."""
        await self._accounts.load()
        for job in await self._store.jobs(Role.CLIENT, open_only=True):
            detail = "the client stopped while it was running; what was vouched for stands"
            await self._store.write(JobClosed(Role.CLIENT, job.job_id, FinishReason.ERROR, job.owed, detail))
        self._shredding = self.background.start("shredding", self.shredder.run, "content is kept until it can be")

    async def stop(self) -> None:
        """Let cancelled jobs get their final receipts. Never raises."""
        if self._shredding is not None:
            self._shredding.cancel()
            await asyncio.gather(self._shredding, return_exceptions=True)
        if self._winding_down:
            await asyncio.wait(set(self._winding_down), timeout=CANCEL_TIMEOUT_S + 1)

    # ---------------------------------------------------------------------------------------------------- the market

    async def market(self) -> list[MarketEntry]:
        """See the Marketplace port."""
        return self._catalogue.market()

    async def card(self, model: str) -> ModelCard:
        """See the Marketplace port."""
        return await self._catalogue.card(model)

    async def card_of(self, profile: Digest) -> ModelCard:
        """The card of one profile on offer, where several serve one model's name. Raises: NoProvider."""
        return await self._catalogue.card_of(profile)

    # ------------------------------------------------------------------------------------------------------- one job

    async def run(self, spec: JobSpec) -> AsyncIterator[JobEvent]:
        """Run one job; see the Marketplace port."""
        card = await self.card(spec.model)
        if spec.reservation != ZERO_DIGEST:
            seller = await self._accounts.seller_of(spec.reservation)
            if spec.only and seller not in spec.only:
                raise NoProvider(f"the reservation is of 0x{seller.hex()}, which is none of the providers asked for")
            spec = replace(spec, only=frozenset({seller}))
        progress = _Progress(spec, self._clock.now_ms() + int(spec.deadline_s * 1000))
        failure: TallyError | None = None
        while len(progress.attempts) < MAX_ATTEMPTS:
            try:
                attempt, job_id = await self._begin(progress, card, failure)
            except TallyError:
                self.jobs_failed += 1
                raise
            progress.attempts.append(attempt)
            failover = len(progress.attempts) > 1
            over = False
            try:
                yield JobStarted(job_id, attempt.provider, attempt.offer.tariff, failover)
                async with aclosing(self._follow(progress, attempt)) as events:
                    async for event in events:
                        yield event
                over = True
            except (TransportError, RemoteProtocolError, Refused) as exc:
                if attempt.final is None:
                    failure = exc
                    await self._give_up(progress, attempt, exc)
                    over = True
                    continue
                over = True
            except JobFailed as exc:  # what was shown cannot go on: nothing more is paid to whoever wrote otherwise
                self.jobs_failed += 1
                await self._give_up(progress, attempt, exc)
                over = True
                raise
            finally:
                if not over:
                    self._wind_down(attempt)
            yield self._conclude(progress, attempt)
            return
        self.jobs_failed += 1
        raise JobFailed(self._obituary(progress, failure)) from failure

    async def _follow(self, progress: _Progress, attempt: Attempt) -> AsyncGenerator[JobEvent, None]:
        """Events of one attempt until its END is acknowledged, tokens already delivered left out."""
        base, vectors = len(progress.acked), 0
        while attempt.final is None:
            for event in await attempt.next_events():
                if isinstance(event, JobTokens):
                    at = base + len(attempt.tokens) - len(event.token_ids)
                    fresh = self._undelivered(progress, event, at)
                    if fresh is not None:
                        yield fresh
                elif isinstance(event, JobVectors):
                    vectors += 1
                    if vectors > progress.vectors:  # a provider that takes over begins again with the first
                        progress.vectors = vectors
                        yield event
                elif isinstance(event, JobPaid):
                    yield JobPaid(progress.cost)
        await attempt.talk.__aexit__(None, None, None)

    def _undelivered(self, progress: _Progress, event: JobTokens, at: int) -> JobTokens | None:
        """The part of `event`, which starts at output index `at`, that the caller does not have yet.

        Raises: JobFailed when a repeated token differs: what was shown cannot be taken back.
        """
        # SPEC 4.10: Tokens that were delivered and not acknowledged come again and are compared
        repeated = progress.delivered[at : at + len(event.token_ids)]
        if tuple(repeated) != event.token_ids[: len(repeated)]:
            raise JobFailed(
                f"the provider that took over wrote another token than was delivered, near output token {at}; the two"
                " providers do not compute the same profile. What was acknowledged is paid, nothing else"
            )
        fresh = event.token_ids[len(repeated) :]
        progress.delivered.extend(fresh)
        at = len(repeated)
        return JobTokens(fresh, event.logprobs[at:], event.alternatives[at:]) if fresh else None

    async def _begin(self, progress: _Progress, card: ModelCard, failure: TallyError | None) -> tuple[Attempt, JobId]:
        """Quotes from the best candidates, then the first that accepts.

        Raises: NoProvider, JobFailed (a continuation found nobody), InsufficientFunds, Refused (all said no).
        """
        try:
            try:
                return await self._first_accepting(progress, card)
            except Refused as exc:
                if exc.code != RefusalCode.TARIFF:
                    raise
            # A provider that restarted or changed its prices refuses jobs under its earlier offer: look again, once.
            await self._directory.refresh()
            progress.tried.difference_update(progress.refused)
            return await self._first_accepting(progress, card)
        except Refused as exc:
            if failure is not None:
                raise JobFailed(self._obituary(progress, failure)) from exc
            if exc.code == RefusalCode.PAYMENT_REQUIRED:
                raise InsufficientFunds(exc.reason) from exc
            raise
        except NoProvider as exc:
            if failure is not None:
                raise JobFailed(self._obituary(progress, failure)) from exc
            raise

    async def _first_accepting(self, progress: _Progress, card: ModelCard) -> tuple[Attempt, JobId]:
        """Raises: NoProvider, InsufficientFunds, Refused (the last that said no), StoreError."""
        refusal: Refused | None = None
        quoted = await self._quotes(progress, card)
        for index, attempt in enumerate(quoted):
            try:
                job_id = await attempt.agree(progress.prompt, progress.max_tokens, progress.parent)
            except (TransportError, RemoteProtocolError) as exc:
                self._penalise(attempt.provider, exc)
                await attempt.talk.__aexit__(type(exc), exc, None)
            except Refused as exc:
                refusal = exc
                progress.refused.add(attempt.provider)
                await attempt.talk.__aexit__(type(exc), exc, None)
            except BaseException as exc:
                for rest in quoted[index:]:
                    await rest.talk.__aexit__(type(exc), exc, None)
                raise
            else:
                for rest in quoted[index + 1 :]:
                    await rest.talk.__aexit__(None, None, None)
                return attempt, job_id
            progress.tried.add(attempt.provider)
        raise refusal or NoProvider(f"none of {len(quoted)} providers of {card.model!r} could be reached; try again")

    async def _quotes(self, progress: _Progress, card: ModelCard) -> list[Attempt]:
        """Attempts that hold a quote, best first, each with its stream open. Raises: NoProvider."""
        spec, now = progress.spec, self._clock.now_ms() // 1000
        ceiling = spec.price_ceiling if spec.price_ceiling is not None else self._settings.ceiling
        ceiling = Wei(min(MAX_AMOUNT, max(0, ceiling - progress.cost)))  # a request has no room for more
        needs = Needs(
            card.profile_id,
            len(progress.prompt),
            progress.max_tokens,
            Tier(spec.tier),
            spec.private,
            ceiling,
            spec.kind,
            spec.reservation,
            spec.only,
            max(spec.options.inputs, default=0),
        )
        offers = {
            Address(checked.offer.provider): checked
            for checked in await self._catalogue.offers(spec.model)
            if Address(checked.offer.provider) not in progress.tried
        }
        candidates = [Candidate(checked.offer, checked.tariff) for checked in offers.values()]
        salt = self._entropy.token(8)
        ranked = rank(candidates, needs, salt, now, self._failures())
        fit, exposed = await self._within_stake(ranked, needs)
        if not fit:
            reasons = {rule_out(candidate, needs, now) or "it already failed this job" for candidate in candidates}
            reasons = (reasons - {"it already failed this job"} | exposed) if exposed else reasons
            raise NoProvider(f"no provider can take this job: {'; '.join(sorted(reasons)) or 'all were tried'}")
        asked = await self._ask_all([offers[Address(c.offer.provider)] for c in fit], card, progress, ceiling)
        quoted = {attempt.provider: attempt for attempt in asked}
        waits = [
            Candidate(c.offer, c.tariff, quoted[Address(c.offer.provider)].queue_ms)
            for c in fit
            if Address(c.offer.provider) in quoted
        ]
        if not waits:
            raise NoProvider(f"none of the {len(fit)} providers that offer {spec.model!r} answered; try again shortly")
        return [quoted[Address(c.offer.provider)] for c in rank(waits, needs, salt, now, self._failures())]

    async def _within_stake(self, ranked: list[Candidate], needs: Needs) -> tuple[list[Candidate], set[str]]:
        """The best that may be asked, and why others may not: too much unsettled work stands before their stake."""
        fit: list[Candidate] = []
        exposed: set[str] = set()
        for candidate in ranked:
            if len(fit) == MAX_QUOTES:
                break
            basis = basis_for(candidate.offer, candidate.tariff, needs)
            worst = worst_case_up(candidate.tariff, needs.prompt_tokens, needs.max_tokens, basis)
            provider = Address(candidate.offer.provider)
            reason = await self._accounts.too_exposed(provider, worst, self._clock.monotonic())
            if reason is None:
                fit.append(candidate)
            else:
                exposed.add(reason)
        return fit, exposed

    async def _ask_all(
        self, offers: list[CheckedOffer], card: ModelCard, progress: _Progress, ceiling: Wei
    ) -> list[Attempt]:
        """Those that quoted, each with its stream open; a caller that leaves meanwhile leaves none open."""
        asking = [asyncio.create_task(self._ask(checked, card, progress, ceiling)) for checked in offers]
        try:
            return [attempt for attempt in await asyncio.gather(*asking) if attempt is not None]
        except BaseException:
            for task in asking:
                task.cancel()
            for outcome in await asyncio.gather(*asking, return_exceptions=True):
                if isinstance(outcome, Attempt):
                    await outcome.talk.__aexit__(None, None, None)
            raise

    async def _ask(self, checked: CheckedOffer, card: ModelCard, progress: _Progress, ceiling: Wei) -> Attempt | None:
        """An attempt holding a quote, or None when the provider did not give one."""
        provider = Address(checked.offer.provider)
        peer = PeerAddress(checked.peer_id, checked.addresses)
        try:
            stream = await self._transport.open(peer, JOB_PROTOCOL, DIAL_TIMEOUT_S)
        except TransportError as exc:
            self._penalise(provider, exc)
            progress.tried.add(provider)
            return None
        attempt = Attempt(self._tools, stream, checked, card, progress.spec, ceiling, progress.deadline_ms)
        await attempt.talk.__aenter__()
        try:
            await attempt.quote(len(progress.prompt), progress.max_tokens)
        except (TransportError, RemoteProtocolError, Refused) as exc:
            if not isinstance(exc, Refused):
                self._penalise(provider, exc)
            progress.tried.add(provider)
            await attempt.talk.__aexit__(type(exc), exc, None)
            return None
        except BaseException as exc:
            await attempt.talk.__aexit__(type(exc), exc, None)
            raise
        return attempt

    # ------------------------------------------------------------------------------------------------------- endings

    def _penalise(self, provider: Address, exc: Exception) -> None:
        log.warning("provider 0x%s failed: %s", provider.hex(), exc)
        count = self._failures().get(provider, 0)
        self._penalties[provider] = (min(8, count + 1), self._clock.monotonic())

    def _failures(self) -> dict[Address, int]:
        """Recent failures per provider: one is forgotten every PENALTY_S. Drops those that are all forgotten."""
        now = self._clock.monotonic()
        left = {who: count - int((now - at) / PENALTY_S) for who, (count, at) in self._penalties.items()}
        self._penalties = {who: self._penalties[who] for who, count in left.items() if count > 0}
        return {who: count for who, count in left.items() if count > 0}

    async def _give_up(self, progress: _Progress, attempt: Attempt, exc: TallyError) -> None:
        """This attempt is over without END: close it at what was vouched for and prepare the continuation."""
        self._penalise(attempt.provider, exc)
        progress.tried.add(attempt.provider)
        await attempt.talk.__aexit__(type(exc), exc, None)
        await attempt.close(FinishReason.ERROR, str(exc))
        progress.acked.extend(self._kept(progress, attempt))
        if progress.parent is None:
            progress.parent = Parent(attempt.job_id, attempt.seed)

    def _kept(self, progress: _Progress, attempt: Attempt) -> list[int]:
        """The tokens that a continuation starts after: those acknowledged, whose like comes again and is compared.

        An upstream server's sampling cannot be repeated, so its text is continued from where the caller has it; what
        was not acknowledged of it is not paid.
        """
        # SPEC 4.10: continues after what was delivered
        acked = attempt.tokens[: attempt.acked]
        if attempt.offer.offer.verifiability == Verifiability.REPLAY:
            return acked
        goes_on = len(attempt.tokens) < progress.max_tokens and not attempt.stopped
        return attempt.tokens if goes_on else acked

    def _wind_down(self, attempt: Attempt) -> None:
        """The caller left: cancel in the background, so that what was delivered is receipted and paid."""

        async def finish() -> None:
            reason = FinishReason.CANCELLED
            try:
                with contextlib.suppress(TransportError, RemoteProtocolError, Refused, Overspend):
                    await attempt.cancel(CANCEL_TIMEOUT_S)
            except TallyError as exc:
                log.error("a cancelled job was not wound down in order: %s", exc)
            finally:
                await attempt.talk.__aexit__(None, None, None)
                try:
                    await attempt.close(reason, "cancelled by the caller")
                except StoreError as exc:
                    log.error("a cancelled job could not be closed in the journal: %s", exc)

        task = asyncio.create_task(finish())
        self._winding_down.add(task)
        task.add_done_callback(self._winding_down.discard)

    def _conclude(self, progress: _Progress, attempt: Attempt) -> JobDone:
        final = attempt.final
        assert isinstance(final, WorkReceipt)
        finish = FinishReason(final.finish_reason)
        self._penalties.pop(attempt.provider, None)
        if finish is FinishReason.ESCROW_EXHAUSTED:
            self.jobs_failed += 1
            raise InsufficientFunds(
                f"the escrow with 0x{attempt.provider.hex()} ran out after {len(progress.delivered)} tokens, which are"
                " paid for. Add TALLY to the wallet, or lower max_tokens"
            )
        self.jobs_done += 1
        return JobDone(
            finish=finish,
            prompt_tokens=len(progress.spec.prompt),
            cached_tokens=final.cached_tokens if len(progress.attempts) == 1 else 0,
            completion_tokens=len(progress.delivered),
            reasoning_tokens=attempt.reasoning_of(progress.delivered),
            ste_micro=final.ste_micro,
            cost=progress.cost,
            refund=Wei(final.refund),
            job_ids=tuple(attempt.job_id for attempt in progress.attempts),
            receipts=tuple(attempt.last_digest for attempt in progress.attempts),
        )

    def _obituary(self, progress: _Progress, failure: TallyError | None) -> str:
        return (
            f"the job ended after {len(progress.delivered)} tokens and {len(progress.attempts)} provider(s): {failure}."
            f" {progress.cost} wei were paid, for acknowledged tokens only; send the request again to start afresh"
        )

    async def status(self) -> dict[str, object]:
        """Plain JSON values; amounts as decimal strings of wei."""
        offers = self._directory.offers()
        return {
            "role": "client",
            "session_key": "0x" + self._accounts.session.address.hex(),
            "peers": len(self._transport.connected()),
            "offers": len(offers),
            "models": sorted({checked.model for checked in offers}),
            "jobs_done": self.jobs_done,
            "jobs_failed": self.jobs_failed,
            "spent_wei": str(self._accounts.spent),
            "channels": [
                {
                    "provider": "0x" + channel.key.provider.hex(),
                    "deposit_wei": str(channel.deposit),
                    "vouched_wei": str(channel.vouched),
                    "claimed_wei": str(channel.claimed),
                    "exit_at": channel.exit_at,
                }
                for channel in self._accounts.channels()
            ],
        }
