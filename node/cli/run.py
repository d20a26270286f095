"""`tally run`: one prompt, one streamed answer, one receipt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from node.cli.session import Session, emit, json_option, pass_session


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", help="Model to ask; not needed while only one is on offer.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Choose among the likeliest tokens of this mass.")
@click.option("--system", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat template.")
@click.option(
    "--tier", type=click.Choice(["flex", "standard", "priority"]), help="Latency tier; each has its price and promise."
)
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The answer is JSON that this JSON Schema allows.",
)
@click.option("--min-tokens", type=click.IntRange(min=1), help="Neither a stop string nor the model ends it before.")
@click.option("--reservation", metavar="ID", help="Use capacity reserved before; `tally reservation list` shows ids.")
@click.option("--private", is_flag=True, help="At the tariff's privacy price; nothing of the prompt stays in a cache.")
@click.option("--max-price", metavar="TALLY", help="Most that this answer may cost.")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--stream/--no-stream", default=True, help="Print as it comes, or all at the end.")
@json_option
@pass_session
def run(
    session: Session,
    prompt: str | None,
    model: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    system: str | None,
    raw: bool,
    tier: str | None,
    json_schema: Path | None,
    min_tokens: int | None,
    reservation: str | None,
    private: bool,
    max_price: str | None,
    bootstrap: tuple[str, ...],
    stream: bool,
    as_json: bool,
) -> None:
    """Send PROMPT (- or nothing: standard input) and stream the answer to stdout.

    Uses the gateway that runs in this home, else a client of its own. On a terminal a line below the text shows
    tokens, speed and what was paid so far; the last line on stderr names cost, provider and receipt.

    Ctrl-C cancels: what was delivered is receipted and paid, the rest is neither generated nor paid.

    \b
    tally run "Name three prime numbers" --max-tokens 50
    tally run - --system "Summarise in one line" < report.txt > summary.txt
    tally run "2+2=" --raw --temperature 0 --json
    tally run "Three cities" --json-schema cities.schema.json
    """
    text = _text(prompt)
    if raw and system:
        raise click.UsageError("--system needs the chat template that --raw leaves out")
    from node.cli.oneshot import Ask, one_shot, summary
    from node.cli.reservation import whole_id
    from node.cli.running import Stop
    from node.cli.running import run as run_to_end
    from node.cli.screen import screen_for

    config = session.load(
        client__max_price=max_price,
        transport__bootstrap=bootstrap or None,
        client__gateway_host="127.0.0.1",
        client__gateway_port=0,
    )
    session.log(config, serving=False)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "min_tokens": min_tokens}
    terms = {
        "tier": tier,
        "reservation": None if reservation is None else whole_id(session, reservation),
        "private": private or None,
        "max_price": max_price,
    }
    body = {"model": model, **sampling, "response_format": _format(json_schema), "x_tally": _given(terms)}
    path, prompted = _asked(text, system, raw=raw)
    ask = Ask(path, {**_given(body), **prompted})
    screen = screen_for(quiet=as_json or not stream)
    stop = Stop("cancelling: paying for what was delivered")
    answer = run_to_end(one_shot(session, config, ask, screen), stop)
    if as_json:
        emit(answer.as_json())
    elif not stream:
        click.echo("".join(answer.text))
    if not as_json:
        click.echo(summary(answer), err=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _asked(text: str, system: str | None, *, raw: bool) -> tuple[str, dict[str, Any]]:
    """The endpoint, and the prompt as it takes it. Logprobs are asked for because they tell tokens from text."""
    if raw:
        return "completions", {"prompt": text, "logprobs": 0}
    messages = [{"role": "system", "content": system}] if system else []
    return "chat/completions", {"messages": [*messages, {"role": "user", "content": text}], "logprobs": True}


def _format(schema: Path | None) -> dict[str, Any] | None:
    """OpenAI's response_format for a schema in a file. Raises: UsageError."""
    if schema is None:
        return None
    try:
        found = json.loads(schema.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise click.UsageError(f"{schema} holds no JSON: {exc}") from exc
    return {"type": "json_schema", "json_schema": {"name": schema.stem, "schema": found, "strict": True}}


def _text(prompt: str | None) -> str:
    """The prompt, from the argument or from standard input. Raises: UsageError."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError('give a prompt: tally run "...", or pipe one in: tally run - < file')
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    if not text:
        raise click.UsageError("the prompt is empty")
    return text
