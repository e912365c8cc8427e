"""From a file to a `Run`: the suite's run.json, or any pytest-benchmark JSON without the suite's sections."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reports import message
from reports.environment import Environment, environment
from reports.fanout import engines_of
from reports.node import Node, UnusableInput, members, refuse_non_finite
from reports.pace import Pace
from reports.pause import Pause, pause
from reports.spent import Medians, medians

__all__ = ["Outcome", "Run", "Timing", "UnusableInput", "document_of", "labelled", "only", "parse", "read", "read_all"]

SCHEMA = 1
RUN = "run.json"
MAX_BYTES = 64_000_000
VERDICTS = ("pass", "fail", "waived", "unsupported", "not-applicable", "error")
LEVELS = ("MUST", "SHOULD")
CASE = re.compile(r" \[subject=[^\]]*\]")  # what messages end with
ERROR_TYPE = re.compile(r"^\w+: (?=.)")


@dataclass(frozen=True)
class Outcome:
    """One requirement judged once."""

    requirement: str
    level: str
    subject: str
    stage: str
    model: str
    verdict: str
    detail: str = ""
    duration_s: float = 0.0
    nodeid: str = ""
    text: str = ""
    waiver_issue: str = ""
    waiver_reason: str = ""
    cause: str = ""
    repeat: str = ""
    calls: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.requirement, self.subject, self.stage, self.model)

    @property
    def known_cause(self) -> str:
        """What the suite names as the cause, else the message's start; empty where there is neither.

        That is what was expected and found, where the message says these, and its first line where it does not.
        """
        said = [message.labelled(self.detail, label) for label in ("expected", "found")]
        return self.cause or "; ".join(filter(None, said)) or self.detail.partition("\n")[0]

    @property
    def told(self) -> str:
        """What a reader is told: why a failure is waived, the cause, the message, and how to repeat the case."""
        return self._told("")

    @property
    def told_with_clause(self) -> str:
        """The same with the requirement's text, for a place where that does not stand already."""
        return self._told(f"clause: {self.text}" if self.text else "")

    def _told(self, clause: str) -> str:
        waiver = ", ".join(filter(None, [self.waiver_reason.removesuffix("."), self.waiver_issue])) or "no reason given"
        lines = [f"waived: {waiver}" if self.verdict == "waived" else "", clause]
        lines += ["" if self._says_its_cause else self.cause, self.detail]
        lines += [f"repeat: {self.repeat}" if self.repeat and self.verdict in ("fail", "error", "waived") else ""]
        return "\n".join(filter(None, lines))

    @property
    def _says_its_cause(self) -> bool:
        """Whether the message has the cause in it, apart from the error's type and the name of the case.

        A cause may be one sentence of what the message says in two lines, "expected: X" and "found: Y"; it may be cut.
        """
        cause, detail = ERROR_TYPE.sub("", self.cause), CASE.sub("", self.detail)
        expected, found = (message.labelled(detail, label) for label in ("expected", "found"))
        return cause in self.detail or cause in detail or f"expected {expected}, found {found}".startswith(cause)


@dataclass(frozen=True)
class Timing:
    """One benchmark. Without raw samples (pytest-benchmark keeps them only when asked) `samples_s` is empty.

    parts_s: of what the update consists, see `reports.spent`.
    pauses: whether its times are those for which an engine could not generate, see `figures`.
    engines: how many were updated at once.
    """

    group: str
    subject: str
    stage: str
    model: str
    name: str
    fullname: str
    samples_s: tuple[float, ...]
    median_s: float
    bytes_sent: float | None = None
    tensors: float | None = None
    worker_calls: float | None = None
    parameters: float | None = None
    roofline_kind: str = "roofline"
    roofline_samples_s: tuple[float, ...] = ()
    roofline_gb_per_s: float | None = None
    engine_peak_extra_bytes: float | None = None
    trainer_peak_extra_bytes: float | None = None
    steps_s: Medians = ()
    parts_s: Medians = ()
    failed: str = ""
    distinct: str = ""
    pace: Pace | None = None
    pause: Pause | None = None
    pauses: bool = False
    engines: int = 1

    @property
    def figures(self) -> tuple[Timing, ...]:
        """What is compared of it: itself and, where it was measured, its pause as a benchmark of its own."""
        if self.pause is None:
            return (self,)
        taken = {"samples_s": self.pause.samples_s, "median_s": statistics.median(self.pause.samples_s)}
        taken |= {"steps_s": (), "parts_s": ()}
        named = {"distinct": f"{self.distinct} pause".strip(), "bytes_sent": None, "pause": None, "pauses": True}
        return (self, replace(self, **taken, **named))

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return (self.group, self.subject, self.stage, self.model, self.distinct)

    @property
    def label(self) -> str:
        """Subject, stage and model; the test's name where the file does not have them."""
        return " ".join(part for part in (self.subject, self.stage, self.model, self.distinct) if part)

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes_sent / self.median_s / 1e9 if self.bytes_sent and self.median_s else None

    @property
    def fraction_of_roofline(self) -> float | None:
        if self.gb_per_s is None or not self.roofline_gb_per_s:
            return None
        return self.gb_per_s / self.roofline_gb_per_s


