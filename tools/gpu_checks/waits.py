"""Where a training step of each detector makes the processor wait for a GPU, by torch's synchronization debug mode."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from benchmarks.model import DETECTORS, batch
from benchmarks.table import Row

import domainnorm as dn

MESSAGE = "called a synchronizing CUDA operation"
OWNERS = {"ours": Path(dn.__file__).parent, "torchvision's": Path(torchvision.__file__).parent}
SMALL = {
    "MODEL.BACKBONE.NAME": "resnet18",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
}
WARM_UP = 3  # steps, in which kernels are compiled and tried


def measure(device: str, small: bool) -> Iterator[Row]:
    """For each detector a row for each place, and one for all of them."""
    size = (64, 96) if small else (800, 1333)
    images, targets = batch(2, *size, device=device)
    for detector, options in DETECTORS.items():
        torch.manual_seed(0)
        words = [*options.split(), "MODEL.DEVICE", device]
        words += [word for pair in (SMALL if small else {}).items() for word in pair]
        model = dn.build_model(dn.load_config(None, words)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        for _ in range(1 if small else WARM_UP):
            losses = step(model, optimizer, images, targets)
        assert all(loss.isfinite() for loss in losses), losses
        with Waits(device) as waits:
            step(model, optimizer, images, targets)
        for (owner, place, line), number in sorted(waits.places.items(), key=lambda item: (item[0][0], -item[1])):
            yield {"detector": detector, "owner": owner, "place": place, "line": line, "waits": number}
        yield {"detector": detector, "owner": "all", "place": "", "line": "", "waits": waits.places.total()}


def step(model: Any, optimizer: Any, images: Any, targets: Any) -> list[torch.Tensor]:
    optimizer.zero_grad()
    losses = list(model(images, targets).values())
    torch.stack(losses).sum().backward()
    optimizer.step()
    return losses


class Waits:
    """Counts what waits within it, by place: whose code, `file:line function` and the line itself."""

    def __init__(self, device: str) -> None:
        self.places: Counter[tuple[str, str, str]] = Counter()
        self.device = device
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "Waits":
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # called where the warning is, within the call that waits
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)

    def _note(self, message: Any, *_: Any, **__: Any) -> None:
        if MESSAGE in str(message):
            self.places[place_of(traceback.extract_stack())] += 1


def place_of(frames: traceback.StackSummary) -> tuple[str, str, str]:
    """The innermost of our or torchvision's frames; where there is none (as in a backward pass), the innermost one."""
    for frame in reversed(frames):
        for owner, folder in OWNERS.items():
            if folder in Path(frame.filename).parents:
                return owner, _shown(frame, folder), frame.line or ""
    frames = [f for f in frames if Path(f.filename).name != "warnings.py" and f.name not in ("_note", "_showwarnmsg")]
    return "other", _shown(frames[-1], Path(torch.__file__).parent), frames[-1].line or ""


def _shown(frame: traceback.FrameSummary, folder: Path) -> str:
    file = Path(frame.filename)
    name = file.relative_to(folder.parent) if folder in file.parents else file.name
    return f"{name}:{frame.lineno} {frame.name}"
