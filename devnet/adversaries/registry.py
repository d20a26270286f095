"""Who there is: name, role, how it cheats, what it gains, what catches it, and how a process becomes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from protocol.errors import TallyError

Role = Literal["provider", "client", "validator"]

REPLAY: Final = "replay"
DOCUMENTS: Final = "documents"


class NoSuchAdversary(TallyError):
    """Nobody has that name; says who there is."""


@dataclass(frozen=True, slots=True)
class Adversary:
    """`where`: module and class or function of this package that makes a process it. `caught_by`: the check, in a few
    words. `kind`: `engine` where the cheat is in the computation, else `documents`. `honest`: no cheat at all, there to
    show that it passes."""

    name: str
    role: Role
    kind: Literal["engine", "documents", "conduct"]
    where: str
    how: str
    gain: str
    caught_by: str
    honest: bool = False

    def thing(self) -> Any:
        """The class or function. Imports its module."""
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(f"devnet.adversaries.{module}"), name)

    def install(self) -> None:
        """Make this process the adversary, before it parses its command line."""
        thing = self.thing()
        if not isinstance(thing, type):
            thing()
            return
        module = importlib.import_module(f"devnet.adversaries.{self.where.partition(':')[0]}")
        become: Callable[[type], None] = module.install
        become(thing)


def _engine(name: str, where: str, how: str, gain: str, caught_by: str, honest: bool = False) -> Adversary:
    return Adversary(name, "provider", "engine", f"engines:{where}", how, gain, caught_by, honest)


_MARGINS: Final = "margins: other tokens than the seed gives"
_BOTH: Final = "margins and fingerprints"
_PRINTS: Final = "fingerprints: log-probabilities and projections"

ADVERSARIES: Final = (
    _engine("small-model", "SmallModel", "serves half the layers", "half the cost", _BOTH),
    _engine(
        "prefill-trick",
        "PrefillTrick",
        "a small model writes, the big one reads it afterwards for true fingerprints",
        "decoding at the small model's cost",
        _MARGINS,
    ),
    _engine("layer-fewer", "LayerFewer", "leaves the middle layer out", "one layer's cost", _BOTH),
    _engine("int8-w8a8", "Int8W8A8", "weights and activations in 8 bits", "about half the cost", _PRINTS),
    _engine("int8-weights", "Int8Weights", "weights in 8 bits", "half the memory traffic", _PRINTS),
    _engine("int4", "Int4", "weights in 4 bits", "a quarter of the memory traffic", _BOTH),
    _engine(
        "wrong-temperature", "WrongTemperature", "draws 1.3 times as hot as asked", "one setting for all", _MARGINS
    ),
    _engine("own-rng", "OwnRng", "draws with a seed of its own", "picks the answer it likes", _MARGINS),
    _engine("truncated-prompt", "TruncatedPrompt", "reads the later half of the prompt", "half the prefill", _BOTH),
    _engine(
        "padded-output",
        "PaddedOutput",
        "goes on after the end",
        "more tokens to bill",
        "stop rule: a stop token inside the output",
    ),
    _engine(
        "altered-token",
        "AlteredToken",
        "puts the second best token in one place of 48",
        "words somebody paid for",
        _MARGINS,
    ),
    _engine(
        "lossy-speculation",
        "LossySpeculation",
        "keeps drafts that are nearly the argmax",
        "fewer big-model steps",
        _MARGINS,
    ),
    _engine(
        "late-and-silent",
        "LateAndSilent",
        "late with the first token, then silent",
        "oversells its slots",
        "the client: tier refund, stall, another provider goes on; no token is paid that was not vouched for",
    ),
    Adversary(
        "over-count",
        "provider",
        "documents",
        "providers:over_count",
        "counts 8 tokens more than it sent",
        "their price",
        "the client's own count, at the first receipt; in an audit the dossier (FORGED)",
    ),
    Adversary(
        "false-cached",
        "provider",
        "documents",
        "providers:false_cached",
        "charges a kept prompt as if read again",
        "the difference to the cached price",
        "the client: two receipts of one prompt (underreported cache hit)",
    ),
    Adversary(
        "overcharge",
        "provider",
        "documents",
        "providers:overcharge",
        "asks 1 % above its tariff",
        "the surcharge",
        "the client, at the first receipt; receipt and tariff prove it on chain (PRICE)",
    ),
    Adversary(
        "equivocation",
        "provider",
        "documents",
        "providers:equivocate",
        "signs two receipts of one step",
        "whichever is vouched for",
        "the client; the two documents prove it on chain (TWO_RECEIPTS)",
    ),
    Adversary(
        "omitted-receipt",
        "provider",
        "documents",
        "providers:omit",
        "leaves every other job out of its commitments",
        "jobs that no committee can draw",
        "the client: its receipt and the root's neighbours prove it on chain (MISSING)",
    ),
    Adversary(
        "withheld",
        "provider",
        "documents",
        "providers:withhold",
        "answers no request for a dossier",
        "nobody sees what it served",
        "the committee: not delivered in the whole submit window (WITHHELD)",
    ),
    Adversary(
        "squatter",
        "provider",
        "documents",
        "providers:squat",
        "offers in another wallet's name",
        "the other's customers",
        "the directory: the node key is not registered to that wallet",
    ),
    Adversary(
        "stops-vouchers",
        "client",
        "conduct",
        "clients:StopsVouchers",
        "reads an increment and never vouches",
        "one increment of 32 tokens",
        "the provider: nothing leaves before the voucher, and the loss is remembered",
    ),
    Adversary(
        "replays",
        "client",
        "conduct",
        "clients:Replays",
        "sends its first voucher for every receipt",
        "an increment",
        "the provider: a voucher must be worth more than the one before",
    ),
    Adversary(
        "overdraws",
        "client",
        "conduct",
        "clients:Overdraws",
        "promises twice its deposit",
        "an increment",
        "the provider: no voucher above confirmed escrow counts",
    ),
    Adversary(
        "races-exit",
        "client",
        "conduct",
        "clients:RacesExit",
        "asks for its deposit back while it buys",
        "what is not claimed in time",
        "the provider: claims within the exit delay and admits nothing that it could not claim",
    ),
    Adversary(
        "copies",
        "validator",
        "conduct",
        "validators:copy",
        "submits another member's digest and reveals its verdict as its own",
        "credit without work",
        "the Court: the digest holds the author's address and salt, so the reveal is refused; missed, no credit",
    ),
    Adversary(
        "rubber-stamps",
        "validator",
        "conduct",
        "validators:rubber_stamp",
        "says PASS and guesses the gaps",
        "credit without work",
        "gaps that match nobody's: no credit; and a penalty at the next guilty or forced case",
    ),
    Adversary(
        "no-model",
        "validator",
        "conduct",
        "validators:toss",
        "says PASS or IMPROBABLE at random, with gaps to match",
        "credit without work",
        "gaps that match nobody's: no credit, and a penalty whenever it is wrong",
    ),
    Adversary(
        "colludes",
        "validator",
        "conduct",
        "validators:collude",
        "runs the model and says the opposite of what it found",
        "a friend acquitted or a rival condemned",
        "the quorum: a third of a committee neither acquits nor condemns; a larger one decides, and it earns nothing",
    ),
    _engine(
        "coupled-speculation",
        "CoupledSpeculation",
        "drafts are kept where they are the very token",
        "sooner, and nobody is cheated",
        "passes: the output is the same",
        True,
    ),
)


def adversary(name: str) -> Adversary:
    """Raises: NoSuchAdversary."""
    for one in ADVERSARIES:
        if one.name == name:
            return one
    raise NoSuchAdversary(f"there is no adversary {name!r}; there are {', '.join(one.name for one in ADVERSARIES)}")


def engines() -> tuple[Adversary, ...]:
    """Those whose cheat a replay looks for, and the honest one beside them."""
    return tuple(one for one in ADVERSARIES if one.kind == "engine" and one.name != "late-and-silent")
