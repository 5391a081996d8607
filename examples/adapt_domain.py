"""Take a trained detector to a new domain from images alone: no labels, no training, and the old domain keeps its AP.

    python tools/train_net.py --config-file configs/quickstart.yaml
    python examples/adapt_domain.py output/quickstart [--source shapes_val] [--target shapes_night_val]
        [--unlabelled shapes_night_train] [--images 300] [--out output/adapt_domain]

Every BatchNorm gets a second domain, with population statistics of the unlabelled images (*Rethinking "Batch"*,
Table 4). AP on both domains is compared under the statistics of the old one, of the new one, of the one that each image
is nearest to (so that nobody has to say where an image comes from), and of the image itself.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import domainnorm as dn
from domainnorm.data.loader import test_loader


class NearestDomain(nn.Module):
    """Each image under the statistics of the domain that it is most like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            with dn.use_domain(self.model, dn.nearest_domain(self.model, [image])):
                found += self.model([image])
        return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained detector: config.yaml, model_final.pth")
    parser.add_argument("--source", default="shapes_val", help="to evaluate on, of the domain it was trained on")
    parser.add_argument("--target", default="shapes_night_val", help="to evaluate on, of the new domain")
    parser.add_argument("--unlabelled", default="shapes_night_train", help="images of the new domain")
    parser.add_argument("--images", type=int, default=300, help="how many of them")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    parser.add_argument("--out", type=Path, default=Path("output/adapt_domain"))
    args = parser.parse_args(argv)

    weights = ["MODEL.WEIGHTS", str(args.run / "model_final.pth"), "OUTPUT_DIR", str(args.out)]
    cfg = dn.load_config(str(args.run / "config.yaml"), [*weights, "DATASETS.TEST", [args.source, args.target]])
    model = dn.build_model(cfg).eval()
    results = {"minibatch": dn.evaluate(cfg, model, "minibatch")["minibatch"]}

    data = test_loader(cfg, args.unlabelled, rank=0, world_size=1).dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    images = ([data[index][0]] for index in islice(order, args.images))  # resized as for predictions
    dn.add_domain(model, images, "target", method="exact")  # those before are now called "0"

    for name, domain in (("source", "0"), ("target", "target")):
        with dn.use_domain(model, domain):
            results[name] = dn.evaluate(cfg, model, "population")["population"]
    results["nearest"] = dn.evaluate(cfg, NearestDomain(model), "population")["population"]

    (args.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"{'AP under statistics of':30}{'source':>10}{'target':>10}")
    said = {"source": "the source", "target": "the target", "nearest": "the nearest", "minibatch": "the image itself"}
    for name, title in said.items():
        print(f"{title:30}" + "".join(f"{test['bbox']['AP']:10.1f}" for test in results[name].values()))
    return results


if __name__ == "__main__":
    main()
