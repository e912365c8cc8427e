"""When a subject is given up: one that hangs in every update must not cost every test a deadline and an engine."""

from collections import Counter

NEVER_WELL, ONCE_WELL = 2, 4  # updates lost in a row: of a subject that never had a good one, and of one that had
LOST_S = 60.0  # or one lost update that took so long, of a subject that never had a good one


class GivenUp(AssertionError):
    """An update that is not tried, since those before it have ended engines or trainers.

    cause: what the first of them ended with.
    """

    def __init__(self, message: str, cause: str) -> None:
        self.cause = cause
        super().__init__(message)


class Patience:
    """Counts, for every subject, the updates that cost a process since its last good one."""

    def __init__(self) -> None:
        self._well: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._lost_s: Counter[str] = Counter()
        self._cause: dict[str, str] = {}

    def succeeded(self, subject: str) -> None:
        """An update of this subject ended well on both sides."""
        self._well.add(subject)
        self._lost[subject] = 0

    def lost(self, subject: str, elapsed_s: float, cause: str) -> None:
        """An update of this subject took so long, and a process had died or had to be ended after it."""
        if not self._lost[subject]:
            self._cause[subject] = cause
        self._lost[subject] += 1
        self._lost_s[subject] += elapsed_s

    def expect_hope(self, subject: str) -> None:
        """Raises GivenUp where nothing but another lost process is to be expected of an update of this subject."""
        lost, well = self._lost[subject], subject in self._well
        if lost < (ONCE_WELL if well else NEVER_WELL) and (well or self._lost_s[subject] < LOST_S):
            return
        since = "since its last good one" if well else "and it has never had a good one"
        raise GivenUp(
            f"expected an update of {subject} to succeed; not tried: its last {lost} updates each cost a process,"
            f" {since}. The first ended with: {self._cause[subject]}",
            self._cause[subject],
        )
