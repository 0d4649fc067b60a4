"""What was removed in this term, so that nobody who hands over, claims or names something older later brings it back."""

from __future__ import annotations

from typing import Final

_REMEMBERED: Final = 1 << 18


class RemovedInTerm:
    """Removed keys and cleared tenants, each with the generation below which it is gone.

    Bounded: with too many to remember, everything written before that moment counts as removed, so that what donors hand
    over later is lost rather than brought back.
    """

    def __init__(self) -> None:
        self._keys: dict[bytes, int] = {}
        self._tenants: dict[int, int] = {}
        self._everything_below = 0

    def add(self, keys: dict[bytes, int]) -> None:
        """``keys`` with the generation below which they are gone."""
        self._keys.update(keys)
        self._bound()

    def clear(self, tenant: int | None, below: int) -> None:
        if tenant is None:
            self._everything_below = below
        else:
            self._tenants[tenant] = below
            self._bound()

    def covers(self, key: bytes, tenant: int, generation: int) -> bool:
        return self.clears(tenant, generation) or generation < self._keys.get(key, 0)

    def clears(self, tenant: int, generation: int) -> bool:
        """Whether that is gone whatever its key."""
        return generation < self._everything_below or generation < self._tenants.get(tenant, 0)

    def _bound(self) -> None:
        if len(self._keys) + len(self._tenants) > _REMEMBERED:  # too many to remember: later handovers bring nothing
            self._everything_below = max(self._everything_below, *self._keys.values(), *self._tenants.values())
            self._keys.clear()
            self._tenants.clear()
