"""The evaluation data under attack as one more set: the inputs are those of an attack by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from callbacks.ood_runs import Both, Small, by_hand, data, detected, fitted, logged, near, ours, patterns
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, OODMonitor, ThreatModel

EPS, STEPS = 0.1, 3
ATTACK = PGD(ThreatModel("linf", EPS), steps=STEPS, start="zero", keep="last")
VAL = patterns(50, 1)
OTHER = {"other": TensorDataset(1 - VAL.tensors[0])}


def attacked(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Projected gradient ascent on the loss, step by step."""
    moved = x
    for _ in range(STEPS):
        leaf = moved.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
        step = moved + 2.5 * EPS / STEPS * gradient.sign()
        moved = (x + (step - x).clamp(-EPS, EPS)).clamp(0, 1)
    return moved


def run(callback: OODMonitor, kind: str, module: Any, loader: Any = None) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback])
    loader = loader or DataLoader(VAL, 16)
    if kind == "fit":
        trainer.fit(module, DataLoader(patterns(80), 16), loader)
    else:
        getattr(trainer, kind)(module, loader, verbose=False)
    return logged(trainer)


@pytest.mark.parametrize("kind", ["fit", "validate", "test"])
@pytest.mark.parametrize("limit", [1000, 20])
def test_scores_are_those_of_inputs_that_were_attacked_by_hand(kind: str, limit: int) -> None:
    module, stage = zoo.built(Small), "test" if kind == "test" else "val"
    found = run(OODMonitor(OTHER, attacked=ATTACK, max_samples=limit), kind, module)
    x, y = VAL.tensors
    z, moved = (module.net(part).detach().double().numpy() for part in (x, attacked(module.net, x, y)[:limit]))
    expected, still = by_hand(z, moved, f"ood/{stage}/attacked"), by_hand(z, z[:limit], f"ood/{stage}/attacked")
    # Two scores that single precision cannot tell apart may stand the other way round.
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert abs(expected[f"ood/{stage}/attacked/msp_auroc"] - still[f"ood/{stage}/attacked/msp_auroc"]) > 0.02
    assert len(found) == 2 * 20


def test_detectors_see_the_attacked_inputs_too() -> None:
    module, known = zoo.built(Small), patterns(100)
    names = ["mahalanobis", "vim"]
    callback = OODMonitor(OTHER, scores=["msp"], detectors=names, fit_data=known, attacked=ATTACK)
    found = run(callback, "validate", module)
    x, y = VAL.tensors
    detectors = fitted(names, module.net, known, 2000)
    expected = detected(detectors, module.net, x, attacked(module.net, x, y), "ood/val/attacked")
    assert {key: found[key] for key in expected} == near(expected)


def test_synthetic_sets_and_the_attacked_one_are_measured_side_by_side() -> None:
    found = run(OODMonitor(scores=["msp"], attacked=ATTACK), "validate", zoo.built(Both), data(40))
    sets = {key.split("/")[2] for key in found}
    assert sets == {"synthetic_noise", "synthetic_shuffle", "synthetic_mosaic", "attacked"}


def test_an_attack_changes_neither_weights_nor_what_the_user_logs() -> None:
    weights, logs = [], []
    for callbacks in ([], [OODMonitor(attacked=PGD(ThreatModel("linf", EPS), steps=2))]):
        module = zoo.built(zoo.SharedStepWithMetrics)
        trainer = zoo.trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, data(32), data(32))
        weights.append(torch.cat([p.detach().flatten() for p in module.state_dict().values()]))
        logs.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("ood")})
    assert torch.equal(*weights)
    assert logs[0] == logs[1]


def test_where_no_gradient_reaches_the_input_that_is_said_and_ends_no_run() -> None:
    class Frozen(Both):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.net[:-1](x)
            return self.net[-1](features)  # type: ignore[no-any-return]  # a tensor

    module = zoo.built(Frozen)
    callback = OODMonitor(OTHER, attacked=ATTACK)
    says = r"attacked= needs gradients, that set is left out, other sets go on: no gradient"
    with pytest.warns(UserWarning, match=says) as seen:
        found = run(callback, "validate", module)
    assert len(ours(seen)) == 1
    with torch.no_grad():
        z = [module.net.eval()(x).double().numpy() for x in (VAL.tensors[0], OTHER["other"].tensors[0])]
    assert found == pytest.approx(by_hand(*z, "ood/val/other"), abs=1e-3)
