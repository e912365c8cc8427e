"""A timer for pytest-benchmark that counts what happens between the processes, not what pytest waits for."""


class MovedClock:
    """Sums the seconds of updates as the trainer and the engine have measured them.

    pytest-benchmark takes a round's time as the difference of two readings of its timer. Read before and after an
    update, this clock gives exactly the update's own time: from the earliest start to the latest end of its halves.
    """

    def __init__(self) -> None:
        self._total_s = 0.0

    def __call__(self) -> float:
        """Seconds counted so far."""
        return self._total_s

    def add(self, elapsed_s: float) -> None:
        """Count one update."""
        self._total_s += elapsed_s


moved_clock = MovedClock()
