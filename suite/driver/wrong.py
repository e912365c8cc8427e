"""What is wrong with an update that has to be refused, in words."""

from typing import Any

# What `suite.actors.checkpoint.Alterations` makes of a tensor, {0}; {1} is what it is given beside the name.
ALTERED = {
    "rename": "{0} under the name {1}",
    "drop": "no {0}",
    "truncate": "{0} of a row less",
    "lengthen": "{0} of a row more",
    "turn": "{0} with rows for columns",
    "cast": "{0} as {1}",
    "duplicate": "{0} twice",
    "bits": "{0} of other bits",
    "add": "{1}, which the model does not have",
    "lay": "{0} laid out {1}",
}


def in_words(
    alter: dict[str, Any] | None = None,
    relabel: str | None = None,
    withhold: str | None = None,
    call_off: bool = False,
    running: object = None,
) -> str:
    """What goes behind "an update" in a sentence, as " with no model.norm.weight"; empty where nothing is wrong.

    The arguments are those of `Moving.update`.
    """
    said = [ALTERED[kind].format(*_given(one, of)) for kind, of in (alter or {}).items() for one in of]
    if relabel is not None:
        said.append(f"handles for device {relabel}" if relabel else "no handles")
    if withhold is not None:
        said.append(f"no handle for {withhold}")
    if call_off:
        said.append("an end before it was sent")
    return f" with {' and '.join(said)}" if said else ""


def _given(name: str, of: dict[str, Any] | list[str]) -> tuple[str, Any]:
    return name, of[name] if isinstance(of, dict) else None
