"""How a failure reads: what was expected, what was found and where, each on a line of its own."""


class Differs(AssertionError):
    """Something else was found than was expected.

    cause: both in a sentence without where, the same for all cases that one fault explains.
    """

    def __init__(self, expected: str, found: object, where: str) -> None:
        expected, found = _line(expected), _line(found)
        self.cause = f"expected {expected}, found {found}"
        super().__init__(f"expected: {expected}\nfound: {found}\nwhere: {where}")


def expect(holds: object, expected: str, found: object, where: str) -> None:
    """Raise Differs unless `holds`. `where` names the subject, stage, model and update: Sync's own `where`, mostly."""
    if not holds:
        raise Differs(expected, found, where)


def _line(text: object) -> str:
    return "; ".join(filter(None, map(str.strip, str(text).splitlines()))) or "nothing"
