"""The pages of docs/layers, docs/how_to and docs/migration: drawings, snippets, commands and names."""

import runpy
from pathlib import Path

import pytest
import torch

import domainnorm as dn

DOCS = Path(__file__).parents[1] / "docs"
DRAWINGS = runpy.run_path(str(DOCS / "drawings.py"))
SAMPLES, CHANNELS = DRAWINGS["SAMPLES"], DRAWINGS["CHANNELS"]


def test_the_drawings_are_those_of_the_script(tmp_path):
    DRAWINGS["main"]([str(tmp_path)])
    drawn = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_bytes() for file in (DOCS / "layers" / "drawings").iterdir()}


@pytest.mark.parametrize("name", DRAWINGS["BLOCKS"])
def test_what_is_drawn_together_is_normalized_together(name):
    """An output depends on the inputs of its normalization batch and on no others; halves of a map are two pieces."""
    samples, channels, norm, options = DRAWINGS["BLOCKS"][name]
    torch.manual_seed(0)
    layer = dn.get_norm(norm, CHANNELS, affine=None, **options).double()
    x = torch.randn(SAMPLES, CHANNELS, 2, 2, dtype=torch.double, requires_grad=True)
    layer(x)[0, 0, 0, 0].backward()
    expected = torch.zeros(SAMPLES, CHANNELS * 4, dtype=torch.bool)
    expected[:samples, : round(channels * 4)] = True
    assert torch.equal(x.grad.flatten(1) != 0, expected)
