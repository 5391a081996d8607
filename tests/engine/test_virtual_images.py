"""Virtual images in the trainer: they count in the statistics of norms and in nothing else."""

import sys

import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn

import domainnorm as dn
from domainnorm.config import UserError
from domainnorm.engine import train

train_module = sys.modules["domainnorm.engine.train"]
DOMAINS = {"MODEL__NORM_DOMAINS": "dataset", "DATASETS__DOMAINS": ["day", "night"]}


class Net(nn.Module):
    """A detector's interface; the loss of an image depends on others through a BatchNorm."""

    def __init__(self, sync=False):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2), dn.DomainBatchNorm(4, sync=sync)
        self.last = nn.Conv2d(4, 1, 1)
        self.double()

    def forward(self, images, targets):
        out = self.last(self.norm(self.conv(torch.stack([i.double() for i in images]))).tanh())
        counts = torch.tensor([len(target["labels"]) for target in targets])
        return {"loss": ((out.mean((1, 2, 3)) - counts) ** 2).mean()}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


def by_hand(cfg, batches):
    """Two images are learned from, three more are normalized with them, in each of two forward passes of a step."""
    model = Net()
    optimizer = train_module.build_optimizer(cfg, model)
    for _ in range(cfg.SOLVER.MAX_ITER):
        images, targets = next(batches)
        optimizer.zero_grad()
        for first in (0, 5):
            x = torch.stack([i.double() for i in images[first : first + 5]])
            own = model.conv(x[:2])
            features = torch.cat([own, model.conv(x[2:]).detach()])
            mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
            norm, count = model.norm, features.numel() // 4
            with torch.no_grad():
                norm.running_mean.lerp_(mean, 0.1)
                norm.running_var.lerp_(var * count / (count - 1), 0.1)
            a = norm.weight / (var + norm.eps).sqrt()
            y = own * a[:, None, None] + (norm.bias - mean * a)[:, None, None]
            counts = torch.tensor([len(target["labels"]) for target in targets[first : first + 2]])
            ((model.last(y.tanh()).mean((1, 2, 3)) - counts) ** 2).mean().div(2).backward()
        optimizer.step()
    return model


def test_a_step_is_that_of_the_definition(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "build_model", lambda cfg: Net())
    choices = {"SOLVER__VIRTUAL_BATCH": 3, "SOLVER__ACCUMULATE": 2, "MODEL__DEVICE": "cpu"}
    cfg = tiny.config(data_set, tmp_path, **choices)
    trained = train(cfg)
    expected = by_hand(cfg, train_module.train_loader(cfg, rank=0, world_size=1))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(trained.norm, name), getattr(expected.norm, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(list(trained.parameters()), list(expected.parameters()), rtol=1e-9, atol=1e-12)
    assert trained.norm.num_batches_tracked == 8


def _synced(rank, cfg):
    train_module.build_model = lambda cfg: Net(sync=True)
    model = train(cfg)
    return [value.double() for value in model.state_dict().values()]


@pytest.mark.slow
def test_two_processes_normalize_all_images_of_all(data_set, tmp_path):
    cfg = tiny.config(data_set, tmp_path, SOLVER__VIRTUAL_BATCH=2, SOLVER__MAX_ITER=2)
    first, second = run_ranks(_synced, 2, cfg)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = Net()
    optimizer = train_module.build_optimizer(cfg, model)
    loaders = [train_module.train_loader(cfg, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(2):
        (a, of_a), (b, of_b) = (next(loader) for loader in loaders)
        optimizer.zero_grad()
        with dn.virtual_batch(model, a[2:] + b[2:], of_a[2:] + of_b[2:]):
            model(a[:2] + b[:2], of_a[:2] + of_b[:2])["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(first, [value.double() for value in model.state_dict().values()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "choices",
    [{}, tiny.MASK_RCNN, DOMAINS, {"SOLVER__FREEZE_NORM_AT": 2}],
    ids=["retinanet", "mask_rcnn", "domains", "frozen"],
)
def test_detectors_train_with_it_and_resume_to_the_bit(data_set, tmp_path, choices):
    options = choices | {"SOLVER__VIRTUAL_BATCH": 2, "SOLVER__IMS_PER_BATCH": 2}
    sets = {"DATASETS__TRAIN": [data_set, data_set]} if "DATASETS__DOMAINS" in choices else {}
    whole, parts = (tiny.config(data_set, tmp_path / name, **options | sets) for name in ("whole", "parts"))
    trained = train(whole)
    train(tiny.config(data_set, tmp_path / "parts", **options | sets | {"SOLVER__MAX_ITER": 2}))
    resumed = train(parts, resume=True)
    torch.testing.assert_close(resumed.state_dict(), trained.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("norm, reason", [("GhostBN", "groups of samples"), ("GN", "no DomainBatchNorm")])
def test_norms_that_it_cannot_enlarge_are_refused(data_set, tmp_path, norm, reason):
    choices = {"MODEL__BACKBONE__NORM": norm, "MODEL__RETINANET__NORM": "GN", "SOLVER__VIRTUAL_BATCH": 2}
    if norm == "GhostBN":
        choices["MODEL__NORM__GHOSTBN__SAMPLES_PER_GROUP"] = 2
    with pytest.raises(UserError, match=rf"SOLVER\.VIRTUAL_BATCH 2: .*{reason}"):
        train(tiny.config(data_set, tmp_path, **choices))
    assert not list(tmp_path.iterdir())


def test_the_normalization_batch_is_said_and_recomputed_with_them(data_set, tmp_path):
    from domainnorm.data.classification_sets import minibatch_size
    from domainnorm.engine.describe import describe_normalization
    from domainnorm.evaluation.recompute import batch_size

    cfg = tiny.config(data_set, tmp_path, SOLVER__VIRTUAL_BATCH=3, SOLVER__ACCUMULATE=2)
    assert "5 images x height x width" in describe_normalization(cfg, Net())
    assert batch_size(cfg) == minibatch_size(cfg, 1) == 5
