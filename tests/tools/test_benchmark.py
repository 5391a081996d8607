"""tools/benchmark.py: what it compares is equal, and what it prints."""

import argparse
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import domainnorm as dn
from domainnorm.distributed import ALL_GATHER

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
sys.path.insert(0, str(TOOL.parent))

import benchmark  # noqa: E402
from benchmarks import collectives, layers, model, shuffle  # noqa: E402


def head(x):
    return x.flatten(1).sin().cumsum(1)[:, :3]


def shuffled_and_gathered(rank, patterns):
    results = []
    for counts in patterns:
        own = dn.RoIShuffle(head)
        x = torch.randn(counts[rank], 2, 2, 2, generator=torch.Generator().manual_seed(rank))
        of_each_way = []
        for way in (
            own,
            lambda x: shuffle.all_gather_shuffle(shuffle.detectron2_rows, head, x, 0),
            lambda x: shuffle.all_gather_shuffle(shuffle.lean_rows, head, x, 0),
        ):
            leaf = x.clone().requires_grad_()
            y = way(leaf)
            y.pow(3).sum().backward()
            of_each_way.append((y.detach(), leaf.grad))
        results.append((head(x), of_each_way, shuffle.bytes_sent(counts, 0, x, y)))
    return results


@pytest.mark.parametrize("patterns", [[[4, 4], [5, 2], [7, 0]], [[3, 0, 8], [0, 1, 0]]])
def test_all_ways_give_the_same_outputs_and_gradients(patterns):
    for of_rank in run_ranks(shuffled_and_gathered, len(patterns[0]), patterns):
        for expected, ways, _ in of_rank:
            for y, grad in ways:
                torch.testing.assert_close(y, expected)
                torch.testing.assert_close(grad, ways[0][1])


def test_bytes_sent():
    # Half of rank 0's RoIs, rounded up, go to rank 1 and back, whatever the permutation; a row is 8 + 3 numbers.
    for ((_, _, (shuffled, gathered)),) in run_ranks(shuffled_and_gathered, 2, [[7, 0]]):
        assert shuffled == 4 * (8 + 3) * 4 and gathered == 2 * (7 * 8 + 4 * 3) * 4


@pytest.fixture
def run(capsys):
    """The command in this process: the rows of its table."""

    def rows(*argv):
        benchmark.main([str(word) for word in argv])
        first, empty, *table = capsys.readouterr().out.splitlines()
        assert re.search(r", torch \S+, 1 thread$", first) and not empty
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]

    return rows


@pytest.mark.slow
def test_shuffle_prints_a_row_for_even_and_one_for_uneven_counts(run):
    rows = run("shuffle", "--processes", "2", "--rois", "16", "--channels", "64", "--repeats", "1")
    assert [row[:2] for row in rows] == [["2", "16"], ["2", "8 to 24"]]
    for _, _, shuffled, gathered, *ratios in rows:
        assert 0 < float(shuffled) < float(gathered)
        assert len(ratios) == 3 and all(float(ratio) > 0 for ratio in ratios)


@pytest.mark.slow
def test_collectives_counts_the_calls_of_each_mode(run):
    *counts, (mode, *ratios) = run("collectives", "--repeats", "5")
    assert mode == collectives.TIME and all(float(ratio) > 0 for ratio in ratios)
    rows = {mode: (forward, backward, int(total)) for mode, forward, backward, total in counts}
    assert set(rows) == set(collectives.MODES)
    # The number of foreground RoIs or anchors is one; a norm per process adds none, a SyncBN one in each direction.
    for mode in ("Mask R-CNN, BN", "Mask R-CNN, GN", "RetinaNet, BN"):
        assert rows[mode] == ("1 all_reduce", "none", 1)
    assert [rows[mode][2] for mode in ("Mask R-CNN, SyncBN", "RetinaNet, SyncBN")] == [1 + 2 * 8, 1 + 2 * 4]
    # Two branches, each with two exchanges of rows, before each of which the ranks compare what they send.
    assert rows["Mask R-CNN, BN, shuffled"][1:] == (f"4 {ALL_GATHER}, 4 all_to_all_single", 17)


def test_one_process_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["shuffle", "--processes", "1"])
    assert "2 or more" in capsys.readouterr().err


@pytest.mark.parametrize("detector", ["RetinaNet", pytest.param("Mask R-CNN", marks=pytest.mark.slow)])
def test_both_detectors_compute_the_same_losses_and_detections(detector):
    models = model.build(detector, 64, 96)
    if detector == "Mask R-CNN":
        for samplers in ([m.rpn.fg_bg_sampler, m.roi_heads.fg_bg_sampler] for m in models.values()):
            for sampler in samplers:
                sampler.batch_size_per_image = 16
    images, targets = model.batch(2, 64, 96)
    losses = model.compare_losses(models, model.steps(models, images, targets, torch.float32))
    assert losses < 1e-4
    assert model.compare_detections(models, model.inferences(models, images[:1], torch.float32)) < 1e-4


@pytest.mark.slow
def test_model_prints_a_row_for_each_measurement(run):
    rows = run("model", "--size", 64, 96, "--detectors", "RetinaNet", "--repeats", 1, "--precisions", "float32")
    expected = [["RetinaNet", what, "64x96", "float32"] for what in ("training step", "inference")]
    assert [row[:4] for row in rows] == expected
    assert all(float(row[5]) > 0 for row in rows)


def test_layers_prints_a_row_for_each_layer_shape_and_layout(run):
    rows = run("layers", "--repeats", 1, "--shapes", "8x32x5x6", "4x16x2x3")
    names = [*layers.LAYERS, "example weighing"]
    expected = [
        [name, shape, layout]
        for shape in ("8x32x5x6", "4x16x2x3")
        for layout in ("NCHW", "channels_last")
        for name in names
    ]
    assert [row[:3] for row in rows] == expected
    assert all(float(ratio) > 0 for row in rows for ratio in row[3:] if ratio)


def test_layers_are_measured_at_the_shapes_of_the_docs():
    args = argparse.ArgumentParser()
    layers.add_arguments(args)
    assert args.parse_args([]).shapes is None
    assert [shape[1] for shape in (*layers.LARGE, *layers.SMALL)] == [64, 256, 512, 256, 64, 1024]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.slow
def test_head_prints_a_row_for_each_peer(run):
    rows = run("head", "--repeats", 1, "--channels", 8, "--size", 64, 96)
    expected = ("shared", "shared", "shared", "shared, compiled", "shared, compiled", "per domain")
    assert [row[:2] for row in rows] == [["64x96", statistics] for statistics in expected]
    assert all(float(row[3]) > 0 for row in rows)


@pytest.mark.slow
def test_memory_prints_a_row_for_each_layer(run):
    rows = run("memory", "--shape", 4, 32, 64, 64, "--layers", "BN", "SeqNorm")
    assert [row[0] for row in rows] == ["BN", "SeqNorm"] * 2
    assert all(float(ratio) > 0 for row in rows for ratio in row[2:])
