"""docs/stores.md says what every counter of a store means, in the words of the code."""

from __future__ import annotations

from tests.support.processes import REPOSITORY
from vcache.store.files_eviction import FILES_COUNTERS
from vcache.store.guard import GUARD_VALUES
from vcache.store.mooncake import MOONCAKE_COUNTERS
from vcache.store.write_behind import WRITE_BEHIND_VALUES


def test_every_counter_is_documented_in_its_own_words():
    page = (REPOSITORY / "docs" / "stores.md").read_text()
    for name, meaning in (GUARD_VALUES | WRITE_BEHIND_VALUES | FILES_COUNTERS | MOONCAKE_COUNTERS).items():
        assert f"| `{name}` | {meaning} |" in page, f"docs/stores.md lacks {name}: {meaning}"
