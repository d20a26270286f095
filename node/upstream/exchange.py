"""The marketplace with a way out: a job goes to a platform outside when that is cheaper or nobody here can take it.

Only with the owner's word: an exchange is configured with a rate, a ceiling and a key. Then, per job:

1. What the market alone can do stays in the market: private jobs, reservations, named providers, embeddings, promised
   latency (priority), grammars, min_tokens, alternatives.
2. Both prices of the platform must be within the ceiling, and the job's worst case within what one job may cost.
3. With an offer here that fits, the platform gets the job only if its worst case is below the best offer's; if the
   platform does not take it, the job runs here.
4. With none, the platform gets it.

An outside job is told by JobOutside. There is no receipt and no voucher, and nothing of it can be checked; its cost is
the platform's published price for the usage it reports, at the configured rate, rounded up. Once text was shown the
job cannot move: a break then is JobFailed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from incentives.price_sheets import OutsideModel, OutsideUsage, cost_up, wei_prices
from node.closing import closed_after
from node.ports import (
    Clock,
    JobDone,
    JobEvent,
    JobFailed,
    JobOutside,
    JobSpec,
    JobTokens,
    MarketEntry,
    Marketplace,
    ModelCard,
    NoProvider,
)
from node.upstream.byte_card import byte_card
from node.upstream.http import Busy, Rejected, UpstreamError
from node.upstream.platform import Platform
from node.upstream.settings import ExchangeSettings
from node.upstream.texts import Texts
from protocol.errors import FieldOutOfRange, Refused, TallyError, TierNotOffered
from protocol.frames import RefusalCode
from protocol.options import Syntax
from protocol.tariff import Basis, worst_case_up
from protocol.units import ZERO_DIGEST, Digest, FinishReason, JobKind, Tier, Wei

log = logging.getLogger("tally.upstream.exchange")

KEPT_TEXTS: Final = 2
"""Tokenizers kept loaded. One of a large vocabulary takes about 200 MB here and two seconds to load."""

_FINISH: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "deadline": FinishReason.DEADLINE}
"""How a platform says that an answer is over, and our own word for one that took too long."""
_UNKNOWN: Final = math.nan
"""The logprob of a token that a platform wrote: not known, and no number that could be taken for one."""


class Exchange:
    """Implements the Marketplace port around another. `platform`: entered."""

    def __init__(self, inner: Marketplace, platform: Platform, settings: ExchangeSettings, clock: Clock) -> None:
        self._inner, self._platform, self._settings, self._clock = inner, platform, settings, clock
        self._texts: OrderedDict[Digest, Texts] = OrderedDict()
        self.jobs_outside = 0
        self.cost_outside = 0

    async def market(self) -> list[MarketEntry]:
        """The market's own offers; a platform is none."""
        return await self._inner.market()

    async def card(self, model: str) -> ModelCard:
        """The market's card, or one of bytes where only the platform has the model. Raises: NoProvider."""
        try:
            return await self._inner.card(model)
        except NoProvider:
            found = await self._platform.model(model)
            if found is None or not self._affordable(found):
                raise
            return byte_card(model, self._platform.host, found.context or 4096)

    async def status(self) -> dict[str, object]:
        return {
            **await self._inner.status(),
            "exchange": {
                "host": self._platform.host,
                "jobs": self.jobs_outside,
                "cost_wei": str(self.cost_outside),
                "tally_usd": str(self._settings.tally_usd),
            },
        }

    async def run(self, spec: JobSpec) -> AsyncIterator[JobEvent]:
        """See the Marketplace port. Raises: also Refused where the platform refuses a job that nobody here can take."""
        card = await self.card(spec.model)
        plan = await self._plan(spec, card)
        here = self._best_here(spec, await self._inner.market(), card.profile_id) if plan is not None else None
        if plan is None or (here is not None and here <= plan.worst):
            began = False
            try:
                async with closed_after(self._inner.run(spec)) as events:
                    async for event in events:
                        began = True
                        yield event
                return
            except NoProvider:
                if plan is None or began:
                    raise
                here = None  # the offers that were known are gone or full
        try:
            async with aclosing(self._outside(spec, plan)) as events:
                async for event in events:
                    yield event
            return
        except _NotTaken as exc:
            if here is None:
                raise exc.said from exc
            log.info("%s does not take a job, so it runs here: %s", self._platform.host, exc.said)
        async with closed_after(self._inner.run(spec)) as events:
            async for event in events:
                yield event

    # ------------------------------------------------------------------------------------------------------- deciding

    def _affordable(self, model: OutsideModel) -> bool:
        prices = wei_prices(model.usd, self._settings.tally_usd)
        return max(prices.prompt, prices.completion, prices.reasoning) <= self._settings.ceiling

    async def _plan(self, spec: JobSpec, card: ModelCard) -> _Plan | None:
        """How the job would run outside; None when it may not, or costs too much."""
        if not _may_leave(spec):
            return None
        model = await self._platform.model(spec.model)
        if model is None or not self._affordable(model):
            return None
        if 0 < model.context <= spec.max_tokens or 0 < model.max_output < spec.max_tokens:
            return None
        dearer = spec.max_tokens if model.usd.reasoning > model.usd.completion else 0
        worst = cost_up(model.usd, OutsideUsage(len(spec.prompt), spec.max_tokens, 0, dearer), self._settings.tally_usd)
        if worst > min(self._settings.most, spec.price_ceiling if spec.price_ceiling is not None else worst):
            return None
        texts = await self._texts_of(card)
        prompt = _text_prompt(spec, texts)
        if prompt is None:
            return None
        stop = [texts.behind((), (number,)) for number in spec.options.stop_ids]
        return _Plan(model, texts, prompt, stop, worst)

    def _best_here(self, spec: JobSpec, entries: list[MarketEntry], profile: Digest) -> Wei | None:
        """The least worst case among offers that can take the job, wei; None when none can."""
        out = []
        for entry in entries:
            fits = len(spec.prompt) + spec.max_tokens <= entry.max_context and spec.max_tokens <= entry.max_output
            if entry.model != spec.model or entry.profile != profile or not fits:
                continue
            basis = Basis(spec.kind, Tier(spec.tier), spec.private, entry.base_bps)
            try:
                out.append(worst_case_up(entry.tariff, len(spec.prompt), spec.max_tokens, basis))
            except (TierNotOffered, FieldOutOfRange):
                continue
        ceiling = self._settings.most if spec.price_ceiling is None else spec.price_ceiling
        return min((cost for cost in out if cost <= ceiling), default=None)

    async def _texts_of(self, card: ModelCard) -> Texts:
        found = self._texts.get(card.profile_id)
        if found is None:
            found = await asyncio.to_thread(Texts, card.tokenizer_json)
            self._texts[card.profile_id] = found
            while len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(card.profile_id)
        return found

    # -------------------------------------------------------------------------------------------------------- running

    async def _outside(self, spec: JobSpec, plan: _Plan) -> AsyncGenerator[JobEvent, None]:
        """Raises: _NotTaken before anything was shown; JobFailed after."""
        reader, deadline = plan.texts.reader(), self._clock.monotonic() + spec.deadline_s
        count, finish, usage, begun = 0, "", None, False
        async with aclosing(self._platform.ask(spec, plan.model, plan.prompt, plan.stop)) as steps:
            while True:
                try:
                    async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                        said = await anext(steps)
                    ids = reader.push(said.text)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    finish = "deadline"
                    break
                except UpstreamError as exc:
                    raise self._broken(exc, count, charged=usage is not None) from exc
                if not begun:
                    begun = True
                    self.jobs_outside += 1
                    yield JobOutside(self._platform.host, plan.model.id)
                count, finish, usage = count + len(ids), said.finish or finish, said.usage or usage
                if ids:
                    yield JobTokens(ids, (_UNKNOWN,) * len(ids))
        if finish not in _FINISH:
            broken = UpstreamError(f"it ended its answer without a proper end ({finish[:20]!r})")
            raise self._broken(broken, count, charged=usage is not None)
        yield self._done(plan.model, _FINISH[finish], usage or OutsideUsage(len(spec.prompt), count))

    def _broken(self, exc: UpstreamError, shown: int, *, charged: bool) -> Exception:
        """`charged`: it said what it counts, so running the job elsewhere as well would be paying for it twice."""
        if charged and not shown:
            return JobFailed(f"{self._platform.host} gave no answer and charges for having tried: {exc}")
        if shown:
            return JobFailed(
                f"{self._platform.host} broke off after part of its answer was shown, and may charge for it: {exc}"
            )
        if isinstance(exc, Rejected):
            return _NotTaken(Refused(RefusalCode.BAD_REQUEST, f"{self._platform.host} refuses the job: {exc.said}"))
        busy = "has no room" if isinstance(exc, Busy) else "failed"
        return _NotTaken(NoProvider(f"nobody here can take the job, and {self._platform.host} {busy}: {exc}"))

    def _done(self, model: OutsideModel, finish: FinishReason, usage: OutsideUsage) -> JobDone:
        cost = cost_up(model.usd, usage, self._settings.tally_usd)
        self.cost_outside += cost
        return JobDone(
            finish=finish,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            reasoning_tokens=usage.reasoning,
            ste_micro=0,
            cost=cost,
            refund=Wei(0),
            job_ids=(),
            receipts=(),
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """A job as it would run outside. `worst`: wei if the whole allowance is used."""

    model: OutsideModel
    texts: Texts
    prompt: str
    stop: list[str]
    worst: Wei


class _NotTaken(Exception):
    """The platform did not take the job, or broke off before it wrote anything. `said`: what the caller is told."""

    def __init__(self, said: TallyError) -> None:
        super().__init__(str(said))
        self.said = said


def _may_leave(spec: JobSpec) -> bool:
    """Whether a platform without our protocol can do this job as asked."""
    options = spec.options
    at_home = spec.private or spec.only or spec.reservation != ZERO_DIGEST or spec.tier == Tier.PRIORITY
    special = (
        options.min_tokens or options.alternatives or options.syntax is not Syntax.NONE or len(options.stop_ids) > 4
    )
    return spec.kind != JobKind.EMBED and not at_home and not special


def _text_prompt(spec: JobSpec, texts: Texts) -> str | None:
    """The prompt as text, a leading BOS left out; "" for a chat, None where control tokens in it cannot be said."""
    if spec.messages:
        return ""
    ids = spec.prompt[1:] if spec.prompt[:1] and spec.prompt[0] in texts.special else spec.prompt
    if not ids or texts.special.intersection(ids):
        return None
    try:
        return texts.said(ids)
    except ValueError:
        return None
