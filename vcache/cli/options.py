"""What several commands share: options, the configuration they add up to, where tables go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from vcache.config import VCacheConfig

#: Wider than any table of ours; lines end where their text does.
PIPE_WIDTH = 1000
#: The longest that an option may ask to wait, as for settings.
MAX_SECONDS = 86_400.0

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="YAML file of settings (default: what VCACHE_CONFIG_FILE names)."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="One setting, such as server.eviction.high_watermark=0.9; repeatable."
    ),
]


def load_config(file: Path | None, settings: list[str] | None = None, **flat: Any) -> VCacheConfig:
    """The configuration of a command line. ``flat``: settings that have options of their own, ``__`` for the dot.

    Raises ``ConfigError``.
    """
    from vcache.config import VCacheConfig

    chosen = dict(_split(text) for text in settings or [])
    chosen |= {name.replace("__", "."): value for name, value in flat.items() if value is not None}
    return VCacheConfig.load(file, **chosen)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as chunk_size=512", param_hint="--set")
    return name.strip(), value.strip()


def duration(text: str, option: str) -> float:
    """Seconds of an option's value. Raises ``BadParameter``."""
    from vcache.units import format_duration, parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=option) from error
    if seconds > MAX_SECONDS:
        raise typer.BadParameter(f"{text!r}: at most {format_duration(MAX_SECONDS)} (a day)", param_hint=option)
    return seconds


def table_console() -> Console:
    """Where tables are printed: as wide as a terminal, or, for a pipe or a file, so wide that no value is broken.

    What is printed is text, not markup: a label or a path may hold brackets.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, emoji=False, width=PIPE_WIDTH)
