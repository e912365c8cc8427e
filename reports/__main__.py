"""python -m reports: show one run, compare two, follow several over versions, export, write an issue."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reports import export, issue, repeated, text, trend
from reports.compare import CAUSES, DEFAULT_CAUSES, compare, same_hardware
from reports.load import Run, UnusableInput, document_of, labelled, only, parse, read, read_all
from reports.results import BASELINES, results_markdown
from reports.statistics import THRESHOLD
from reports.subjects import subjects_markdown

EXIT_STATUS = """\
exit status:
  0  nothing worse (show, trend, table, subjects, results, export, issue: done)
  1  compare: newly failing, newly in error, or slower beyond the threshold; --fail-on chooses what counts
  2  unusable input or options: the message names the file, the place and what was expected
  3  compare --strict: nothing worse, but a timing is inconclusive
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UnusableInput as error:
        print(f"reports: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"reports: {error.filename}: cannot be written: {error.strerror}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m reports", description=__doc__, epilog=EXIT_STATUS, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: object, files: str | None, narrowed: bool = True, **how: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, **how, description=how["help"], epilog=EXIT_STATUS, formatter_class=raw)
        added.set_defaults(command=function)
        if files:
            added.add_argument("files", nargs=files, type=Path, metavar="FILE")
        for item in ("subject", "stage", "model") if narrowed else ():
            added.add_argument(f"--{item}", action="append", default=[], help=f"only this {item}; repeatable")
        return added

    added = command("show", _show, "+", help="runs: requirements, throughput; or counts of repeated cases")
    added.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    _compare_options(command("compare", _compare, None, help="run B against run A"))
    added = command("trend", _trend, "+", help="several runs in the order of their versions")
    _machines(added)
    for kind, what in (("html", "the page"), ("png", "the picture"), ("svg", "the picture")):
        added.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write {what}")
    added = command("table", _table, "+", help="the Markdown table of several runs")
    _machines(added)
    added = command("subjects", _subjects, "+", help="the Markdown table of subjects side by side, from several runs")
    _across_machines(added)
    added = command("results", _results, None, narrowed=False, help="the page of measured results, docs/results.md")
    added.add_argument(
        "--baselines", type=Path, default=BASELINES, metavar="DIR", help="folders of runs, one a machine"
    )
    added = command("export", _export, None, help="one run as CSV or Markdown")
    added.add_argument("file", type=Path, metavar="FILE")
    added.add_argument("--format", choices=("csv", "markdown"), required=True)
    added.add_argument("--output", type=Path, metavar="FILE", help="instead of standard output")
    added = command("issue", _issue, None, narrowed=False, help="a failed case as an issue to file, in Markdown")
    added.add_argument("file", type=Path, metavar="FILE")
    named = "a requirement, subject, stage or model, or a part of the test's id; the first case that all of them name"
    added.add_argument("case", nargs="+", metavar="CASE", help=named)
    return parser


def _compare_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("a", type=Path, metavar="A")
    added.add_argument("b", type=Path, metavar="B")
    _machines(added)
    added.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    added.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    added.add_argument("--markdown", type=Path, metavar="FILE", help="write a pull request's comment")
    added.add_argument("--strict", action="store_true", help="exit 3 where a timing is inconclusive")
    causes = "; ".join(f"{name}: {meaning}" for name, meaning in CAUSES.items())
    shown = f"what exits 1, separated by commas, or none (default {','.join(DEFAULT_CAUSES)}). {causes}"
    added.add_argument("--fail-on", type=_causes, default=DEFAULT_CAUSES, metavar="LIST", help=shown)


def _across_machines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--across-machines", action="store_true", help="compare runs of different hardware too")


def _machines(parser: argparse.ArgumentParser) -> None:
    _across_machines(parser)
    shown = f"practical difference, as 5%% or 0.05 (default {THRESHOLD * 100:g}%%)"
    parser.add_argument("--threshold", type=_threshold, default=THRESHOLD, help=shown)


def _threshold(given: str) -> float:
    try:
        value = float(given.removesuffix("%")) / (100 if given.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, found {given!r}")
    return value


def _causes(given: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(",")) if given != "none" else ()
    for name in names:
        if name not in CAUSES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(CAUSES)} or none, found {name!r}")
    return names


def _chosen(runs: list[Run], options: argparse.Namespace) -> list[Run]:
    chosen = [only(run, options.subject, options.stage, options.model) for run in runs]
    for run in chosen:
        if not run.outcomes and not run.timings:
            raise UnusableInput(run.source, "", "expected results of this subject, stage and model, found none")
    return chosen


def _show(options: argparse.Namespace) -> int:
    if options.html and len(options.files) > 1:
        raise UnusableInput(str(options.files[1]), "", "expected one file beside --html, found another")
    shown = [_shown(file, options) for file in options.files]
    heads = [f"{file}\n\n" if len(shown) > 1 else "" for file in options.files]
    print("\n\n\n".join(head + said for head, said in zip(heads, shown, strict=True)))
    return 0


def _shown(file: Path, options: argparse.Namespace) -> str:
    document = document_of(file)
    if repeated.is_repeated(document):
        if options.html or options.subject or options.stage or options.model:
            raise UnusableInput(str(file), "", "expected a run for this option, found counts of repeated cases")
        return repeated.repeated_text(repeated.parse(document, str(file)))
    [run] = _chosen([parse(document, str(file))], options)
    if options.html:
        from reports import page

        _write(options.html, page.run_page(run))
    return text.run_text(run)


def _compare(options: argparse.Namespace) -> int:
    a, b = _chosen(labelled([read(options.a), read(options.b)]), options)
    found = compare(a, b, options.threshold, options.across_machines)
    if options.html:
        from reports import page

        _write(options.html, page.compare_page(found, options.fail_on))
    if options.junit:
        _write(options.junit, export.compare_junit(found, options.fail_on))
    if options.markdown:
        _write(options.markdown, export.compare_markdown(found, options.fail_on))
    print(text.compare_text(found, options.fail_on))
    status = found.exit_status(options.fail_on, options.strict)
    print(f"\nExit status {status}.")
    return status


def _trend(options: argparse.Namespace) -> int:
    runs = _several(options)
    if options.html:
        from reports import page

        _write(options.html, page.trend_page(runs, options.threshold))
    for path in filter(None, (options.png, options.svg)):
        from reports import plots

        sheet = plots.trend_picture(runs)
        if sheet is None:
            raise UnusableInput(str(options.files[0]), "", "expected timings or failures to draw, found none")
        plots.save(sheet, path, "svg" if path == options.svg else "png")
    print(trend.trend_text(runs, options.threshold))
    return 0


def _table(options: argparse.Namespace) -> int:
    print(trend.markdown_tables(_several(options), options.threshold))
    return 0


def _subjects(options: argparse.Namespace) -> int:
    print(subjects_markdown(_several(options)))
    return 0


def _results(options: argparse.Namespace) -> int:
    print(results_markdown(options.baselines), end="")
    return 0


def _issue(options: argparse.Namespace) -> int:
    print(issue.issue_markdown(read(options.file), options.case), end="")
    return 0


def _several(options: argparse.Namespace) -> list[Run]:
    runs = _chosen(read_all(options.files), options)
    if not options.across_machines:
        same_hardware(runs)
    return runs


def _export(options: argparse.Namespace) -> int:
    [run] = _chosen([read(options.file)], options)
    content = export.run_csv(run) if options.format == "csv" else export.run_markdown(run)
    if options.output:
        _write(options.output, content)
    else:
        print(content, end="")
    return 0


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
