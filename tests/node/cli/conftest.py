"""A home of its own per test, and the command line in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from incentives.ledger import (
    AckReceived,
    AckSigned,
    JobClosed,
    JobOpened,
    ReceiptIssued,
    ReceiptVouched,
    Record,
    Role,
    SlotSeen,
    VoucherReceived,
)
from incentives.ledger import ChannelKey as Key
from node.chain.deployment import Deployment
from node.keys import save
from node.store.store import SqlStore
from protocol.bundle import Bundle
from protocol.messages import ReceiptAck
from protocol.packing import pack
from protocol.units import WEI_PER_TALLY, Address, FinishReason, JobId, Wei
from tests.node.cli.sticks import DOMAIN, NODE, SESSION, WALLET, make_bundle

Tally = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TALLY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALLY_SCRYPT_N", "1024")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home of mode 0700."""
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def tally(home: Path) -> Tally:
    """`tally("status", "--json")` in this process."""
    from node.cli.main import cli

    def invoke(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, ["--home", str(home), *args], input=stdin, prog_name="tally")

    return invoke


@pytest.fixture
def furnished(home: Path) -> Path:
    """A home with password, keys, deployment file, and a journal of one job seen from the client's side."""
    furnish(home, Role.CLIENT, make_bundle())
    return home


def furnish(home: Path, role: Role, bundle: Bundle) -> None:
    (home / "password").write_text("correct horse\n")
    (home / "password").chmod(0o600)
    for name, signer in (("wallet", WALLET), ("node", NODE), ("session", SESSION)):
        save(home / "keys", name, "correct horse", signer.secret, scrypt_n=1024)
    escrow = DOMAIN.verifying_contract
    token, registry, *others = (Address(bytes([n]) * 20) for n in range(1, 6))
    Deployment(DOMAIN.chain_id, token, escrow, registry, *others, 0).save(home / "deployment.json")
    asyncio.run(_fill(home, role, bundle))


async def _fill(home: Path, role: Role, bundle: Bundle) -> None:
    store = SqlStore(home / "journal.db")
    await store.open()
    assert bundle.tariff is not None
    kept = pack(bundle.tariff) + bundle.tariff_signature
    await store.put_value(f"tariff/{bundle.request.tariff_hash.hex()}", kept)
    assert bundle.profile is not None
    await store.put_value(f"profile/{bundle.request.profile_id.hex()}", pack(bundle.profile))
    for record in _records(role, bundle):
        await store.write(record)
    await store.close()


def _records(role: Role, bundle: Bundle) -> list[Record]:
    job_id = JobId(bundle.job_id)
    request, accept, signed = bundle.request, bundle.accept, bundle.request_signature
    slot = SlotSeen(Key(request.provider, request.client), WALLET.address, Wei(WEI_PER_TALLY), Wei(0), 0, 1)
    out: list[Record] = [
        slot,
        JobOpened(role, job_id, request, signed, accept, bundle.accept_signature, "tiny", bundle.options),
    ]
    for notch in bundle.notches:
        assert notch.voucher is not None
        if role is Role.CLIENT:
            signature = notch.receipt_signature
            out.append(ReceiptVouched(notch.digest, notch.receipt, signature, notch.voucher, notch.token_ids))
            if notch.receipt.is_final:
                out.append(AckSigned(job_id, ReceiptAck(notch.digest)))
        else:
            out.append(ReceiptIssued(notch.digest, notch.receipt))
            step = notch.receipt.step
            out.append(VoucherReceived(request.client, job_id, step, notch.voucher, notch.voucher_signature))
            if notch.receipt.is_final:
                out.append(AckReceived(job_id, ReceiptAck(notch.digest), notch.ack_signature))
    last = bundle.notches[-1].receipt
    return [*out, JobClosed(role, job_id, FinishReason(last.finish_reason), Wei(last.total), "")]
