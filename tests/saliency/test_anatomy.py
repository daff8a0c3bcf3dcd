"""What runs on the way to the logits, and what computes beside the modules."""

from __future__ import annotations

import torch
from saliency.small_nets import PICTURES, ViT, cnn, with_seeded_weights
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.saliency.anatomy import anatomy_of


def test_leaves_are_those_that_run_in_their_order_and_functions_those_between_them() -> None:
    net = cnn()
    found = anatomy_of(net, lambda x: net(x.flatten(1).view(x.shape) / 2).softmax(1), PICTURES)
    assert list(found.leaves) == list(net)
    assert set(found.leaves.values()) == {1}
    assert found.outside == ["div"]  # what only moves numbers does not count, nor what comes after
    assert (found.classes, found.bearing) == (5, set())


def test_attention_has_parameters_beside_its_parts() -> None:
    net = with_seeded_weights(ViT())
    found = anatomy_of(net, net, PICTURES)
    assert found.bearing == {"MultiheadAttention", "ViT"}
    assert found.suspects(set(found.leaves)).startswith(
        "Without a rule may be: modules MultiheadAttention, ViT and func"
    )


def test_metrics_losses_and_what_runs_twice_are_told_apart() -> None:
    class Metric(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z.argmax(1) == 0).float().mean()

    net, metric, loss, relu = cnn(), Metric(), nn.CrossEntropyLoss(), nn.ReLU()
    module = nn.ModuleList([net, metric, loss, relu])

    class Ends(BaseException):
        pass

    def logits_fn(x: Tensor) -> Tensor:
        z = relu(relu(net(x)))
        metric(z)
        handle = loss.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Ends))  # as reading a step ends it
        try:
            loss(z, torch.zeros(len(z), dtype=torch.long))
        except Ends:
            handle.remove()
        return z

    found = anatomy_of(module, logits_fn, PICTURES)
    assert list(found.leaves) == [*net, relu]
    assert found.leaves[relu] == 2
    assert found.outside == []


def test_it_works_in_inference_mode_and_leaves_no_hooks() -> None:
    net = cnn()
    with torch.inference_mode():
        found = anatomy_of(net, lambda x: F.relu(net(x)), PICTURES)
    assert list(found.leaves) == list(net)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
