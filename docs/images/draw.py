"""Draw the pictures of docs/tutorials from the built-in data and the two runs of docs/tutorials/first_run.md.

    python docs/images/draw.py

It expects output/quickstart and output/shared, and writes JPEGs of less than 100 kB beside this file.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

import domainnorm as dn
from domainnorm.cli import show
from domainnorm.data.shapes import shapes_dataset
from domainnorm.visualization.draw import draw_objects
from domainnorm.visualization.sheet import enlarged

HERE = Path(__file__).parent
CONFIG = "configs/quickstart.yaml"
DIFFERENT = (40, 98, 185, 155, 56, 169)  # images of shapes_val with most mistakes of one run and not of the other


def save(name: str, image: Image.Image, width: int = 800) -> None:
    """Of at most `width` pixels, as `name`.jpg."""
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image.convert("RGB").save(HERE / f"{name}.jpg", quality=70, optimize=True)


def contact_sheet(name: str, *args: str) -> None:
    """What `tools/show_data.py` draws."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sheet.png"
        if code := show.main(["--config-file", CONFIG, "--out", str(file), *args]):
            raise SystemExit(code)
        save(name, Image.open(file))


def predictions(name: str, run: str) -> None:
    """What a run finds in some test images, two rows."""
    predict = dn.Predictor(run)
    folder = shapes_dataset("shapes_val")[1]
    drawn = []
    for number in DIFFERENT:
        found = predict(folder / f"{number:06}.png")
        image, scale = enlarged(found.image, 256, 320)
        picture = draw_objects(image, found.boxes * scale, found.names, scores=found.scores, classes=found.class_names)
        drawn.append(F.pad(picture, [0, 0, 320 - picture.shape[2], 320 - picture.shape[1]], fill=255))
    save(name, F.to_pil_image(make_grid(torch.stack(drawn), nrow=3, padding=6, pad_value=255)))


def day_and_night(name: str) -> None:
    """Three images by day, and below them three by night."""
    images = []
    for data_set in ("shapes_train", "shapes_night_train"):
        for number in (163, 207, 223):
            image = Image.open(shapes_dataset(data_set)[1] / f"{number:06}.png").convert("RGB")
            images.append(F.center_crop(F.resize(F.pil_to_tensor(image), [256], antialias=False), [256, 256]))
    save(name, F.to_pil_image(make_grid(torch.stack(images), nrow=3, padding=6, pad_value=255)))


def main() -> None:
    annotations = ["--source", "annotations", "--number", "8", "DATASETS.TEST", "[]"]
    contact_sheet("annotations", *annotations)
    augmented = ["INPUT.SCALE_JITTER", "[0.5, 2.0]", "INPUT.PHOTOMETRIC_DISTORT", "0.5", "SOLVER.IMS_PER_BATCH", "4"]
    contact_sheet("loader", "--source", "loader", "--number", "4", *augmented)
    day_and_night("day_night")
    for name, run in (("first_run", "output/quickstart"), ("first_run_shared", "output/shared")):
        predictions(name, run)
    save("confusion", Image.open("output/quickstart/report/confusion.png"), 600)


if __name__ == "__main__":
    main()
