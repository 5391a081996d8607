"""An image of any kind is read or refused in one line; deeper intensities have one scale in a data set."""

import os
import socket
import struct
import zlib

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageFile
from torchvision import tv_tensors

from domainnorm.config import UserError, load_config
from domainnorm.data import ClassificationDataset, read_image
from domainnorm.data.image import IntensityRange
from domainnorm.data.transforms import classifier_test_transforms, classifier_train_transforms, train_transforms
from domainnorm.modeling import build_model


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "error", [IndexError, KeyError, AssertionError, MemoryError, RecursionError, ZeroDivisionError]
)
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.png", np.zeros((4, 4), np.uint8))

    def load(self):
        raise error("what\nhappened")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert f"image {path}: cannot be read (" in message_of(read_image, path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "it is a named pipe, expected a file" in message_of(read_image, tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "it is a socket" in message_of(read_image, tmp_path / "s")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert "it is a device" in message_of(read_image, tmp_path / "zero.png")
    assert "it is a folder" in message_of(read_image, tmp_path)
    for name in ("pipe.png:pipe.png", "pipe.npz"):
        if name.endswith("npz"):
            os.mkfifo(tmp_path / name)
        paths = ":".join(str(tmp_path / part) for part in name.split(":"))
        assert "named pipe" in message_of(ClassificationDataset, paths)


@pytest.mark.parametrize("mode", Image.MODES)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "gif", "jpg", "im", "ppm"])
def test_every_mode_is_read_or_refused(tmp_path, mode, suffix):
    try:
        path = saved(tmp_path / f"a.{suffix}", Image.new(mode, (5, 3)))
    except (OSError, ValueError, KeyError):
        pytest.skip("no such file can be written")
    try:
        assert read_image(path, (3, 5)).shape == (3, 3, 5)
    except UserError as error:
        assert "\n" not in str(error) and mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "F")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0), (2**31 - 1, 2**31 - 1), (10**6, 10**6)])
def test_images_of_impossible_size(tmp_path, size):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    assert f"image {path}: " in message_of(read_image, path)


def test_animations_and_palettes_with_alpha(tmp_path):
    frames = [Image.new("RGB", (5, 3), (k, 0, 0)) for k in (200, 100)]
    for suffix in ("gif", "webp", "png", "tif"):
        path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert abs(int(read_image(path)[0, 0, 0]) - 200) < 8
    palette = Image.fromarray(np.arange(15, dtype=np.uint8).reshape(3, 5) % 2, mode=None).convert("P")
    path = saved(tmp_path / "p.png", palette, transparency=bytes([0, 255]))
    assert torch.equal(read_image(path), read_image(saved(tmp_path / "q.png", palette)))


# intensities


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_have_one_scale_in_a_data_set(tmp_path, top):
    """Also an image that is dark by itself; one that is brighter than those that were looked at is refused."""
    for k, share in enumerate([0.001, 0.5, 1.0]):
        saved(tmp_path / "a" / f"{k}.tif", np.full((4, 4), share * top, np.float32))
    dataset = ClassificationDataset(str(tmp_path))
    assert [int(image.max()) for image, _ in dataset] == [0, 128, 255]
    saved(tmp_path / "a" / "2.tif", np.full((4, 4), 2 * top, np.float32))
    assert "INPUT.MAX_INTENSITY" in message_of(dataset.__getitem__, 2)
    twice = ClassificationDataset(str(tmp_path), max_intensity=2 * top)
    assert [int(image.max()) for image, _ in twice] == [0, 64, 255]


def test_one_image_of_floats_up_to_255_is_not_black(tmp_path):
    path = saved(tmp_path / "a.tif", np.array([[0, 51, 255]], np.float32))
    assert read_image(path)[0].tolist() == [[0, 51, 255]]


def test_sixteen_bits_have_the_scale_of_their_depth_or_the_one_that_is_said(tmp_path):
    path = saved(tmp_path / "a" / "0.png", np.array([[0, 4095]], np.uint16))
    assert read_image(path)[0].tolist() == [[0, 16]]
    for white, expected in ((0.0, [[0, 16]]), (4095.0, [[0, 255]])):
        assert ClassificationDataset(str(tmp_path), max_intensity=white)[0][0][0].tolist() == expected
    assert "of which 255 is white" in message_of(read_image, path, white=IntensityRange(tmp_path, [], 255.0))


# folders of classes


def test_what_is_hidden_is_no_class_and_no_image(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    for name in ("ant/1.png", "ant/deep/2.png", "ant/.thumbs/3.png", "ant/._1.png", ".git/4.png", "bee/5.png"):
        saved(tmp_path / name, pixels)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "ant" / "loop").symlink_to(tmp_path / "ant")
    dataset = ClassificationDataset(str(tmp_path))
    assert dataset.class_names == ["ant", "bee"] and list(dataset.files) == ["ant/1.png", "ant/deep/2.png", "bee/5.png"]


def test_the_order_is_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/1/x.png", "b/1-a/x.png", "b/1/0/y.png", "a/z.PNG", "a/y.jpeg"):
        saved(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    files = [os.path.relpath(file, tmp_path) for file, _ in ImageFolder(str(tmp_path)).samples]
    dataset = ClassificationDataset(str(tmp_path))
    assert list(dataset.files) == files and dataset.labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_what_is_no_image_in_a_class_is_refused(tmp_path):
    saved(tmp_path / "a" / "1.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nothing")
    assert "gone.jpg: it is no file, or a link to none" in message_of(ClassificationDataset, str(tmp_path))
    (tmp_path / "a" / "gone.jpg").unlink()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert "pipe.jpg: it is no file" in message_of(ClassificationDataset, str(tmp_path))


# shapes

SHAPES = [(1, 1), (1, 7), (7, 1), (1, 3000), (3000, 1), (2, 5000), (5000, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_every_shape_are_transformed(shape):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    cfg = load_config()
    boxes = tv_tensors.BoundingBoxes([[0.0, 0.0, shape[1], shape[0]]], format="XYXY", canvas_size=shape)
    out, target = train_transforms(cfg)(image, {"boxes": boxes, "labels": torch.zeros(1)})
    assert target["boxes"].tolist() == [[0, 0, out.shape[2], out.shape[1]]]
    assert min(out.shape) >= 1 and max(out.shape) <= cfg.INPUT.MAX_SIZE_TRAIN
    for crop in ("random_resized", "padded", "none"):
        overrides = ["MODEL.META_ARCHITECTURE", "Classifier", "INPUT.CROP", crop, "INPUT.CROP_SIZE", 32]
        cfg = load_config(overrides=overrides)
        for transforms in (classifier_train_transforms(cfg), classifier_test_transforms(cfg)):
            assert transforms(image).shape == (3, 32, 32)


@pytest.mark.parametrize("options", [{}, tiny.MASK_RCNN], ids=["RetinaNet", "Mask R-CNN"])
def test_a_detector_predicts_images_of_every_shape(tmp_path, options):
    name = tiny.write_dataset(tmp_path, count=2)
    model = build_model(tiny.config(name, tmp_path, **options)).eval()
    with torch.no_grad():
        for shape in SHAPES:
            (output,) = model([torch.rand(3, *shape)])
            assert torch.isfinite(output["boxes"]).all()
            assert (output["boxes"][:, 2::2] <= shape[1]).all() and (output["boxes"][:, 3::2] <= shape[0]).all()
