"""`dn.train` and `dn.evaluate` of models and data sets of others."""

import sys

import pytest
import tiny
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

import domainnorm as dn
from domainnorm.data import CocoDataset, train_loader, training_sets
from domainnorm.engine import train

train_module = sys.modules[train.__module__]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


class Own(torch.utils.data.Dataset):
    """Noise with a box, drawn anew for each step."""

    def __init__(self, count=6, dtype=torch.float32):
        self.count, self.dtype = count, dtype

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = (torch.rand(3, 32, 32) * 255).to(torch.uint8) if self.dtype == torch.uint8 else torch.rand(3, 32, 32)
        target = {"boxes": torch.tensor([[2.0, 2, 20 + index, 20]]), "labels": torch.tensor([0]), "image_id": index}
        return image, target


def run(folder, *, resume=False, data=None, **choices):
    torch.manual_seed(1)
    cfg = tiny.config("", folder, DATASETS__TRAIN=[], SOLVER__BASE_LR=0.1, **choices)
    return train(
        cfg, model=tiny.Regressor(norm=True), train_data=Own() if data is None else data, resume=resume
    ).state_dict()


def test_own_data_is_resumed_to_the_bit_whoever_loads_it(tmp_path):
    whole = run(tmp_path / "whole", DATALOADER__NUM_WORKERS=2)
    run(tmp_path / "parts", SOLVER__MAX_ITER=2)
    parts = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "weights: those of the Regressor given" in log and "\nOwn       6  " in log


def test_the_loop_is_that_of_own_data(tmp_path):
    seen = []

    class Watch(tiny.Regressor):
        def forward(self, images, targets=None):
            seen.append([int(target["image_id"]) for target in targets])
            assert all(target["boxes"].shape == (1, 4) for target in targets)
            return super().forward(images, targets)

    cfg = tiny.config("", tmp_path / "out", DATASETS__TRAIN=[], SOLVER__IMS_PER_BATCH=3)
    train(cfg, model=Watch(), train_data=[Own(4), Own(2)])
    assert sorted(seen[0] + seen[1]) == [0, 0, 1, 1, 2, 3]


def test_transforms_replace_those_of_the_config(data_set, tmp_path):
    transforms = v2.Compose([v2.Resize((20, 30)), v2.ToDtype(torch.float32, scale=True)])
    shapes = []

    class Watch(tiny.Regressor):
        def forward(self, images, targets=None):
            shapes.extend(tuple(image.shape) for image in images)
            return super().forward(images, targets)

    train(tiny.config(data_set, tmp_path / "1", SOLVER__MAX_ITER=1), model=Watch(), transforms=transforms)
    own = CocoDataset(data_set)
    train(tiny.config("", tmp_path / "2", DATASETS__TRAIN=[], SOLVER__MAX_ITER=1), model=Watch(), train_data=own,
          transforms=transforms)  # fmt: skip
    assert shapes == [(3, 20, 30)] * 8


def test_statistics_are_recomputed_on_own_data(tmp_path, data_set):
    """Also those of averaged weights, and in the evaluations of the run."""
    torch.manual_seed(0)
    words = {"TEST__STATISTICS": ["recomputed"], "DATASETS__TEST": [data_set], "TEST__RECOMPUTE__NUM_SAMPLES": 6}
    averages = {"SOLVER__AVERAGE_WEIGHTS": "SWA", "TEST__RECOMPUTE__IN_CHECKPOINT": True}
    cfg = tiny.config("", tmp_path / "out", DATASETS__TRAIN=[], **words, **averages)

    class Dark(Own):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image * 0 + 0.125, target

    trained = train(cfg, model=tiny.Regressor(norm=True), train_data=Dark())
    torch.testing.assert_close(trained.norm.running_mean, torch.full((3,), 0.125).double())
    results = dn.evaluate(cfg, trained, train_data=Dark())
    assert results.keys() == {"recomputed"}


