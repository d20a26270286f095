"""One prompt through the gateway of this home, or through one that lives as long as the answer.

Either way the answer takes the gateway's own path over HTTP, so there is one way text is rendered, streamed, cancelled
and paid; what was paid is read from the journal through the control socket.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.screen import REFRESH_HZ, Meter, Screen
from node.cli.session import Session, write_private
from node.cli.tables import short
from protocol.errors import TallyError

if TYPE_CHECKING:
    import aiohttp

    from node.config import NodeConfig
    from node.gateway.control import ControlClient

KEY_NAME: Final = "tally-run"
"""Name of the API key that `tally run` makes for itself; its text stays in the home."""

POLL_S: Final = 0.5
"""How often the journal is asked what was paid so far. Unit: s. An increment of 32 tokens takes about as long."""

_NEXT: Final = {
    "model_not_found": "`tally market` shows what is on offer",
    "no_provider": "`tally market` shows what is on offer",
    "tier_not_offered": "`tally market --tier` shows who sells which",
    "price_ceiling": "`tally market --job PROMPT:OUTPUT` prices it everywhere; --max-price and --max-tokens bound it",
    "insufficient_funds": "`tally wallet show` shows balance and channels",
}
"""What to do about a refusal, by the gateway's error code; of the others its own text says it."""

CLOSE_S: Final = 8.0
"""How long a cancelled job may take to be receipted. Unit: s. The client itself gives up after 5."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked: a path under /v1 and OpenAI's request body, its model filled in later when it is None."""

    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Answer:
    """What came back. `tokens`: delivered. `usage`: OpenAI's, with its `tally` part; {} when it did not come."""

    model: str = ""
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    provider: str = ""
    jobs: list[str] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    sent_at: float = field(default_factory=time.monotonic)
    last_at: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second since the request was sent: tokens come in bursts, and waiting for the first one counts."""
        took = self.last_at - self.sent_at
        return self.tokens / took if took > 0 else 0.0

    @property
    def cost(self) -> int:
        """Wei, from the final receipts."""
        return int(self.usage.get("tally", {}).get("cost_wei", 0))

    @property
    def receipts(self) -> list[str]:
        """Digests of the last receipt of each provider."""
        return list(self.usage.get("tally", {}).get("receipts", []))

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": self.model,
            "text": "".join(self.text),
            "finish_reason": self.finish,
            "provider": self.provider,
            "jobs": self.jobs,
            "receipts": self.receipts,
            "cost_wei": str(self.cost),
            "tokens_per_second": round(self.rate, 1),
            "usage": {name: value for name, value in self.usage.items() if name != "tally"},
        }


def summary(answer: Answer) -> str:
    """The last line: what it came to, who was paid, and where the proof is."""
    parts = [f"{answer.tokens} tokens", f"{answer.rate:.1f} tok/s", money.amount(answer.cost), short(answer.provider)]
    if answer.receipts:
        parts.append("receipt " + ", ".join(digest[:12] for digest in answer.receipts))
    elif answer.usage:
        parts.append("no receipt")
    return "  ".join(parts)


async def one_shot(session: Session, config: NodeConfig, ask: Ask, screen: Screen) -> Answer:
    """Send it and stream the answer to `screen`.

    Cancelling pays what was delivered and says so on stderr. Raises: CommandFailed, and what starting a client raises.
    """
    import aiohttp

    control = session.control()
    async with endpoint(control, config) as url:
        headers = {"Authorization": f"Bearer {own_key(config.home)}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=1 << 20) as http:
            answer = Answer(model=ask.body.get("model") or await _only_model(http, url))
            body = {**ask.body, "model": answer.model, "stream": True, "stream_options": {"include_usage": True}}
            watch = asyncio.create_task(_watch(control, answer, screen))
            try:
                await _stream(http, f"{url}/{ask.path}", body, answer, screen)
            except asyncio.CancelledError:
                screen.close()
                await _tell_cancelled(control, answer)
                raise
            except aiohttp.ClientError as exc:
                raise CommandFailed(
                    f"the gateway at {url} broke off: {exc}", kept="acknowledged tokens are paid"
                ) from exc
            finally:
                watch.cancel()
                screen.close()
    return answer


@asynccontextmanager
async def endpoint(control: ControlClient, config: NodeConfig) -> AsyncIterator[str]:
    """The URL (ending in /v1) of the gateway that runs here, else of one of our own on a free port."""
    from node.gateway.control import ControlUnavailable

    try:
        status = await control.call("status")
    except ControlUnavailable:
        from node.app import gateway_app

        async with gateway_app(config) as app:
            await app.client.directory.refresh()
            yield app.url
        return
    if "url" not in status:
        raise CommandFailed(
            f"the node that runs in {config.home} is a {status.get('role', 'node')}, and one home holds one node",
            kept="nothing was sent or paid",
            do="buy from another home: tally --home OTHER ...",
        )
    yield str(status["url"]).replace("//0.0.0.0:", "//127.0.0.1:")


def own_key(home: Path) -> str:
    """An API key of this home for its own commands, made at first use. Raises: GatewayError, CommandFailed."""
    from node.cli.gateway import api_keys

    keys, file = api_keys(home), home / f"{KEY_NAME}.key"
    with suppress(OSError):
        kept = file.read_text(encoding="utf-8").strip()
        if keys.check(f"Bearer {kept}") is not None:
            return kept
    keys.revoke(KEY_NAME)
    fresh = keys.create(KEY_NAME)
    write_private(file, fresh + "\n")
    return fresh


async def _only_model(http: aiohttp.ClientSession, url: str) -> str:
    """The model on offer when there is just one. Raises: CommandFailed."""
    async with http.get(f"{url}/models") as response:
        names = sorted({str(entry["id"]) for entry in (await _json(response))["data"]})
    if len(names) == 1:
        return names[0]
    if not names:
        raise CommandFailed(
            "no provider offers anything now",
            kept="nothing was sent or paid",
            do="name peers to ask with --bootstrap, or in transport.bootstrap; `tally market` shows what they offer",
        )
    raise click.UsageError(f"several models are on offer; choose one with --model: {', '.join(names)}")


async def _json(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Raises: CommandFailed with the gateway's own words."""
    answer = json.loads(await response.read())
    if response.status != 200:
        _refuse(answer)
    assert isinstance(answer, dict)
    return answer


