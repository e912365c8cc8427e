"""Python runs this at its start where PYTHONPATH has this folder: a torchvision for CUDA can be imported then.

One that is built for CUDA lacks its operators beside a torch for CPUs, and names two of them when it is imported.
Engine processes import it through transformers, and vLLM starts some of them by itself: the environment reaches all.
"""

import importlib
import sys


def let_torchvision_be_imported() -> None:
    """Import torchvision; where that fails for want of its operators, define them, so that the next import succeeds."""
    import torch

    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class BeforeTorchvision:
    """Finds no module, and acts before the first import of torchvision: a process that needs none pays nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            let_torchvision_be_imported()


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, BeforeTorchvision())
