"""The catalogue: what weight sync into vLLM has to do, clause by clause.

An id is stable: clauses may be added, and one that no longer holds is removed, but an id is never given to another
clause. `threads` cite where it went wrong before, as <project>#<issue or pull request>.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """One clause. `kind` says on which stages it can be judged: "cpu", "gpu" or "both"."""

    id: str
    level: str  # "MUST" | "SHOULD"
    text: str
    reason: str
    threads: tuple[str, ...] = ()
    kind: str = "both"


_ALL = (
    Requirement(
        "update.zeroed",
        "MUST",
        "After an update with zeros, every weight element that the engine computes with is zero and at least one was "
        "looked at, the engine generates what a model of zeros does, and check_weights_changed() turned true.",
        "Where a backend replaces parameters with empty ones, 'all are zero' holds although nothing was updated.",
    ),
    Requirement(
        "update.exact",
        "MUST",
        "After an update, every weight that the engine computes with equals, bit by bit, that of an engine that "
        "loaded the same checkpoint from disk; so it does after the update back.",
        "Shapes, sums and 'the output changed' let swapped, stale and half loaded tensors pass.",
        ("vllm#42821", "vllm#44814", "vllm#48284", "vllm#51063", "prime-rl#2714", "sglang#14178", "vllm#57022"),
    ),
    Requirement(
        "update.behaviour",
        "MUST",
        "After an update, the engine chooses the greedy tokens of the trainer's own forward pass wherever the "
        "choice is clear, and the log-probabilities of its tokens are the trainer's within the stated tolerance.",
        "Weights may be right where they are read and not where they are used.",
        ("vllm#42821", "trl#5312", "slime#929"),
    ),
    Requirement(
        "update.repeated",
        "MUST",
        "Three different updates in a row are each exact.",
        "Loading into a model that has already been processed differs from loading into a fresh one.",
        ("vllm#42821", "skyrl#1680", "verl#7136", "vllm#14266", "vllm#28425"),
    ),
    Requirement(
        "update.tied",
        "MUST",
        "With tied embeddings, an update that sends the embedding alone is exact in the embedding and in the "
        "output layer.",
        "The two share one tensor until a backend repacks one of them.",
        ("vllm#51063", "vllm#51665"),
    ),
    Requirement(
        "update.untied",
        "MUST",
        "With untied embeddings, embedding and output layer each get their own tensor, and neither the other's.",
        "Code written for tied models discards or duplicates the output layer.",
        ("vllm#51063", "vllm#51665"),
    ),
    Requirement(
        "update.moe",
        "MUST",
        "Two updates in a row of a mixture of experts, sent expert by expert, are each exact in every expert and "
        "router.",
        "Kernels want the experts fused, and a second load can write into the layout of the first.",
        ("vllm#42821", "skyrl#1680", "vllm#41670"),
    ),
    Requirement(
        "update.order",
        "MUST",
        "An update is exact whatever the order of its tensors.",
        "Layers that wait for their last tensor may be finished before it came, and trainers send in orders of "
        "their own.",
        ("sglang#14178", "ms-swift#9060"),
    ),
    Requirement(
        "update.dtype",
        "MUST",
        "Float32 tensors sent to a bfloat16 engine arrive as torch rounds them: to the nearest, ties to even.",
        "Truncation, or a way through float16, changes half of the weights by one unit and no shape.",
    ),
    Requirement(
        "update.nonfinite",
        "MUST",
        "NaNs with their payloads, infinities, negative zeros and subnormal numbers arrive bit by bit.",
        "A diverged trainer has to be seen in the engine; what cleans up or flushes numbers hides it.",
    ),
    Requirement(
        "update.trained",
        "MUST",
        "After an optimiser step of a trainer that holds the model in shards, the update sends the stepped "
        "weights, whole.",
        "What is sent may be a rank's own shard, or a copy from before the step.",
        ("slime#929", "ms-swift#10204", "trl#5312"),
    ),
    Requirement(
        "update.sequence",
        "MUST",
        "After any sequence of whole updates, tensors sent alone, updates that are refused, called off, nested or lost "
        "with their trainer, generations, cache resets and sleeps, the engine computes with the last acknowledged "
        "weights, or has said that it is inconsistent.",
        "What an update leaves behind meets the next one: each may be right on its own.",
        ("vllm#42821", "vllm#57853", "vllm#57854", "vllm#48284"),
    ),
    Requirement(
        "update.graphs",
        "MUST",
        "An engine that captured CUDA graphs computes with the updated weights, and the addresses of its "
        "parameters are those from before the update.",
        "A graph replays addresses: a parameter that was replaced leaves it computing with the old one.",
        ("vllm#41670",),
        "gpu",
    ),
    Requirement(
        "update.fp8",
        "MUST",
        "An engine with online FP8 quantisation, updated from bfloat16 tensors, equals one that quantised the same "
        "checkpoint when it loaded it: weights and scales.",
        "Processing after loading drops loaders and changes layouts, and the second time it starts from its own "
        "result.",
        ("vllm#14266", "vllm#28425", "verl#7136", "vllm#41670"),
        "gpu",
    ),
    Requirement(
        "fanout.two_engines",
        "MUST",
        "One trainer updates two engines at once, and both are exact.",
        "Ranks are offset by engine, and an offset that is wrong leaves one of them waiting or with another's shard.",
        ("vllm#56949",),
    ),
    Requirement(
        "names.free",
        "MUST",
        "No public name of the extension is one that the installed vLLM's Worker has.",
        "vLLM mixes the extension into its worker and refuses to start where names collide; each release takes new "
        "ones.",
    ),
    Requirement(
        "errors.unknown_name",
        "MUST",
        "An update with a tensor that the model does not have is refused within its deadline, naming it, and the "
        "engine still generates what it generated before.",
        "An ignored name is a renamed layer that is never updated; a crash is an engine lost.",
        ("vllm#57854", "vllm#51063"),
    ),
    Requirement(
        "errors.missing_name",
        "MUST",
        "An update that lacks a tensor of the model is refused within its deadline, naming it, and the engine "
        "still generates what it generated before.",
        "A layer that receives only some of its tensors is finished over uninitialised memory, silently.",
        ("vllm#44814", "prime-rl#2714", "vllm#57854"),
    ),
    Requirement(
        "errors.shape",
        "MUST",
        "An update with a tensor of another shape than the model's is refused within its deadline, naming it, and "
        "the engine still generates what it generated before.",
        "Half loaded, the tensors already consumed are gone, and the next request ends the engine.",
        ("vllm#57854", "trl#6913"),
    ),
    Requirement(
        "errors.dtype",
        "MUST",
        "An update with a tensor of a dtype that cannot be the model's weights is refused within its deadline, "
        "naming it, and the engine still generates what it generated before.",
        "Copying casts whatever it is given, and a dtype that cannot be sent leaves the other side waiting.",
        ("trl#3690", "trl#6913"),
    ),
    Requirement(
        "errors.nested",
        "MUST",
        "An update that is begun inside another is refused, and the weights stay as they were.",
        "Two updates at once leave a mixture that neither trainer has.",
        ("vllm#57854",),
    ),
    Requirement(
        "faults.trainer_killed",
        "MUST",
        "Where the trainer dies before, during or after the transfer, the engine answers within its deadline: it has "
        "the new weights, or raises and has the old ones, or says that it is inconsistent. The next trainer's update "
        "is exact.",
        "NCCL waits for a peer that has died for ever, and what was half loaded generates on.",
        ("trl#6913", "vllm#57854"),
    ),
    Requirement(
        "faults.trainer_stopped",
        "MUST",
        "Where the trainer stops answering in the middle of the transfer, the engine answers within its deadline, as "
        "if the trainer had died.",
        "A process that hangs closes no connection: only a deadline finds it.",
        ("trl#6913", "trl#3690"),
    ),
    Requirement(
        "faults.worker_killed",
        "MUST",
        "Where a worker of the engine dies in the middle of an update, engine and trainer both raise within the "
        "deadline.",
        "A trainer that waits for a worker that has died holds its GPUs until someone looks.",
        ("trl#6913", "vllm#57853"),
    ),
    Requirement(
        "devices.remap",
        "MUST",
        "Handles land on the GPU that they came from, and the update is exact, for every combination of the "
        "trainer's and the engine's CUDA_VISIBLE_DEVICES: same, reversed, one a subset of the other, as UUIDs, "
        "unset.",
        "A CUDA IPC handle carries the sender's ordinal, which means another GPU, or none, to the receiver.",
        ("sglang#5077", "Mooncake#3678", "vime#418", "vllm#41848", "vllm#56949"),
        "gpu",
    ),
    Requirement(
        "devices.identity",
        "MUST",
        "The id that the engine reports for a GPU is NVML's, torch's and the trainer's for the same GPU, in one "
        "spelling.",
        "Ids are the keys of handles: spelled in two ways, or taken by an ordinal that means another GPU, they "
        "never meet.",
        ("vllm#41848", "vllm#46132", "vllm#56949"),
        "gpu",
    ),
    Requirement(
        "devices.wrong_handle",
        "MUST",
        "Handles for another device, under an unknown id, or an empty set of them are refused with an error that "
        "names the id, and the weights stay as they were.",
        "An update that finds nothing for its device and reports success leaves the old weights in silence.",
        ("vllm#56949", "sglang#5077", "vllm#57022"),
    ),
    Requirement(
        "cache.prefix",
        "MUST",
        "After an update and the reset that the extension documents, no prefix cached under the old weights is "
        "used; without the reset it would be.",
        "Cached keys and values are functions of the weights that computed them.",
        ("vllm#9744", "nemo-rl#4018"),
    ),
    Requirement(
        "sleep.level1",
        "MUST",
        "An engine that slept at level 1 and woke is updated exactly.",
        "Weights return to memory that may be mapped anew, under addresses and handles taken before.",
        ("trl#5312", "vllm#57853", "vllm#52950"),
        "gpu",
    ),
    Requirement(
        "sleep.level2",
        "MUST",
        "An engine that slept at level 2, which discards the weights, is exact after it woke and was updated: "
        "buffers too.",
        "What no update sends, such as rotary tables, is not restored by one.",
        ("vllm#16564", "vllm#29341", "trl#5312", "vllm#57853"),
        "gpu",
    ),
    Requirement(
        "memory.steady",
        "SHOULD",
        "Over 50 updates, device memory, host memory, file descriptors and mapped handles of both sides stay level.",
        "A buffer kept each round ends a training run after hours.",
        ("vllm#51258", "verl#6958", "vllm#52950", "verl#7873"),
    ),
)

REQUIREMENTS: dict[str, Requirement] = {requirement.id: requirement for requirement in _ALL}
