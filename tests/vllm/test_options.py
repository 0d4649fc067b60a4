"""Bad options of the connector fail when it is made, and the error names the option and what would work; the page is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vcache_vllm.counters import CONNECTOR_COUNTERS
from vcache_vllm.options import ConnectorOptions

from tests.support.processes import REPOSITORY
from vcache.errors import ConfigError

pytestmark = pytest.mark.vllm


def test_options_have_the_names_of_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text("client: {call_timeout: 300ms}\nsegment: {size: 4GiB}\n")
    options = ConnectorOptions.of(
        {"config_file": str(file), "segment": {"size": "2GiB"}, "chunk_size": 512, "device": "cpu:1", "donate": True},
        block_size=128,
    )
    assert (options.device, options.donate) == ("cpu:1", True)
    assert options.config.client.call_timeout == 0.3
    assert options.config.segment.size == 2 << 30
    assert (options.config.chunk_size, options.config.block_size) == (512, 128)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"segmnet": {"size": "1GiB"}}, "segmnet"),
        ({"block_size": 16}, "block_size = 16"),
        ({"chunk_size": 200}, "chunk_size = 200"),
        ({"donate": "1GiB"}, "segment.size says how much"),
        ({"load_async": "yes"}, "load_async = 'yes'"),
        ({"device": 0}, "device = 0"),
        ({"weights": ""}, "weights = ''"),
        ({"segment": {"size": "many"}}, "segment.size"),
    ],
)
def test_a_bad_option_is_named(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ConnectorOptions.of(extra, block_size=128)


def test_every_counter_stands_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "vllm.md").read_text()
    for name, meaning in CONNECTOR_COUNTERS.items():
        assert f"| `{name}` | {meaning} |" in page
