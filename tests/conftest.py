import pytest

# for `make test-fid` only: it needs torchvision
collect_ignore = ["torchvision_operators.py"]


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Tests neither read nor fill the user's cache of reference statistics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMBREAK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