@dataclass(frozen=True)
class Run:
    """Everything one file says. `label` is short and unique among the runs shown together."""

    source: str
    label: str
    when: str
    environment: Environment
    outcomes: tuple[Outcome, ...]
    timings: tuple[Timing, ...]
    timeline: tuple[tuple[str, float, float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[Timing, ...]:
        """The timings, each followed by its pause where that was measured."""
        return tuple(figure for timing in self.timings for figure in timing.figures)


def read(path: str | Path) -> Run:
    """Read one file. Raises UnusableInput naming the file, the place and what was expected there."""
    return parse(document_of(path), str(path))


def read_all(paths: Iterable[str | Path]) -> list[Run]:
    """Read several files, in the order of their vLLM versions, with labels that tell them apart."""
    runs = [read(path) for path in paths]
    return labelled(sorted(runs, key=lambda run: (_version(run.label), run.when, run.source)))


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those of one version are known by their files' names."""
    taken = Counter(run.label for run in runs)
    return [run if taken[run.label] == 1 else replace(run, label=Path(run.source).stem) for run in runs]


def only(run: Run, subjects: list[str], stages: list[str], models: list[str]) -> Run:
    """The run with nothing but these subjects, stages and models; an empty list keeps all."""

    def kept(item: Outcome | Timing) -> bool:
        wanted = ((item.subject, subjects), (item.stage, stages), (item.model, models))
        return all(not names or name in names for name, names in wanted)

    return replace(run, outcomes=tuple(filter(kept, run.outcomes)), timings=tuple(filter(kept, run.timings)))


def parse(document: Any, file: str) -> Run:
    """Turn a document in memory into a Run. Raises UnusableInput as `read` does."""
    try:
        refuse_non_finite(document, file)
    except RecursionError:
        raise _nested(file) from None
    root = Node(document, file)
    root.of(dict, "an object, as pytest-benchmark writes")
    _check_schema(root)
    if "benchmarks" not in root and "conformance" not in root:
        raise root.refuse("pytest-benchmark's JSON, an object with a list 'benchmarks'", "no 'benchmarks'")
    outcomes = tuple(_outcome(node) for node in root["conformance"]) if "conformance" in root else ()
    notes = [node.text() for node in root["stale_waivers"]] if "stale_waivers" in root else []
    timings = [_timing(node, notes) for node in root["benchmarks"]] if "benchmarks" in root else []
    where = environment(root)
    return Run(
        source=file,
        label=where.vllm or Path(file).stem,
        when=(root["datetime"].optional_text() or "")[:19],
        environment=where,
        outcomes=outcomes,
        timings=_told_apart(_joined(timings, outcomes, dict(where.paces)), root),
        timeline=tuple(_timeline(root)),
        notes=tuple(notes),
    )


def document_of(path: str | Path) -> Any:
    """The JSON document in a file. Raises UnusableInput where there is none."""
    file = str(path)
    text = _text(file)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: members(pairs, file))
    except json.JSONDecodeError as error:
        cut = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        hint = "the file ends too early: was it cut off?" if cut else f"not JSON: {error.msg}"
        raise UnusableInput(file, f"line {error.lineno} column {error.colno}", hint) from None
    except ValueError as error:
        raise UnusableInput(file, "", f"not JSON: {error}") from None
    except RecursionError:
        raise _nested(file) from None


def _nested(file: str) -> UnusableInput:
    return UnusableInput(file, "", "expected pytest-benchmark's JSON, found objects nested without end")


def _text(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        run = Path(file) / RUN
        there = f"{run} exists: name that" if run.exists() else f"{run} does not exist: did a run write there?"
        raise UnusableInput(file, "", f"expected a file such as run.json, found a directory; {there}") from None
    except OSError as error:
        raise UnusableInput(file, "", f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        limit = f"expected at most {MAX_BYTES // 10**6} MB, found more (a run of the suite is under 2 MB)"
        raise UnusableInput(file, f"byte {MAX_BYTES}", limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(file, f"byte {error.start}", "expected JSON in UTF-8, found other bytes") from None
    if not text.strip():
        raise UnusableInput(file, "line 1 column 1", "expected pytest-benchmark's JSON, found an empty file")
    return text


def _check_schema(root: Node) -> None:
    if "schema" not in root:
        if "conformance" in root:
            raise root["schema"].refuse(f"schema {SCHEMA} beside 'conformance'")
        return
    for node in (root["schema"], root["environment"]["schema"] if "environment" in root else root["schema"]):
        if type(node.value) is int and node.value > SCHEMA:
            raise node.refuse(f"schema {SCHEMA}", f"{node.value}: a newer suite wrote it, read it with that one")
        if type(node.value) is not int or node.value != SCHEMA:
            raise node.refuse(f"schema {SCHEMA}")


def _outcome(node: Node) -> Outcome:
    return Outcome(
        requirement=node["requirement"].text(),
        level=node["level"].one_of(LEVELS),
        subject=node["subject"].optional_text() or "",
        stage=node["stage"].optional_text() or "",
        model=node["model"].optional_text() or "",
        verdict=node["verdict"].one_of(VERDICTS),
        detail=node["detail"].optional_text() or "",
        duration_s=node["duration_s"].optional_number() or 0.0,
        nodeid=node["nodeid"].optional_text() or "",
        text=node["text"].optional_text() or "",
        waiver_issue=node["waiver_issue"].optional_text() or "",
        waiver_reason=node["waiver_reason"].optional_text() or "",
        cause=node["cause"].optional_text() or "",
        repeat=node["repeat"].optional_text() or "",
        calls=tuple(call.text() for call in node["calls"]) if "calls" in node else (),
    )


def _timing(node: Node, notes: list[str]) -> Timing:
    stats, extra = node["stats"], node["extra_info"]
    stats.of(dict, "an object with pytest-benchmark's statistics")
    extra = extra if extra.value is not None else Node({}, node.file, extra.place)
    samples = stats["data"].numbers()
    if "data" in stats and not samples:
        raise stats["data"].refuse("at least one sample")
    median_s = statistics.median(samples) if samples else stats["median"].number()
    said = stats["median"].optional_number()
    if said is not None and abs(said - median_s) > 1e-6 * max(said, median_s):
        notes.append(f"{stats['median'].place} is not the median of its data, which counts instead: edited by hand?")
    bytes_sent, roofline = extra["bytes_sent"].optional_number(), extra["roofline_samples_s"].numbers()
    roofline_gb_per_s = extra["roofline_gb_per_s"].optional_number()
    if roofline_gb_per_s is None and roofline and bytes_sent and statistics.median(roofline):
        roofline_gb_per_s = bytes_sent / statistics.median(roofline) / 1e9
    return Timing(
        group=node["group"].optional_text() or "",
        subject=extra["subject"].optional_text() or "",
        stage=extra["stage"].optional_text() or "",
        model=extra["model"].optional_text() or "",
        name=node["name"].text(),
        fullname=node["fullname"].optional_text() or node["name"].text(),
        samples_s=samples,
        median_s=median_s,
        bytes_sent=bytes_sent,
        tensors=extra["tensors"].optional_number(),
        worker_calls=extra["worker_calls"].optional_number(),
        parameters=extra["parameters"].optional_number(),
        roofline_kind=extra["roofline_kind"].optional_text() or "roofline",
        roofline_samples_s=roofline,
        roofline_gb_per_s=roofline_gb_per_s,
        engine_peak_extra_bytes=extra["engine_peak_extra_bytes"].optional_number(),
        trainer_peak_extra_bytes=extra["trainer_peak_extra_bytes"].optional_number(),
        steps_s=medians(extra, "steps_s"),
        parts_s=medians(extra, "parts_s"),
        distinct=extra["measures"].optional_text() or "",
        pause=pause(extra),
        engines=engines_of(extra),
    )


def _joined(timings: list[Timing], outcomes: tuple[Outcome, ...], paces: dict[str, Pace]) -> list[Timing]:
    """Add the pace of each timing's stage, and whether its test failed.

    pytest-benchmark also saves what was timed by a test that failed afterwards: such a time means nothing.
    """
    spoiling = ("fail", "error", "waived")
    failed = {item.nodeid: item.verdict for item in outcomes if item.nodeid and item.verdict in spoiling}
    return [replace(t, failed=failed.get(t.fullname, ""), pace=paces.get(t.stage)) for t in timings]


def _told_apart(timings: list[Timing], root: Node) -> tuple[Timing, ...]:
    """Make keys unique: add the test's name, then its path, where two keys are equal."""
    plain = [timing if timing.subject else replace(timing, distinct=timing.name) for timing in timings]
    for attribute in ("name", "fullname"):
        taken = Counter(timing.key for timing in plain)
        plain = [t if taken[t.key] == 1 else replace(t, distinct=getattr(t, attribute)) for t in plain]
    seen: dict[tuple[str, ...], int] = {}
    for index, timing in enumerate(plain):
        if timing.key in seen:
            place = f"benchmarks[{index}]"
            raise UnusableInput(root.file, place, f"expected every benchmark once, found benchmarks[{seen[timing.key]}]"
                                f" again ({timing.fullname}): edited by hand?")  # fmt: skip
        seen[timing.key] = index
    return tuple(plain)


def _timeline(root: Node) -> Iterable[tuple[str, float, float]]:
    """(what, when it began, when it ended) in seconds; an entry without a beginning follows the one before."""
    now = 0.0
    if "timeline" not in root:
        return
    for node in root["timeline"]:
        began = node["began_s"].optional_number()
        began = now if began is None else began
        now = began + node["elapsed_s"].number()
        yield node["what"].text(), began, now


def _version(label: str) -> tuple[tuple[int, int | str], ...]:
    """Numbers by value and words by letter, so that 0.9 stands before 0.10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|[a-z]+", label.lower()))
