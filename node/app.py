"""The composition root: builds each role from the configuration, wires the ports, and takes all down again.

Only this file knows which class stands behind which port. Each `*_app` is an async context manager: entered, the role
serves; left, it drains, settles and closes in the reverse order, also when starting failed half way.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.background import log_bug
from node.config import NodeConfig
from node.keys import load_or_create, read_password
from node.ports import (
    Chain,
    ChainError,
    ChainUnavailable,
    Engine,
    Marketplace,
    ModelCard,
    PeerAddress,
    Store,
    Transport,
)
from node.system import SystemClock, SystemEntropy
from protocol.errors import TallyError
from protocol.units import Digest, Wei

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.chain.court import Web3Court
    from node.client.claims import Claims
    from node.client.oversight import Oversight
    from node.client.router import Router
    from node.discovery.directory import OfferDirectory
    from node.gateway.server import GatewayServer
    from node.provider.provider import Provider
    from node.validator.shelf import Volume
    from node.validator.validator import Validator
    from protocol.messages import Profile
    from protocol.signing import Signer

MIN_STAKE = Wei(1)
"""Stake below which a client ignores an offer. Unit: wei. The Registry's own minimum is what keeps strangers out."""

CONTROL_SOCKET = "control.sock"

CHAIN_RETRY_S = 2.0
"""Pause between attempts to reach an RPC that did not answer at the start. Unit: s."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread of a provider may keep the interpreter while another waits. Unit: s. The engine's thread and the
event loop share it; at Python's 5 ms a small torch call may wait that long behind the loop."""

log = logging.getLogger("tally.app")


@dataclass(frozen=True, slots=True)
class ProviderApp:
    """A serving provider."""

    provider: Provider
    store: Store
    chain: Web3Chain
    transport: Transport
    wallet: Signer
    node_key: Signer
    home: Path


@dataclass(frozen=True, slots=True)
class ValidatorApp:
    """A validator that follows the Court."""

    validator: Validator
    store: Store
    chain: Web3Chain
    court: Web3Court
    transport: Transport
    wallet: Signer
    node_key: Signer


@dataclass(frozen=True, slots=True)
class ClientApp:
    """A client that can run jobs. `oversight` None: it was turned off."""

    marketplace: Router
    store: Store
    chain: Web3Chain
    transport: Transport
    directory: OfferDirectory
    wallet: Signer
    session: Signer
    claims: Claims
    oversight: Oversight | None


@dataclass(frozen=True, slots=True)
class GatewayApp:
    """A client with the OpenAI-compatible server before it. `url`: ends in /v1."""

    client: ClientApp
    server: GatewayServer
    url: str


def password_of(config: NodeConfig) -> bytes:
    """The key files' password. Raises: KeystoreError naming the file and how to make it."""
    return read_password(config.password_file or config.home / "password")


def bootstrap_peers(config: NodeConfig) -> tuple[PeerAddress, ...]:
    """`/ip4/1.2.3.4/tcp/4001/p2p/16Uiu2...` -> where and who."""
    peers = []
    for text in config.transport.bootstrap:
        address, _, peer_id = text.rpartition("/p2p/")
        peers.append(PeerAddress(peer_id, (address,)))
    return tuple(peers)


async def _key(config: NodeConfig, name: str) -> Signer:
    """Unlocking takes a second of CPU by design, so it leaves the event loop."""
    return await asyncio.to_thread(load_or_create, config.keys_dir, name, password_of(config))


@asynccontextmanager
async def journal(config: NodeConfig, *, serving: bool = False) -> AsyncIterator[Store]:
    """The store alone; backed up when it is opened for `serving`, not when a command only looks.

    Raises: StoreError, also when a node of this home is running.
    """
    from node.store.store import SqlStore

    store = SqlStore(config.journal, backups=serving)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def wallet_chain(config: NodeConfig) -> AsyncIterator[tuple[Web3Chain, Signer]]:
    """The chain, acting for this home's wallet."""
    wallet = await _key(config, "wallet")
    async with _chain(config, wallet) as chain:
        yield chain, wallet


@asynccontextmanager
async def reading_chain(config: NodeConfig) -> AsyncIterator[Web3Chain]:
    """The chain to look at: no key is opened. Raises: ChainError."""
    async with _chain(config, None) as chain:
        yield chain


async def node_key_of(config: NodeConfig) -> Signer:
    """The key this home's documents are signed with, made when there is none. Raises: KeystoreError."""
    return await _key(config, "node")


