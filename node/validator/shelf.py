"""Models a validator can replay: one replayer a profile, loaded when a case first needs it, one replay at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from node.judging import Judged, judge
from node.ports import Clock, Replayer
from protocol.dossier import Examined
from protocol.messages import Profile
from protocol.units import Digest, JobId


@dataclass(frozen=True, slots=True)
class Volume:
    """A model that can be replayed. `make`: a replayer of it, not yet started."""

    name: str
    profile: Profile
    make: Callable[[], Replayer]


class Shelf:
    """`volumes`: by profile id. Weights stay loaded once they were needed: the next case of the profile is near."""

    def __init__(self, volumes: Mapping[Digest, Volume], clock: Clock) -> None:
        self._volumes, self._clock = dict(volumes), clock
        self._loaded: dict[Digest, Replayer] = {}
        self._turn = asyncio.Lock()
        self.replay_s = 0.0
        """Seconds spent in replays since the start, loading left out."""

    def profile(self, profile_id: Digest) -> Profile | None:
        """None for a model this node does not have."""
        volume = self._volumes.get(profile_id)
        return None if volume is None else volume.profile

    def names(self) -> list[str]:
        """Of all volumes."""
        return [volume.name for volume in self._volumes.values()]

    async def judge(self, profile_id: Digest, job_id: JobId, job: Examined) -> Judged:
        """The finding of one job of a profile that is here. Raises: TallyError when it cannot be replayed here."""
        volume = self._volumes[profile_id]
        async with self._turn:
            replayer = self._loaded.get(profile_id)
            if replayer is None:
                replayer = volume.make()
                await replayer.start()
                self._loaded[profile_id] = replayer
            began = self._clock.monotonic()
            try:
                return await judge(job_id, job, volume.profile, replayer)
            finally:
                self.replay_s += self._clock.monotonic() - began

    async def stop(self) -> None:
        """Unload everything. Idempotent."""
        loaded, self._loaded = self._loaded, {}
        await asyncio.gather(*(replayer.stop() for replayer in loaded.values()), return_exceptions=True)
