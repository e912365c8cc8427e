"""CUDA's rules of which devices a process sees, stated from NVIDIA's documents, and machines to apply them to.

Nothing of the suite's own code is used here: this judges it. The sources:

* CUDA C++ Programming Guide, "CUDA Environment Variables", CUDA_VISIBLE_DEVICES: a comma-separated sequence of GPU
  identifiers, which are integer indices or UUID strings; abbreviated UUIDs are allowed where they identify one GPU; the
  process sees only the devices in the sequence and enumerates them in its order; one invalid index hides all that come
  after it (0,2,-1,1 shows 0 and 2); unset shows all, the empty string none.
* NVIDIA Multi-Instance GPU User Guide, "CUDA Device Enumeration": a slice is named MIG-<UUID>; a process enumerates a
  single slice, the first of those that it could see; and no GPU in one piece besides.

The guides are silent on these, which are as PyTorch has them (torch.cuda._parse_visible_devices): a device named twice
leaves none; an index is read as strtol reads it ("1x" is 1); a sequence goes on only with identifiers of its first
one's sort. Blanks around an identifier, of which nobody says anything, mean nothing here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A physical GPU: its UUID without prefix, and the UUIDs of the slices that it is cut into."""

    uuid: str
    slices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Physical:
    """What memory lies on: a GPU, or a slice of it. `gpu` is the GPU's place on the machine."""

    gpu: int
    uuid: str
    is_slice: bool

    @property
    def name(self) -> str:
        """As nvidia-smi -L prints it."""
        return f"{'MIG' if self.is_slice else 'GPU'}-{self.uuid}"


def physical_devices(machine: list[Gpu]) -> list[Physical]:
    """Everything that memory can lie on."""
    found = []
    for index, gpu in enumerate(machine):
        found += [Physical(index, uuid, True) for uuid in gpu.slices] or [Physical(index, gpu.uuid, False)]
    return found


def enumerated(value: str | None, machine: list[Gpu]) -> list[Physical]:
    """What a process with this CUDA_VISIBLE_DEVICES sees, by its ordinals there; None stands for unset."""
    devices = physical_devices(machine)
    if value is None:
        return _as_one_process(devices)
    chosen: list[Physical] = []
    sort = None
    for identifier in (part.strip() for part in value.split(",")):
        is_uuid = identifier.startswith(("GPU-", "MIG-"))
        this_sort = identifier[:4] if is_uuid else "index"
        sort = sort or this_sort
        named = _by_uuid(identifier, devices) if is_uuid else _by_index(identifier, devices)
        if this_sort != sort or named is None:
            break
        if named in chosen:
            return []
        chosen.append(named)
    return _as_one_process(chosen)


def _by_uuid(identifier: str, devices: list[Physical]) -> Physical | None:
    candidates = [device for device in devices if device.name.startswith(identifier)]
    return candidates[0] if len(candidates) == 1 else None


def _by_index(identifier: str, devices: list[Physical]) -> Physical | None:
    sign = identifier[:1] if identifier[:1] in ("+", "-") else ""
    digits = ""
    for character in identifier[len(sign) :]:
        if character not in "0123456789":
            break
        digits += character
    if not digits or sign == "-":
        return None
    of_gpu = [device for device in devices if device.gpu == int(digits)]
    return of_gpu[0] if of_gpu else None


def _as_one_process(devices: list[Physical]) -> list[Physical]:
    first_slice = next((device for device in devices if device.is_slice), None)
    return [first_slice] if first_slice else devices


def listing(machine: list[Gpu]) -> str:
    """What `nvidia-smi -L` prints on this machine."""
    lines = []
    for index, gpu in enumerate(machine):
        lines.append(f"GPU {index}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu.uuid})")
        lines += [f"  MIG 1g.10gb     Device  {n}: (UUID: MIG-{uuid})" for n, uuid in enumerate(gpu.slices)]
    return "\n".join(lines) + "\n"
