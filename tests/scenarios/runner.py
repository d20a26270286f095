"""Acts a scenario on a stage: each step is handed to the stage's method of the same name."""

from __future__ import annotations

import re
from typing import Any, Protocol

from tests.scenarios.vocabulary import Scenario


class Stage(Protocol):
    """`act_<step>` for each step; `begin` before the first, `rest` after the last."""

    async def begin(self) -> None:
        """Remember what everybody was paid so far."""

    async def rest(self) -> None:
        """Nothing runs any more; what is left over is an error."""


async def act(stage: Any, scenario: Scenario) -> None:
    """Raises: AssertionError naming the step that did not come true."""
    await stage.begin()
    for number, step in enumerate(scenario.steps, 1):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(step).__name__).lower()
        try:
            await getattr(stage, f"act_{name}")(step)
        except (AssertionError, TimeoutError) as exc:
            raise AssertionError(f"{scenario.name}, step {number}, {step}: {exc or type(exc).__name__}") from exc
    await stage.rest()
