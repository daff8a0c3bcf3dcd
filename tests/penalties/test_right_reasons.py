"""Right for the right reasons: the closed form of a softmax model, masks of every shape, shortcuts unlearned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties import RightReasons

METHODS = ("finite_differences", "double_backward")
W = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, 1.0, 2.0, 0.5], [0.3, 0.0, -1.0, 1.5]])
X = torch.tensor([[0.5, 0.2, -0.1, 1.0], [-0.3, 0.8, 0.4, 0.0], [0.1, -0.6, 0.9, -0.5]])
Y = torch.tensor([0, 1, 2])
MASK = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.0]])

IMAGES = torch.randn(4, 3, 2, 5)
PIXELS = (torch.arange(40).view(4, 1, 2, 5) % 3 == 0).float()
DEFAULT, PENALTY = RightReasons(), RightReasons(method="double_backward")


def linear(x: Tensor) -> Tensor:
    return x @ W.T


def of_images(x: Tensor) -> Tensor:
    return linear(torch.tanh(x.flatten(1))[:, :4])


def test_a_softmax_model_has_its_closed_form() -> None:
    """sum_k log p_k = sum_k z_k - K log sum_k exp z_k, whose gradient is sum_k (1 - K p_k) w_k."""
    gradient = (1 - 3 * linear(X).softmax(1)) @ W
    expected = ((MASK * gradient).square().sum(1) / MASK.sum(1)).mean()
    torch.testing.assert_close(PENALTY(linear, X, Y, mask=MASK), expected)


def test_a_finite_step_goes_along_the_masked_gradient() -> None:
    mask = (MASK > 0).float()
    gradient = mask * ((1 - 3 * linear(X).softmax(1)) @ W)
    h = 0.13 * X.norm(dim=1).mean()
    there = X + h * gradient / gradient.norm(dim=1, keepdim=True)
    climbed = linear(there).log_softmax(1).sum(1) - linear(X).log_softmax(1).sum(1)
    expected = ((climbed / h).square() / mask.sum(1)).mean()
    torch.testing.assert_close(RightReasons()(linear, X, Y, mask=mask), expected, rtol=1e-4, atol=0)


def test_both_methods_agree_at_a_small_step() -> None:
    x, mask = X.double(), MASK.double()
    small = RightReasons(step=1e-3)(linear_double, x, Y, mask=mask, call=InDouble)
    torch.testing.assert_close(small, PENALTY(linear_double, x, Y, mask=mask, call=InDouble), rtol=1e-3, atol=0)


def linear_double(x: Tensor) -> Tensor:
    return x @ W.double().T


class InDouble(LossCall):
    """A loss call of somebody's own."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__("cross_entropy", logits, Y)

    def log_probabilities(self) -> Tensor:
        return self.logits.log_softmax(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "mask",
    [
        PIXELS.expand(4, 3, 2, 5),
        PIXELS.squeeze(1),
        PIXELS.bool(),
        PIXELS.squeeze(1).to(torch.uint8),
        PIXELS.double(),
        PIXELS.bfloat16(),
    ],
    ids=["NCHW", "NHW", "bool", "NHW-uint8", "float64", "bfloat16"],
)
def test_masks_of_every_shape_and_type_mean_the_same(mask: Tensor, method: str) -> None:
    penalty = RightReasons(method=method)
    expected = penalty(of_images, IMAGES, torch.arange(4) % 3, mask=PIXELS)
    assert expected.item() > 0
    torch.testing.assert_close(penalty(of_images, IMAGES, torch.arange(4) % 3, mask=mask), expected)


def test_one_mask_serves_a_whole_batch() -> None:
    one = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(PENALTY(linear, X, Y, mask=one), PENALTY(linear, X, Y, mask=one.expand(3, 4)))


