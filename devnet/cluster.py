"""A whole market on this machine: Anvil, the contracts, providers, validators and a gateway, each a process of its own.

Everything listens on loopback and lies in one directory; leaving the context stops every process in order: gateway
(its last jobs are cancelled and paid), providers (they settle), validators, chain.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from devnet.anvil import Anvil, AnvilOptions
from devnet.deploy import COURT_RULES, DeployOptions, deploy, fund
from devnet.processes import START_SECONDS, NodeProcess, free_port
from node.chain.deployment import Deployment
from node.keys import load_or_create
from node.system import SystemClock
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Address, Wei

MODEL_DIR: Final = Path(__file__).parent / "model" / "tally-demo-4m"
MODEL_NAME: Final = "tally-demo-4m"

SCRYPT_N: Final = 8192
"""Work factor of the devnet's key files, which guard test money: 0.06 s an unlock instead of 1.7 s."""

EPOCH_SECONDS: Final = 1
"""The devnet's tariff epoch. Unit: s. A real one takes hours; a demo cannot wait for its first price to be in force."""

BLOCK_SECONDS: Final = 1
"""Interval of blocks that nobody asked for, where validators run: a draw waits for two. Unit: s."""

VALIDATOR_NICENESS: Final = 5
"""Added to the niceness of validators: what is checked later must not slow down what somebody waits for."""

SUBMIT_SECONDS: Final = int(START_SECONDS)
"""Submit window of the devnet's Court. Unit: s. A provider that was killed must be back and show its transcripts within
it, or it is found to withhold them; on busy cores a start takes most of this. Only who withholds makes others wait."""

DEPLOY: Final = DeployOptions(
    epoch_seconds=EPOCH_SECONDS, exit_delay=60, court=replace(COURT_RULES, submit_window=SUBMIT_SECONDS)
)
"""What the devnet's contracts are made with."""

STAKE: Final = 1_000 * WEI_PER_TALLY
VALIDATOR_STAKE: Final = 100 * WEI_PER_TALLY
FUNDS: Final = 10_000 * WEI_PER_TALLY
COIN: Final = 10**19


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """`home`: where everything lies. `slots`: per provider. `settle_interval`: as in the configuration file.

    `provider_config`: of every provider, `each_config` of the first, second, ... beyond that; `validator_config` of
    every validator. `module`: what runs instead of `node`. `adversaries`: nodes by
    name ("provider-3", "validator-4") that run as a cheat of devnet/adversaries, by its name.
    """

    home: Path
    providers: int = 2
    validators: int = 0
    slots: int = 8
    settle_interval: str = "10m"
    gateway_port: int = 0
    model_dir: Path = MODEL_DIR
    provider_config: dict[str, str] = field(default_factory=dict)
    client_config: dict[str, str] = field(default_factory=dict)
    validator_config: dict[str, str] = field(default_factory=dict)
    each_config: tuple[dict[str, str], ...] = ()
    deploy: DeployOptions = DEPLOY
    adversaries: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    module: str = "node"