@asynccontextmanager
async def _chain(config: NodeConfig, wallet: Signer | None, *, patient: bool = False) -> AsyncIterator[Web3Chain]:
    """`patient`: serve even while the RPC does not answer. Raises: ChainUnavailable unless patient, ChainError."""
    from node.chain.chain import Web3Chain
    from node.chain.deployment import Deployment

    deployment = Deployment.load(config.chain.deployment)
    chain = Web3Chain(config.chain.rpc_url, deployment, wallet, clock=SystemClock())
    try:
        await chain.start()
    except ChainUnavailable as exc:
        if not patient:
            raise
        log.warning("starting without the chain, which is tried again every %g s: %s", CHAIN_RETRY_S, exc)
        retries = [_keep_connecting(chain)]
    else:
        retries = []
    try:
        async with _background(*retries):
            yield chain
    finally:
        await chain.stop()


async def _keep_connecting(chain: Web3Chain) -> None:
    """Until the RPC answers for the right chain. A wrong one is logged and not used."""
    while True:
        await asyncio.sleep(CHAIN_RETRY_S)
        try:
            return await chain.start()
        except ChainUnavailable as exc:
            log.debug("the chain does not answer yet: %s", exc)
        except ChainError as exc:
            log.error("the RPC is not of our chain, nothing is settled until it is: %s", exc)


def court_of(chain: Web3Chain) -> Web3Court:
    """The Court of the chain's deployment, acting for the chain's wallet."""
    from node.chain.court import Web3Court

    return Web3Court(chain, SystemClock())


def _transport(config: NodeConfig, secret: bytes, *, listen: bool) -> Transport:
    """`listen` False: a client that only dials takes a free port on loopback."""
    from node.transport.libp2p import Libp2pTransport

    wanted = config.transport
    if not listen:
        return Libp2pTransport(secret, "127.0.0.1", 0, (), wanted.bootstrap)
    return Libp2pTransport(secret, wanted.listen_host, wanted.listen_port, wanted.announce, wanted.bootstrap)


@asynccontextmanager
async def _background(*work: Any) -> AsyncIterator[None]:
    """Run coroutines until the block is left. One that a bug ends before is in the log."""
    tasks = [asyncio.create_task(item, name=item.__qualname__) for item in work]
    for task in tasks:
        task.add_done_callback(log_bug)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _control(config: NodeConfig, routes: Mapping[str, Any]) -> AsyncIterator[None]:
    """The local socket that `tally status` and its like talk to."""
    from node.gateway.control import ControlServer

    server = ControlServer(config.home / CONTROL_SOCKET, routes)
    await server.start()
    try:
        yield
    finally:
        await server.stop()


@asynccontextmanager
async def _serving(config: NodeConfig, model_dir: Path, model: str) -> AsyncIterator[tuple[Engine, ModelCard]]:
    """The engine that the configuration describes, started, and the card of what it serves under the name `model`.

    Raises: ModelError; UrlRefused, UpstreamError where another server computes.
    """
    wanted = config.provider
    engine: Engine
    card_of: Callable[[str, Profile, int], ModelCard]
    if wanted.upstream:
        from node.engine.declared import declared_card, declared_profile, read_declared
        from node.upstream.engine import ModelTexts, UpstreamEngine
        from node.upstream.settings import UpstreamSettings

        declared = await asyncio.to_thread(read_declared, model_dir)
        texts = ModelTexts(declared.tokenizer_json, declared.eos_ids, declared.bos_id, declared.context)
        settings = UpstreamSettings(
            wanted.upstream,
            wanted.upstream_model,
            wanted.upstream_key_file,
            wanted.slots,
            wanted.max_queue,
            allow_private=wanted.upstream_private,
        )
        engine = UpstreamEngine(
            settings, texts, lambda able: declared_profile(declared, able.model, ids_shown=able.ids_out), SystemClock()
        )
        card_of = partial(declared_card, declared)
    else:
        from node.engine.card import load_card
        from node.engine.engine import TorchEngine

        engine = TorchEngine(
            model_dir,
            wanted.dtype,
            wanted.slots,
            kv_budget_bytes=wanted.kv_budget,
            threads=wanted.threads or None,
            max_queue=wanted.max_queue,
            device=wanted.device,
            compile_option=wanted.compile,
        )
        card_of = partial(load_card, model_dir)
    await engine.start()
    try:
        yield engine, card_of(model, engine.profile, engine.max_context)
    finally:
        await engine.stop()


