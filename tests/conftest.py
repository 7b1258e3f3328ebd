"""Set-up of all tests: no cache of the user's, and torchvision beside a CPU build of torch (`make test-fid`)."""

import importlib.util
import sys

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMBREAK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def declare_missing_operators():
    """torchvision's usual wheel cannot load its operators beside a CPU torch, and then fails to import."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        import torch

        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


LIBRARY = declare_missing_operators() if importlib.util.find_spec("torchvision") else None
