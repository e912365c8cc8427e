"""What starts, calls and ends a process, and what it says."""
