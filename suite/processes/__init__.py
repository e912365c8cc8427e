"""What starts, calls and ends a process, and what it says. Everybody else starts one through a Launcher."""