def test_marks_are_counted_where_they_are_spread_to() -> None:
    """Of z = (sum x, 0), log p_0 + log p_1 falls by 1 with every x, where p_0 = 1: (1 + 1) / 2 in two channels."""
    x = torch.full((1, 2, 1, 3), 10.0)
    y = torch.tensor([0])
    mask = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    penalty = PENALTY(lambda x: torch.stack([x.flatten(1).sum(1), torch.zeros(1)], 1), x, y, mask=mask)
    assert penalty.item() == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_samples_without_marks_add_nothing_and_are_counted(method: str) -> None:
    x = F.normalize(X) * 2  # one length, so that leaving one out does not change the step
    mask = MASK.clone()
    mask[1] = 0
    kept, penalty = [0, 2], RightReasons(method=method)
    of_two = penalty(linear, x[kept], Y[kept], mask=mask[kept])
    torch.testing.assert_close(penalty(linear, x, Y, mask=mask), of_two * 2 / 3, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_does_not_depend_on_the_batch_size_where_masks_are_rare(method: str) -> None:
    net, penalty = nn.Linear(4, 3), RightReasons(method=method)
    x, y = F.normalize(torch.randn(24, 4)), torch.arange(24) % 3
    mask = torch.zeros(24, 4)
    mask[[0, 7, 8], 1] = 1
    whole = penalty(net, x, y, mask=mask)
    for size in (1, 3, 8):
        parts = [
            penalty(net, *p[:2], mask=p[2]) for p in zip(x.split(size), y.split(size), mask.split(size), strict=True)
        ]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_samples_without_a_label_do_not_count(method: str) -> None:
    x, penalty = F.normalize(X) * 2, RightReasons(method=method)
    found = penalty(linear, x, torch.tensor([0, -100, 2]), mask=MASK)
    torch.testing.assert_close(found, penalty(linear, x[[0, 2]], Y[[0, 2]], mask=MASK[[0, 2]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_of_pixels_and_labels_the_mean_is_taken(method: str) -> None:
    penalty, one = RightReasons(method=method), RightReasons(method=method)(linear, X, Y, mask=MASK)
    pixels = penalty(lambda x: linear(x)[:, :, None].expand(-1, -1, 7), X, Y[:, None].expand(-1, 7), mask=MASK)
    torch.testing.assert_close(pixels, one, rtol=1e-4, atol=0)
    w, y = W[0], (Y > 0).float()[:, None]
    yes_no = penalty(lambda x: (x @ w)[:, None], X, y, mask=MASK)
    labels = penalty(lambda x: (x @ w)[:, None].expand(-1, 5), X, y.expand(-1, 5), mask=MASK)
    torch.testing.assert_close(labels, yes_no, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_is_switched_off_is_left_out_of_the_sum(method: str) -> None:
    w = W.clone().requires_grad_()
    off = torch.tensor([0.0, -torch.inf, 0.0])
    y = torch.tensor([0, 2, 0])
    found = RightReasons(method=method)(lambda x: x @ w.T + off, X, y, mask=MASK)
    torch.testing.assert_close(found, RightReasons(method=method)(lambda x: x @ w[[0, 2]].T, X, y // 2, mask=MASK))
    (gradient,) = torch.autograd.grad(found, w)
    assert bool(gradient.isfinite().all())


def test_no_mask_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"expected a mask, a tensor .* got NoneType"):
        PENALTY(linear, X, Y, mask=None)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("method", METHODS)
def test_without_any_mark_it_is_a_zero_that_can_be_differentiated(method: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    penalty = RightReasons(method=method)(net, X, Y, mask=torch.zeros_like(X))
    assert penalty.item() == 0.0
    for gradient in torch.autograd.grad(penalty, list(net.parameters()), materialize_grads=True):
        assert not gradient.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_does_not_look_there_has_no_penalty(method: str) -> None:
    blind = W * torch.tensor([1.0, 0.0, 1.0, 0.0])
    mask = torch.tensor([[0, 1, 0, 1]])
    assert RightReasons(method=method)(lambda x: x @ blind.T, X, Y, mask=mask).item() == 0.0


def test_a_yes_no_head_has_two_classes() -> None:
    """log p + log (1 - p) has the gradient (1 - 2p) w."""
    w = W[0]
    gradient = (1 - 2 * torch.sigmoid(X @ w))[:, None] * w
    expected = ((MASK * gradient).square().sum(1) / MASK.sum(1)).mean()
    torch.testing.assert_close(PENALTY(lambda x: x @ w, X, torch.tensor([0, 1, 1]), mask=MASK), expected)


def test_a_model_that_returns_log_probabilities_says_so_by_its_call() -> None:
    def call(z: Tensor) -> LossCall:
        return LossCall("nll_loss", z, Y)

    found = PENALTY(lambda x: linear(x).log_softmax(1), X, Y, mask=MASK, call=call)
    torch.testing.assert_close(found, PENALTY(linear, X, Y, mask=MASK))


@pytest.mark.parametrize(("method", "forwards"), [("finite_differences", 1), ("double_backward", 0)])
def test_given_logits_save_a_forward_and_change_nothing(method: str, forwards: int) -> None:
    seen: list[Tensor] = []

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x)
        return linear(x)

    penalty, leaf = RightReasons(method=method), X.clone().requires_grad_()
    for reuse in (True, False):
        seen.clear()
        found = penalty(logits_fn, leaf, Y, mask=MASK, logits=linear(leaf), reuse=reuse)
        torch.testing.assert_close(found, penalty(linear, X, Y, mask=MASK))
        assert len(seen) == forwards + (method == "finite_differences" and not reuse)


@pytest.mark.parametrize("method", METHODS)
def test_it_makes_a_model_unlearn_a_shortcut(method: str) -> None:
    """Feature 0 tells the class half of the time, feature 1 always does, while training lasts."""
    y = torch.arange(400) % 2
    sign = 2.0 * y - 1
    honest = sign + 1.5 * torch.randn(400)
    x = torch.stack([honest, sign], 1)
    shuffled = torch.stack([honest, sign[torch.randperm(400)]], 1)
    accuracy = {}
    for weight in (0.0, 10.0):
        net = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            term = RightReasons(method=method)(net, x, y, mask=torch.tensor([[0, 1]]))
            (F.cross_entropy(net(x), y) + weight * term).backward()
            optimizer.step()
        accuracy[weight] = float((net(shuffled).argmax(1) == y).float().mean())
    reachable = float(((honest > 0) == (y == 1)).float().mean())
    assert accuracy[0.0] < reachable - 0.1
    assert accuracy[10.0] == pytest.approx(reachable, abs=0.02)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 5), r"shape \(3, 5\) does not fit inputs \(3, 4\)"),
        (torch.ones(2, 4), r"shape \(2, 4\) does not fit inputs \(3, 4\)"),
        (torch.ones(1, 3, 4), r"shape \(1, 3, 4\) does not fit inputs \(3, 4\)"),
        (torch.ones(4), r"shape \(4,\) does not fit inputs \(3, 4\)"),
        (torch.ones(3, 4) * 255, "from 255 to 255; divide"),
        (torch.full((3, 4), -0.5), r"in \[0, 1\] .* from -0.5 to -0.5"),
        (torch.where(torch.eye(3, 4) > 0, torch.nan, 1.0), "from nan to nan"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PENALTY(linear, X, Y, mask=mask)


@pytest.mark.parametrize(
    ("written", "read"), [("region", "region"), ("2", 2), ("[0, region]", (0, "region")), ("[extra, 1]", ("extra", 1))]
)
def test_yaml_says_where_the_masks_are(written: str, read: str | int | tuple[str | int, ...], tmp_path: Path) -> None:
    def make(penalty: RightReasons = DEFAULT) -> RightReasons:
        return penalty

    (tmp_path / "run.yaml").write_text(f"penalty: {{mask_key: {written}}}\n")
    made = auto_cli(make, args=[f"--config={tmp_path / 'run.yaml'}"], as_positional=False)
    assert made == RightReasons(read)
    assert made.name == "right_reasons"
    assert len({made, RightReasons(read)}) == 1


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RightReasons\(method=\) must be one of"):
        RightReasons(method="exact")
