"""A text as token ids without a tokenizer, so that the demo downloads nothing and is the same everywhere.

Words (runs of letters and digits) and single punctuation marks are the tokens; a token's id is the CRC-32 of its UTF-8
bytes, folded into the vocabulary. A model with random weights gives ids no meaning, all that matters is that the same text
is the same ids in every process and that different texts differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from zlib import crc32

from vcache.errors import ConfigError

VOCABULARY: Final = 4096
#: Ids that models reserve for beginning, end and padding.
RESERVED_IDS: Final = 16
DEFAULT_TEXT: Final = Path(__file__).resolve().parents[2] / "examples" / "prompt.txt"

_TOKEN: Final = re.compile(r"\w+|[^\w\s]")


def token_ids(text: str) -> list[int]:
    """One id per word or punctuation mark of ``text``, each from ``RESERVED_IDS`` to ``VOCABULARY - 1``."""
    spread = VOCABULARY - RESERVED_IDS
    return [RESERVED_IDS + crc32(token.encode()) % spread for token in _TOKEN.findall(text)]


def read_prompt(path: Path | None) -> list[int]:
    """The token ids of a text file; raises ``ConfigError`` when it cannot be read."""
    source = path or DEFAULT_TEXT
    try:
        return token_ids(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt = {source}: cannot be read as UTF-8 text ({error}); name another file") from error
