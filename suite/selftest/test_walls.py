"""Walls between the rooms: what one room does not import, at first hand or through others, at any time."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from suite import ROOT
from suite.processes import janitor

# What a room's modules do not import. What is not here is a package of another project.
OURS = ("extensions", "reports", "suite")
PYTESTS_SIDE = ("pytest", "suite.plugin", "suite.fixtures", "suite.session", "suite.driver")
WALLS = {
    "extensions": ("reports", "suite"),
    "reports": ("torch", "vllm"),
    "suite.driver": ("pytest", "suite.plugin", "suite.fixtures", "suite.session"),
    "suite.actors": PYTESTS_SIDE,
    "suite.processes": PYTESTS_SIDE,
    "suite.stages": PYTESTS_SIDE,
    "suite.models": PYTESTS_SIDE,
    "suite.subjects": PYTESTS_SIDE,
}
# Imports that cross a wall and wait to be mended: (importing module, imported module).
WAITING: set[tuple[str, str]] = set()

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Our modules by their dotted names."""
    found = {}
    for path in (path for package in OURS for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(root: Path) -> Graph:
    """What every module of ours imports: ours by their whole names, other packages by theirs."""
    ours = modules(root)
    return {name: {*_resolved(_imported(ast.parse(path.read_text())), ours)} for name, path in ours.items()}


def _imported(node: ast.AST) -> Iterator[str]:
    """Names of modules, or of what stands in one; also where a function imports them, but not for type checkers."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


def _resolved(names: Iterator[str], ours: Mapping[str, Path]) -> Iterator[str]:
    """With the packages that Python imports on the way."""
    for name in names:
        parts = name.split(".")
        wholes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)] if parts[0] in OURS else parts[:1]
        yield from (whole for whole in wholes if whole in ours or parts[0] not in OURS)


def crossings(imported: Graph, room: str, forbidden: tuple[str, ...]) -> list[list[str]]:
    """The shortest ways, as lists of modules, from a room to every forbidden module that its modules import."""
    ways = {name: [name] for name in imported if within(name, (room,))}
    queue, found = [*ways], {}
    for name in queue:
        for other in sorted(imported.get(name, ())):
            if (name, other) in WAITING:
                continue
            if within(other, forbidden):
                found.setdefault((name, other), [*ways[name], other])
            elif other not in ways:
                ways[other] = [*ways[name], other]
                queue.append(other)
    return [*found.values()]


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.fixture(scope="module")
def imported() -> Graph:
    return graph(ROOT)


@pytest.mark.parametrize("room", WALLS)
def test_nothing_crosses(imported: Graph, room: str):
    assert any(within(name, (room,)) for name in imported), f"expected modules in {room}, found none"
    found = [" -> ".join(way) for way in crossings(imported, room, WALLS[room])]
    assert not found, (
        f"expected that {room} imports nothing of {', '.join(WALLS[room])}, found\n" + "\n".join(found) + "\n"
        "hand it what it needs as an argument, or move what both need to a room that both may import"
    )


def test_what_waits_to_be_mended_is_still_there(imported: Graph):
    mended = [edge for edge in WAITING if edge[1] not in imported.get(edge[0], ())]
    assert not mended, f"expected imports that wait to be mended, found them gone: {mended}; remove them from WAITING"


# ---- facts that a wall has stand twice


def texts(room: Path) -> set[str]:
    """Every text that stands in a room's modules."""
    nodes = (node for path in room.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("fact", [janitor.RUN_VARIABLE, str(janitor.SHARED_MEMORY)])
def test_extensions_and_the_janitor_mean_the_same(fact: str):
    """The janitor imports no torch and the extensions nothing of the suite, so each says it for itself."""
    found = texts(ROOT / "extensions")
    assert fact in found, f"expected {fact!r} in extensions/, as in suite/processes/janitor.py; found it nowhere there"


def test_what_extensions_keep_in_shared_memory_is_what_the_janitor_removes():
    names = [text for text in texts(ROOT / "extensions") if text.startswith("weight-sync-")]
    assert names, "expected extensions/ to name what it keeps in shared memory"
    assert [name for name in names if not name.startswith(janitor.SEGMENT_PREFIX)] == []


# ---- that it finds what crosses

FILES = {
    "suite/__init__.py": "",
    "suite/plugin.py": "import pytest",
    "suite/between.py": "from suite import plugin",
    "suite/room/__init__.py": "",
    "suite/room/one.py": "",
}


@pytest.mark.parametrize(
    ("code", "way"),
    [
        ("import suite.plugin", "suite.room.one -> suite.plugin"),
        ("from suite.plugin import announce", "suite.room.one -> suite.plugin"),
        ("from suite import plugin", "suite.room.one -> suite.plugin"),
        ("def late():\n    from suite import plugin as other", "suite.room.one -> suite.plugin"),
        ("from suite.between import anything", "suite.room.one -> suite.between -> suite.plugin"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import suite.plugin", None),
        ("import suite_plugin\nimport os.path", None),
    ],
)
def test_what_crosses_is_found(tmp_path: Path, code: str, way: str | None):
    for name, text in (FILES | {"suite/room/one.py": code}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = crossings(graph(tmp_path), "suite.room", ("suite.plugin",))
    assert [" -> ".join(way) for way in found] == ([way] if way else [])


def test_what_the_packages_on_the_way_import_counts(tmp_path: Path):
    for name, text in (FILES | {"suite/room/__init__.py": "import torch.nn", "suite/plugin.py": ""}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "page.py").write_text("from suite.room.one import anything")
    found = crossings(graph(tmp_path), "reports", ("torch", "vllm"))
    assert found == [["reports.page", "suite.room", "torch"]]
