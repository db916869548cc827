"""Importing this makes torchvision importable beside a CPU build of torch.

Most processors of vision-language models need torchvision, whose builds on the registry are for CUDA builds of torch.
`make dev` puts one into .venv/vision. Its Python part works with a CPU build too, once the operators are declared that
it expects from its CUDA part.
"""

import importlib.util
import sys
from pathlib import Path

import torch

if importlib.util.find_spec("torchvision") is None:
    sys.path.append(str(Path(__file__).parents[1] / ".venv" / "vision"))
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
