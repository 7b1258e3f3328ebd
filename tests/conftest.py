import gc

import pytest

# for `make test-fid` only: it needs torchvision
collect_ignore = ["torchvision_operators.py"]


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Tests neither read nor fill the user's cache of reference statistics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMBREAK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure(config):
    """Late starts that warn fail. Not in pyproject.toml: xdist's controller, which runs no test, would import torch."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.addinivalue_line("filterwarnings", "error::symbreak.start.late_start.LateStartWarning")


def pytest_collection_finish(session):
    """What torch and diffusers hold is looked through once, not in every collection of garbage."""
    gc.collect()
    gc.freeze()
