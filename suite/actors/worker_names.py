"""What vLLM's own worker classes are called and have, without an engine."""

from suite.processes.target import load

WORKERS = ("vllm.v1.worker.gpu_worker:Worker", "vllm.v1.worker.cpu_worker:CPUWorker")


class WorkerNames:
    """Imports the worker classes of the installed vLLM; those of other platforms may not be importable."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        for worker in WORKERS:
            try:
                cls = load(worker)
            except (ImportError, OSError) as error:
                print(f"{worker} is not of this platform: {error}")  # to the log
                continue
            self._names |= set(dir(cls))

    def facts(self) -> dict:
        """{"names": every attribute of the classes}."""
        return {"names": sorted(self._names)}
