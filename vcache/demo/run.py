"""``run_demo``: the whole demo, from choosing devices to the exit status."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from rich.console import Console

from vcache.demo.devices import devices_here
from vcache.demo.display import Display
from vcache.demo.figures import DemoReport
from vcache.demo.llm import run_llm
from vcache.demo.plain import run_plain
from vcache.demo.processes import Stage
from vcache.demo.prompt import read_prompt
from vcache.ending import termination_as_interrupt
from vcache.errors import ConfigError

DEFAULT_PLAIN_TOKENS = 2048


def run_demo(
    *,
    llm: bool = True,
    prompt: Path | None = None,
    tokens: int = DEFAULT_PLAIN_TOKENS,
    json_file: Path | None = None,
    console: Console | None = None,
) -> int:
    """Runs the demo, printing as it goes; 0 when what came out is right and came from where it should, else 1.

    llm: with real engines and the text in ``prompt``; otherwise two plain processes move ``tokens`` tokens' KV.
    json_file: where the figures go, whatever the verdict.

    Raises ``ConfigError`` for arguments that cannot work and ``ChildFailed`` when a process did not do its part. Leaves no
    process, shared memory or file behind, not even when interrupted.
    """
    if prompt is not None and not llm:
        raise ConfigError(
            f"--prompt = {prompt}: a text is for engines; leave out --no-llm, or say how many --tokens to move"
        )
    if json_file is not None:
        _check_writable(json_file)
    display = Display(console or Console())
    with termination_as_interrupt(), Stage() as stage:
        devices = devices_here()
        if llm:
            report = run_llm(stage, display, devices, read_prompt(prompt))
        else:
            report = run_plain(stage, display, devices, tokens)
        if not report.passed:
            display.quote(stage.logs())
    display.report(report)
    if json_file is not None:
        write_json(json_file, report)
    return 0 if report.passed else 1


def _check_writable(path: Path) -> None:
    """Now, not when all is done and the figures would be lost."""
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"--json = {path}: cannot be written; name a file in a directory that exists")


def write_json(path: Path, report: DemoReport) -> None:
    """Writes the figures, indented for people."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
