"""What docs/metadata-server.md says of the server is so."""

from __future__ import annotations

import re
from pathlib import Path

from vcache import protocol
from vram_metadata_server.counters import MEANING

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "metadata-server.md").read_text()


def test_every_counter_is_documented_with_its_meaning() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCUMENT.split("## Counters")[1].split("## ")[0], re.MULTILINE))
    assert rows == dict(MEANING)


def test_every_message_is_documented() -> None:
    messages = DOCUMENT.split("## Messages")[1].split("## ")[0]
    for message in protocol.AnyRequest.__args__:
        assert f"`{message.__name__}`" in messages


def test_every_file_of_the_package_is_named() -> None:
    package = ROOT / "vram_metadata_server"
    named = set(re.findall(r"`(?:eviction/)?(\w+\.py)`", DOCUMENT))
    minor = {
        "__init__.py",
        "settings.py",
        "counters.py",
        "deadlines.py",
        "integrity.py",
        "intake.py",
        "refusal.py",
        "report.py",
        "placement.py",
    }
    assert {path.name for path in package.rglob("*.py")} - minor <= named
