import os
import signal
import sys

# Before torch: two threads in each of several test processes slow each other down many times.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="where tests marked gpu run")


def pytest_collection_modifyitems(items):
    """Tests that start processes are marked by what they call."""
    for item in items:
        if {"run_ranks", "launch", "tool"} & set(item.function.__code__.co_names):
            item.add_marker("distributed")


@pytest.fixture(scope="session")
def device(request):
    """For tests marked gpu."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests generate the shapes anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMAINNORM_DATA", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Ctrl-C is what it is in a terminal, also where a shell runs the tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _no_plots():
    """A training draws its data in a second: only where a test asks for it."""
    from domainnorm.engine import train

    module = sys.modules[train.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_data", lambda report, folder: None)
        yield
