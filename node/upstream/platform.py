"""One platform outside: its prices as it publishes them, and a job there as pieces of text with the usage it charges.

A chat goes to /chat/completions as the messages it was made from, since a platform renders them by the model's own
template; anything else goes to /completions as text. Nothing of an answer can be checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from incentives.price_sheets import OutsideModel, OutsideUsage, PriceSheet, parse_sheet
from node.ports import JobSpec
from node.upstream.http import HttpServer, UpstreamError, read_key
from node.upstream.reading import read_chunk
from node.upstream.settings import ExchangeSettings
from protocol.errors import TallyError
from protocol.options import PENALTY_ONE
from protocol.sampling import MICRO

log = logging.getLogger("tally.upstream.platform")

SHEET_LIFE_S: Final = 3600.0
"""How long a platform's prices are taken as they were read. Unit: s. Platforms change them every few days; doubling it
doubles how long a job may go there at a price that is no longer true."""

SHEET_RETRY_S: Final = 60.0
"""Pause after prices could not be read. Unit: s. Meanwhile, and until they can, no job goes there on older ones than
SHEET_LIFE_S."""


@dataclass(frozen=True, slots=True)
class Said:
    """A step of an answer. `finish`: as the platform says it, "" while open. `usage`: once it is told."""

    text: str
    finish: str = ""
    usage: OutsideUsage | None = None


class Platform:
    """`async with` connects; nothing is asked before it is needed. `now_s`: monotonic seconds.

    Raises on entry: UrlRefused, UpstreamError (the key file).
    """

    def __init__(self, settings: ExchangeSettings, now_s: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._now_s = settings, now_s
        self.host = urlsplit(settings.url).hostname or ""
        self._names = dict(settings.models)
        self._stack = AsyncExitStack()
        self._server: HttpServer | None = None
        self._sheet: PriceSheet | None = None
        self._read_at = self._tried_at = -SHEET_LIFE_S

    async def __aenter__(self) -> Platform:
        key = read_key(self._settings.key_file) if self._settings.key_file is not None else ""
        server = HttpServer(self._settings.url, key=key, allow_private=self._settings.allow_private)
        self._server = await self._stack.enter_async_context(server)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server = None
        await self._stack.aclose()

    async def model(self, name: str) -> OutsideModel | None:
        """What the platform has under our `name`, at prices read within SHEET_LIFE_S. None also when none are."""
        now = self._now_s()
        if now - self._read_at >= SHEET_LIFE_S:
            if now - self._tried_at >= SHEET_RETRY_S:
                await self._read_sheet(now)
            if now - self._read_at >= SHEET_LIFE_S:
                return None
        return self._sheet.model(self._names.get(name, name)) if self._sheet is not None else None

    async def _read_sheet(self, now: float) -> None:
        self._tried_at = now
        try:
            assert self._server is not None, "asked inside `async with`"
            raw = await self._server.get_raw("/models")
            self._sheet = parse_sheet(raw, f"{self._settings.url.rstrip('/')}/models", int(time.time()))
            self._read_at = now
        except TallyError as exc:
            log.warning("the prices of %s cannot be read, no job goes there: %s", self.host, exc)

    async def ask(self, spec: JobSpec, model: OutsideModel, prompt: str, stop: list[str]) -> AsyncGenerator[Said, None]:
        """The answer as it comes. The first step, without text, says that the platform took the job.

        Raises: UpstreamError and its kinds; before the first step nothing was taken.
        """
        path, body = _body(spec, model, prompt, stop)
        assert self._server is not None, "asked inside `async with`"
        events = await self._server.stream(path, body)
        try:
            yield Said("")
            async for event in events:
                yield _said(event)
        finally:
            await events.aclose()


def _body(spec: JobSpec, model: OutsideModel, prompt: str, stop: list[str]) -> tuple[str, dict[str, Any]]:
    sampling, options = spec.sampling, spec.options
    body: dict[str, Any] = {
        "model": model.id,
        "max_tokens": spec.max_tokens,
        "temperature": sampling.temperature_micro / MICRO,
        "top_p": sampling.top_p_micro / MICRO,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if options.penalised:
        body["frequency_penalty"] = options.frequency_milli / PENALTY_ONE
        body["presence_penalty"] = options.presence_milli / PENALTY_ONE
    if stop:
        body["stop"] = stop
    if spec.messages:
        messages = [{"role": role, "content": content} for role, content in spec.messages]
        return "/chat/completions", {**body, "messages": messages}
    return "/completions", {**body, "prompt": prompt}


def _said(event: dict[str, Any]) -> Said:
    """A chunk of either endpoint. Raises: UpstreamError."""
    try:
        choices = [
            {"text": (choice.get("delta") or {}).get("content"), **choice, "logprobs": None}
            for choice in event.get("choices") or []
        ]
        usage = _usage(event.get("usage"))
    except (AttributeError, TypeError, ValueError) as exc:
        raise UpstreamError(f"the platform sent a completion in another form ({type(exc).__name__})") from exc
    piece = read_chunk({"choices": choices[:1]})
    return Said(piece.text, piece.finish, usage)


def _usage(told: Any) -> OutsideUsage | None:
    """Raises: TypeError, AttributeError, ValueError."""
    if not told:
        return None
    prompt, completion = told["prompt_tokens"], told["completion_tokens"]
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (told.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    counts = (prompt, completion, cached, reasoning)
    if any(type(count) is not int or not 0 <= count < 1 << 40 for count in counts):
        raise TypeError("usage is no counts")
    return OutsideUsage(prompt, completion, min(cached, prompt), min(reasoning, completion))
