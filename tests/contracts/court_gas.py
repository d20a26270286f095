"""What a case costs on chain: whole transactions of a small and of a full committee, base fee and calldata included.

The beacon is a block hash, which differs from run to run, and with it who is drawn: so these numbers agree within a
few hundredths, not to the unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eth_hash.auto import keccak
from eth_utils.address import to_checksum_address
from web3 import HTTPProvider, Web3
from web3.contract.contract import Contract, ContractFunction
from web3.types import Nonce, RPCEndpoint
from web3.utils.address import get_create_address

from devnet.anvil import Anvil, AnvilOptions
from incentives.audit_draw import case_key
from protocol.eip712 import digest, fields_of, hash_struct
from protocol.merkle import Entry, root
from protocol.messages import Commitment, NodeKeyConsent, Profile, Tariff, Verdict, WorkReceipt
from protocol.signing import Signer
from protocol.units import Address, AuditOutcome, Digest, JobId, Wei
from tests.contracts.conftest import WEI, Chain, deploy

SMALL, FULL = 4, 40
"""Validators enlisted, of whom 3 and 21 are drawn first."""

START = 2_000_000_000
"""Unix second of the chain's first block: times are stored and signed, and their size must not change."""

STAKE, PENALTY, BOND = 1_000 * WEI, 20 * WEI, 10 * WEI
EPOCH, WINDOW = 100, 600
GAPS = Digest(b"".join((1_000 + 17 * i).to_bytes(2, "big") for i in range(16)))
UNTIL = (1 << 64) - 1
LATER = 1_000
"""Epoch of the measured case, after those that filled storage."""


def filled(struct: Any, **values: Any) -> Any:
    """A document of fixed patterns and zeros but for `values`."""
    width = {"address": 20, "bytes32": 32}

    def pattern(name: str, sol: str) -> Any:
        if sol == "bool":
            return False
        return keccak(name.encode())[: width[sol]] if sol in width else 0

    return struct(**{name: values.get(name, pattern(name, sol)) for name, sol in fields_of(struct)})


def words(document: Any) -> tuple[Any, ...]:
    """A document as web3 takes it."""
    struct: Any = type(document)
    values = ((getattr(document, name), sol) for name, sol in fields_of(struct))
    return tuple(to_checksum_address(v) if sol == "address" else v for v, sol in values)


def key_of(number: int) -> Signer:
    """Node key of account `number`."""
    return Signer.from_secret(keccak(b"node key %d" % number))


@dataclass(frozen=True, slots=True)
class Stage:
    """A Court whose account 1 provides and whose accounts from 2 on judge."""

    chain: Chain
    registry: Contract
    court: Contract
    profile_id: Digest

    def wallet(self, number: int) -> Address:
        return Address(bytes.fromhex(self.chain.account(number)[2:]))

    def gas(self, call: ContractFunction, sender: int = 0) -> int:
        return int(self.chain.send(call, sender)["gasUsed"])

    def settle(self, number: int) -> None:
        """A node key and stake."""
        consent = NodeKeyConsent(self.wallet(number), UNTIL)
        key = key_of(number)
        account, everything = self.chain.account(number), 2**256 - 1
        functions = self.registry.functions
        self.gas(self.chain.token.functions.transfer(account, STAKE))
        self.gas(self.chain.token.functions.approve(self.registry.address, everything), number)
        signature = key.sign(self.chain.domain, consent)
        self.gas(functions.register(to_checksum_address(key.address), UNTIL, signature), number)
        self.gas(functions.stake(STAKE), number)

    def wait(self, seconds: int) -> None:
        self.chain.web3.provider.make_request(RPCEndpoint("evm_increaseTime"), [seconds])
        self.mine(1)

    def mine(self, count: int) -> None:
        self.chain.web3.provider.make_request(RPCEndpoint("anvil_mine"), [count])

    def commit(self, epoch: int) -> tuple[Digest, int]:
        """Key of a commitment to one job, and the gas of making it."""
        node = root([Entry(JobId(keccak(b"job")), Digest(keccak(b"receipt")), Wei(10**16 + 1))])
        provider = self.wallet(1)
        made = Commitment(provider, self.profile_id, epoch, node.hash, 1, node.total, Digest(keccak(b"lot")))
        signature = key_of(1).sign(self.chain.domain, made)
        gas = self.gas(self.court.functions.commit(words(made), signature))
        self.mine(2)
        return case_key(provider, self.profile_id, epoch), gas


def stage(web3: Web3, validators: int, committee: int) -> Stage:
    """Everything deployed, `validators` enlisted."""
    owner = web3.eth.accounts[0]
    token = deploy(web3, "TallyToken", owner, owner, 1_000_000 * WEI)
    escrow = deploy(web3, "Escrow", token.address, 3600)
    chain = Chain(web3, token, escrow, escrow)
    there = get_create_address(owner, Nonce(web3.eth.get_transaction_count(owner) + 2))
    windows = (3600, 3600, 3600)
    registry = deploy(web3, "Registry", token.address, escrow.address, there, STAKE, 86_400, 60, *windows)
    faults = deploy(web3, "Faults", registry.address, escrow.address, there)
    rules = (EPOCH, WINDOW, WINDOW, WINDOW, WINDOW, (committee,) * 3, 0, STAKE, PENALTY, BOND)
    court = deploy(web3, "Court", registry.address, escrow.address, token.address, faults.address, rules)
    assert court.address == there
    profile = filled(Profile, flag_ppm=1_000)
    made = Stage(chain, registry, court, Digest(hash_struct(profile)))
    made.gas(court.functions.registerProfile(words(profile)))
    made.settle(1)
    for number in range(2, 2 + validators):
        made.settle(number)
        made.gas(court.functions.enlist(), number)
    return made


