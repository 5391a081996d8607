"""Random configs: each loads, and equals itself once saved; or is refused in one line. Of some, the model is built."""

import sys
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from attacks import configs

SETTINGS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
randoms = st.randoms(use_true_random=False)


@settings(max_examples=400, **SETTINGS)
@given(randoms)
def test_random_values_of_random_keys(tmp_path_factory, random):
    configs.load(configs.overrides(random), folder(tmp_path_factory))


@settings(max_examples=400, **SETTINGS)
@given(randoms)
def test_damaged_files(tmp_path_factory, random):
    configs.load(configs.document(random), folder(tmp_path_factory))


@settings(max_examples=60, **SETTINGS)
@given(randoms)
def test_what_loads_is_built(random):
    configs.build(configs.tiny_options(random))


def folder(factory):
    path = factory.getbasetemp() / "fuzz"
    path.mkdir(exist_ok=True)
    return path


def test_attacks_succeed_and_fail(tmp_path):
    """The generators make configs of both kinds."""
    results = [configs.load(configs.overrides(Random(k)), tmp_path) for k in range(60)]
    assert 10 < sum(result is None for result in results) < 50
