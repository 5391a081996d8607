import subprocess
import sys

import pytest
import torch

from domainnorm.visualization import draw
from domainnorm.visualization.draw import color_of, draw_objects, letter_size, line_width

CLASSES = ["cat", "dog", "fish"]


def grey(height=200, width=300):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def is_color(picture, name, y, x):
    return picture[:, y, x].tolist() == list(color_of(name, CLASSES))


def test_boxes_have_the_colours_of_their_classes():
    image = grey()
    boxes = torch.tensor([[20.0, 50, 120, 150], [150, 60, 280, 190]])
    picture = draw_objects(image, boxes, ["cat", "dog"], classes=CLASSES)
    assert picture.dtype == torch.uint8 and picture.shape == image.shape
    assert (image == 128).all()  # a copy
    for name, (x0, y0, x1, y1) in zip(["cat", "dog"], boxes.int().tolist(), strict=True):
        middle = (y0 + y1) // 2, (x0 + x1) // 2
        assert is_color(picture, name, middle[0], x0) and is_color(picture, name, middle[0], x1)
        assert is_color(picture, name, y1, middle[1])
        assert (picture[:, middle[0], middle[1]] == 128).all()
    assert len({color_of(name, CLASSES) for name in CLASSES}) == 3


def with_and_without(box, name):
    """One object with its name, and without."""
    nameless = ["" if other == name else other for other in CLASSES]
    named = draw_objects(grey(), torch.tensor([box]), [name], classes=CLASSES)
    return named, draw_objects(grey(), torch.tensor([box]), [""], classes=nameless)


def test_names_stand_above_the_box_and_within_the_image():
    named, without = with_and_without([100.0, 100, 200, 150], "dog")
    rows, columns = (without != named).any(0).nonzero(as_tuple=True)
    assert rows.max() <= 100 and rows.min() >= 100 - 2 * letter_size(grey()) and columns.min() >= 99
    area = len(rows)
    for corner in ([0.0, 0, 40, 40], [290.0, 190, 299, 199], [0.0, 190, 299, 199]):  # in the box, or to the left
        named, without = with_and_without(corner, "dog")
        assert (without != named).any(0).sum() > 0.6 * area  # but for the lines of the box, of the same colour


def test_names_that_would_hide_the_image_are_left_out():
    few, many = (torch.tensor([[100.0, 100, 140, 120]] * count) for count in (10, 200))
    pictures = [draw_objects(grey(), boxes, ["dog"] * len(boxes)) for boxes in (few, many)]
    changed = [(picture != 128).any(0).sum() for picture in pictures]
    assert changed[1] == 2 * (41 + 21) - 4 < changed[0]


def test_scores_are_written_behind_names():
    box = torch.tensor([[100.0, 100, 200, 150]])
    width = {}
    for text, scores in (("dog", None), ("dog", [0.9]), ("dog 0.90", None), ("dog", torch.tensor([0.9]))):
        picture = draw_objects(grey(), box, [text], scores=scores, classes=[*CLASSES, "dog 0.90"])
        label = (picture[:, 90] != 128).any(0).nonzero()
        width[text, str(scores)] = int(label.max() - label.min())
    assert width["dog", "[0.9]"] == width["dog 0.90", "None"] == width["dog", "tensor([0.9000])"] > width["dog", "None"]


def test_masks_are_tinted_and_outlined():
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    masks[0, 50:150, 20:120] = True
    masks[1, 80:120, 50:90] = True  # on the other
    boxes = torch.tensor([[20.0, 50, 120, 150], [50, 80, 90, 120]])
    picture = draw_objects(grey(), boxes, ["", "cat"], masks=masks, classes=["cat", ""])
    for y, x, name in ((60, 100, ""), (100, 70, "cat")):
        tint = torch.tensor(color_of(name, ["cat", ""])) * draw.MASK_OPACITY + 128 * (1 - draw.MASK_OPACITY)
        assert (picture[:, y, x] - tint).abs().max() <= 1
    assert picture[:, 119, 70].tolist() == list(color_of("cat", ["cat"]))
    assert (picture[:, 20, 20] == 128).all()


def test_lines_and_letters_grow_with_the_image():
    small, large = grey(100, 120), grey(1500, 2000)
    assert (line_width(small), letter_size(small)) == (1, 9)
    assert (line_width(large), letter_size(large)) == (6, 35)
    picture = draw_objects(large, torch.tensor([[500.0, 500, 1500, 1000]]), ["cat"], classes=CLASSES)
    assert [is_color(picture, "cat", 750, x) for x in (499, 500, 505, 506)] == [False, True, True, False]


def test_nothing_to_draw():
    image = grey()
    assert draw_objects(image, torch.zeros(0, 4), [], masks=torch.zeros(0, 200, 300, dtype=torch.bool)).equal(image)
    with pytest.raises(ValueError, match="1 names and 2 boxes"):
        draw_objects(image, torch.zeros(2, 4), ["cat"])


def test_colours_by_spelling_stay():
    assert color_of("zebra") == color_of("zebra", CLASSES) == color_of("zebra", ["horse"])


def test_without_matplotlib_and_system_fonts(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    real = draw.ImageFont.truetype

    def truetype(font=None, *args, **options):
        if font == "DejaVuSans.ttf":
            raise OSError("cannot open resource")
        return real(font, *args, **options)

    monkeypatch.setattr(draw.ImageFont, "truetype", truetype)
    draw._font.cache_clear()
    named, without = with_and_without([100.0, 100, 200, 150], "dog")
    assert (without != named).any()
    draw._font.cache_clear()


def test_matplotlib_is_not_loaded_with_the_library():
    code = "import sys; import domainnorm as dn; dn.train, dn.evaluate; import domainnorm.visualization.draw"
    code += "; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_names_of_several_lines_are_drawn():
    picture = draw_objects(torch.zeros(3, 60, 80, dtype=torch.uint8), torch.tensor([[5.0, 20, 70, 50]]), ["a\nb\r"])
    assert picture.any()
