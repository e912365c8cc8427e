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


def expect_told(some: object, what: str, where: str) -> None:
    """Raise RuntimeError, which is an error and no fail, unless there is `some` of what is looked at."""
    if not some:
        raise RuntimeError(f"expected {what}, found none to look at: nothing is told {where}")


def _line(text: object) -> str:
    return "; ".join(filter(None, map(str.strip, str(text).splitlines()))) or "nothing"
