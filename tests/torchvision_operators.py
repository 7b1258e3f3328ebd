"""Imported before pytest by `make test-fid`: lets torchvision be imported beside a CPU build of torch.

torchvision's usual wheel cannot load its operators there, and then fails to import for want of two of them. They are
declared, not defined: nothing here calls them. transformers and diffusers, which pytest's own settings import, need
them too: a plugin or a conftest would come too late.
"""

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
