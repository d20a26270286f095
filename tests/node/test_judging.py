"""What a replay that fails says about the job: only what no machine could have served is held against its provider."""

from __future__ import annotations

from typing import Any

import pytest

from node.judging import judge
from node.ports import Replay, ReplayRequest, Unreplayable
from protocol.dossier import examine
from protocol.units import AuditOutcome
from tests.protocol.dossiers import NODE, Case, served
from tests.protocol.jobs import DOMAIN
from tests.twins.engine_twin import EngineTwin
from tests.twins.replayer_twin import ReplayerTwin


class Fails(ReplayerTwin):
    def __init__(self, error: Exception) -> None:
        super().__init__(EngineTwin())
        self._error = error

    async def replay(self, request: ReplayRequest) -> Replay:
        raise self._error


async def found(case: Case, error: Exception) -> Any:
    shown = case.dossier
    examined = examine(shown, case.entry, DOMAIN, (NODE.address,), case.profile)
    return await judge(case.entry.job_id, examined, case.profile, Fails(error))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unreplayable("its grammar cannot be followed on this machine"), AuditOutcome.PASS),
        (ValueError("token id 9999999 is outside the vocabulary"), AuditOutcome.FORGED),
    ],
)
async def test_a_job_is_forged_only_where_no_machine_could_have_served_it(
    error: Exception, outcome: AuditOutcome
) -> None:
    judged = await found(served(40), error)
    assert judged.finding.outcome is outcome and not judged.gaps
