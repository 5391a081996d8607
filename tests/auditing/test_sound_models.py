"""Nothing is said of models of many families that were trained as usual."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import audit_sound
from audit_cases import audited
from audit_sound import SOUND, sound

FAST = ("perceptron", "vit_tiny of timm", "densenet")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SOUND]


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_model_has_no_findings(name, monkeypatch):
    monkeypatch.setattr(audit_sound, "STEPS", 100)  # fewer than those of docs/audit.md: the same, in less time
    torch.set_num_threads(1)
    report = audited(sound(name))
    assert report.findings == []
    assert report.healthy