class Cluster:
    """`async with Cluster(options) as cluster`: on entry everything serves; validators follow (`validators_ready`)."""

    def __init__(self, options: ClusterOptions) -> None:
        self.options = options
        self.home = options.home
        self.providers: list[NodeProcess] = []
        self.wallets: list[Signer] = []
        self.validators: list[NodeProcess] = []
        self.validator_wallets: list[Signer] = []
        self._judging: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """The gateway's base URL, ending in /v1."""
        return str(self.gateway.ready["url"])

    @property
    def api_key(self) -> str:
        return str(self.gateway.ready["api_key"])

    @property
    def env(self) -> dict[str, str]:
        return {"TALLY_SCRYPT_N": str(SCRYPT_N), "HF_HUB_OFFLINE": "1", **self.options.env}

    @property
    def nodes(self) -> list[NodeProcess]:
        """Every node, in the order in which they are stopped."""
        return [self.gateway, *self.providers, *self.validators]

    @property
    def names(self) -> dict[Address, str]:
        """Who a wallet of a provider or validator is."""
        return {wallet: name for name, wallet, _ in self.staked}

    @property
    def staked(self) -> list[tuple[str, Address, Wei]]:
        """Name, wallet and first stake of everybody who has one."""
        parties = [(n.name, w.address, Wei(STAKE)) for n, w in zip(self.providers, self.wallets, strict=True)]
        judges = zip(self.validators, self.validator_wallets, strict=True)
        return parties + [(n.name, w.address, Wei(VALIDATOR_STAKE)) for n, w in judges]

    @property
    def accounts(self) -> list[Address]:
        """Everybody who may hold TALLY, contracts included."""
        at = self.deployment
        people = (self.deployer, self.client_wallet, *self.wallets, *self.validator_wallets)
        return [*(p.address for p in people), at.escrow, at.registry, at.reservations, at.court]

    async def validators_ready(self) -> None:
        """Until every validator is enlisted and watches. Raises: ProcessFailed."""
        if self._judging is not None:
            await asyncio.shield(self._judging)

    async def _start(self) -> None:
        self._prepare_home()
        interval = BLOCK_SECONDS if self.options.validators else None
        self.anvil = Anvil(AnvilOptions(state=self.home / "anvil.json", block_seconds=interval))
        self._stack.callback(self.anvil.stop)
        await self._found()
        self.validators = [self._node(f"validator-{i + 1}", "validator") for i in range(self.options.validators)]
        await self._start_providers()
        if self.validators:
            self._judging = asyncio.create_task(self._start_validators())
            self._stack.push_async_callback(self._stop_judging)
        await self._start_gateway()

    async def _found(self) -> None:
        """Contracts, homes, wallets and test money."""
        clock = SystemClock()
        self.deployer = self.anvil.accounts[0]
        self.deployment: Deployment = await deploy(self.anvil.rpc_url, self.deployer, clock, self.options.deploy)
        self.deployment.save(self.home / "deployment.json")
        self.wallets = [self._make_home(f"provider-{i + 1}") for i in range(self.options.providers)]
        self.validator_wallets = [self._make_home(f"validator-{i + 1}") for i in range(self.options.validators)]
        self.client_wallet = self._make_home("gateway")
        accounts = [w.address for w in (*self.wallets, *self.validator_wallets, self.client_wallet)]
        await fund(self.anvil.rpc_url, self.deployment, self.deployer, clock, accounts, Wei(FUNDS), COIN)

    def _node(self, name: str, role: str) -> NodeProcess:
        """A node that is stopped when the cluster is left; the last one made is stopped first."""
        cheat = self.options.adversaries.get(name)
        node = NodeProcess(
            name,
            self.home / name,
            [role, "run"],
            self.env,
            ("devnet.adversaries", cheat) if cheat else (self.options.module,),
            VALIDATOR_NICENESS if role == "validator" else 0,
        )
        self._stack.push_async_callback(node.stop)
        return node

    async def _start_providers(self) -> None:
        for index in range(self.options.providers):
            name = f"provider-{index + 1}"
            listen = {"listen_host": "127.0.0.1", "listen_port": free_port()}
            self._configure(name, transport=listen, provider=self._sold(index))
            node = self._node(name, "provider")
            self.providers.append(node)
            node.start()
        await asyncio.gather(*(node.wait_ready() for node in self.providers))

    async def _start_validators(self) -> None:
        """Beside the gateway; a commitment made before they are enlisted could be drawn only when its block is old."""
        for node in self.validators:
            self._configure(
                node.name,
                transport={"bootstrap": self._peers(), "listen_host": "127.0.0.1", "listen_port": free_port()},
                validator={
                    "model_dirs": [str(self.options.model_dir)],
                    "stake": str(VALIDATOR_STAKE // WEI_PER_TALLY),
                    "poll": "1s",
                    "threads": 1,
                    **self.options.validator_config,
                },
            )
            node.start()
        await asyncio.gather(*(node.wait_ready() for node in self.validators))

    async def _stop_judging(self) -> None:
        """End the starting of validators, if it is still under way; the nodes themselves are stopped on their own."""
        assert self._judging is not None
        self._judging.cancel()
        await asyncio.gather(self._judging, return_exceptions=True)

    def _peers(self) -> list[str]:
        return [str(node.ready["addresses"][0]) for node in self.providers]

    async def _start_gateway(self) -> None:
        self.gateway = await self.start_client("gateway")

    async def start_client(self, name: str) -> NodeProcess:
        """A gateway whose home and wallet exist. Raises: ProcessFailed."""
        client = {"gateway_port": self.options.gateway_port, "deposit": "5", **self.options.client_config}
        self._configure(name, transport={"bootstrap": self._peers()}, client=client)
        gateway = self._node(name, "gateway")
        gateway.start()
        await gateway.wait_ready()
        return gateway

    async def add_client(self, name: str, tally: Wei) -> NodeProcess:
        """One more gateway, whose new wallet gets `tally` wei. Raises: ChainError, ProcessFailed."""
        wallet = self._make_home(name)
        clock = SystemClock()
        await fund(self.anvil.rpc_url, self.deployment, self.deployer, clock, [wallet.address], tally, COIN)
        return await self.start_client(name)

    def _sold(self, index: int) -> dict[str, object]:
        each = self.options.each_config
        return {
            "model_dir": str(self.options.model_dir),
            "model_name": MODEL_NAME if self.options.model_dir == MODEL_DIR else "",
            "slots": self.options.slots,
            "stake": str(STAKE // WEI_PER_TALLY),
            "settle_interval": self.options.settle_interval,
            "region": "devnet",
            **self.options.provider_config,
            **(each[index] if index < len(each) else {}),
        }

    def _prepare_home(self) -> None:
        """A devnet starts afresh: its chain does, so what older nodes remember would be of another world."""
        marker = self.home / "devnet.json"
        if marker.exists():
            shutil.rmtree(self.home)
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker.write_text("{}")

    def _make_home(self, name: str) -> Signer:
        """Data directory, password and wallet of one node."""
        home = self.home / name
        home.mkdir(mode=0o700)
        password = secrets.token_urlsafe(24)
        file = home / "password"
        file.touch(mode=0o600)
        file.write_text(password + "\n")
        return load_or_create(home / "keys", "wallet", password, scrypt_n=SCRYPT_N)

    def _configure(self, name: str, **tables: dict[str, object]) -> None:
        """Write one node's config.toml."""
        tables["chain"] = {"rpc_url": self.anvil.rpc_url, "deployment": str(self.home / "deployment.json")}
        lines = []
        for table, values in tables.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (self.home / name / "config.toml").write_text("\n".join(lines) + "\n")
