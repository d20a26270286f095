"""How fast steps have been, and from that how long a request would wait for its first token if it came now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from node.engine.generation import Generation
from node.ports import Urgency

SMOOTHING: Final = 0.1
"""Weight of the newest step in the running means. Ten to twenty steps decide; doubling it lets one slow step (another
process's moment) move what is quoted."""


class Pace:
    """Running means. Written by the engine's thread, read by any; plain numbers, each consistent by itself.

    `step_s`: seconds of a step that only decodes. `read_s`: seconds a prompt token adds to a step. `used`: share of
    max_tokens that ended streams made. `busy_s`: seconds spent in steps since start.
    """

    __slots__ = ("busy_s", "read_s", "step_s", "used")

    def __init__(self) -> None:
        self.step_s = self.read_s = self.busy_s = 0.0
        self.used = 1.0

    def stepped(self, seconds: float, decoded: int, read: int) -> None:
        """A step took `seconds` for `decoded` streams' rows and `read` prompt tokens."""
        self.busy_s += seconds
        if not read:
            self.step_s = _towards(self.step_s, seconds)
        elif not decoded:
            self.read_s = _towards(self.read_s, seconds / read)
        else:
            self.read_s = _towards(self.read_s, max(0.0, seconds - self.step_s) / read)

    def ended(self, produced: int, max_tokens: int) -> None:
        """A stream ended by itself after `produced` of `max_tokens`."""
        self.used = _towards(self.used, produced / max_tokens)

    def first_token_s(
        self, streams: Iterable[Generation], slots: int, chunk: int, urgency: Urgency, prompt_tokens: int
    ) -> float:
        """Estimated seconds to the first token of a new stream beside `streams`, all that are open.

        Slots of less urgent streams count as free, their prompts as unread for longer. Cache hits are left out, so
        the true wait may be shorter. `chunk`: prompt tokens read per step.
        """
        free, ahead, unread = slots, 0, prompt_tokens
        left = []
        for stream in streams:
            if stream.request.urgency < urgency or stream.ended:
                continue
            unread += max(0, stream.goal - stream.fed)
            if stream.waiting:
                ahead += 1
            else:
                free -= 1
                left.append(max(1.0, self.used * stream.request.max_tokens - stream.produced))
        steps = unread / chunk
        queue = ahead - free
        if queue >= 0 and left:
            rounds, place = divmod(queue, len(left))
            left.sort()
            steps += left[place] + rounds * sum(left) / len(left)
        return steps * self.step_s + unread * self.read_s


def _towards(mean: float, value: float) -> float:
    return mean + SMOOTHING * (value - mean) if mean else value
