"""Known failures that a run may have: what a file of waivers says, which cases it covers, and which are stale.

A waiver turns a `fail` into `waived`, and nothing else: an `error` is the suite's own failure and stays one. It applies
to one requirement of one subject, on the vLLM versions and devices that it names. What it names `device` is a glob
(`fnmatch`, case matters) that has to match one of these:

* where the installed vLLM runs on a CPU: "cpu", or the CPU's model as run.json's `environment.cpu.model` has it;
* where it runs on GPUs: "gpu", or the name of any of the machine's GPUs as `environment.devices` has it.

`vllm` is a PEP 440 specifier set for the installed version: pre-releases count, local suffixes (+cpu) do not.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from reports.units import counted
from suite.conformance.requirements import catalogue
from suite.session.verdicts import ERROR, NOT_APPLICABLE, PASS, UNSUPPORTED, WAIVED

TABLE = "waiver"
HEADER = re.compile(r"\s*\[\[\s*waiver\s*\]\]\s*(#.*)?")
NEEDED = ("requirement", "subject", "vllm", "device", "issue", "reason")
ALLOWED = (*NEEDED, "stage", "model")
NARROWING = "vllm, device, stage or model"


class Case(NamedTuple):
    """What one test judges: names, empty where the test takes no stage or no model."""

    requirement: str
    subject: str
    stage: str
    model: str


@dataclass(frozen=True)
class Waiver:
    """One entry of a file; `place` says where it stands there. `device`, `stage` and `model` are globs."""

    requirement: str
    subject: str
    vllm: SpecifierSet
    device: str
    issue: str = field(compare=False)
    reason: str = field(compare=False)
    stage: str = "*"
    model: str = "*"
    place: str = field(default="", compare=False)

    def applies(self, vllm: str, devices: Collection[str]) -> bool:
        """Whether it is meant for this version and any of these names. Raises ValueError for what is no version."""
        try:
            public = Version(vllm).public
        except InvalidVersion as error:
            raise ValueError(
                f"expected the installed vLLM to have a version that PEP 440 knows, found {vllm!r}"
            ) from error
        named = any(fnmatchcase(device, self.device) for device in devices)
        return named and self.vllm.contains(public, prereleases=True)

    def covers(self, case: Case) -> bool:
        same = (self.requirement, self.subject) == (case.requirement, case.subject)
        return same and fnmatchcase(case.stage, self.stage) and fnmatchcase(case.model, self.model)

    def __str__(self) -> str:
        narrowed = [f"{name} {getattr(self, name)}" for name in ("stage", "model") if getattr(self, name) != "*"]
        return f"Waiver {self.place}: {', '.join([self.requirement, self.subject, *narrowed])}"


# ---- the file


def read(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a TOML file, which may have none. Raises ValueError with file, entry and what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML's and UTF-8's
        raise ValueError(f"{path}: expected TOML in UTF-8: {error}") from error
    entries = document.pop(TABLE, [])
    if document:
        raise ValueError(f"{path}: expected nothing but tables [[{TABLE}]], found {', '.join(map(repr, document))}")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a table [[{TABLE}]] for every waiver, found [{TABLE}]")
    found: dict[Waiver, str] = {}
    for place, entry in zip(_places(text, len(entries)), entries, strict=True):
        try:
            waiver = _waiver(entry, place)
            if waiver in found:
                raise ValueError(f"expected every waiver once, found {TABLE} {found[waiver]} again")
        except ValueError as error:
            raise ValueError(f"{path}: {TABLE} {place}: {error}") from error
        found[waiver] = place
    return tuple(found)


def _places(text: str, count: int) -> list[str]:
    """What each entry is called: its number and, where each has a header of its own, its line."""
    headers = [number for number, line in enumerate(text.splitlines(), 1) if HEADER.fullmatch(line)]
    if len(headers) != count:  # written inline, or a header within a text
        return [str(number) for number in range(1, count + 1)]
    return [f"{number} (line {line})" for number, line in enumerate(headers, 1)]


def _waiver(entry: Any, place: str) -> Waiver:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a table, found {entry!r}")
    unknown = [name for name in entry if name not in ALLOWED]
    missing = [name for name in NEEDED if name not in entry]
    if unknown or missing:
        said = f"unknown {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
        raise ValueError(f"expected the keys {', '.join(NEEDED)}, perhaps stage and model, found {said}")
    for name, value in entry.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: expected a text that is not empty, found {value!r}")
    if entry["requirement"] not in catalogue():
        raise ValueError(f"requirement: expected one of {', '.join(catalogue())}, found {entry['requirement']!r}")
    if not _is_link(entry["issue"]):
        raise ValueError(f"issue: expected the http(s) URL of an issue, found {entry['issue']!r}")
    return Waiver(**{**entry, "vllm": _versions(entry["vllm"])}, place=place)


def _versions(given: str) -> SpecifierSet:
    example = "a PEP 440 specifier set such as >=0.27,<0.30"
    if "+" in given:
        raise ValueError(f"vllm: expected {example}, without a local suffix, which is not compared, found {given!r}")
    try:
        found = SpecifierSet(given)
    except InvalidSpecifier as error:
        raise ValueError(f"vllm: expected {example}, found {given!r}") from error
    if not len(found):
        raise ValueError(f"vllm: expected {example}, found {given!r}, which is no limit")
    return found


def _is_link(given: str) -> bool:
    try:
        parts = urlsplit(given)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not any(map(str.isspace, given))


# ---- a run


@dataclass
class Ledger:
    """The waivers that apply here, and what a run has found of the cases that they cover.

    file, read: its name, and how many waivers it has. subjects: the names of all that there are.
    whole: whether every test of the suite is looked at: no paths are given, no --lf. in_part: the requirements of which
    this run judges only a part (--play): a pass does not make their waivers stale.
    held, elsewhere: every case that those tests have on the stages that this machine can hold, and on the others,
    whatever --subject, --stage and --model left of them. due: how many tests of a case have not ended, or never will.
    """

    waivers: Sequence[Waiver]
    file: str = ""
    read: int = 0
    subjects: Collection[str] = ()
    whole: bool = True
    in_part: Collection[str] = ()
    held: set[Case] = field(default_factory=set)
    elsewhere: set[Case] = field(default_factory=set)
    due: Counter[Case] = field(default_factory=Counter)
    judged: list[tuple[Case, str]] = field(default_factory=list)

    def waiver_of(self, case: Case) -> Waiver | None:
        """The first that covers this case."""
        return next((waiver for waiver in self.waivers if waiver.covers(case)), None)

    def expect(self, cases: Iterable[tuple[Case, bool]]) -> None:
        """Take down what a test could judge: cases, and whether this machine can hold them."""
        for case, is_held in cases:
            (self.held if is_held else self.elsewhere).add(case)

    def ended(self, case: Case, verdict: str) -> None:
        self.due[case] -= 1
        self.judged.append((case, verdict))

    def __str__(self) -> str:
        used = sum(WAIVED in self._verdicts(waiver) for waiver in self.waivers)
        stale = f", {len(self.stale())} to correct or remove: with these no run exits with 0" if self.stale() else ""
        here = f"{len(self.waivers)} for this vLLM and device"
        return f"{self.file}: {counted(self.read, 'waiver')}, {here}, {used} used{stale}"

    def stale(self) -> dict[Waiver, str]:
        """What is wrong with a waiver that the file should no longer have as it is; final once the run has ended.

        A case that was not judged may be the one that fails: where the run was narrowed or cut short, nothing is said
        of a waiver that covers one. Cases that this machine cannot hold do not count, so that a waiver for them alone
        is left in peace, and one that also covers cases that pass here has to be narrowed.
        """
        seen = {case for case, _ in self.judged}
        missed = self.held - seen | {case for case, count in self.due.items() if count > 0}
        missed |= {case for case in self.held if case.requirement in self.in_part}
        found = {waiver: self._wrong(waiver, missed) for waiver in self.waivers}
        return {waiver: wrong for waiver, wrong in found.items() if wrong}

    def _wrong(self, waiver: Waiver, missed: set[Case]) -> str:
        if waiver.subject not in self.subjects:
            return f"there is no such subject: expected one of {', '.join(self.subjects)}. Correct or remove it."
        found = self._verdicts(waiver)
        if found & {WAIVED, ERROR} or not self.whole or any(map(waiver.covers, missed)):
            return ""
        if PASS in found:
            return f"no longer needed: all that it covers here passes. Remove it, or narrow its {NARROWING}."
        if UNSUPPORTED in found:
            return f"not needed: what the subject lacks is no failure. Remove it, or narrow its {NARROWING}."
        if NOT_APPLICABLE in found or any(map(waiver.covers, self.elsewhere)):
            return ""
        return "matches no case: no test judges this requirement with such a stage and model. Correct or remove it."

    def _verdicts(self, waiver: Waiver) -> set[str]:
        return {verdict for case, verdict in self.judged if waiver.covers(case)}
