"""The connection to a chain's JSON-RPC: one web3 session, bounded retries, and no foreign exception beyond this file.

A node that does not answer, answers late, or says it is busy raises ChainUnavailable; a node that answers with a
refusal raises another ChainError. Nothing here signs or decides anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

from node.foreign import tame_py_ecc
from node.ports import ChainError, ChainUnavailable, Clock

if TYPE_CHECKING:
    from web3 import AsyncWeb3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """How patient to be.

    `timeout_s`: one request. 10 s is above what a loaded public endpoint takes; a longer one hides that it is gone.
    `attempts`: tries of a read, so a read gives up after at most attempts x timeout plus the pauses.
    `backoff_s`: first pause between tries; each next one is twice as long, up to `backoff_max_s`.
    """

    timeout_s: float = 10.0
    attempts: int = 4
    backoff_s: float = 0.2
    backoff_max_s: float = 5.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after failed try number `attempt` (from 0)."""
        return min(self.backoff_s * 2.0 ** min(attempt, 16), self.backoff_max_s)


class Refusal(Enum):
    """What a node means by refusing a request. JSON-RPC gives no code for it, only words, so words are compared,
    here and nowhere else. Each row: as Geth, Erigon, Nethermind, Besu, Reth and Anvil put it."""

    KNOWN = ("already known", "alreadyknown", "already imported", "known transaction")
    NONCE_USED = ("nonce too low", "oldnonce", "nonce is below")
    UNDERPRICED = (
        "underpriced",
        "replacementnotallowed",
        "fee too low",
        "below current base fee",
        "less than block base",
    )
    NO_COIN = ("insufficient funds", "insufficientfunds", "balance too low", "upfront cost exceeds")
    UNKNOWN_BLOCK = ("header not found", "unknown block", "block not found", "blockoutofrange", "data unavailable")
    BUSY = ("limit exceeded", "rate limit", "too many requests", "timeout", "timed out", "capacity")
    OTHER = ()

    @classmethod
    def of(cls, message: str) -> Refusal:
        """The meaning of a node's error message."""
        lowered = message.lower()
        return next((kind for kind in cls if any(words in lowered for words in kind.value)), cls.OTHER)


@dataclass
class RpcRefused(ChainError):
    """The node answered, with an error of its own."""

    rpc: str
    kind: Refusal
    message: str

    def __str__(self) -> str:
        return f"the RPC at {self.rpc} refused: {self.message}"


@dataclass
class CallReverted(ChainError):
    """A contract reverted during a call or a gas estimation; `data`: what it returned."""

    message: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"the contract reverted: {self.message}"


_PASSING: Final = (Refusal.BUSY, Refusal.UNKNOWN_BLOCK)
_PASSING_CODES: Final = frozenset({-32005, -32603, 429})
"""JSON-RPC codes for "limit exceeded" (EIP-1474) and "internal error", and HTTP's 429 as some repeat it in the body."""


class Rpc:
    """One endpoint. Reads are retried; whatever changes the chain is tried once, by `once`."""

    def __init__(self, url: str, clock: Clock, limits: RpcLimits | None = None) -> None:
        self.clock, self.limits = clock, limits or RpcLimits()
        self._url = url
        self._w3: AsyncWeb3[Any] | None = None
        parts = urlsplit(url)
        # Keys to paid endpoints stand in the path or before the host; neither may reach a log.
        self.name = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")

    async def start(self) -> None:
        """Make the session; connects to nothing yet."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        tame_py_ecc()
        from web3 import AsyncHTTPProvider, AsyncWeb3

        if self._w3 is not None:
            return
        timeout = ClientTimeout(total=self.limits.timeout_s)
        provider = AsyncHTTPProvider(self._url, request_kwargs={"timeout": timeout}, exception_retry_configuration=None)
        # web3's own session opens a TCP connection per request; ours keeps up to eight.
        await provider.cache_async_session(ClientSession(raise_for_status=True, connector=TCPConnector(limit=8)))
        provider.global_ccip_read_enabled = False  # a contract must not make this node fetch a URL
        self._w3 = AsyncWeb3(provider, middleware=[])

    async def stop(self) -> None:
        """Close the session. Idempotent."""
        w3, self._w3 = self._w3, None
        if w3 is not None:
            await w3.provider.disconnect()

    @property
    def w3(self) -> AsyncWeb3[Any]:
        """Raises: ChainUnavailable before `start` and after `stop`."""
        if self._w3 is None:
            raise ChainUnavailable("the chain connection is not started")
        return self._w3

    async def once(self, call: Callable[[AsyncWeb3[Any]], Awaitable[T]]) -> T:
        """One try. Raises: ChainUnavailable, RpcRefused, CallReverted, ChainError."""
        w3 = self.w3
        try:
            return await call(w3)
        except ChainError:
            raise
        except Exception as exc:  # noqa: BLE001 - the adapter's edge: web3 lets KeyError and the like through
            self._raise_mapped(exc)

    async def read(self, call: Callable[[AsyncWeb3[Any]], Awaitable[T]]) -> T:
        """`once`, tried again while the node is unavailable, a bounded number of times with growing pauses."""
        for attempt in range(self.limits.attempts - 1):
            try:
                return await self.once(call)
            except ChainUnavailable:
                await self.clock.sleep(self.limits.pause(attempt))
        return await self.once(call)

    def _raise_mapped(self, exc: Exception) -> NoReturn:
        from aiohttp import ClientError, ClientResponseError
        from web3.exceptions import (
            BadResponseFormat,
            BlockNotFound,
            ContractLogicError,
            TransactionIndexingInProgress,
            Web3RPCError,
        )

        match exc:
            case ClientResponseError() if exc.status < 500 and exc.status not in (408, 425, 429):
                raise ChainError(f"the RPC at {self.name} answers HTTP {exc.status}: check its URL and key") from exc
            case ClientError() | OSError() | BadResponseFormat() | BlockNotFound() | TransactionIndexingInProgress():
                raise self._unavailable(type(exc).__name__) from exc
            case ContractLogicError():
                raise CallReverted(str(exc.message), _revert_data(exc.data)) from exc
            case Web3RPCError():
                self._raise_refusal(exc, (exc.rpc_response or {}).get("error"))
            case ValueError():  # a body that is no JSON: a proxy's error page
                raise self._unavailable("its answer is no JSON-RPC") from exc
            case _:
                raise ChainError(f"the RPC at {self.name} could not be understood: {exc!r}") from exc

    def _raise_refusal(self, exc: Exception, error: Any) -> NoReturn:
        message = str(error.get("message", error)) if isinstance(error, Mapping) else str(error or exc)
        code = error.get("code") if isinstance(error, Mapping) else None
        kind = Refusal.of(message)
        if kind in _PASSING or (kind is Refusal.OTHER and code in _PASSING_CODES):
            raise self._unavailable(message) from exc
        raise RpcRefused(self.name, kind, message) from exc

    def _unavailable(self, reason: str) -> ChainUnavailable:
        return ChainUnavailable(
            f"the RPC at {self.name} does not answer ({reason}); what was confirmed stays valid, try again later"
        )


def _revert_data(data: object) -> bytes:
    """Revert data as nodes wrap it: hex text, hex text in a mapping, or nothing."""
    if isinstance(data, Mapping):
        data = data.get("data")
    if not isinstance(data, str):
        return b""
    try:
        return bytes.fromhex(data.removeprefix("Reverted ").removeprefix("0x"))
    except ValueError:
        return b""
