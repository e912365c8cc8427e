"""What makes two engines the same, a started engine as pytest sees it, and with which options one starts."""

from dataclasses import dataclass, field

from suite.models import MODELS, alibi
from suite.processes.call import Process
from suite.processes.launcher import Launcher
from suite.stages import Stage
from suite.subjects import Subject

BECOME_DEADLINE_S = 15.0


@dataclass(frozen=True)
class EngineKey:
    """What makes two engines the same.

    seed: of the checkpoint that it cold-loads, None for dummy weights. options: further arguments of vllm.LLM.
    visible: its CUDA_VISIBLE_DEVICES where that is not its stage's; None for unset. copy: counts engines of a stage.
    again: whether it only shows how far two cold engines of the same are apart.
    serves: whether it answers requests while it is updated.
    """

    model: str
    stage: str
    subject: str
    seed: int | None
    options: tuple[tuple[str, object], ...] = ()
    visible: str | None = ""
    copy: int = 0
    again: bool = False
    serves: bool = False

    def is_server(self, stage: Stage) -> bool:
        """Whether it is a `vllm serve`, on this stage. What others are compared with never is."""
        return self.serves and stage.server

    def __str__(self) -> str:
        extra = [f"{name}={value}" for name, value in self.options]
        extra += [] if self.visible == "" else [f"CUDA_VISIBLE_DEVICES={self.visible}"]
        extra += [f"#{self.copy}"] if self.copy else []
        extra += ["again"] if self.again else []
        extra += ["serving"] if self.serves else []
        return " ".join([self.model, self.stage, self.subject, f"seed={self.seed}", *extra])


class PortTaken(Exception):
    """An engine did not start since something else listens where it was to."""


class NoReference(Exception):
    """The engine to compare with did not start: nothing can be said of the subject."""

    def __init__(self, key: EngineKey, error: Exception) -> None:
        self.said = f"the engine to compare with, {key}, did not start: {getattr(error, 'said', error)}"
        super().__init__(self.said)


@dataclass
class EngineHandle:
    """A started engine as pytest sees it."""

    key: EngineKey
    process: Process
    link_path: str
    ranks: int
    subject: dict[str, str] | None  # `Subject.plain()` of the one whose extension its workers have; None if not known
    connection: object = None  # which trainer and group it last joined
    facts: dict = field(default_factory=dict)

    def become(self, subject: Subject) -> None:
        """Have the engine exchange its extension and its half of updates for this subject's, unless it has them."""
        wanted = subject.plain()
        if self.subject != wanted:
            self.subject, self.connection = None, None
            self.process.call("become", wanted, deadline_s=BECOME_DEADLINE_S)
            self.subject = wanted


def actor_of(key: EngineKey, stage: Stage, launcher: Launcher) -> tuple[str, dict[str, object]]:
    """The class that owns an engine in its process, and what it is given beside what every engine is."""
    if key.is_server(stage):
        return "suite.actors.server:ServerEngine", {"address": launcher.address, "port": launcher.free_port()}
    if stage.data_parallel_size > 1:
        return "suite.actors.parallel:ParallelEngine", {}
    return f"suite.actors.{'serving:ServingEngine' if key.serves else 'engine:Engine'}", {}


def seed_of(subject_index: int) -> int:
    """The checkpoint that a subject's engines start from: two subjects are each other's cold-loaded reference."""
    return 0 if subject_index == 0 else 1


# vLLM's CPU engine makes what a later rank of a pipeline receives into when it warms up, and an eager one does not warm
# up (0.32). This one does, and what it would compile is not compiled: see TORCHDYNAMO_DISABLE.
OF_CPU_PIPELINES = {"enforce_eager": False, "compilation_config": {"mode": 1}}

# FlashInfer's kernels for gated delta nets are compiled when they are first used, and not every host has the package.
# Of FlashAttention only version 2 knows ALiBi, and not every build of vLLM has that.
OF_GPU_MODELS = {
    "qwen3_next": {"additional_config": {"gdn_prefill_backend": "triton"}},
    alibi.ARCHITECTURE: {"attention_backend": "TRITON_ATTN"},
}


def engine_options(stage: Stage, model: str) -> dict:
    """Arguments of vllm.LLM that every engine of a stage and a model gets."""
    options = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 16, "seed": 0, "enforce_eager": True}
    options["max_num_batched_tokens"] = 4096
    options["kv_cache_memory_bytes"] = (64 if stage.kind == "cpu" else 512) * 2**20
    if stage.kind == "gpu":
        options["gpu_memory_utilization"] = 0.05  # the cache's size is given; this is only what has to be free
        options |= OF_GPU_MODELS.get(MODELS[model].architecture, {})
    spec = MODELS[model]
    options["skip_tokenizer_init"] = not (spec.processor or spec.sees)  # prompts are token ids, but vLLM wants it
    if spec.processor or spec.sees:
        options["skip_mm_profiling"] = True
    if stage.pipeline_parallel_size > 1:
        options["pipeline_parallel_size"] = stage.pipeline_parallel_size
        options |= OF_CPU_PIPELINES if stage.kind == "cpu" else {}
    if stage.data_parallel_size > 1:
        options["data_parallel_size"] = stage.data_parallel_size
    return options


def options_of(key: EngineKey, stage: Stage) -> dict:
    """Arguments of vllm.LLM that an engine gets."""
    return engine_options(stage, key.model) | ({"load_format": "dummy"} if key.seed is None else {}) | dict(key.options)


def expect_on(devices: tuple[str, ...], facts: dict, name: str) -> None:
    """Ordinals name devices to the engine; UUIDs decide whether they are the right ones."""
    found = tuple(device["id"] for device in facts["devices"])
    if found != devices:
        raise RuntimeError(f"expected {name} on {devices}, found it on {found}: do NVML and CUDA agree on the order?")
