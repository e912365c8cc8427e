"""Which subjects there are: those of this folder, those that installed packages bring, and a user's own class."""

from functools import cache
from importlib import metadata

from suite.subjects import (
    areal,
    broadcast,
    checkpoint_engine,
    example,
    handles,
    native_gloo,
    native_ipc,
    native_nccl,
    native_planned,
    openrlhf,
    planned,
    swift,
    trl,
    verl,
)
from suite.subjects.adapting import expect_known_forms
from suite.subjects.protocol import Subject, load

ENTRY_POINTS = "weight_sync_subjects"  # the group of the entry points by which packages bring subjects
KINDS: tuple[type[Subject], ...] = (
    planned.PlannedSparse,
    planned.Planned,
    planned.PlannedHandles,
    broadcast.Broadcast,
    handles.Handles,
)

# Examined where nobody says which.
SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (broadcast.SUBJECT, handles.SUBJECT)}
# Examined where --subject names them.
NAMED: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        *example.SUBJECTS,
        native_gloo.SUBJECT,
        native_ipc.SUBJECT,
        *native_nccl.SUBJECTS,
        native_planned.SUBJECT,
        *planned.SUBJECTS,
        checkpoint_engine.SUBJECT,
        verl.SUBJECT,
        *openrlhf.SUBJECTS,
        swift.SUBJECT,
        trl.SUBJECT,
        areal.SUBJECT,
    )
}


def subject_from(extension: str) -> Subject:
    """The subject for a user's class, given as `pkg.module:Class`; its methods tell which kind of subject it is.

    An attribute `weight_sync_sender` names the class of its sender, where it has one of its own. Raises ValueError,
    with what is missing, where one of both can't be imported, or the class has the methods of no known kind.
    """
    cls = load(extension)
    sender = getattr(cls, "weight_sync_sender", "")
    if sender:
        load(sender, f"the sender that {cls.__name__}.weight_sync_sender names")
    for kind in KINDS:
        if all(callable(getattr(cls, method, None)) for method in kind.methods):
            expect_known_forms(cls)
            return kind(cls.__name__, extension, kind.lacking(cls), sender=sender)
    wanted = "; or ".join(f"{kind.__name__.lower()}: {', '.join(kind.methods)}" for kind in KINDS)
    raise ValueError(f"{extension} has the methods of no known kind of subject; expected {wanted}")


def known_subjects() -> dict[str, Subject]:
    """All that --subject can name. Raises ValueError for an entry point that brings none, or one there is already."""
    return SUBJECTS | NAMED | _installed()


@cache
def _installed() -> dict[str, Subject]:
    found: dict[str, Subject] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        subject = _brought(entry)
        if subject.name in (*SUBJECTS, *NAMED, *found):
            raise ValueError(f"{_named(entry)}: there is a subject {subject.name} already")
        found[subject.name] = subject
    return found


def _brought(entry: metadata.EntryPoint) -> Subject:
    try:
        subject = entry.load()
    except Exception as error:  # an import may raise anything
        raise ValueError(f"{_named(entry)} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(subject, Subject):
        raise ValueError(f"{_named(entry)}: expected a Subject, found a {type(subject).__name__}")
    return subject


def _named(entry: metadata.EntryPoint) -> str:
    return f"entry point {entry.name} = {entry.value} of group {ENTRY_POINTS}"
