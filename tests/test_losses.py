from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.losses import LOSSES, LossCall

CLASSES, DENSE = torch.tensor([0, 2, 1, 2]), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])
WEIGHT = torch.tensor([0.5, 1.0, 3.0])


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def soft(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).softmax(1)


def yes_no(*shape: int) -> Tensor:
    return (logits(*shape) > 0).float()


# function, its input, its target, its other arguments, what is read as the kind
CALLS: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, Any], str]] = {
    "classes": (F.cross_entropy, logits(4, 3), CLASSES, {}, "cross_entropy"),
    "class weights": (F.cross_entropy, logits(4, 3), CLASSES, {"weight": WEIGHT}, "cross_entropy"),
    "label smoothing": (F.cross_entropy, logits(4, 3), CLASSES, {"label_smoothing": 0.1}, "cross_entropy"),
    "both": (F.cross_entropy, logits(4, 3), CLASSES, {"weight": WEIGHT, "label_smoothing": 0.1}, "cross_entropy"),
    "soft targets": (F.cross_entropy, logits(4, 3), soft(4, 3), {}, "cross_entropy"),
    "ignored class": (F.cross_entropy, logits(4, 3), CLASSES, {"ignore_index": 2}, "cross_entropy"),
    "dense": (F.cross_entropy, logits(4, 3, 2), DENSE, {"ignore_index": 0}, "cross_entropy"),
    "log-probabilities": (F.nll_loss, logits(4, 3).log_softmax(1), CLASSES, {"weight": WEIGHT}, "nll_loss"),
    "probabilities": (F.binary_cross_entropy, logits(4, 3).sigmoid(), yes_no(4, 3), {}, "binary_cross_entropy"),
    "one logit": (F.binary_cross_entropy_with_logits, logits(4), yes_no(4), {}, "binary_cross_entropy_with_logits"),
    "multi-label": (
        F.binary_cross_entropy_with_logits,
        logits(4, 3),
        yes_no(4, 3),
        {"pos_weight": WEIGHT, "weight": torch.rand(4, 3)},
        "binary_cross_entropy_with_logits",
    ),
    "divergence": (F.kl_div, logits(4, 3).log_softmax(1), soft(4, 3), {}, "kl_div"),
    "of logs": (F.kl_div, logits(4, 3).log_softmax(1), soft(4, 3).log(), {"log_target": True}, "kl_div"),
}


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_read_and_repeated_per_sample(name: str, keywords: bool) -> None:
    function, given, target, options, kind = CALLS[name]
    args, kwargs = ((), {"input": given, "target": target}) if keywords else ((given, target), {})
    call = LossCall.from_arguments(function, args, {**kwargs, **options, "reduction": "mean"})
    assert (call.kind, call.logits is given, call.target is target) == (kind, True, True)
    assert dict(call.options) == options
    assert call.per_sample().shape == (4,)
    torch.testing.assert_close(call.per_sample().sum(), function(given, target, **options, reduction="sum"))
    alone = [function(given[i : i + 1], target[i : i + 1], **_of_sample(options, i), reduction="sum") for i in range(4)]
    torch.testing.assert_close(call.per_sample(), torch.stack(alone))


def _of_sample(options: dict[str, Any], i: int) -> dict[str, Any]:
    return {k: v[i : i + 1] if isinstance(v, Tensor) and v.shape == (4, 3) else v for k, v in options.items()}


def test_every_recognised_function_is_tested_here() -> None:
    assert set(LOSSES.values()) - {kind for *_, kind in CALLS.values()} <= {"linear_cross_entropy"}


def test_class_weights_may_be_positional_too() -> None:
    call = LossCall.from_arguments(F.cross_entropy, (logits(4, 3), CLASSES, WEIGHT), {})
    expected = F.cross_entropy(logits(4, 3), CLASSES, WEIGHT, reduction="none")
    torch.testing.assert_close(call.per_sample(), expected)


@pytest.mark.parametrize("options", [{}, {"linear_bias": torch.randn(3), "weight": WEIGHT, "label_smoothing": 0.2}])
def test_logits_of_a_fused_layer_and_loss_are_rebuilt(options: dict[str, Any]) -> None:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        pytest.skip("torch < 2.13 has no linear_cross_entropy")
    features, layer = torch.randn(4, 5), torch.randn(3, 5)
    call = LossCall.from_arguments(function, (features, layer, CLASSES), options)
    assert call.kind == "cross_entropy"
    torch.testing.assert_close(call.logits, F.linear(features, layer, options.get("linear_bias")))
    torch.testing.assert_close(call.per_sample().sum(), function(features, layer, CLASSES, **options, reduction="sum"))


