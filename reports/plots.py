"""Plots by matplotlib: as SVG to stand inside a page, light or dark as the page is, or as a picture of its own.

Series differ by marker and line as well as by colour; the colours are Okabe and Ito's, which the colour-blind can tell
apart. For a page every colour is drawn as a stand-in and then replaced by a CSS variable of the page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from reports import statistics, units
from reports.load import Run, Timing
from reports.matrix import FOUND_WANTING, SYMBOL, cells, in_order

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4a9e", "#7a5c2e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")
INK, FAINT, PAPER = "#1b1f24", "#c9ced6", "#ffffff"
VERDICT_COLOUR = {"pass": "#009e73", "fail": "#d55e00", "waived": "#8a4f9e", "error": "#b8860b",
                  "unsupported": "#5b6470", "not-applicable": "#8a929c"}  # fmt: skip
VARIABLES = {**{colour: f"--series-{place}" for place, colour in enumerate(SERIES, 1)}, INK: "--ink", FAINT: "--line",
             PAPER: "--paper"}  # fmt: skip
LIGHT = {variable: colour for colour, variable in VARIABLES.items()}
DARK_SERIES = ("#5aa9e6", "#ff8c42", "#2ecc9a", "#e39cc4", "#9bdcff", "#ffc247", "#b0a3f5", "#d0aa78")
DARK = {f"--series-{place}": colour for place, colour in enumerate(DARK_SERIES, 1)}
DARK |= {"--ink": "#e6e9ee", "--line": "#3a424d", "--paper": "#14181d"}
PANEL_INCHES = (5.2, 3.7)
GREATEST_NUMBER_OF_PANELS = 12
LONGEST_NAME = 40
SETTINGS = {
    "font.family": "sans-serif", "font.size": 11, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "legend.fontsize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "reports", "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT, "grid.linewidth": 0.7,
    "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False, "hatch.linewidth": 0.6,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
}  # fmt: skip


@contextmanager
def _settings() -> Iterator[None]:
    """Our settings. Names that the font lacks and odd values are drawn without a warning."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def figure(panels: Sequence[Callable[[Axes], None]], across: int = 1, strip: Strip | None = None) -> Figure:
    """Panels side by side, `across` in a row, and a strip over the whole width below. Nothing global is touched."""
    from matplotlib.figure import Figure

    with _settings():
        panels = panels[:GREATEST_NUMBER_OF_PANELS]
        rows, across = math.ceil(len(panels) / across), min(across, max(len(panels), 1))
        below = strip.inches if strip else 0.0
        sheet = Figure((PANEL_INCHES[0] * across, PANEL_INCHES[1] * rows + below), layout="constrained")
        ratios = [PANEL_INCHES[1]] * rows + ([below] if strip else [])
        grid = sheet.add_gridspec(len(ratios), across, height_ratios=ratios)
        for place, draw in enumerate(panels):
            draw(sheet.add_subplot(grid[place // across, place % across]))
        if strip:
            strip(sheet.add_subplot(grid[-1, :]))
        return sheet


def save(sheet: Figure, path: Path, kind: str) -> None:
    """Write a picture, `kind` "png" or "svg"; the same runs give the same bytes."""
    with _settings():
        sheet.savefig(path, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else {"Software": None})


def inline_svg(sheet: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element for a page: scalable, in the page's colours, its ids made unique by `name`."""
    from markupsafe import escape

    stream = io.StringIO()
    with _settings():
        sheet.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = re.sub(rf"(?i){colour}\b", f"var({variable})", svg)
    # Presentation attributes do not know variables, styles do.
    svg = re.sub(r'\b(fill|stroke)="(var\([^"]*\))"', r'style="\1: \2"', svg)
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def throughput(run: Run) -> list[Figure]:
    """GB/s against model size, one figure a stage, each roofline drawn in; none where no known bytes were moved."""
    timed = [t for t in run.timings if t.gb_per_s and (t.parameters or t.bytes_sent) and not t.failed]
    stages = in_order(timing.stage for timing in timed)
    subjects = in_order(timing.subject for timing in timed)

    def panel(stage: str) -> Callable[[Axes], None]:
        return lambda axes: _throughput_panel(axes, [t for t in timed if t.stage == stage], subjects, stage)

    return [figure([panel(stage)]) for stage in stages]


def steps(run: Run) -> list[Figure]:
    """Where an update's time goes: the median of each step, stacked; none where no steps were measured."""
    timed = [timing for timing in run.timings if timing.steps_s]
    names = in_order(name for timing in timed for name, _ in timing.steps_s)

    def panel(place: tuple[str, str]) -> Callable[[Axes], None]:
        chosen = [timing for timing in timed if (timing.subject, timing.stage) == place]
        return lambda axes: _steps_panel(axes, chosen, names, _name(*place))

    return [figure([panel(place)]) for place in dict.fromkeys((t.subject, t.stage) for t in timed)]


def trend(runs: Sequence[Run]) -> list[Figure]:
    """Median time of every benchmark over the runs with intervals, one figure a subject and stage."""
    return [figure([panel]) for panel in _trend_panels(runs)]


def trend_picture(runs: Sequence[Run]) -> Figure | None:
    """The same in one picture and, below, the requirements that any run fails."""
    panels, strip = _trend_panels(runs), Strip(runs)
    return figure(panels, 2, strip if strip.names else None) if panels or strip.names else None


def _trend_panels(runs: Sequence[Run]) -> list[Callable[[Axes], None]]:
    places = dict.fromkeys((t.group, t.subject, t.stage) for run in runs for t in run.figures)
    return [_trend_panel(runs, place) for place in places]


def _throughput_panel(axes: Axes, timed: list[Timing], subjects: list[str], stage: str) -> None:
    by_parameters = all(timing.parameters for timing in timed)
    for subject in in_order(timing.subject for timing in timed):
        place = subjects.index(subject)
        mine = [timing for timing in timed if timing.subject == subject]
        mine.sort(key=lambda timing: _extent(timing, by_parameters))
        extents = [_extent(timing, by_parameters) for timing in mine]
        axes.plot(extents, [t.gb_per_s for t in mine], label=_name(subject or "update"), **_style(place))
        roofed = [(extent, t) for extent, t in zip(extents, mine, strict=True) if t.roofline_gb_per_s]
        if roofed:
            style = _style(place) | {"linestyle": (0, (4, 2)), "linewidth": 1.2, "markersize": 3.5, "fillstyle": "none"}
            label = _name("roofline:", roofed[0][1].roofline_kind)
            axes.plot([extent for extent, _ in roofed], [t.roofline_gb_per_s for _, t in roofed], label=label, **style)
    axes.set(xscale="log", yscale="log", ylabel="GB/s", title=_name(stage or "all stages"))
    axes.set_xlabel("parameters" if by_parameters else "bytes sent")
    _plain_ticks(axes.yaxis, lambda value: f"{value:g}")
    _plain_ticks(axes.xaxis, units.parameters if by_parameters else units.size)
    _legend_below(axes)


def _extent(timing: Timing, by_parameters: bool) -> float:
    return (timing.parameters if by_parameters else timing.bytes_sent) or 0.0


def _steps_panel(axes: Axes, timed: list[Timing], names: list[str], title: str) -> None:
    labels = [_name(timing.model or timing.name) for timing in timed]
    left = [0.0] * len(timed)
    unit, factor = ("ms", 1e3) if max(timing.median_s for timing in timed) < 1 else ("s", 1.0)
    for place, name in enumerate(names):
        widths = [dict(timing.steps_s).get(name, 0.0) * factor for timing in timed]
        colour, hatch = SERIES[place % len(SERIES)], HATCHES[place % len(HATCHES)]
        axes.barh(range(len(timed)), widths, 0.65, left, label=_name(name), color=colour, hatch=hatch, edgecolor=PAPER)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(timed)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=f"{unit}, median of each step", title=title)
    _legend_below(axes)


def _trend_panel(runs: Sequence[Run], place: tuple[str, str, str]) -> Callable[[Axes], None]:
    chosen = [{t.key: t for t in run.figures if (t.group, t.subject, t.stage) == place} for run in runs]
    keys = list(dict.fromkeys(key for timings in chosen for key in timings))

    def draw(axes: Axes) -> None:
        for number, key in enumerate(keys):
            shift = (number - (len(keys) - 1) / 2) * min(0.06, 0.4 / len(keys))
            points = [(x + shift, timings[key]) for x, timings in enumerate(chosen) if key in timings]
            points = [(x, timing) for x, timing in points if timing.median_s and not timing.failed]
            if not points:
                continue
            xs, middles = [x for x, _ in points], [timing.median_s for _, timing in points]
            ranges = [statistics.median_interval(t.samples_s) if t.samples_s else (t.median_s,) * 2 for _, t in points]
            errors = [[m - low for m, (low, _) in zip(middles, ranges, strict=True)],
                      [high - m for m, (_, high) in zip(middles, ranges, strict=True)]]  # fmt: skip
            errors = [[max(error, 0.0) for error in side] for side in errors]
            label = _name(key[3], key[4])
            axes.errorbar(xs, middles, errors, label=label, capsize=3, elinewidth=1.2, **_style(number))
        axes.set_xticks(range(len(runs)), [_name(run.label) for run in runs], rotation=20 if len(runs) > 5 else 0)
        axes.set_xlim(-0.4, len(runs) - 0.6)
        axes.set(yscale="log", ylabel="median time")
        axes.set_title(_name(*place) or "benchmarks")
        _plain_ticks(axes.yaxis, lambda value: units.seconds(value).replace(".0 ", " "))
        _legend_below(axes, 3, -0.1)

    return draw


class Strip:
    """One line for each requirement that any run fails or cannot judge, one column a run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        found = [cells(run.outcomes, "requirement") for run in runs]
        names = dict.fromkeys(key for judged in found for key in judged)
        self.labels, self.found = [_name(run.label) for run in runs], found
        self.names = [n for n in names if any(n in f and f[n].verdict in FOUND_WANTING for f in found)]
        self.inches = 0.9 + 0.27 * len(self.names)

    def __call__(self, axes: Axes) -> None:
        for y, name in enumerate(self.names):
            for x, judged in enumerate(self.found):
                if name in judged:
                    verdict = judged[name].verdict
                    colour = VERDICT_COLOUR[verdict]
                    axes.text(x, y, f"{SYMBOL[verdict]} {verdict}", ha="center", va="center", color=colour, fontsize=10)
        axes.set_xticks(range(len(self.labels)), self.labels)
        axes.set_yticks(range(len(self.names)), [_name(*key) for key in self.names])
        axes.set(xlim=(-0.5, len(self.labels) - 0.5), ylim=(len(self.names) - 0.5, -0.5))
        axes.set_title("requirements that a version fails")
        axes.grid(visible=False)
        axes.tick_params(length=0)


def _style(place: int) -> dict[str, Any]:
    return {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)], "markersize": 6,
            "linewidth": 1.8}  # fmt: skip


def _name(*parts: str) -> str:
    """A name that fits a plot."""
    name = units.plain(" ".join(filter(None, parts))).replace("\n", " ")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _plain_ticks(axis: Any, written: Callable[[float], str]) -> None:
    """Figures a reader knows in place of powers of ten; few enough to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 1
    places = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(10, places))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, columns: int = 2, below: float = -0.17) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns)