@asynccontextmanager
async def provider_app(config: NodeConfig) -> AsyncIterator[ProviderApp]:
    """Serve. Raises: ConfigError, KeystoreError, StoreError, ChainError, ModelError, TransportError."""
    from incentives.settlement import SettlePolicy
    from node.books import books_routes
    from node.discovery.directory import OfferDirectory
    from node.provider.offering import OfferTexts
    from node.provider.provider import Provider, ProviderSettings
    from node.routes import journal_routes, tariff_routes
    from node.tariff_sheet import wanted_tariff

    wanted = config.provider
    if wanted.model_dir is None:
        raise TallyError("no model to serve: name a Hugging Face model directory with --model DIR")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    clock, entropy = SystemClock(), SystemEntropy()
    wallet, node_key = await _key(config, "wallet"), await _key(config, "node")
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(journal(config, serving=True))
        chain = await stack.enter_async_context(_chain(config, wallet, patient=True))
        model = wanted.model_name or wanted.model_dir.resolve().name
        engine, card = await stack.enter_async_context(_serving(config, wanted.model_dir, model))
        transport = _transport(config, node_key.secret, listen=True)
        directory = OfferDirectory(transport, chain, clock, bootstrap_peers(config), MIN_STAKE)
        directory.start_serving()
        settings = ProviderSettings(
            wanted_tariff(config, wallet.address, card.profile_id),
            OfferTexts(model, wanted.region, wanted.retention_hours, min(wanted.max_output, engine.max_context)),
            SettlePolicy(wanted.settle_interval, wanted.settle_value, wanted.settle_dust),
            wanted.stake,
            float(wanted.drain),
            wanted.appeal,
        )
        ports = (store, chain, transport, directory, clock, entropy)
        provider = Provider(settings, node_key, engine, card, *ports, court_of(chain))
        await transport.start()
        stack.push_async_callback(transport.stop)
        stack.push_async_callback(provider.stop)
        await provider.start()
        await stack.enter_async_context(_background(directory.run()))

        async def status(_: dict[str, Any]) -> dict[str, Any]:
            return {**await provider.status(), "peer_id": transport.peer_id, "chain": await chain_status(chain)}

        routes = {**journal_routes(store, chain.domain), **books_routes(store), **tariff_routes(provider.offering)}
        await stack.enter_async_context(_control(config, {"status": status, **routes}))
        yield ProviderApp(provider, store, chain, transport, wallet, node_key, config.home)


def _volumes(config: NodeConfig) -> dict[Digest, Volume]:
    """The models that a validator can replay, by profile id. Reads every weight file once. Raises: ModelError."""
    from node.engine.profile import profile_of
    from node.engine.replay import TorchReplayer
    from node.validator.shelf import Volume
    from protocol.eip712 import hash_struct

    wanted, out = config.validator, {}
    for model_dir in wanted.model_dirs:
        profile = profile_of(model_dir, wanted.dtype, wanted.device)
        make = partial(TorchReplayer, model_dir, wanted.dtype, wanted.threads or None, wanted.device)
        out[hash_struct(profile)] = Volume(model_dir.resolve().name, profile, make)
    return out


@asynccontextmanager
async def validator_app(config: NodeConfig) -> AsyncIterator[ValidatorApp]:
    """Judge. Raises: ConfigError, KeystoreError, StoreError, ChainError, ModelError, TransportError."""
    from node.chain.court import encode_proof
    from node.discovery.directory import OfferDirectory
    from node.routes import journal_routes
    from node.validator.shelf import Shelf
    from node.validator.validator import Validator, ValidatorSettings

    wanted = config.validator
    if not wanted.model_dirs:
        raise TallyError("no model to replay: name each Hugging Face model directory with --model DIR")
    clock, entropy = SystemClock(), SystemEntropy()
    wallet, node_key = await _key(config, "wallet"), await _key(config, "node")
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(journal(config, serving=True))
        chain = await stack.enter_async_context(_chain(config, wallet, patient=True))
        court = court_of(chain)
        shelf = Shelf(await asyncio.to_thread(_volumes, config), clock)
        transport = _transport(config, node_key.secret, listen=True)
        directory = OfferDirectory(transport, chain, clock, bootstrap_peers(config), MIN_STAKE)
        directory.start_serving()
        settings = ValidatorSettings(wanted.stake, float(wanted.poll), wanted.max_audits, wanted.auto_draw)
        ports = (store, chain, court, transport, directory, clock, entropy)
        validator = Validator(settings, wallet.address, node_key, shelf, *ports, encode_proof)
        await transport.start()
        stack.push_async_callback(transport.stop)
        stack.push_async_callback(validator.stop)
        await validator.start()
        await stack.enter_async_context(_background(directory.run()))

        async def status(_: dict[str, Any]) -> dict[str, Any]:
            return {**await validator.status(), "peer_id": transport.peer_id, "chain": await chain_status(chain)}

        await stack.enter_async_context(_control(config, {"status": status, **journal_routes(store, chain.domain)}))
        yield ValidatorApp(validator, store, chain, court, transport, wallet, node_key)


