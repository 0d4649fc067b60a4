"""``vcache demo``: the main job, to be watched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    llm: Annotated[
        bool, typer.Option("--llm/--no-llm", help="Real vLLM engines, or two plain processes with Llama-8B-shaped KV.")
    ] = True,
    prompt: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text for the engines (default: examples/prompt.txt).")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="With --no-llm: tokens to move, 128 KiB each; whole chunks of 256.")
    ] = 2048,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Show two engines sharing a prefix: computed on one, loaded by the other from its segment, the DRAM tier, the store."""
    from vcache.demo.run import run_demo

    raise typer.Exit(run_demo(llm=llm, prompt=prompt, tokens=tokens, json_file=json_file))
