"""In pytest's process: engines lent from a pool, trainers, one update, and what is expected of it."""
