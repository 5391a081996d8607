"""Draw what goes wrong when pyramid levels share the statistics of one BatchNorm, in a detector that you have trained.

    python tools/train_net.py --config-file configs/quickstart.yaml
    python examples/level_statistics.py output/quickstart [--layer NAME] [--images 50] [--out levels.png]

Left, the features of each level before a norm of the head, in the channel whose levels differ as much as those of the
median channel. Right, what inference makes of them, over all channels: with the population statistics of all levels
together, and with each level's own.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import domainnorm as dn
from domainnorm.data.loader import test_loader


@torch.no_grad()
def level_features(run: Path, layer: str, images: int) -> list[Tensor]:
    """What each level brings to norm `layer`, over some test images: of each level (C, n)."""
    cfg = dn.load_config(str(run / "config.yaml"), ["MODEL.WEIGHTS", str(run / "model_final.pth")])
    model = dn.build_model(cfg).eval()
    norms = {name: m for name, m in model.head.named_modules() if isinstance(m, dn.DomainBatchNorm)}
    if not norms:
        raise SystemExit(f"{run}: the head has no BatchNorm: give a RetinaNet with MODEL.RETINANET.NORM BN")
    if layer and layer not in norms:
        raise SystemExit(f"--layer takes any of {list(norms)}, got {layer!r}")
    seen: list[list[Tensor]] = []
    norm = norms[layer or next(iter(norms))]
    norm.register_forward_pre_hook(lambda _, inputs: seen.append([x.transpose(0, 1).flatten(1) for x in inputs[0]]))
    data = test_loader(cfg, cfg.DATASETS.TEST[0], rank=0, world_size=1).dataset
    for index in range(min(images, len(data))):
        model([data[index][0]])
    return [torch.cat(level, 1) for level in zip(*seen, strict=True)]


def draw(levels: list[Tensor], eps: float = 1e-5) -> Figure:
    """The picture of the module's docstring."""
    everything = torch.cat(levels, 1)  # every position counts once, as in shared population statistics
    mean, std = everything.mean(1, keepdim=True), (everything.var(1, keepdim=True) + eps).sqrt()
    shared = [(level - mean) / std for level in levels]
    differ = torch.stack([level.mean(1) for level in shared]).std(0)
    channel = int(differ.argsort()[len(differ) // 2])

    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    colors = [f"C{k}" for k in range(len(levels))]
    own = everything[channel][: 2**24]  # as many as quantile takes
    low, high = (float(own.quantile(q)) for q in (0.005, 0.995))
    bins = torch.linspace(low, high, 41)
    for k, level in enumerate(levels):
        count = torch.histogram(level[channel], bins).hist
        density = count / count.sum() / (bins[1] - bins[0])
        left.plot((bins[:-1] + bins[1:]) / 2, density, color=colors[k], label=f"level {k}")
    curve = torch.distributions.Normal(mean[channel], std[channel]).log_prob(bins).exp()
    left.plot(bins, curve, "--", color="black", label="shared statistics")
    left.set(title="Features of one channel, before the norm", xlabel="value", ylabel="density")
    left.legend(fontsize=8, frameon=False)

    for k, level in enumerate(shared):
        right.errorbar(k - 0.12, level.mean(1).abs().mean(), level.std(1).mean(), fmt="o", color=colors[k], capsize=4)
        right.errorbar(k + 0.12, 0, 1, fmt="o", color="#bbbbbb", capsize=4)
    right.plot([], [], "o", color="black", label="shared statistics")
    right.plot([], [], "o", color="#bbbbbb", label="each level's own")
    right.set(title="After the norm: |mean| ± deviation", xlabel="level", xticks=range(len(levels)))
    right.margins(y=0.2)
    right.legend(fontsize=8, frameon=False, loc="lower center", ncols=2)
    for axes in (left, right):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a RetinaNet trained with BN in its head")
    parser.add_argument("--layer", default="", help="norm of the head; the first by default")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("levels.png"))
    args = parser.parse_args(argv)
    draw(level_features(args.run, args.layer, args.images)).savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
