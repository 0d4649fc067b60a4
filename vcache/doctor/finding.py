"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """OK: works. NOTE: works, but one should know. PROBLEM: something that was asked for does not work."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """``fix`` says what to do about a note or a problem, where something can be done."""

    about: str
    state: State
    detail: str
    fix: str = ""
