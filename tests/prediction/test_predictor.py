"""What a Predictor takes, and that it finds what an evaluation finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

import domainnorm as dn
from domainnorm.config import save_config
from domainnorm.data import read_image
from domainnorm.data.classes import with_classes
from domainnorm.engine.checkpoint import save_model
from domainnorm.layers import DomainBatchNorm
from domainnorm.modeling import fast
from domainnorm.prediction import predictor

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def images(data_set):
    return Path(data_set.split(":")[1])


def evaluated(data_set, folder, **others):
    """The folder of a model of random weights that finds much, and was evaluated under both statistics."""
    chosen = {"DATASETS__TEST": [data_set], "TEST__STATISTICS": ["population", "minibatch"]}
    cfg = with_classes(tiny.config(data_set, folder, **chosen | others), ["kind 3", "kind 7"])
    torch.manual_seed(0)
    model = dn.build_model(cfg)
    for layer in model.modules():
        if isinstance(layer, DomainBatchNorm):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    if hasattr(model, "head"):
        last = model.head.classification_head.cls_logits
        torch.nn.init.normal_(last.weight, std=10)
        torch.nn.init.zeros_(last.bias)
    save_model(cfg, "model_final.pth", model)
    save_config(cfg, folder / "config.yaml")
    (folder / "last_checkpoint").write_text("model_final.pth")
    dn.evaluate(cfg, model)
    return folder


@pytest.fixture(scope="module")
def retinanet(data_set, tmp_path_factory):
    return evaluated(data_set, tmp_path_factory.mktemp("retinanet"))


@pytest.fixture(scope="module")
def mask_rcnn(data_set, tmp_path_factory):
    return evaluated(data_set, tmp_path_factory.mktemp("mask_rcnn"), **tiny.MASK_RCNN)


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(predictor, "computes_in_bfloat16", lambda device: False)


def in_floats(image):
    return F.to_dtype(image, torch.float32, scale=True)


def assert_equal(found, other, **tolerances):
    """Of two predictions; without tolerances to the bit."""
    assert found.names == other.names and len(found) > 0
    for key in ("boxes", "scores"):
        torch.testing.assert_close(getattr(found, key), getattr(other, key), **tolerances or {"atol": 0, "rtol": 0})
    if found.masks is not None and not tolerances:
        assert torch.equal(found.masks, other.masks)


# --- what an evaluation finds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["population", "minibatch"])
@pytest.mark.parametrize("run", ["retinanet", "mask_rcnn"])
def test_exact_is_what_an_evaluation_found(run, statistics, images, request):
    folder = request.getfixturevalue(run)
    truth = json.loads((folder / "inference" / statistics / "coco_instances_results.json").read_text())
    predict = dn.Predictor(folder, statistics=statistics, exact=True, score=0.0)
    found = [result for k, one in enumerate(predict(images)) for result in one.coco_results(10 + k)]
    assert len(found) == len(truth) > 20
    ids = dict(enumerate(tiny.CATEGORY_IDS, start=1))
    for own, other in zip(found, truth, strict=True):
        own["category_id"] = ids[own["category_id"]]
        assert own.pop("category_name") == f"kind {other['category_id']}"
        assert Path(own.pop("file_name")) == images / f"{other['image_id'] - 10}.png"
        assert own == other
    assert ("segmentation" in found[0]) == (run == "mask_rcnn")


@pytest.mark.parametrize("run", ["retinanet", "mask_rcnn"])
def test_the_fast_way_finds_the_same_but_for_rounding(run, images, request, in_float32):
    folder = request.getfixturevalue(run)
    exact, quick = (dn.Predictor(folder, exact=exact, score=0.0) for exact in (True, False))
    backbone = quick.model.model.backbone
    assert not any(isinstance(m, DomainBatchNorm) for m in backbone.modules())
    for found, other in zip(quick(images), exact(images), strict=True):
        assert len(alike(found, other, 1e-4, 0.99)) > 0.9 * len(other) > 0
        assert (found.masks is None) == (run == "retinanet")


def alike(found, other, atol, overlap):
    """The rows of those in `found` that are also in `other`: order, and NMS, of nearly equal scores is of rounding."""
    same = (found.labels[:, None] == other.labels) & ((found.scores[:, None] - other.scores).abs() <= atol)
    return (same & (box_iou(found.boxes, other.boxes) >= overlap)).any(1).nonzero()


def test_in_bfloat16(retinanet, images, monkeypatch):
    monkeypatch.setattr(predictor, "computes_in_bfloat16", lambda device: True)
    quick, exact = dn.Predictor(retinanet), dn.Predictor(retinanet, exact=True)
    head = quick.model.model.head
    assert head.classification_head.cls_logits.weight.dtype == torch.bfloat16
    assert head.classification_head.conv[0][1].running_mean.dtype == torch.float32
    for image in images.iterdir():
        found, other = quick(image), exact(image)
        assert found.scores.dtype == found.boxes.dtype == torch.float32
        assert len(alike(found, other, 0.1, 0.7)) > 0.7 * len(found) > 0


def test_what_computes_in_bfloat16(monkeypatch):
    for has, expected in (({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert fast.computes_in_bfloat16(torch.device("cpu")) is expected


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("run", ["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("statistics", ["population", "minibatch"])
def test_a_prediction_depends_on_its_image_only(run, statistics, exact, images, request):
    """Whatever the others are, their sizes and their number."""
    options = {"exact": exact, "score": 0.0, "statistics": statistics}
    alone = dn.Predictor(request.getfixturevalue(run), **options)
    together = dn.Predictor(request.getfixturevalue(run), batch_size=3, **options)
    inputs = [read_image(images / f"{k}.png") for k in range(4)]
    inputs[1] = inputs[1][:, :40]
    inputs[2] = F.resize(inputs[2], [100, 90])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for k, found in zip(order, together([inputs[k] for k in order]), strict=True):
            assert_equal(found, alone(inputs[k]))


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predict(retinanet):
    return dn.Predictor(retinanet, exact=True)


def test_one_image_of_any_kind(predict, images):
    path = images / "3.png"
    tensor = read_image(path)
    expected = predict(path)
    assert len(expected) > 5 and expected.boxes.shape == (len(expected), 4) and expected.masks is None
    array = np.asarray(Image.open(path))
    kinds = [str(path), Image.open(path), array, array[::-1][::-1], tensor, in_floats(tensor)]
    for one in kinds:
        found = predict(one)
        assert_equal(found, expected)
        assert torch.equal(F.to_dtype(found.image, torch.uint8, scale=True), tensor)
    names = [found.name for found in predict(kinds)]
    assert names == [str(path), *(f"image {k}" for k in range(2, 7))]


def test_several_images_in_the_order_of_their_numbers(predict, images, tmp_path):
    frames = tmp_path / "frames"
    (frames / "later").mkdir(parents=True)
    for k, name in enumerate(("frame_2.png", "frame_10.PNG", "frame_1.png", ".hidden.png", "later/3.png")):
        shutil.copy(images / f"{k}.png", frames / name)
    (frames / "notes.txt").write_text("no image")

    def names(inputs):
        return [str(Path(found.name).relative_to(frames)) for found in predict(inputs)]

    assert names(frames) == names([str(frames)]) == ["frame_1.png", "frame_2.png", "frame_10.PNG"]
    assert names(f"{frames}/*.png") == ["frame_1.png", "frame_2.png"]
    assert names(f"{frames}/**/*.png") == ["frame_1.png", "frame_2.png", "later/3.png"]
    assert names([f"{frames}/later/?.png", frames]) == ["later/3.png", "frame_1.png", "frame_2.png", "frame_10.PNG"]
    assert isinstance(predict(f"{frames}/later/*.png"), list)  # a pattern, also of one
    shutil.copy(images / "3.png", frames / "[x].png")
    assert predict(frames / "[x].png").name == str(frames / "[x].png")  # a name before it is a pattern


def test_files_and_pil_images_are_turned_upright(predict, images, tmp_path):
    image = Image.open(images / "3.png").crop((0, 0, 64, 50))
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise
    image.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    assert Image.open(tmp_path / "lying.png").size == (50, 64)
    upright, lying = predict(tmp_path / "upright.png"), predict(tmp_path / "lying.png")
    assert_equal(lying, upright)
    assert_equal(predict(Image.open(tmp_path / "lying.png")), upright)
    assert lying.image.shape == (3, 50, 64)


def test_other_modes_and_depths(retinanet, images, tmp_path):
    path = images / "3.png"
    gray = Image.open(path).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 4)
    deep.save(tmp_path / "deep.png")
    predict = dn.Predictor(retinanet, exact=True, score=0.0, options=["INPUT.MAX_INTENSITY", 4 * 255])
    assert_equal(predict(tmp_path / "deep.png"), predict(gray))
    assert_equal(predict(deep), predict(gray.convert("RGBA")))


WRONG = {
    "absent.png: no such file or folder": "absent.png",
    "pattern *.gif: matches no image": "*.gif",
    "expected an array of RGB as uint8 (H, W, 3), got float64 (8, 8, 3)": np.zeros((8, 8, 3)),
    "got uint8 (8, 8)": np.zeros((8, 8), np.uint8),
    "as uint8 or as floats from 0 to 1, got torch.uint8 (8, 8, 3)": torch.zeros(8, 8, 3, dtype=torch.uint8),
    "got torch.float32 (3, 8, 8)": torch.full((3, 8, 8), 255.0),
    "got torch.int64 (3, 8, 8)": torch.zeros(3, 8, 8, dtype=torch.int64),
    "image 1: has no pixels, its shape is (3, 0, 8)": np.zeros((0, 8, 3), np.uint8),
    "expected a path, a folder, a pattern, a PIL image, an array or a tensor, got 3": 3,
}


@pytest.mark.parametrize("message", WRONG)
def test_unknown_inputs(message, predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dn.UserError) as caught:
        predict(WRONG[message])
    assert message in str(caught.value)


def test_what_is_broken_does_not_end_the_others(predict, images, tmp_path):
    (tmp_path / "broken.png").write_bytes((images / "0.png").read_bytes()[:80])
    (tmp_path / "empty").mkdir()
    errors = []
    inputs = [images / "3.png", tmp_path / "broken.png", None, tmp_path / "empty", images / "1.png"]
    found = list(predict.stream(inputs, errors.append))
    assert [Path(one.name).name for one in found] == ["3.png", "1.png"]
    assert_equal(found[1], predict(images / "1.png"))
    told = [str(error) for error in errors]
    assert "broken.png: cannot be read" in told[0] and "image 3: expected a path" in told[1]
    assert "empty: no images in it" in told[2] and len(told) == 3


# --- what is found --------------------------------------------------------------------------------------------------


def test_scores(retinanet, images):
    everything = dn.Predictor(retinanet, exact=True, score=0.0)(images / "3.png")
    for exact in (True, False):
        found = dn.Predictor(retinanet, exact=exact, score=0.9)(images / "3.png")
        assert 0 < len(found) < len(everything) and found.scores.min() > 0.9
    assert len(dn.Predictor(retinanet, score=1.0)(images / "3.png")) == 0
    of_class = [name for name in everything.names if name == "kind 3"]
    least = float(everything.scores[everything.names.index("kind 3")])  # the highest of its class
    for exact in (True, False):
        found = dn.Predictor(retinanet, exact=exact, score={"kind 3": least - 1e-3})(images / "3.png")
        assert 0 < found.names.count("kind 3") < len(of_class)
        assert all(score > 0.5 for score, name in zip(found.scores, found.names, strict=True) if name == "kind 7")
    found = dn.Predictor(retinanet, exact=True, score={"kind 3": least, "kind 7": 1})(images / "3.png")
    assert found.scores.tolist() == [least]  # as much is enough


def test_lines_pictures_and_results(predict, retinanet, images):
    found = predict(images / "3.png")
    kinds = [found.names.count(name) for name in ("kind 3", "kind 7")]
    counts = ", ".join(f"{count} kind {k}" for count, k in zip(kinds, (3, 7), strict=True) if count)
    assert str(found).startswith(f"{images / '3.png'}: {counts}, ") and str(found).endswith(" ms")
    picture = found.draw()
    assert picture.dtype == torch.uint8 and picture.shape == (3, 64, 64) and not torch.equal(picture, found.image)
    first = found.coco_results(5)[0]
    left, top, right, bottom = found.boxes[0].tolist()
    assert first["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-4)
    assert (first["image_id"], first["category_id"], first["category_name"]) == (
        5,
        1 + int(found.labels[0]),
        found.names[0],
    )
    nothing = dn.Predictor(retinanet, score=1.0)(images / "3.png")
    assert f"{images / '3.png'}: nothing, " in str(nothing) and torch.equal(nothing.draw(), nothing.image)


def test_a_checkpoint_is_enough(retinanet, images, tmp_path):
    """Neither the run nor its data set."""
    content = torch.load(retinanet / "model_final.pth")
    content["config"] = content["config"].replace(str(images.parent), "/gone")
    assert "/gone" in content["config"]
    torch.save({key: content[key] for key in ("model", "config", "description")}, tmp_path / "net.pth")
    found, other = (dn.Predictor(file, exact=True)(images / "3.png") for file in (tmp_path / "net.pth", retinanet))
    assert_equal(found, other)
    torch.save(content["model"], tmp_path / "bare.pth")
    with pytest.raises(dn.UserError, match=r"bare.pth: holds no config: name the model's"):
        dn.Predictor(tmp_path / "bare.pth")
    config_file = retinanet / "config.yaml"
    found = dn.Predictor(tmp_path / "bare.pth", exact=True, config_file=config_file)(images / "3.png")
    assert_equal(found, other)


def test_options_that_do_not_fit(retinanet, tmp_path):
    for options, message in (
        ({"statistics": "recomputed"}, r"statistics takes one of \['population', 'minibatch'\]"),
        ({"score": 2}, "score takes a number from 0 to 1, got 2"),
        ({"score": {"kind 3": -1}}, "score takes a number from 0 to 1, got -1"),
        ({"score": {"kind 4": 0.3}}, r"score takes names of the model's classes, \['kind 3', 'kind 7'\], got 'kind 4'"),
        ({"batch_size": 0}, "batch_size takes 1 or more, got 0"),
        ({"domain": "day"}, r"the model has no norm with several domains, got domain 'day'"),
        ({"options": ["INPUT.MIN_SIZE", 3]}, "unknown key INPUT.MIN_SIZE"),
    ):
        with pytest.raises(dn.UserError, match=message):
            dn.Predictor(retinanet, **options)
    with pytest.raises(dn.UserError, match="holds no checkpoint: expected the folder of a run"):
        dn.Predictor(tmp_path)
    with pytest.raises(dn.UserError, match=r"absent: no such file"):
        dn.Predictor(tmp_path / "absent")


# --- domains --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_domains(data_set, tmp_path_factory):
    """The checkpoint of a model whose norms have other statistics for each of two data sets, and its config."""
    domains = {
        "DATASETS__TRAIN": [data_set, data_set],
        "DATASETS__DOMAINS": ["day", "night"],
        "TEST__DOMAIN": "average",
    }
    norms = {"MODEL__NORM_DOMAINS": "dataset", "MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset"}
    folder = evaluated(data_set, tmp_path_factory.mktemp("domains"), **domains | norms)
    file = folder / "model_final.pth"
    return file, dn.load_config(folder / "config.yaml", ["MODEL.WEIGHTS", str(file)])


def test_domains(of_domains, images, in_float32):
    file, cfg = of_domains
    model = dn.build_model(cfg).eval()
    image = read_image(images / "3.png")
    scores = []
    for domain, names in ((0, ("day", "0", 0)), (1, ("night", "1", 1))):
        with torch.no_grad(), dn.use_domain(model, domain):
            scores.append(model([in_floats(image)])[0]["scores"])
        for name in names:
            found = dn.Predictor(file, domain=name, exact=True, score=0.0)(image)
            assert torch.equal(found.scores, scores[-1])
        found = dn.Predictor(file, domain=domain, score=0.0)(image)
        torch.testing.assert_close(found.scores, scores[-1], atol=1e-4, rtol=0)
    assert not torch.equal(*scores)
    with pytest.raises(dn.UserError, match=r"say which the images are of, of \['day', 'night'\]"):
        dn.Predictor(file, options=["TEST.DOMAIN", "given"])
    with pytest.raises(dn.UserError, match=r"got 'dusk'"):
        dn.Predictor(file, domain="dusk")


def test_images_of_no_known_domain(of_domains, images, in_float32):
    image = read_image(images / "3.png")
    file, cfg = of_domains
    for choice in ("nearest", "average"):
        model = dn.build_model(cfg).eval()
        with torch.no_grad():
            if choice == "average":
                expected = dn.merge_domains(model)([in_floats(image)])[0]["scores"]
            else:
                with dn.use_domain(model, dn.nearest_domain(model, [in_floats(image)])):
                    expected = model([in_floats(image)])[0]["scores"]
        options = {"options": ["TEST.DOMAIN", choice], "score": 0.0}
        assert torch.equal(dn.Predictor(file, exact=True, **options)(image).scores, expected)
        found = dn.Predictor(file, **options)(image).scores
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- classifiers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    generator = np.random.default_rng(0)
    labels = np.arange(24) % 3
    pixels = generator.integers(0, 60, (24, 16, 16, 3)) + labels[:, None, None, None] * 80
    np.savez(folder / "a.npz", images=pixels.astype(np.uint8), labels=labels, class_names=["ant", "bee", "cat"])
    chosen = {
        "MODEL__META_ARCHITECTURE": "Classifier",
        "MODEL__BACKBONE__NAME": "cifar_resnet8",
        "MODEL__RETINANET__NORM": "",
        "INPUT__CROP_SIZE": 16,
        "INPUT__CROP": "none",
        "SOLVER__MAX_ITER": 40,
        "SOLVER__BASE_LR": 0.05,
        "SOLVER__IMS_PER_BATCH": 12,
        "SOLVER__CHECKPOINT_PERIOD": 100,
    }
    dn.train(tiny.config(str(folder / "a.npz"), folder / "run", **chosen))
    return folder / "run", torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2)


def test_classifiers(classifier):
    folder, pixels = classifier
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    model = dn.build_model(dn.load_config(folder / "config.yaml", weights)).eval()
    with torch.no_grad():
        expected = torch.cat([model([in_floats(image)]) for image in pixels]).softmax(1)
    for options, atol in (({"exact": True}, 0), ({"exact": True, "batch_size": 5}, 1e-6), ({}, 0.05)):
        found = dn.Predictor(folder, **options)(list(pixels))
        for k, one in enumerate(found):
            assert one.boxes is None and sorted(one.names) == ["ant", "bee", "cat"]
            assert one.names[0] == ["ant", "bee", "cat"][k % 3]
            torch.testing.assert_close(one.scores, expected[k][one.labels], atol=atol, rtol=0)
    assert str(one).startswith(f"image 24: cat {one.scores[0]:.2f}, ")
    results = one.coco_results(1)
    assert [result["category_name"] for result in results] == one.names and results[0]["category_id"] == 3
    assert one.draw().shape == (3, 16, 16)


def test_minibatch_statistics_of_a_classifier_are_those_of_an_image(classifier):
    folder, pixels = classifier
    alone = dn.Predictor(folder, statistics="minibatch", exact=True)(pixels[0])
    together = dn.Predictor(folder, statistics="minibatch", exact=True, batch_size=4)(list(pixels[:4]))[0]
    assert torch.equal(alone.scores, together.scores)
