"""What an update announces, and whether the model can take it.

A manifest is plain data, in the order of sending: `[{"name": str, "dtype": "bfloat16", "shape": [int, ...]}, ...]`.
"""

from collections.abc import Iterable

import torch

from extensions.tensors import FLOATING_SOURCES, Shape, dtype_name, dtype_of, is_shape

Manifest = list[dict]
Layout = tuple[torch.dtype, Shape]
Announced = dict[str, Layout]  # a parsed manifest: by name, in the order of sending
SHOWN = 8  # names shown in a message; the others are counted
MAX_NAME = 1000  # characters


class ManifestError(ValueError):
    """A manifest that is malformed or does not fit the model. Nothing was touched."""


def manifest_of(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
    """The manifest of named tensors, in their order."""
    return [{"name": n, "dtype": dtype_name(t.dtype), "shape": list(t.shape)} for n, t in named_tensors]


def parse(manifest: object) -> Announced:
    """The dtype and shape of each name. Raises ManifestError where entries are malformed or names are there twice."""
    if not isinstance(manifest, list | tuple) or not manifest:
        raise ManifestError(
            f"a manifest is a non-empty list of entries, found {type(manifest).__name__} {manifest!r:.80}"
        )
    parsed: Announced = {}
    duplicates = []
    for index, entry in enumerate(manifest):
        name, layout = _parse_entry(index, entry)
        if name in parsed:
            duplicates.append(name)
        parsed[name] = layout
    if duplicates:
        raise ManifestError(f"{len(duplicates)} duplicate {_plural('name', duplicates)}: {shown(duplicates)}")
    return parsed


def _parse_entry(index: int, entry: object) -> tuple[str, Layout]:
    where = f"manifest entry {index}"
    if not isinstance(entry, dict) or set(entry) != {"name", "dtype", "shape"}:
        raise ManifestError(f"{where}: expected the keys name, dtype, shape, found {entry!r:.120}")
    name, shape = entry["name"], entry["shape"]
    require_name(name, f"{where}: ")
    if not is_shape(shape):
        raise ManifestError(f"{where} ({name}): a shape is a list of sizes, found {shape!r:.120}")
    try:
        return name, (dtype_of(entry["dtype"]), tuple(shape))
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{where} ({name}): {error}") from None


def require_name(value: object, where: str = "") -> None:
    """Raise ManifestError unless `value` is text that messages and logs can show unchanged."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ManifestError(f"{where}a name is printable text, found {value!r:.120}")


def check(announced: Announced, layouts: Announced, optional: set[str]) -> None:
    """Raise ManifestError where a name is unknown, one that is not optional is missing, or a layout does not fit."""
    problems = []
    if missing := [name for name in layouts if name not in announced and name not in optional]:
        problems.append(f"{len(missing)} missing {_plural('name', missing)}: {shown(missing)}")
    if unknown := [name for name in announced if name not in layouts]:
        problems.append(f"{len(unknown)} unknown {_plural('name', unknown)}: {shown(unknown)}")
    for name, (dtype, shape) in announced.items():
        if name not in layouts:
            continue
        into, expected = layouts[name]
        if shape != expected:
            problems.append(f"{name}: expected shape {list(expected)}, found {list(shape)}")
        problems += wrong_dtype(name, dtype, into)
    require_none(problems)


def wrong_dtype(name: str, found: torch.dtype, into: torch.dtype) -> list[str]:
    """Why a weight of dtype `into` can't be updated from a tensor of dtype `found`, a sentence; empty where it can."""
    accepted = FLOATING_SOURCES if into in FLOATING_SOURCES else (into,)
    if found in accepted:
        return []
    return [f"{name}: expected a dtype of {', '.join(map(dtype_name, accepted))}, found {dtype_name(found)}"]


def require_none(problems: list[str]) -> None:
    """Raise ManifestError where there is a problem; the message shows the first ones."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more problems" if len(problems) > SHOWN else ""
        raise ManifestError("the update does not fit the model: " + "; ".join(problems[:SHOWN]) + more)


def shown(names: list[str]) -> str:
    """Names as a message shows them: the first, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _plural(word: str, items: list[str]) -> str:
    return word if len(items) == 1 else word + "s"
