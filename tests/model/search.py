"""Breadth-first search over all states of a model, for one that breaks a promise."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from tests.model.promises import violation
from tests.model.protocol_model import start, steps
from tests.model.state import State, Variant


class Finding(NamedTuple):
    """``broken``: the promise and the shortest way to break it; None when no reachable state breaks any."""

    states: int
    is_exhausted: bool
    broken: str | None
    trace: list[str]


def search(variant: Variant, *, most_states: int = 2_000_000) -> Finding:
    """Looks at every state that can be reached, nearest first, up to ``most_states``."""
    first = start(variant)
    before: dict[State, tuple[State, str] | None] = {first: None}
    todo = deque([first])
    while todo:
        state = todo.popleft()
        for label, after in steps(state, variant):
            if after in before:
                continue
            before[after] = (state, label)
            broken = violation(after)
            if broken is not None:
                return Finding(len(before), False, broken, _trace(before, after))
            todo.append(after)
        if len(before) > most_states:
            return Finding(len(before), False, None, [])
    return Finding(len(before), True, None, [])


def _trace(before: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    labels = []
    while (link := before[state]) is not None:
        state, label = link
        labels.append(label)
    return labels[::-1]
