"""How long this host was short of memory, as Linux's pressure stall information says."""

import re
from pathlib import Path

MEMORY = Path("/proc/pressure/memory")
_TOTAL_US = re.compile(r"^full .*\btotal=(\d+)", re.MULTILINE)


def stalled_s() -> float:
    """Seconds since the host started in which it ran nothing for want of memory; 0 where the kernel does not say."""
    try:
        found = _TOTAL_US.search(MEMORY.read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1e6 if found else 0.0
