"""What one gateway accepts at most. All of it can be set where the gateway is made; the defaults suit one person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_STOPS: Final = 4
"""Stop strings a request may name, as at OpenAI."""

MAX_STOP_IDS: Final = 32
"""Stop token ids a request may name. A job's options hold 64, and those that follow from stop strings join them."""

MAX_STOP_CHARS: Final = 256
"""Longest stop string. Unit: characters. As much may be held back from the reader at any time, and each token is
compared with it, so doubling it doubles both."""

MAX_MESSAGES: Final = 4096
"""Most messages in a conversation. Above any real one; bounds what a template must loop over."""

MAX_MODEL_CHARS: Final = 256
"""Longest model name. Unit: characters. Names are repeated in errors, so a longer one would be an echo service."""

MAX_TOP_LOGPROBS: Final = 20
"""OpenAI's own limit for chat."""

MAX_EMBED_TEXTS: Final = 2048
"""Texts of one embeddings request, as at OpenAI. They are bought in jobs of 32."""

MAX_EMBED_TOKENS: Final = 300_000
"""Tokens of one embeddings request, all texts together, as at OpenAI. Its vectors are held until the last one came."""

EMBED_JOBS: Final = 4
"""Embedding jobs of one request that run at once. More would only queue at the providers, and each reserves escrow."""

MAX_IDEMPOTENCY_KEY: Final = 255
"""Longest Idempotency-Key. Unit: characters, as Stripe and OpenAI's SDKs use it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients can make the gateway hold. Times in seconds.

    body_bytes: a request's body. 1 MiB is about 250k tokens of English, above the contexts on offer; each waiting
        request can hold as much.
    header_line_bytes: one header line or the request line; keys, hosts and SDK headers need far less.
    body_s, headers_s: until a request's body, a connection's first headers, must have arrived. A client on a phone
        needs one or two; a stalled one would otherwise hold its connection for minutes.
    write_s: until a reader must have taken what was written. A reader that stops reading holds a job and its money.
    connections: open at once. Each costs a file descriptor and about 50 KB.
    jobs: running at once; the 429 above it protects the wallet from a runaway loop as much as the machine.
    keepalive_s: longest silence inside a stream; proxies and browsers cut connections after 15 to 60.
    codec_s: until a prompt must be rendered and tokenised; a stranger's template may loop.
    default_max_tokens: for requests that name none. It bounds the cost of a forgotten parameter; a client that
        wants more says so.
    replay_s: how long a finished answer is kept for its Idempotency-Key; SDKs retry within minutes.
    replay_bytes, replay_entry_bytes: all kept answers together, and the largest one that is kept.
    grace_s: how long a job with an Idempotency-Key goes on after its last client left, for that client to come back
        (SDKs retry after 0.5 to 1 s). Whatever is generated meanwhile is paid.
    stop_s: how long running jobs may take to finish when the gateway stops.
    """

    body_bytes: int = 1 << 20
    header_line_bytes: int = 8190
    body_s: float = 15.0
    headers_s: float = 15.0
    write_s: float = 60.0
    connections: int = 256
    jobs: int = 32
    keepalive_s: float = 10.0
    codec_s: float = 30.0
    default_max_tokens: int = 1024
    replay_s: float = 3600.0
    replay_bytes: int = 64 << 20
    replay_entry_bytes: int = 4 << 20
    grace_s: float = 5.0
    stop_s: float = 5.0
