"""What the checkpoint of an engine holds, read off the headers of its safetensors files. No weight is read."""

import json
from pathlib import Path

import torch

from extensions.manifest import Announced

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def checkpoint_layouts(model: str) -> Announced:
    """The dtype and shape of each tensor in the checkpoint of `model`, a directory or a name in the local cache.

    Empty where there is no safetensors file, as in the directory of an engine that starts with dummy weights. Raises
    OSError, ValueError or KeyError where a file cannot be read.
    """
    directory = _directory(model)
    found: Announced = {}
    for path in checkpoint_files(directory) if directory is not None else ():
        for name, entry in _header(path).items():
            if name != "__metadata__":
                found[name] = (DTYPES.get(entry["dtype"], torch.uint8), tuple(entry["shape"]))
    return found


def _directory(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of the checkpoint in a directory: those of its index, where there is one.

    Raises OSError, ValueError or KeyError where the index cannot be read.
    """
    if (directory / INDEX).is_file():
        names = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        return [directory / name for name in sorted(names)]
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))


def _header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        return json.loads(file.read(length))
