"""Models by architecture and size, written to disk from a config with seeded weights; nothing is downloaded."""

from suite.models.catalogue import ALIBI, ARCHITECTURES, MODELS, TIED, ModelSpec, manifest, tensors
from suite.models.files import fill, read_spec, save, write_checkpoint, write_config
from suite.models.values import Shape, fill_values, values

__all__ = [
    "ALIBI", "ARCHITECTURES", "MODELS", "TIED", "ModelSpec", "Shape", "fill", "fill_values", "manifest",
    "read_spec", "save", "tensors", "values", "write_checkpoint", "write_config",
]  # fmt: skip
