"""Judge updates of many architectures: `python -m suite.architectures [NAME ...]`, in process or with --engines.

Exit status: 0 every update that was begun is exact; 1 one is wrong or failed, or an engine did not start; 2 the
command could not be carried out.
"""

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

from suite import ROOT
from suite.architectures import engines, engines_table, running, table
from suite.architectures.configs import CONFIGS
from suite.architectures.table import BAD, Row
from suite.session import environment

CPU_INFO = Path("/proc/cpuinfo")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if unknown := [name for name in options.names if name not in CONFIGS]:
        print(f"{unknown[0]}: expected one of {', '.join(CONFIGS)}", file=sys.stderr)
        return 2
    if options.list:
        print(*CONFIGS, sep="\n")
        return 0
    if reason := environment.lacks_engine("cpu"):
        print(reason, file=sys.stderr)
        return 2
    if options.engines:
        return _on_engines(options.names or list(engines.KINDS), options.logs / "engines", options.write)
    rows = _rows(options.names or list(CONFIGS), options.jobs, options.logs)
    if options.write:
        options.write.write_text(table.page(rows, _versions()))
        print(f"Written to {options.write}")
    bad = [found.name for found in rows if found.outcome in BAD]
    print(f"{len(rows)} architectures, {len(bad)} wrong or failed{': ' if bad else ''}{', '.join(bad)}")
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m suite.architectures", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to judge (default: all)")
    parser.add_argument("--list", action="store_true", help="say which there are, and judge none")
    parser.add_argument(
        "--engines", action="store_true", help=f"judge on real engines (default: {', '.join(engines.KINDS)})"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to this file, in Markdown")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes at once")
    parser.add_argument(
        "--logs", type=Path, default=ROOT / "reports" / "architectures", metavar="DIR", help="where logs go"
    )
    return parser


def _on_engines(names: list[str], logs: Path, page: Path | None) -> int:
    """Judge them on real engines and write their rows; exit status as `main`, and 1 too where one was not run."""
    found = engines.judge(names, list(engines.STAGES), logs)
    for name, row in found.items():
        for stage, (outcome, why) in row.items():
            print(f"{name:28} {stage:8} {outcome:12} {why}", flush=True)
    if page:
        kept = page.read_text() if page.exists() else ""
        page.write_text(engines_table.page(found, _versions(), kept))
        print(f"Written to {page}")
    bad = [name for name, row in found.items() if any(outcome in engines.BAD for outcome, _ in row.values())]
    print(f"{len(found)} architectures, {len(bad)} wrong or not run{': ' if bad else ''}{', '.join(bad)}")
    return 1 if bad else 0


def _rows(names: list[str], jobs: int, logs: Path) -> list[Row]:
    """Judge them, tell each as it is done, and return them in the order given."""
    found: dict[running.Task, dict] = {}
    rows = {}
    for (name, judge), result in running.run(names, jobs, logs):
        found[name, judge] = result
        if all((name, other) in found for other in running.JUDGES):
            rows[name] = told = table.row(name, *(found[name, other] for other in running.JUDGES))
            print(f"{name:28} {told.outcome:12} {told.why}", flush=True)
    return [rows[name] for name in names]


def _versions() -> dict[str, str]:
    distribution, version = environment.vllm()
    return {
        "distribution": distribution or "", "version": version or "", "transformers": metadata.version("transformers"),
        "amx": "with" if "amx_tile" in CPU_INFO.read_text() else "without",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
