"""Reads, shows and compares the suite's results; imports neither torch nor vllm, so it runs on a laptop.

`python -m reports --help` lists the commands. The suite itself uses the two functions below.
Plots and statistics load their libraries when first used: importing this package costs next to nothing.
"""

import json
from pathlib import Path
from typing import Any


def write_html(run: dict[str, Any], path: str | Path) -> Path:
    """Write the self-contained page of one run (the content of a run.json, which may be that of a run cut short).

    Raises `reports.load.UnusableInput` naming the place where `run` is not what it should be.
    """
    from reports import load, page

    path = Path(path)
    path.write_text(page.run_page(load.parse(_as_written(run), "run.json")), encoding="utf-8")
    return path


def render_text(run: dict[str, Any], width: int = 100) -> str:
    """The closing summary of one run in at most `width` columns: requirements x subjects, then throughput."""
    from reports import load, text

    return text.run_text(load.parse(_as_written(run), "run.json"), width)


def _as_written(run: dict[str, Any]) -> Any:
    """The run as a JSON file would give it back: lists for tuples, texts for paths."""
    return json.loads(json.dumps(run, default=str))