async def chain_status(chain: Chain) -> dict[str, object]:
    """What `status` says of the chain: its head, or why it does not answer."""
    try:
        async with asyncio.timeout(3):
            head = await chain.head()
    except (TallyError, TimeoutError) as exc:
        return {"reachable": False, "error": str(exc) or "no answer in 3 s"}
    return {"reachable": True, "block": head.number, "timestamp": head.timestamp}


@asynccontextmanager
async def client_app(config: NodeConfig) -> AsyncIterator[ClientApp]:
    """Be a client. Raises: ConfigError, KeystoreError, StoreError, ChainError, TransportError."""
    from node.chain.court import encode_proof
    from node.client.accounts import Accounts, SpendingLimits
    from node.client.claims import Claims
    from node.client.oversight import Oversight
    from node.client.router import ClientSettings, Router
    from node.discovery.directory import OfferDirectory

    clock, entropy = SystemClock(), SystemEntropy()
    wallet, session = await _key(config, "wallet"), await _key(config, "session")
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(journal(config, serving=True))
        chain = await stack.enter_async_context(_chain(config, wallet, patient=True))
        # A fresh network identity at every start: a client's peer id need not tie its sessions together.
        transport = _transport(config, entropy.token(32), listen=False)
        directory = OfferDirectory(transport, chain, clock, bootstrap_peers(config), MIN_STAKE)
        directory.start_serving()
        limits = SpendingLimits(config.client.deposit, config.client.max_total)
        accounts = Accounts(session, wallet.address, limits, store, chain)
        bought = config.client
        settings = ClientSettings(bought.max_price, float(bought.stall), bought.keep_content, bought.retention_hours)
        router = Router(settings, accounts, store, transport, directory, clock, entropy)
        await router.start()
        await transport.start()
        stack.push_async_callback(transport.stop)
        stack.push_async_callback(router.stop)
        await stack.enter_async_context(_background(directory.run()))
        court, oversight = court_of(chain), None
        claims = Claims(wallet.address, store, chain, court)
        if bought.oversight:
            oversight = Oversight(claims, store, chain, court, transport, directory, clock, entropy, encode_proof)
            oversight.start()
            stack.push_async_callback(oversight.stop)
        yield ClientApp(router, store, chain, transport, directory, wallet, session, claims, oversight)


@asynccontextmanager
async def _with_exchange(config: NodeConfig, market: Marketplace) -> AsyncIterator[Marketplace]:
    """The market with the way out that the configuration allows, if any. Raises: TallyError saying what is missing."""
    wanted = config.exchange
    if not wanted.enabled:
        yield market
        return
    missing = [name for name in ("url", "tally_usd", "ceiling") if not getattr(wanted, name)]
    if missing or wanted.tally_usd is None:
        needed = ", ".join(f"exchange.{name}" for name in missing)
        raise TallyError(f"the exchange is enabled and lacks {needed}: set them, or set exchange.enabled to false")
    from node.upstream.exchange import Exchange
    from node.upstream.platform import Platform
    from node.upstream.settings import ExchangeSettings

    settings = ExchangeSettings(
        wanted.url,
        wanted.ceiling,
        wanted.tally_usd,
        config.client.max_price,
        wanted.key_file,
        wanted.models,
        allow_private=wanted.private,
    )
    async with Platform(settings) as platform:
        yield Exchange(market, platform, settings, SystemClock())


@asynccontextmanager
async def gateway_app(config: NodeConfig) -> AsyncIterator[GatewayApp]:
    """Be a client behind an OpenAI-compatible server. Raises: what `client_app` raises, GatewayError."""
    from node.gateway.auth import ApiKeys
    from node.gateway.server import GatewayServer
    from node.routes import claim_routes, journal_routes, market_routes

    clock, entropy = SystemClock(), SystemEntropy()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_app(config))
        chain = client.chain
        keys = ApiKeys(config.home / "api_keys.json", clock=clock, entropy=entropy)
        marketplace = await stack.enter_async_context(_with_exchange(config, client.marketplace))
        server = GatewayServer(
            marketplace,
            host=config.client.gateway_host,
            port=config.client.gateway_port,
            api_keys=keys,
            clock=clock,
            entropy=entropy,
            max_price=config.client.max_price,
        )
        port = await server.start()
        stack.push_async_callback(server.stop)
        url = f"http://{config.client.gateway_host}:{port}/v1"

        async def status(_: dict[str, Any]) -> dict[str, Any]:
            watch = client.oversight
            seen = {} if watch is None else {"oversight": watch.status()}
            return {**await marketplace.status(), **seen, "url": url, "chain": await chain_status(chain)}

        market = market_routes(client.marketplace, chain, client.marketplace.card_of)
        routes = {**journal_routes(client.store, chain.domain), **claim_routes(client.claims), **market}
        await stack.enter_async_context(_control(config, {"status": status, **routes}))
        yield GatewayApp(client, server, url)
