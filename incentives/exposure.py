"""How much stake makes cheating lose, and how much unsettled value a stake covers.

A provider that cheats in every job gains g each, is audited with probability q per job, found with probability d per
audit, and goes on for D more jobs until the verdict lands: it gains g * (1 / (q d) + D) in the mean before it loses its
stake. A safety factor phi (2 to 3) covers luck and what it saves beyond g. Source: inspection games (Avenhaus et al.).
"""

from __future__ import annotations

from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.units import BPS, Wei

PHI_BPS: Final = 30_000
"""Safety factor x 10^4 that this house assumes: 3. Doubling it doubles the stake per unsettled value."""


def needed_stake(gain: Wei, rate_bps: int, detection_bps: int, jobs_before_verdict: int, phi_bps: int = PHI_BPS) -> Wei:
    """Least stake plus unpaid escrow: ceil(phi * g * (1 / (q d) + D)).

    `gain`: wei gained per cheated job. `rate_bps`: jobs audited, of 10^4. `detection_bps`: audits of a cheated job that
    find it, of 10^4. `jobs_before_verdict`: cheated jobs between the first one found and the slash.
    Raises: FieldOutOfRange.
    """
    for name, value, least, most in (
        ("gain", gain, 0, None),
        ("rate_bps", rate_bps, 1, BPS),
        ("detection_bps", detection_bps, 1, BPS),
        ("jobs_before_verdict", jobs_before_verdict, 0, None),
        ("phi_bps", phi_bps, BPS, None),
    ):
        if value < least or (most is not None and value > most):
            raise FieldOutOfRange("Exposure", name, value)
    chance = rate_bps * detection_bps
    return Wei(-(-phi_bps * gain * (BPS * BPS + jobs_before_verdict * chance) // (BPS * chance)))


def unsettled_cap(stake: Wei, phi_bps: int = PHI_BPS) -> Wei:
    """Most wei of work that may stand vouched for and unsettled, or unjudged, behind `stake`: floor(stake / phi).

    Raises: FieldOutOfRange.
    """
    if stake < 0:
        raise FieldOutOfRange("Exposure", "stake", stake)
    if phi_bps < BPS:
        raise FieldOutOfRange("Exposure", "phi_bps", phi_bps)
    return Wei(stake * BPS // phi_bps)


def stake_for(unsettled: Wei, phi_bps: int = PHI_BPS) -> Wei:
    """Least stake under which `unsettled` wei may stand open: ceil(unsettled * phi). Raises: FieldOutOfRange."""
    if unsettled < 0:
        raise FieldOutOfRange("Exposure", "unsettled", unsettled)
    if phi_bps < BPS:
        raise FieldOutOfRange("Exposure", "phi_bps", phi_bps)
    return Wei(-(-unsettled * phi_bps // BPS))
