import os

# Before torch: two threads in each of several test processes slow each other down many times.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests generate the shapes anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMAINNORM_DATA", str(tmp_path_factory.mktemp("cache")))
        yield
