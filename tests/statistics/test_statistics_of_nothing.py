"""Batches without a sample, or with numbers that are not finite, have no statistics."""

from functools import partial

import pytest
import torch
from torch import nn

import domainnorm as dn


@pytest.mark.parametrize("method", ["pooled", "mean_of_variances", "exact"])
def test_no_statistics_of_nothing(method):
    model = nn.Sequential(dn.DomainBatchNorm(3)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(4, 3, 4, 4)
    options = {"method": method, "progress": False}
    for broken, message in ((x[:0], "no sample"), (x / 0, "not finite")):
        for recompute in (dn.recompute_population_statistics, partial(dn.add_domain, name="c")):
            with pytest.raises(ValueError, match=message):
                recompute(model, [broken], **options)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_domain_is_nearest_to_nothing():
    model = nn.Sequential(dn.DomainBatchNorm(8, num_domains=3)).eval()
    x = torch.randn(4, 8, 5, 5)
    for broken, message in ((x[:0], "no sample"), (x / 0, "not finite")):
        with pytest.raises(ValueError, match=message):
            dn.nearest_domain(model, broken)
