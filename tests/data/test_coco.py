"""CocoDataset: what it reads, and one line for every mistake in an annotation file or an image."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms import v2

from domainnorm.config import UserError, load_config
from domainnorm.data import CocoDataset, read_image, resolve_dataset
from domainnorm.data.transforms import test_transforms as make_test_transforms
from domainnorm.data.transforms import train_transforms

HEIGHT, WIDTH = 20, 30
ORIENTATION = 0x0112
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def contents(annotations=(), **more):
    """A valid file with two images and three categories whose ids have gaps and are out of order."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, "domain": "day"},
            {"id": 3, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 10 + i, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 5], "iscrowd": 0, **annotation}
            for i, annotation in enumerate(annotations)
        ],
        "categories": [{"id": 90, "name": "cup"}, {"id": 5, "name": "dog"}, {"id": 17, "name": "cat"}],
        **more,
    }


@pytest.fixture
def make(tmp_path):
    """Writes a data set, returns its name."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "images" / name)

    def write(data):
        text = data if isinstance(data, str) else json.dumps(data)
        (tmp_path / "annotations.json").write_text(text, encoding="utf-8")
        return f"{tmp_path / 'annotations.json'}:{tmp_path / 'images'}"

    return write


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# names


def test_names_of_coco_sets_are_detectron2s(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert resolve_dataset("coco_2017_val")[0] == Path("datasets/coco/annotations/instances_val2017.json")
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert resolve_dataset("coco_2014_minival") == (
        Path("/data/coco/annotations/instances_minival2014.json"),
        Path("/data/coco/val2014"),
    )
    assert "/data/coco/annotations/instances_train2017.json" in error_of(CocoDataset, "coco_2017_train")


def test_two_paths_are_a_name():
    assert resolve_dataset("/x/labels.json:images/train") == (Path("/x/labels.json"), Path("images/train"))


@pytest.mark.parametrize("name", ["coco_2017_vall", "", "labels.json:", ":images"])
def test_unknown_name(name):
    message = error_of(resolve_dataset, name)
    assert repr(name) in message and "annotations.json:image_folder" in message
    assert name != "coco_2017_vall" or "coco_2017_val," in message


# samples


def test_sample(make):
    boxes = [[1, 2, 10, 5], [0.5, 0.25, 4.5, 10]]
    data = contents([{"bbox": boxes[0], "category_id": 90}, {"bbox": boxes[1], "category_id": 5}])
    dataset = CocoDataset(make(data))
    assert len(dataset) == 2 and dataset.image_ids == [7, 3] and dataset.sizes == [(HEIGHT, WIDTH)] * 2
    assert dataset.category_ids == [5, 17, 90] and dataset.class_names == ["dog", "cat", "cup"]
    assert [category["id"] for category in dataset.categories] == [5, 17, 90]

    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(dataset.image_folder / "a.png")))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [0.5, 0.25, 5, 10.25]]
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["labels"].tolist() == [2, 0] and target["labels"].dtype == torch.int64
    assert (target["image_id"], target["file_name"], target["domain"]) == (7, "a.png", "day")
    assert "masks" not in target

    _, target = dataset[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["domain"] == ""


def test_targets_are_copies(make):
    dataset = CocoDataset(make(contents([{}])))
    dataset[0][1]["boxes"].zero_()
    assert dataset[0][1]["boxes"].tolist() == [[1, 2, 11, 7]]


def test_images_without_objects_can_be_left_out(make):
    crowd = {"iscrowd": 1, "image_id": 3}
    name = make(contents([{}, crowd]))
    assert CocoDataset(name, keep_empty=False).image_ids == [7]
    assert CocoDataset(name).image_ids == [7, 3]


def test_crowds_are_left_out_and_their_boxes_not_checked(make):
    dataset = CocoDataset(make(contents([{"iscrowd": 1, "bbox": [0, 0, 0, 0]}, {"bbox": [3, 3, 2, 2]}])))
    assert dataset[0][1]["boxes"].tolist() == [[3, 3, 5, 5]]


def test_objects_of_images_in_mixed_order(make):
    annotations = [{"image_id": i, "bbox": [k, 0, 1, 1]} for k, i in enumerate([3, 7, 3, 7, 7])]
    dataset = CocoDataset(make(contents(annotations)))
    assert [dataset[i][1]["boxes"][:, 0].tolist() for i in (0, 1)] == [[1, 3, 4], [0, 2]]


def test_empty_file(make):
    assert len(CocoDataset(make(contents(images=[])))) == 0


def test_masks_equal_pycocotools(make):
    rng = np.random.default_rng(1)
    pixels = rng.random((HEIGHT, WIDTH)) < 0.4
    compressed = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    compressed = {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}
    changes = np.flatnonzero(np.diff(pixels.ravel(order="F").astype(int), prepend=0)).tolist()
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, pixels.size]).tolist()}
    polygons = [[1, 1, 12, 2, 6, 15], [20, 10, 28.5, 10, 28.5, 18, 20, 18]]
    name = make(contents([{"segmentation": s} for s in (polygons, uncompressed, compressed)]))

    dataset = CocoDataset(name, masks=True)
    masks = dataset[0][1]["masks"]
    assert isinstance(masks, tv_tensors.Mask) and masks.shape == (3, HEIGHT, WIDTH)
    reference = COCO(str(dataset.annotation_file))
    for mask, annotation in zip(masks, reference.loadAnns([10, 11, 12]), strict=True):
        assert np.array_equal(mask.numpy(), reference.annToMask(annotation))
    assert np.array_equal(masks[1].numpy(), pixels) and np.array_equal(masks[2].numpy(), pixels)
    assert masks[0].sum() > 80
    assert dataset[1][1]["masks"].shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 1, 5, 5]],
        [[1, 1, 5, 5, 9, 9, 2]],
        [[1, 1, 5, 5, 9, "x"]],
        [[1, 1, 5, 5, 1e8, 9]],
        [1, 1, 5, 5, 9, 9],
        {"counts": [600]},
        {"size": [WIDTH, HEIGHT], "counts": [600]},
        {"size": [HEIGHT, WIDTH], "counts": [599]},
        {"size": [HEIGHT, WIDTH], "counts": [-1, 601]},
        {"size": [HEIGHT, WIDTH], "counts": 600},
    ],
)
def test_undecodable_segmentation(make, segmentation):
    name = make(contents([{"segmentation": segmentation}, {"segmentation": [[1, 1, 5, 5, 1, 9]]}]))
    message = error_of(CocoDataset, name, masks=True)
    assert "annotation 10 (image a.png" in message and "segmentation" in message
    assert len(CocoDataset(name, masks=True, invalid_boxes="skip")[0][1]["masks"]) == 1
    assert len(CocoDataset(name)[0][1]["boxes"]) == 2  # not looked at


@pytest.mark.parametrize("counts", ["", "zzz", "0", "P9\\`3", "ééé"])
def test_broken_compressed_rle(make, counts):
    """It shows before training, and not when the image comes."""
    name = make(contents([{"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}, {"segmentation": SQUARE}]))
    message = error_of(CocoDataset, name, masks=True)
    assert "annotation 10 (image a.png" in message and "cannot be decoded" in message
    dataset = CocoDataset(name, masks=True, invalid_boxes="skip")
    assert len(dataset[0][1]["masks"]) == len(dataset.ground_truth()["annotations"]) == 1


# transforms


def test_transforms_keep_labels_boxes_and_masks_in_step(make):
    big, tiny = [0, 0, WIDTH, HEIGHT], [10, 10, 0.5, 4]

    def rectangle(x, y, w, h):
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]

    annotations = [
        {"bbox": box, "category_id": c, "segmentation": rectangle(*box)}
        for box, c in ((tiny, 5), (big, 90), ([4, 6, 8, 8], 17))
    ]
    cfg = load_config(overrides=["INPUT.MIN_SIZE_TRAIN", [10], "INPUT.RANDOM_FLIP", 1.0])
    image, target = CocoDataset(make(contents(annotations)), masks=True, transforms=train_transforms(cfg))[0]
    assert image.shape == (3, 10, 15) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert target["labels"].tolist() == [2, 1]
    assert target["boxes"].tolist() == [[0, 0, 15, 10], [15 - 6, 3, 15 - 2, 7]]
    assert target["masks"].shape == (2, 10, 15)
    ys, xs = target["masks"][1].nonzero(as_tuple=True)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (9, 3, 13, 7)


@pytest.mark.parametrize("size", [7, 13, 33, 61, 127])
def test_boxes_on_the_border_survive_resizing(make, size):
    cfg = load_config(overrides=["INPUT.MIN_SIZE_TRAIN", [size]])
    dataset = CocoDataset(make(contents([{"bbox": [0, 0, WIDTH, HEIGHT]}])), transforms=train_transforms(cfg))
    for _ in range(4):
        image, target = dataset[0]
        assert target["boxes"].tolist() == [[0, 0, image.shape[2], image.shape[1]]]


def test_test_transforms_keep_the_size(make):
    dataset = CocoDataset(make(contents([{}])), transforms=make_test_transforms(load_config()))
    image, target = dataset[0]
    assert image.dtype == torch.float32 and image.shape == (3, HEIGHT, WIDTH) and image.max() <= 1
    assert target["boxes"].tolist() == [[1, 2, 11, 7]]
    assert torch.equal(v2.functional.to_dtype(CocoDataset(dataset.name)[0][0], scale=True), image)


# mistakes in the annotation file


def test_missing_file(tmp_path):
    assert f"{tmp_path}/none.json: no such file" in error_of(CocoDataset, f"{tmp_path}/none.json:{tmp_path}")
    assert f"{tmp_path}: cannot be read" in error_of(CocoDataset, f"{tmp_path}:{tmp_path}")


def test_broken_json(make):
    assert "line 2 column 16" in error_of(CocoDataset, make('{"images": [],\n "annotations" []}'))
    assert "line 1 column 1" in error_of(CocoDataset, make(""))
    assert "COCO" in error_of(CocoDataset, make("[1, 2]"))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_and_malformed_lists(make, key):
    data = contents([{}])
    assert f'has no "{key}"' in error_of(CocoDataset, make({k: v for k, v in data.items() if k != key}))
    assert f'"{key}" is no list' in error_of(CocoDataset, make(data | {key: {}}))
    assert f"{key}[1] is 'x'" in error_of(CocoDataset, make(data | {key: [data[key][0], "x"]}))


@pytest.mark.parametrize(
    ("key", "field", "value", "expected"),
    [
        ("images", "id", None, "images[0] has id None; expected a whole number"),
        ("images", "id", 1.5, "images[0] has id 1.5"),
        ("images", "id", 2**64, "images[0] has id 18446744073709551616"),
        ("images", "width", "30", "images[0] (id 7) has width '30'; expected a whole number"),
        ("images", "height", 0, "height 0; expected positive"),
        ("images", "file_name", 5, "has file_name 5; expected a string"),
        ("images", "domain", 1, "has domain 1; expected a string"),
        ("annotations", "id", "a", "annotations[0] has id 'a'"),
        ("annotations", "image_id", 8, "annotation 10 has image_id 8, which is not in its list of images"),
        ("annotations", "category_id", 6, "annotation 10 has category_id 6, which is not in its list of categories"),
        ("annotations", "category_id", [5], "annotations[0] (id 10) has category_id [5]"),
        ("annotations", "bbox", [1, 2, 3], "annotations[0] (id 10) has bbox [1, 2, 3]; expected four numbers"),
        ("annotations", "bbox", [1, 2, 3, "4"], "has bbox [1, 2, 3, '4']"),
        ("annotations", "bbox", None, "has bbox None"),
        ("annotations", "iscrowd", "no", "has iscrowd 'no'"),
        ("categories", "name", None, "categories[0] (id 90) has name None"),
        ("categories", "id", "dog", "categories[0] has id 'dog'"),
    ],
)
def test_malformed_field(make, key, field, value, expected):
    data = contents([{}, {}])
    data[key][0][field] = value
    assert expected in error_of(CocoDataset, make(data))


@pytest.mark.parametrize("field", ["id", "image_id", "category_id", "bbox"])
def test_missing_field(make, field):
    data = contents([{}, {}, {}])
    del data["annotations"][1][field]
    message = error_of(CocoDataset, make(data))
    assert "annotations[1]" in message and f"has no {field}" in message


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_ids_used_twice(make, key):
    data = contents([{}, {}])
    data[key][1]["id"] = data[key][0]["id"]
    assert f"{key}[1] has id {data[key][0]['id']}, which an earlier entry has too" in error_of(CocoDataset, make(data))


def test_no_category(make):
    assert "empty" in error_of(CocoDataset, make(contents(categories=[])))


@pytest.mark.parametrize(
    ("bbox", "left"),
    [
        ([-1.5, 0, 10, 5], [0, 0, 8.5, 5]),
        ([0, -3, 10, 5], [0, 0, 10, 2]),
        ([25, 0, 6.5, 5], [25, 0, 30, 5]),
        ([0, 18, 10, 4], [0, 18, 10, 20]),
        ([5, 5, 0, 5], None),
        ([5, 5, 5, 0], None),
        ([5, 5, -2, 5], None),
        ([5, 5, 1e-9, 5], None),
        ([31, 5, 5, 5], None),
        ([30, 5, 0.5, 5], None),  # within the pixel of tolerance, but nothing of it is in the image
        ([-9, -9, 5, 5], None),
        ([float("nan"), 5, 5, 5], None),
        ([5, 5, float("inf"), 5], None),
        ([float("-inf"), 5, float("inf"), 5], None),
    ],
)
def test_invalid_boxes(make, caplog, bbox, left):
    name = make(contents([{"bbox": [1, 1, 2, 2]}, {"bbox": bbox}]))
    message = error_of(CocoDataset, name)
    for word in ("annotation 11 ", "a.png", "30 x 20", "DATALOADER.INVALID_BOXES skip", "annotations.json"):
        assert word in message
    dataset = CocoDataset(name, invalid_boxes="skip")
    assert dataset[0][1]["boxes"].tolist() == [[1, 1, 3, 3]] + ([left] if left else [])
    assert dataset[0][1]["labels"].tolist() == [0] * (1 + bool(left))
    (line,) = caplog.messages
    assert ("1 boxes clipped" in line) == bool(left) and ("1 objects dropped" in line) == (not left)


def test_a_pixel_beyond_is_clipped(make, caplog):
    dataset = CocoDataset(make(contents([{"bbox": [-1, -0.5, 32, 21.5]}])))
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 30, 20]] and not caplog.messages


def test_many_invalid_boxes_are_counted(make):
    assert "2 more" in error_of(CocoDataset, make(contents([{"bbox": [0, 0, 0, 1]}] * 3)))


# images


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


RAMP = np.arange(WIDTH, dtype=np.uint8)[None].repeat(HEIGHT, 0) * 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_modes(tmp_path, mode):
    image = Image.fromarray(RAMP).convert("RGB").convert(mode)
    pixels = read_image(saved(tmp_path, image), (HEIGHT, WIDTH))
    assert type(pixels) is torch.Tensor and pixels.dtype == torch.uint8 and pixels.shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    if mode not in ("1", "P"):
        assert np.array_equal(pixels[0].numpy(), RAMP)


def test_cmyk(tmp_path):
    red = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    pixels = read_image(saved(tmp_path, red, "x.jpg"))
    assert pixels[0].min() > 200 and pixels[1:].max() < 60


def test_transparency_is_dropped(tmp_path, recwarn):
    rgba = np.full((HEIGHT, WIDTH, 4), 200, dtype=np.uint8)
    rgba[..., 3] = 0
    assert (read_image(saved(tmp_path, Image.fromarray(rgba))) == 200).all()
    palette = Image.fromarray(RAMP).convert("P")
    plain = read_image(saved(tmp_path, palette))
    transparent = read_image(saved(tmp_path, palette, transparency=bytes([0, 128] * 128)))
    assert torch.equal(plain, transparent) and not recwarn.list
    grey = saved(tmp_path, Image.fromarray(RAMP), transparency=8)
    assert torch.equal(read_image(grey)[0], torch.from_numpy(RAMP))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big.tif"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    image = Image.fromarray(values) if name != "big.tif" else Image.frombytes("I;16B", (6, 1), values.astype(">u2"))
    path = saved(tmp_path, image, name)
    assert Image.open(path).mode.startswith("I")
    assert read_image(path)[1].tolist() == [[0, 0, 1, 1, 128, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_integers_and_floats(tmp_path, dtype):
    def read(values):
        return read_image(saved(tmp_path, Image.fromarray(np.array([values], dtype=dtype)), "x.tif"))[0].tolist()

    assert read([0, 257, 65535]) == [[0, 1, 255]]
    for values in ([0, 70000], [-1, 5]):
        assert "expected 0 to 65535" in error_of(read, values)
    if dtype == np.float32:
        assert read([0, 0.5, 1]) == [[0, 128, 255]]
        assert "mode F" in error_of(read, [0, float("nan")])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sixteen", [False, True])
def test_exif_orientation(tmp_path, orientation, sixteen):
    upright = np.zeros((4, 6), dtype=np.uint8)
    upright[0, :3] = 255  # tells all eight apart
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that the tag asks to reverse
    image = Image.fromarray(upright.astype(np.uint16) * 257 if sixteen else upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path, image, exif=exif)
    assert read_image(path, (4, 6))[0].tolist() == upright.tolist()
    if orientation > 4:
        message = error_of(read_image, path, (6, 4))
        assert "is 6 x 4" in message and "say 4 x 6" in message and "EXIF" in message


def test_another_size_than_annotated(make, tmp_path):
    name = make(contents([{}]))
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a.png")
    message = error_of(CocoDataset(name).__getitem__, 0)
    assert "a.png: is 20 x 30" in message and "say 30 x 20" in message and "EXIF" not in message


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it also warns
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_truncated(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    for length in (len(buffer.getvalue()) * 2 // 3, 60, 10):
        path = tmp_path / "broken.img"
        path.write_bytes(buffer.getvalue()[:length])
        assert str(path) in error_of(read_image, path)


def test_missing_and_not_an_image(make, tmp_path):
    dataset = CocoDataset(make(contents([{}])))
    for content in ("hello", ""):
        (tmp_path / "images" / "a.png").write_text(content)
        assert "a.png: cannot be read" in error_of(dataset.__getitem__, 0)
    (tmp_path / "images" / "a.png").unlink()
    assert "images/a.png: no such file" in error_of(dataset.__getitem__, 0)
    assert str(tmp_path) in error_of(read_image, tmp_path)
    assert "images/a.png: no such file" in error_of(CocoDataset, dataset.name)  # before any is read
