"""What was found of every architecture, and the page that says it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

EXACT, REFUSED, WRONG, FAILS = "exact", "refused", "wrong", "fails"
NOT_LOADABLE, NOT_TRIED = "not loadable", "not tried"
OUTCOMES = (EXACT, REFUSED, WRONG, FAILS, NOT_LOADABLE, NOT_TRIED)
BAD = (WRONG, FAILS)
NAMED = 3  # stale tensors that are named
# Threads about what an update leaves stale, by a part of the tensor's name.
THREADS = {"sink": "vllm#57795", "conv_weights": "vllm#42481"}
UNREPORTED = "not yet reported"
OF_STEP = {"start": NOT_TRIED, "write": NOT_TRIED, "load": NOT_LOADABLE, "begin": REFUSED, "update": FAILS}

INTRODUCTION = """\
# Models

Written by `tox run -e models -- --write docs/models.md`, with {distribution} {version} and transformers {transformers}
on a CPU {amx} AMX. Do not edit this page.

Every model is tiny and has two checkpoints, which differ in every element and have the names that a published
checkpoint has. A process of its own loads the first by vLLM's loader, updates it to the second one tensor a call, and
back with all of them in one call, by the bracket of the reference extensions. After each update every tensor that the
model computes with (parameters, buffers, other attributes, weights packed for kernels) is compared bit by bit with that
of a model which loaded that checkpoint. Tensors in which two cold loads differ are left out.

| outcome | meaning |
| --- | --- |
| exact | every tensor is equal, after both updates |
| refused | `begin_update` says why it does not take the update, and touches nothing |
| wrong | the update succeeded, and some tensors are stale |
| fails | the update raised, and not to refuse it |
| not loadable | vLLM cannot load the checkpoint at all |
| not tried | a checkpoint could not be written, or a package is missing here |

*Layerwise reload* is vLLM's own (`vllm.model_executor.model_loader.reload`) around the model's `load_weights`, without
the extensions. What is wrong there is the fault of vLLM; what is wrong only in the column before it is ours.

Where the CPU has AMX, vLLM 0.32 packs linear weights into tensors that Python sees, so more tensors are compared. There
it has two more faults, not yet reported: layerwise reload fails with latent attention (DeepSeek), and a process that
computes without having asked the kernel for AMX ends by SIGILL.
"""


@dataclass(frozen=True)
class Row:
    """One architecture: `outcome` of the reference's update and `why`; `sent` and `compared` count tensors."""

    name: str
    outcome: str
    why: str = ""
    sent: int = 0
    compared: int = 0
    reload: str = ""  # outcome of vLLM's layerwise reload, and why


def row(name: str, judged: dict[str, Any], reloaded: dict[str, Any]) -> Row:
    """From what `running.run` yields for an architecture."""
    outcome, why = outcome_of(judged)
    other, other_why = outcome_of(reloaded)
    if outcome in (NOT_LOADABLE, NOT_TRIED):
        return Row(name, outcome, why)
    if other == REFUSED:  # there is nothing that could refuse: begin is not called
        other = FAILS
    told = other if other == EXACT else f"{other}: {other_why}"
    told += f"; {UNREPORTED}" if other == FAILS else ""
    return Row(name, outcome, why, judged.get("sent", 0), judged.get("compared", 0), told)


def outcome_of(found: dict[str, Any]) -> tuple[str, str]:
    """(outcome, reason) of one process."""
    if "step" in found:
        if found["kind"] in ("ModuleNotFoundError", "ImportError"):
            return NOT_TRIED, found["message"]
        place = f" ({found['within']})" if found["within"].startswith("vllm/") else ""
        refused = found["step"] != "begin" or found["within"].startswith("extensions/")
        return OF_STEP[found["step"]] if refused else FAILS, f"{found['kind']}: {found['message']}{place}"
    if found["differing"] == 0 or found["compared"] == 0:
        return FAILS, f"{found['differing']} of {found['compared']} tensors differ: the comparison proves nothing"
    if stale := found["stale"]:
        named = ", ".join(f"`{path}`" for path in stale[:NAMED])
        more = f" and {len(stale) - NAMED} more" if len(stale) > NAMED else ""
        return WRONG, f"{len(stale)} of {found['compared']}: {named}{more}; {_threads(stale)}"
    if found["state"] != "ready":
        return FAILS, f"update_state() says {found['state']!r} after an exact update"
    return EXACT, ""


def _threads(stale: list[str]) -> str:
    """How many of the tensors each thread is about."""
    counted = Counter(next((THREADS[part] for part in THREADS if part in path), UNREPORTED) for path in stale)
    return ", ".join(f"{thread} ({count})" for thread, count in sorted(counted.items(), reverse=True))


def page(rows: list[Row], versions: dict[str, str]) -> str:
    """The whole page, in Markdown."""
    counts = ", ".join(f"{number} {outcome}" for outcome in OUTCOMES if (number := _count(rows, outcome)))
    lines = [INTRODUCTION.format(**versions), f"{len(rows)} architectures: {counts}.", ""]
    lines += ["| model | update | tensors sent | compared | layerwise reload |", "| --- | --- | --- | --- | --- |"]
    for found in rows:
        told = found.outcome + (f": {escaped(found.why)}" if found.why else "")
        counted = f"{found.sent or ''} | {found.compared or ''}"
        lines.append(f"| {found.name} | {told} | {counted} | {escaped(found.reload)} |")
    return "\n".join(lines) + "\n"


def _count(rows: list[Row], outcome: str) -> int:
    return sum(found.outcome == outcome for found in rows)


def escaped(text: str) -> str:
    """Text that can stand in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
