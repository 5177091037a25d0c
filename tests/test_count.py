"""Counts that can be checked by hand, and the least times that follow from them."""

from __future__ import annotations

import pytest
import roofline
import torch
import torch.nn.functional as F
from count import Count
from roofline import Gpu

from support import machine

FLOAT = 4  # bytes
SIZES = {"hidden_dim": 32, "encoder_feature_dim": 8, "num_layers": 2, "num_filters": 4}
PIXELS = {"obs_shape": (9, 24, 24), "encoder_type": "pixel", "decoder_type": "pixel", **SIZES}
STATES = {"obs_shape": (5,), "encoder_type": "identity", "decoder_type": "identity", **SIZES}


def ones(*shape, **kwargs):
    return torch.ones(shape, device="cuda", **kwargs)


CASES = {  # of what, its kernels, FLOP and bytes moved
    "product": (lambda: (ones(4, 8), ones(8, 16)), torch.mm, 1, 2 * 4 * 8 * 16, FLOAT * (4 * 8 + 8 * 16 + 4 * 16)),
    "sum of two": (lambda: (ones(10), ones(10)), torch.add, 1, 0, FLOAT * 30),
    "in place": (lambda: (ones(10),), torch.relu_, 1, 0, FLOAT * 20),
    "overwritten": (lambda: (ones(10),), torch.Tensor.zero_, 1, 0, FLOAT * 10),
    "a view": (lambda: (ones(2, 3),), torch.t, 0, 0, 0),
    "expanded": (lambda: (ones(1, 5).expand(7, 5),), torch.neg, 1, 0, FLOAT * (5 + 35)),
    "in two bytes": (lambda: (ones(10),), torch.Tensor.bfloat16, 1, 0, (FLOAT + 2) * 10),
    "on the host": (lambda: (torch.ones(3),), torch.neg, 0, 0, 0),
    "a list": (lambda: ([ones(3), ones(5)],), lambda each: torch._foreach_mul_(each, 2), 1, 0, FLOAT * 16),
    "a long list": (lambda: ([ones(65536)] * 321,), lambda x: torch._foreach_mul_(x, 2), 2, 0, FLOAT * 65536 * 321 * 2),
    "a module and its gradients": (  # a bias is summed
        lambda: (torch.nn.Linear(8, 16, device="cuda"), ones(4, 8)),
        lambda layer, x: layer(x).sum().backward(),
        5,
        2 * 2 * 4 * 8 * 16,
        None,
    ),
    "convolution": (  # of 5 x 5 to 3 x 3; the bias is added to its result
        lambda: (ones(1, 2, 5, 5), ones(3, 2, 3, 3), ones(3)),
        F.conv2d,
        2,
        2 * 27 * 2 * 9,
        FLOAT * (50 + 54 + 3 + 27 + 2 * 27),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(gpu, name):
    make, function, *expected = CASES[name]
    arguments = make()
    with Count() as count:
        function(*arguments)
    counted = [count.total(field) for field in ("kernels", "flop", "bytes")]
    assert all(number in (None, mine) for number, mine in zip(expected, counted, strict=True)), counted


def test_memory_at_once(gpu):
    x = ones(1000)
    with Count() as count:
        y = x.view(10, 100).neg_() + 1  # what was there does not count
        z = y + 1
        del y
        _ = z + 1
    assert count.peak == 2 * 1000 * FLOAT


@pytest.mark.parametrize(
    ("precision", "product", "convolution"),
    [(None, "fp32", "tf32"), ("fp32", "fp32", "fp32"), ("tf32", "tf32", "tf32"), ("bf16", "bf16", "bf16")],
)
def test_operands(gpu, precision, product, convolution):
    """As PyTorch's defaults and the project's precisions have it. The actor's last layer is exact in bf16."""
    action = dict(roofline.counts(**PIXELS, action_shape=(2,), batch_size=8, precision=precision))["action"]
    operands = [(each.name, each.operands) for each in action.operations if each.flop]
    last = "fp32" if precision == "bf16" else product
    assert operands == [("convolution", convolution)] * 2 + [("addmm", product)] * 3 + [("addmm", last)]


def test_least_times(gpu):
    """Of each operation the slowest of three: FLOP, bytes, launch."""
    matrix = ones(100, 100)
    with Count() as count:
        matrix @ matrix
        matrix + matrix
    compute, move = 2e6 / 1e12, FLOAT * 3e4 / 1e12
    assert roofline.least(count, Gpu(1, 1, 1, 1)) == pytest.approx(compute + move)
    assert roofline.least(count, Gpu(1, 1000, 1, 1)) == pytest.approx(2 * move)
    assert roofline.least(count, Gpu(1, 1, 1, 1), launch=1e-3) == pytest.approx(2e-3)


@pytest.mark.parametrize("settings", [PIXELS, STATES], ids=["pixel", "state"])
def test_updates(gpu, settings):
    """More with the actor than without; the same again."""
    once, again = (dict(roofline.counts(**settings, action_shape=(2,), batch_size=8)) for _ in range(2))
    _, full, without, action = once.values()
    for field in ("kernels", "flop", "bytes"):
        assert full.total(field) > without.total(field) > action.total(field) > 0
    for name, count in once.items():
        assert (count.operations, count.peak) == (again[name].operations, again[name].peak)


def test_the_table(compiler, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "SHAPES", {"state": (17,)})
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| state")]
    assert [row[1] for row in rows[::4]] == ["default", "fp32", "tf32", "bf16"]
    for row in rows:
        least, launched = (float(cell.replace(",", "")) for cell in row[-2:])
        assert launched >= max(least, int(row[3]) * roofline.LAUNCH * 1e6)


@pytest.mark.parametrize(
    ("batch_size", "image_size", "num_layers", "num_filters"),
    [(128, 84, 4, 32), (64, 84, 4, 32), (128, 64, 2, 32), (64, 84, 4, 64), (128, 100, 6, 16)],
)
def test_the_memory_kept_free_for_updates(gpu, batch_size, image_size, num_layers, num_filters):
    """It holds an update of each of four kinds, and is not a multiple of that."""
    shape, sizes = (9, image_size, image_size), {"num_layers": num_layers, "num_filters": num_filters}
    counted = dict(roofline.counts(shape, (6,), batch_size, precision="fp32", **sizes))
    peak = counted["update with actor, target"].peak
    assert 2 * peak < machine.update_bytes(batch_size, shape, num_layers, num_filters) < 8 * peak
