"""Run mutants through the suite: `python -m suite.selftest.mutants [NAME ...]`.

All chosen mutants are examined in one session of pytest with real engines, each by the requirement that it names,
beside the reference that it is a broken version of. The outcome goes to mutants.json beside run.json (repeat.json with
--repeat). Exit status: 0 every mutant was killed and every control passed; 1 not so; 2 the run could not be made.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO

from reports.units import counted
from suite import ROOT
from suite.selftest.mutants import Mutant, verdicts
from suite.session.record import RUN
from suite.stages import unavailable
from suite.stages.hardware import machine

DEADLINE_S, ENDING_S = 4 * 3600.0, 60.0
PYTEST_RAN = (0, 1)
NOT_SHOWN = re.compile(r"=+ weight sync =+")  # from here on pytest's output shows mutants as if they were subjects


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    report = Path(options.report).resolve()
    try:
        chosen = verdicts.select(options.names, options.kind, options.sample, options.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for mutant in chosen:
            print(f"{mutant.requirement:24} {mutant.name}: {mutant.does}")
        return 0
    if options.repeat:
        only = [f"-k={options.k}"] if options.k else []
        entries = _judged(report, options.kind, [f"--repeat={options.repeat}", *only])
        return 2 if entries is None else _tell_repeated(entries, options.repeat, report)
    chosen, away = verdicts.held(chosen, options.kind, unavailable(machine()), len(machine().devices))
    for mutant, reason in away.items():
        print(f"{mutant} is left out: {reason}")
    if not chosen:
        print("this machine can hold none of their stages", file=sys.stderr)
        return 2
    hosts = [f"--subject={host}" for host in dict.fromkeys(mutant.host for mutant in chosen)]
    names = [f"--extension={mutant.extension}" for mutant in chosen]
    stages = [f"--stage={stage}" for stage in _stages(chosen, options.kind)]
    entries = _judged(report, options.kind, [*hosts, *names, *stages])
    return 2 if entries is None else _tell(chosen, away, entries, options, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m suite.selftest.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    parser.add_argument("--kind", choices=("cpu", "gpu"), default="cpu", help="of the engines (default: cpu)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="run N of them, of different requirements")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="which sample (default: 0)")
    parser.add_argument(
        "--repeat", type=int, default=0, metavar="N", help="no mutants: the references, N times in a row"
    )
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="with --repeat: only these cases, as pytest's -k")
    parser.add_argument("--report", default=ROOT / "reports" / "mutants", metavar="DIR", help="where the results go")
    parser.add_argument("--list", action="store_true", help="say which there are, and run none")
    return parser


def _stages(chosen: list[Mutant], kind: str) -> list[str]:
    """The stages to be held: those where mutants are judged, and cpu-tp2, which lends a second engine to cpu-tp1."""
    held = [mutant.stage(kind) for mutant in chosen]
    lends = any(m.requirement.startswith("fanout.") and m.stage(kind) == "cpu-tp1" for m in chosen)
    return [*dict.fromkeys([*held, *(["cpu-tp2"] if lends else [])])]


def _judged(report: Path, kind: str, arguments: list[str]) -> list[verdicts.Entry] | None:
    """Run pytest, and return what it has judged; None where it did not get that far."""
    run = report / RUN
    run.unlink(missing_ok=True)
    report.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "suite.plugin",
        "-p", "suite.selftest.mutants.plugin", "-p", "no:cacheprovider", "-m", kind, "--tb=no", f"--report={report}",
        *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    overdue = threading.Timer(DEADLINE_S, process.terminate)
    overdue.start()
    try:
        with (report / "pytest.txt").open("w") as log:
            _pass_on(process, log)
        code = process.wait(ENDING_S)
    finally:
        overdue.cancel()
        _end(process)
    if code not in PYTEST_RAN or not run.exists():
        print(f"pytest ended with {code}: {' '.join(command)}; its output is in {report / 'pytest.txt'}")
        return None
    return json.loads(run.read_text())["conformance"]


def _end(process: "subprocess.Popen[str]") -> None:
    """End pytest, which ends its engines; the janitor does where it can't."""
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _pass_on(process: "subprocess.Popen[str]", log: TextIO) -> None:
    shown = True
    for line in process.stdout:
        log.write(line)
        shown = shown and not NOT_SHOWN.match(line)
        if shown:
            print(line, end="", flush=True)


def _tell(
    chosen: list[Mutant],
    away: dict[str, str],
    entries: list[verdicts.Entry],
    options: argparse.Namespace,
    report: Path,
) -> int:
    outcomes = [verdicts.outcome_of(mutant, options.kind, entries) for mutant in chosen]
    whole = not options.names and not options.sample
    summary = verdicts.summary(outcomes, entries, options.kind, whole)
    counts = summary["counts"]
    print(f"\n{verdicts.table(outcomes)}\n")
    print(
        f"{counts['killed']} of {counted(counts['mutants'], 'mutant')} killed,"
        f" by {counted(counts['requirements'], 'requirement')};"
        f" {counts['survived']} survived, {counted(counts['error'], 'error')};"
        f" {counts['controls passed']} of {counted(counts['controls'], 'control')} passed"
    )
    return _write(summary | {"left_out": away}, report / "mutants.json")


def _tell_repeated(entries: list[verdicts.Entry], times: int, report: Path) -> int:
    summary = verdicts.repeated(entries, times)
    for requirement, counts in summary["requirements"].items():
        print(f"{requirement:24} {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    print(f"in all, {times} times in a row: {', '.join(f'{n} {verdict}' for verdict, n in summary['counts'].items())}")
    return _write(summary, report / "repeat.json")


def _write(summary: dict, path: Path) -> int:
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(*(f"! {problem}" for problem in summary["problems"]), sep="\n")
    print(f"Written to {path}")
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # by way of what ends pytest
    sys.exit(main())