WRONG = {
    "generator": (lambda: iter([]), "train_data takes data sets, with __len__ and __getitem__"),
    "empty": (lambda: Own(0), "Own has no image to train on"),
    "bytes": (lambda: Own(dtype=torch.uint8), "the image of Own[0] is torch.uint8 (3, 32, 32); expected floats"),
    "no pair": (lambda: torch.arange(3), "Tensor[0] is tensor(0); expected (image, target)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path, case):
    make, expected = WRONG[case]
    with pytest.raises(dn.UserError) as error:
        run(tmp_path / "out", data=make())
    assert expected in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- torchvision's detectors ----------------------------------------------------------------------------------------


class Backbone(nn.Sequential):
    out_channels = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())


def faster_rcnn():
    """Of three classes: 0 is background."""
    anchors = AnchorGenerator(((16, 32, 64),), ((1.0,),))
    return FasterRCNN(
        Backbone(),
        3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0"], 4, 2),
        box_detections_per_img=20,
    )


class Oracle(nn.Module):
    """Finds the squares of `tiny.write_dataset` by their colours; its label of the first class is `first`."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, images):
        found = []
        for image in images:
            red, blue = image[0] > 0.6, image[2] > 0.6
            y, x = (red | blue).nonzero(as_tuple=True)
            box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            found.append(
                {
                    "boxes": torch.stack([box, box]),
                    "labels": torch.tensor([self.first + int(red.any()), 0]),  # and background
                    "scores": torch.tensor([0.9, 0.95]),
                }
            )
        return found


def test_labels_of_a_model_of_others(data_set, tmp_path):
    """From 1, with background; without names, from 0."""
    words = {"DATASETS__TEST": [data_set], "DATASETS__TRAIN": []}
    named = {"MODEL__CLASS_NAMES": ["background", "kind 3", "kind 7"], "DATASETS__LABELS": "union"}
    results = dn.evaluate(tiny.config("", tmp_path / "1", **words, **named), Oracle(1))
    assert results["population"]["bbox"]["AP"] == pytest.approx(100)
    from_0 = dn.evaluate(tiny.config("", tmp_path / "0", **words), Oracle(0))
    assert 50 < from_0["population"]["bbox"]["AP"] < 100  # class 0 is found twice
    mixed_up = {"MODEL__CLASS_NAMES": ["background", "kind 7", "kind 3"], "DATASETS__LABELS": "union"}
    wrong = dn.evaluate(tiny.config("", tmp_path / "2", **words, **mixed_up), Oracle(1))
    assert wrong["population"]["bbox"]["AP"] == pytest.approx(0)


def test_a_detector_of_torchvision_is_trained_and_evaluated(data_set, tmp_path):
    torch.manual_seed(0)
    cfg = tiny.config(
        data_set,
        tmp_path / "out",
        DATASETS__TEST=[data_set],
        DATASETS__LABELS="union",
        MODEL__CLASS_NAMES=["background", "kind 3", "kind 7"],
        SOLVER__MAX_ITER=3,
        SOLVER__BASE_LR=0.01,
        TEST__STATISTICS=["population", "recomputed"],
    )
    labels = []

    def watch(trainer):
        labels.extend(trainer.model.seen)

    class Watched(FasterRCNN):
        def forward(self, images, targets=None):
            self.seen = [label for target in targets or [] for label in target["labels"].tolist()]
            return super().forward(images, targets)

    model = faster_rcnn()
    model.__class__ = Watched
    before = model.backbone[1].running_mean.clone()
    trained = train(cfg, model=model, hooks=[watch])
    assert trained is model and set(labels) == {1, 2}
    assert not torch.equal(before, model.backbone[1].running_mean)
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    faster_rcnn().load_state_dict(state)
    assert dn.evaluate(cfg, trained)["population"].keys() == {"bbox"}


def test_minibatch_statistics_of_torchs_batch_norms_are_refused_before_training(data_set, tmp_path):
    words = {"DATASETS__TEST": [data_set], "TEST__STATISTICS": ["population", "minibatch"]}
    cfg = tiny.config(data_set, tmp_path / "out", **words)
    with pytest.raises(dn.UserError) as error:
        train(cfg, model=faster_rcnn())
    assert "TEST.STATISTICS 'minibatch': backbone.1 is torch's BatchNorm2d" in str(error.value)
    assert "convert_batchnorm" in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(dn.UserError, match="backbone"):
        dn.evaluate(cfg, faster_rcnn(), "minibatch")


def test_batches_of_own_data_have_their_order_from_the_seed(data_set, tmp_path):
    """What is loaded is the config's stream over the images there are."""
    cfg = tiny.config(data_set, tmp_path)
    own = next(train_loader(cfg, rank=0, world_size=1, datasets=training_sets(cfg)))
    theirs = next(train_loader(cfg, rank=0, world_size=1))
    assert all(map(torch.equal, own[0], theirs[0]))