def _refuse(answer: Any) -> None:
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    code = str(error.get("code")) if isinstance(error, dict) else ""
    raise CommandFailed(str(said or "the gateway refused without a reason"), do=_NEXT.get(code, ""))


async def _stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any], answer: Answer, screen: Screen) -> None:
    """Raises: CommandFailed, also when the stream ends without a finish_reason."""
    async with http.post(url, json=body) as response:
        if response.status != 200:
            _refuse(json.loads(await response.read()))
        async for line in response.content:
            answer.jobs = answer.jobs or [job for job in response.headers.get("x-tally-job", "").split(",") if job]
            answer.provider = answer.provider or response.headers.get("x-tally-provider", "")
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                _take(json.loads(line[6:]), answer, screen)
    if answer.finish is None:
        raise CommandFailed(
            f"the answer broke off after {answer.tokens} tokens",
            kept="acknowledged tokens are paid, nothing else",
            do="`tally receipts list` shows what was paid; run it again",
        )


def _take(chunk: dict[str, Any], answer: Answer, screen: Screen) -> None:
    """One event of the stream. Raises: CommandFailed."""
    if "error" in chunk:
        _refuse(chunk)
    if chunk.get("usage"):
        answer.usage = chunk["usage"]
        answer.provider = answer.usage.get("tally", {}).get("provider") or answer.provider
        answer.jobs = answer.usage.get("tally", {}).get("jobs") or answer.jobs
        answer.tokens = answer.usage.get("completion_tokens", answer.tokens)
    for choice in chunk.get("choices", []):
        answer.finish = choice.get("finish_reason") or answer.finish
        listed = choice.get("logprobs") or {}
        fresh = len(listed.get("content") or listed.get("tokens") or [])
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if fresh or text:
            answer.last_at = time.monotonic()
            answer.tokens += fresh
            answer.text.append(text)
            screen.write(text)


async def _watch(control: ControlClient, answer: Answer, screen: Screen) -> None:
    """Keep the live line true until cancelled."""
    meter, asked_at = Meter(), 0.0
    while True:
        meter.tokens, meter.rate, meter.provider = answer.tokens, answer.rate, answer.provider
        if time.monotonic() - asked_at > POLL_S:
            asked_at = time.monotonic()
            jobs = await _jobs(control, answer.jobs)
            meter.paid_wei = sum(int(job["owed_wei"]) for job in jobs) if jobs else meter.paid_wei
        screen.meter(meter)
        await asyncio.sleep(1 / REFRESH_HZ)


async def _jobs(control: ControlClient, ids: list[str]) -> list[dict[str, Any]]:
    """The journal's view of jobs, as far as it can be had: it only informs."""
    found = []
    for job_id in ids:
        with suppress(TallyError):
            job = (await control.call("job", job_id=job_id))["job"]
            if job is not None:
                found.append(job)
    return found


async def _tell_cancelled(control: ControlClient, answer: Answer) -> None:
    """Wait until what was delivered is receipted and paid, and say what it came to."""
    deadline = time.monotonic() + CLOSE_S
    jobs = await _jobs(control, answer.jobs)
    while any(job["closed"] is None for job in jobs) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        jobs = await _jobs(control, answer.jobs)
    if not jobs:
        click.echo("cancelled before the first token; `tally receipts list` shows it if anything was paid", err=True)
        return
    paid = sum(int(job["owed_wei"]) for job in jobs)
    covered = sum(job["completion_tokens"] for job in jobs)
    proof = ", ".join(job["receipt"][:12] for job in jobs if job["receipt"])
    click.echo(
        f"cancelled: {answer.tokens} tokens arrived, {covered} were receipted and cost {money.amount(paid)}, "
        f"paid to {short(answer.provider)}" + (f"; receipt {proof}" if proof else ""),
        err=True,
    )
