"""Searches of the protocol's model: with all rules every reachable state keeps every promise; without any one, some does not.

The bounds are small (two writers, one or two extents, one fault of each kind); the counter-examples of the broken variants are
all shorter than what the searches exhaust.
"""

from __future__ import annotations

import pytest

from tests.model.search import search
from tests.model.state import Variant

HOLD = {
    "one extent, eviction, kill, restart": Variant(),
    "two writers of one key": Variant(keys=("A", "A"), cells=2, kills=0, evictions=0),
    "removal and restart": Variant(removals=1, evictions=0, kills=0),
    "removal, the writer killed": Variant(keys=("A",), removals=1),
    "removal, two restarts": Variant(keys=("A",), cells=2, removals=1, restarts=2),
    "removal, donor silent, restart": Variant(keys=("A",), removals=1, silences=1),
    "removal, another writes that chunk": Variant(
        keys=("A", "A"), cells=2, removals=1, evictions=0, kills=0, restarts=0
    ),
    "two restarts": Variant(restarts=2, evictions=0, kills=0),
    "donor silent, restart": Variant(silences=1, evictions=0, kills=0),
    "donor silent, removal": Variant(silences=1, removals=1, evictions=0, kills=0, restarts=0),
    "a copy, its source evicted": Variant(copied=("A",), cells=2, restarts=0, kills=0),
    "a copy, its copier or the server killed": Variant(keys=("A",), copied=("A",), cells=2),
    "a copy, removal and restart": Variant(keys=("A",), copied=("A",), cells=2, removals=1, evictions=0, kills=0),
    "a pull, its source evicted": Variant(pulled=("A",), cells=2, restarts=0, kills=0),
    "a pull, its puller or the server killed": Variant(keys=("A",), pulled=("A",), cells=2),
    "a pull, another takes over": Variant(keys=("A",), pulled=("A", "A"), cells=2, restarts=0),
    "a pull, removal and restart": Variant(keys=("A",), pulled=("A",), cells=2, removals=1, evictions=0, kills=0),
    "space first, a key later": Variant(keys=("B",), late=("A",), silences=1, evictions=0, kills=0),
    "space first, eviction and kill": Variant(keys=("B",), late=("A",)),
    "space first, another writes that chunk": Variant(keys=("A",), late=("A",), cells=2, evictions=0, kills=0),
    "read in place": Variant(reads_in_place=True, kills=0),
    "read in place, donor silent": Variant(reads_in_place=True, silences=1, kills=0, restarts=0),
    "read in place, removal": Variant(reads_in_place=True, removals=1, evictions=0, kills=0),
}

BREAK = {
    "extents come back when time is up": (
        Variant(extents_return_on_evidence=False, restarts=0, kills=0),
        "cell 0 was granted twice",
    ),
    "the gate does not wait for writers": (
        Variant(gate_waits_for_writers=False, kills=0),
        "cell 0 was granted twice",
    ),
    "the last scan began before the last hello": (
        Variant(scans_after_hellos=False, kills=0, evictions=0),
        "nobody knows of the committed",
    ),
    "extents are granted before their record is retired": (
        Variant(retires_before_reuse=False, restarts=0, kills=0),
        "wrong bytes served",
    ),
    "a removal is answered before memory says so": (
        Variant(answers_removals_late=False, removals=1, evictions=0, kills=0),
        "was removed, answered, and is back",
    ),
    "readers validate before they copy": (
        Variant(validates_after_copy=False, restarts=0, kills=0),
        "wrong bytes served",
    ),
    "a heartbeat settles grants that are on their way": (
        Variant(heartbeats_say_seen=False, restarts=0, kills=0),
        "cell 0 was granted twice",
    ),
    "a hello claims what is committed": (
        Variant(claims_only_unfinished=False, restarts=2, evictions=0, kills=0),
        "the index says",
    ),
    "a copy is committed as it is": (
        Variant(copied=("A",), cells=2, copies_check_their_source=False, restarts=0, kills=0),
        "wrong bytes served",
    ),
    "a write under way outlives a removal": (
        Variant(keys=("A",), removals_call_off_writes=False, removals=1, evictions=0, kills=0, restarts=0),
        "was removed, answered, and is back",
    ),
    "a removal is answered before all writers have said hello": (
        Variant(keys=("A",), removals_wait_for_gates=False, removals=1, restarts=2, evictions=0, kills=0),
        "was removed, answered, and is back",
    ),
    "a pull outlives a removal": (
        Variant(
            keys=("A",),
            pulled=("A",),
            cells=2,
            removals_call_off_writes=False,
            removals=1,
            evictions=0,
            kills=0,
            restarts=0,
        ),
        "was removed, answered, and is back",
    ),
    "a copy under way outlives a removal": (
        Variant(
            keys=("A",),
            copied=("A",),
            cells=2,
            removals_call_off_writes=False,
            removals=1,
            evictions=0,
            kills=0,
            restarts=0,
        ),
        "was removed, answered, and is back",
    ),
    "what is read in place is retired all the same": (
        Variant(reads_in_place=True, holds_keep_records=False, restarts=0, kills=0),
        "wrong bytes served",
    ),
    "a donor that was dropped hands over what it had": (
        Variant(retires_on_return=False, silences=1, removals=1, evictions=0, kills=0),
        "was removed, answered, and is back",
    ),
}


@pytest.mark.parametrize("name", HOLD)
def test_with_every_rule_every_state_keeps_every_promise(name: str) -> None:
    found = search(HOLD[name])
    assert found.broken is None, "\n".join([found.broken or "", *found.trace])
    assert found.is_exhausted and found.states > 1000


@pytest.mark.parametrize("name", BREAK)
def test_without_one_rule_a_promise_is_broken(name: str) -> None:
    variant, promise = BREAK[name]
    found = search(variant)
    assert found.broken is not None and promise in found.broken
    assert found.trace, "the way there is shown"


@pytest.mark.slow
def test_what_was_pulled_without_a_look_at_its_record_is_somebody_elses() -> None:
    """The order is out of date, its space was granted again; the chunk itself is back elsewhere, so that a copy is granted."""
    variant = Variant(
        keys=("A", "B", "A"), pulled=("A",), evictions=2, copies_check_their_source=False, cells=2, restarts=0, kills=0
    )
    found = search(variant)
    assert found.broken is not None and "wrong bytes served" in found.broken
