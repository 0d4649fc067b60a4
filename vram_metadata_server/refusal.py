"""A request that is understood and refused."""

from __future__ import annotations

from vcache.protocol import ErrorCode


class RefusalError(Exception):
    """Becomes the ``Error`` that answers the request; the message says what would work."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