def verdict_of(case_id: Digest, member: Address, outcome: AuditOutcome) -> Verdict:
    """1,000 tokens, one flag; for IMPROBABLE 300, of which 50 in a job of 200 tokens."""
    guilty = outcome is AuditOutcome.IMPROBABLE
    return filled(  # type: ignore[no-any-return]
        Verdict,
        validator=member,
        case_id=case_id,
        outcome=int(outcome),
        tokens=1_000,
        flags=300 if guilty else 1,
        worst_tokens=200,
        worst_flags=50 if guilty else 1,
        gaps=GAPS,
    )


def judge(stage: Stage, case_id: Digest, outcome: AuditOutcome) -> tuple[list[int], list[int], int]:
    """Gas of each submission, of each reveal, and of counting them. Members come in the order of their seats."""
    seats = stage.court.functions.seatsOf(case_id, 0).call()
    numbers = [stage.chain.web3.eth.accounts.index(seat[0]) for seat in seats]
    verdicts = [verdict_of(case_id, stage.wallet(number), outcome) for number in numbers]
    functions = stage.court.functions
    submits = [
        stage.gas(functions.submit(case_id, digest(stage.chain.domain, verdict)), number)
        for number, verdict in zip(numbers, verdicts, strict=True)
    ]
    reveals = [
        stage.gas(functions.reveal(words(verdict)), number) for number, verdict in zip(numbers, verdicts, strict=True)
    ]
    return submits, reveals, stage.gas(functions.conclude(case_id))


def measure_price(stage: Stage) -> int:
    """Gas of proving that a receipt charges a wei too much."""
    now = int(stage.chain.web3.eth.get_block("latest")["timestamp"]) + 120
    sheet = filled(
        Tariff,
        provider=stage.wallet(1),
        sequence=1,
        profile_id=stage.profile_id,
        prompt_price=10**12 + 1,
        standard_bps=10_000,
        long_context_threshold=1_000_000,
        base_min_bps=10_000,
        base_max_bps=20_000,
        valid_from=now,
        valid_until=now + 10_000,
    )
    domain, key = stage.chain.domain, key_of(1)
    stage.gas(stage.registry.functions.logTariff(words(sheet), key.sign(domain, sheet)))
    lines = 1_000 * (10**12 + 1)
    receipt = filled(
        WorkReceipt,
        provider=stage.wallet(1),
        tier=1,
        base_bps=10_000,
        reservation=b"\0" * 32,
        prompt_tokens=1_000,
        received_at=now * 1000,
        prompt_line=lines,
        multiplier=10**16,
        total=lines + 1,
        tariff_hash=digest(domain, sheet),
    )
    types = [f"({','.join(sol for _, sol in fields_of(struct))})" for struct in (Tariff, WorkReceipt)]
    values = [words(sheet), words(receipt), key.sign(domain, receipt)]
    proof = stage.chain.web3.codec.encode([*types, "bytes"], values)
    return stage.gas(stage.court.functions.prove(2, proof))


def measure_committee(stage: Stage, label: str, validators: int) -> dict[str, int]:
    """Gas of a case that passes, once every validator was credited before: the first time pays for its storage."""
    credits = stage.court.functions.creditsOf
    epoch = 1
    while any(credits(stage.chain.account(number)).call()[0] == 0 for number in range(2, 2 + validators)):
        case_id, _ = stage.commit(epoch)
        stage.gas(stage.court.functions.draw(case_id))
        judge(stage, case_id, AuditOutcome.PASS)
        epoch += 1
    case_id, commit = stage.commit(LATER)
    out = {f"commit_{label}": commit, f"draw_{label}": stage.gas(stage.court.functions.draw(case_id))}
    submits, reveals, conclude = judge(stage, case_id, AuditOutcome.PASS)
    members = len(submits)
    out |= {f"submit_{label}_first": submits[0], f"submit_{label}_last": submits[-1]}
    out |= {f"reveal_{label}_first": reveals[0], f"reveal_{label}_last": reveals[-1]}
    out[f"conclude_pass_{label}"] = conclude
    out[f"per_verdict_submit_reveal_conclude_{label}"] = -(-(sum(submits) + sum(reveals) + conclude) // members)
    return out


def measure_court() -> dict[str, int]:
    """Gas of whole transactions, by name."""
    with Anvil(AnvilOptions(accounts=FULL + 2, timestamp=START)) as anvil:
        web3 = Web3(HTTPProvider(anvil.rpc_url))
        small = stage(web3, SMALL, 3)
        out = measure_committee(small, "3_of_4", SMALL)
        out["prove_price"] = measure_price(small)
        case_id, _ = small.commit(LATER + 1)
        small.gas(small.court.functions.draw(case_id))
        _, reveals, conclude = judge(small, case_id, AuditOutcome.IMPROBABLE)
        out |= {"reveal_improbable_3_of_4": reveals[0], "conclude_improbable_3_of_4": conclude}
        small.wait(WINDOW)
        out["execute_3_of_4"] = small.gas(small.court.functions.execute(case_id))
        return out | measure_committee(stage(web3, FULL, 21), "21_of_40", FULL)
