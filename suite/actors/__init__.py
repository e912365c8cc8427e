"""In started processes: engine, trainer, the line between them, and the probe in the workers."""
