"""From a photo of 8 bits to drawn boxes with onnxruntime, PIL and NumPy alone.

    domainnorm export --config-file output/run/config.yaml --format onnx --boxes --out net.onnx \
        MODEL.WEIGHTS output/run/model_final.pth
    python examples/onnx_predict.py net.onnx photo.jpg drawn.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def main(net, photo, drawn, score=0.5):
    """Draws what is found with a higher score; returns names, scores and boxes (left, top, right, bottom)."""
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255  # resizing and mean and std are in the file
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"images": pixels})

    found = [(names[k], float(s), box.tolist()) for box, s, k in zip(boxes, scores, labels, strict=True) if s > score]
    draw = ImageDraw.Draw(image)
    for name, own, box in found:
        draw.rectangle(box, outline="red", width=2)
        draw.text(box[:2], f"{name} {own:.2f}", fill="red", anchor="lb")
    image.save(drawn)
    return found


if __name__ == "__main__":
    for name, score, box in main(*sys.argv[1:4]):
        print(f"{name} {score:.2f} {[round(side) for side in box]}")