def test_the_same_loss_for_other_logits_is_differentiable() -> None:
    call = LossCall.from_arguments(F.cross_entropy, (logits(4, 3), CLASSES), {"reduction": "sum"})
    other = torch.zeros(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(call.again(other).per_sample().sum(), other)
    torch.testing.assert_close(gradient, 1 / 3 - F.one_hot(CLASSES, 3).float())


@pytest.mark.parametrize("name", CALLS)
def test_low_precision_logits_are_computed_in_float32(name: str) -> None:
    _, given, target, options, kind = CALLS[name]
    rounded = given.bfloat16()
    half, full = LossCall(kind, rounded, target, options), LossCall(kind, rounded.float(), target, options)  # type: ignore[arg-type]
    for low, high in (
        (half.per_sample(), full.per_sample()),
        (half.log_probabilities(), full.log_probabilities()),
        (half.margin(), full.margin()),
    ):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)


# kind, logits, target -> predictions, labels, correct, margin, all by hand
HEADS: dict[str, tuple[str, list[Any], list[Any], list[Any], list[Any], list[float], list[float]]] = {
    "multi-class": ("cross_entropy", [[3.0, 1, 0], [0, 2, 1]], [0, 2], [0, 1], [0, 2], [1, 0], [-2, 1]),
    "soft targets": ("cross_entropy", [[3.0, 1, 0]], [[0.1, 0.7, 0.2]], [0], [1], [0], [2]),
    "dense": ("cross_entropy", [[[3.0, 0], [1, 4]]], [[0, 0]], [[0, 1]], [[0, 0]], [0.5],
              [0.5 - 1 + 0.25 * math.tanh(1)]),
    "dense, one pixel ignored": (
        "cross_entropy", [[[3.0, 0, 5], [1, 4, 0]]], [[0, 0, -100]], [[0, 1, 0]], [[0, 0, -100]], [0.5],
        [0.5 - 1 + 0.25 * math.tanh(1)],
    ),
    "one logit (N,)": ("binary_cross_entropy_with_logits", [2.0, -1, -3], [1.0, 1, 0], [1, 0, 0], [1, 1, 0],
                       [1, 0, 1], [-2, 1, -3]),
    "one logit (N, 1)": ("binary_cross_entropy_with_logits", [[2.0], [-1]], [[1.0], [1]], [[1], [0]], [[1], [1]],
                         [1, 0], [-2, 1]),
    "multi-label": ("binary_cross_entropy_with_logits", [[2.0, -1], [1, -2]], [[1.0, 1], [1, 0]], [[1, 0], [1, 0]],
                    [[1, 1], [1, 0]], [0.5, 1], [0.5 - 1 + 0.25 * math.tanh(-0.5), -1 + 0.25 * math.tanh(-1.5)]),
    "probabilities": ("binary_cross_entropy", [0.8, 0.2], [1.0, 1], [1, 0], [1, 1], [1, 0], [-1.3862944, 1.3862944]),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_what_is_predicted_right_and_how_clearly_is_known_for_every_head(name: str) -> None:
    kind, given, target, predictions, labels, correct, margin = HEADS[name]
    call = LossCall(kind, torch.tensor(given), torch.tensor(target))  # type: ignore[arg-type]
    assert call.predictions().tolist() == predictions
    assert call.labels().tolist() == labels
    assert call.correct().tolist() == correct
    assert call.margin().tolist() == pytest.approx(margin)


@pytest.mark.parametrize("ignored", [255, -1])
def test_ignored_pixels_count_neither_as_right_nor_as_wrong_whatever_their_number(ignored: int) -> None:
    given = torch.tensor([[[3.0, 0, 5], [1, 4, 0]]])
    call = LossCall("cross_entropy", given, torch.tensor([[0, 0, ignored]]), {"ignore_index": ignored})
    assert call.correct().tolist() == [0.5]
    assert call.margin().tolist() == pytest.approx([0.5 - 1 + 0.25 * math.tanh(1)])


@pytest.mark.parametrize("name", CALLS)
def test_log_probabilities_are_those_of_the_head(name: str) -> None:
    _, given, target, options, kind = CALLS[name]
    logs = LossCall(kind, given, target, options).log_probabilities()  # type: ignore[arg-type]
    if kind.startswith("binary"):
        yes = given if kind == "binary_cross_entropy" else given.sigmoid()
        torch.testing.assert_close(logs.exp(), torch.stack([1 - yes, yes], 1))
    else:
        torch.testing.assert_close(logs.exp(), given.softmax(1))
    torch.testing.assert_close(logs.exp().sum(1), torch.ones_like(logs[:, 0]))


@pytest.mark.parametrize("kind", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_log_probabilities_of_certain_answers_are_finite(kind: str) -> None:
    certain = torch.tensor([-200.0, 200.0]) if kind.endswith("logits") else torch.tensor([0.0, 1.0])
    call = LossCall(kind, certain, torch.ones(2))  # type: ignore[arg-type]
    assert bool(torch.isfinite(call.log_probabilities()).all())
    assert bool(torch.isfinite(call.margin()).all())


@pytest.mark.parametrize(
    ("given", "target", "kind", "target_shape"),
    [
        (logits(4, 3), CLASSES, "cross_entropy", (4,)),
        (logits(4, 3, 2), DENSE, "cross_entropy", (4, 2)),
        (logits(4), yes_no(4), "binary_cross_entropy_with_logits", (4,)),
        (logits(4), yes_no(4).long(), "binary_cross_entropy_with_logits", (4,)),
        (logits(4, 1), yes_no(4).long(), "binary_cross_entropy_with_logits", (4, 1)),
        (logits(4, 1), yes_no(4, 1), "binary_cross_entropy_with_logits", (4, 1)),
        (logits(4, 3), yes_no(4, 3), "binary_cross_entropy_with_logits", (4, 3)),
    ],
)
def test_the_usual_loss_of_a_head_follows_from_shapes(
    given: Tensor, target: Tensor, kind: str, target_shape: tuple[int, ...]
) -> None:
    call = LossCall.for_head(given, target)
    assert (call.kind, tuple(call.target.shape)) == (kind, target_shape)
    assert call.per_sample().shape == (4,)


@pytest.mark.parametrize(
    ("given", "target"), [(logits(4, 3), torch.zeros(4)), (logits(4, 3), torch.zeros(4, 2, dtype=torch.long))]
)
def test_a_head_without_a_usual_loss_is_an_error_with_both_shapes(given: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got logits \(4, 3\) for targets \(4.*torch\.(float32|int64)"):
        LossCall.for_head(given, target)


def test_rows_are_single_predictions_without_the_ignored_ones() -> None:
    call = LossCall("cross_entropy", logits(4, 3, 2), DENSE, {"ignore_index": 0})
    log_p, right, sample = call.rows()
    expected = [
        (call.logits[n, :, i].log_softmax(0), int(DENSE[n, i]), n) for n in range(4) for i in range(2) if DENSE[n, i]
    ]
    assert torch.allclose(log_p, torch.stack([row for row, _, _ in expected]))
    assert right.tolist() == [label for _, label, _ in expected]
    assert sample.tolist() == [n for _, _, n in expected]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_rows_of_yes_no_outputs_have_two_columns(shape: tuple[int, ...]) -> None:
    z, y = logits(*shape), yes_no(*shape)
    log_p, right, sample = LossCall("binary_cross_entropy_with_logits", z, y).rows()
    assert torch.allclose(log_p.exp()[:, 1], z.sigmoid().flatten())
    assert right.tolist() == y.flatten().long().tolist()
    assert sample.tolist() == [n for n in range(4) for _ in range(z[0].numel())]


@pytest.mark.parametrize(
    "kind", ["cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy"]
)
def test_a_temperature_means_the_same_for_every_kind(kind: Any) -> None:
    z = logits(5, 3)
    given = {"nll_loss": z.log_softmax(1), "binary_cross_entropy": z.sigmoid()}.get(kind, z)
    scaled = LossCall(kind, given, yes_no(5, 3) if kind.startswith("binary") else CLASSES).scaled(2.5)
    expected = (z / 2.5).sigmoid() if kind.startswith("binary") else (z / 2.5).softmax(1)
    observed = scaled.log_probabilities().exp()
    assert torch.allclose(observed[:, 1] if kind.startswith("binary") else observed, expected, atol=1e-6)
    assert scaled.kind == kind


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2)])
@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss"])
def test_recalibrated_classes_are_log_probabilities_in_place_of_logits(kind: Any, shape: tuple[int, ...]) -> None:
    z, bias = logits(*shape), torch.tensor([0.5, -1.0, 0.0])
    given = z.log_softmax(1) if kind == "nll_loss" else z
    seen: list[Tensor] = []

    def recalibrate(log_p: Tensor) -> Tensor:
        seen.append(log_p)
        return (0.5 * log_p + bias).log_softmax(1)

    found = LossCall(kind, given, CLASSES).recalibrated(recalibrate)
    each = bias.view(1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(found.logits, (0.5 * z.log_softmax(1) + each).log_softmax(1))
    assert (found.kind, seen[0].shape) == (kind, (z.numel() // 3, 3))
    torch.testing.assert_close(seen[0].exp().sum(1), torch.ones(len(seen[0])))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 3, 2)])
@pytest.mark.parametrize("kind", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_recalibrated_yes_no_outputs_stay_what_they_were(kind: Any, shape: tuple[int, ...]) -> None:
    z = logits(*shape)
    given = z.sigmoid() if kind == "binary_cross_entropy" else z

    def platt(log_p: Tensor) -> Tensor:
        return F.logsigmoid(torch.tensor([-1.0, 1.0]) * (0.5 * (log_p[:, 1:] - log_p[:, :1]) + 0.3))

    found = LossCall(kind, given, yes_no(*shape)).recalibrated(platt).logits
    expected = 0.5 * z + 0.3
    torch.testing.assert_close(found, expected.sigmoid() if kind == "binary_cross_entropy" else expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_recalibrated_logits_keep_their_type(dtype: torch.dtype) -> None:
    call = LossCall("cross_entropy", logits(4, 3).to(dtype), CLASSES)
    assert call.recalibrated(lambda log_p: log_p).logits.dtype == dtype
