"""The example as its readers run it: real vLLM engines over LMCacheMPConnector, ``lmcache server`` and VCacheL2Adapter."""

from __future__ import annotations

import os

import pytest

from tests.support.processes import REPOSITORY, Child


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_vllm_loads_from_the_pool_what_the_first_computed(tmp_path) -> None:
    script = Child(
        ["bash", str(REPOSITORY / "examples" / "lmcache" / "run.sh")],
        environment={name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")},
        log=tmp_path / "log",
    )
    try:
        assert script.wait(1700) == 0, script.report()
        assert "2,048 of 2,049 tokens loaded from the pool" in script.expect("the same answer")
    finally:
        script.kill()
