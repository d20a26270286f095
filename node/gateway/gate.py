"""How many requests may buy at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from node.gateway.errors import too_busy


class Gate:
    """Counts what is `running`; above `limit` nobody is let in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.running = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be one of those that run. Raises: ApiError (429)."""
        if self.running >= self._limit:
            raise too_busy(f"This gateway already runs {self.running} jobs. Nothing was sent or paid.")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
