"""The worst of several attacks: their union, at the price of those samples that still hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import NFGSM, PGD, PixelSpace, RobustAccuracy, ThreatModel
from lightning_robust.attacks import FGSM
from lightning_robust.attacks.guard import AttackError
from lightning_robust.attacks.noise import UniformNoise
from lightning_robust.attacks.objectives import margin
from lightning_robust.attacks.worst_case import WorstCase
from lightning_robust.randomness import seeded

THREAT = ThreatModel("linf", 0.06)
CHEAP, STRONG, OTHER = FGSM(THREAT), PGD(THREAT, steps=5, start="zero"), PGD(THREAT, steps=5, objective="margin")


class Brighten:
    """A foreign attack: it knows nothing of generators, rows or objectives."""

    threat = THREAT

    def __init__(self, by: float = 0.06) -> None:
        self.by, self.samples = by, []

    def __call__(self, logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        self.samples.append(len(x))
        return (x + self.by).clamp(0, 1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10)).eval()


@pytest.fixture
def labelled(net: nn.Module) -> tuple[Tensor, Tensor]:
    """What the network says of 64 images, but for every eighth, which it gets wrong."""
    x = zoo.images(64)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    return x, y


def margins(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(net(x), y)


def test_of_every_sample_that_holds_it_keeps_the_worst_result_and_together_they_are_the_union(
    net: nn.Module, labelled: tuple[Tensor, Tensor]
) -> None:
    x, y = labelled
    attacks = [Brighten(), CHEAP, STRONG]
    alone = torch.stack([margins(net, x, y), *(margins(net, attack(net, x, y), y) for attack in attacks)])
    found = WorstCase(attacks)(net, x, y)
    worst = margins(net, found, y)
    union = alone.amax(0) > 0
    assert torch.equal(worst > 0, union)
    assert int((alone[0] > 0).sum()) < int((alone[:2].amax(0) > 0).sum()) < int(union.sum()) < 64
    # Those that hold to the end met every attack; the others kept what fooled them first.
    torch.testing.assert_close(worst[~union], alone.amax(0)[~union])
    first = (alone > 0).float().argmax(0)
    torch.testing.assert_close(worst[union], alone.gather(0, first[None])[0][union])
    assert torch.equal(found[::8], x[::8])  # wrong as they are: left alone


def test_only_samples_that_still_hold_are_attacked(net: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    first, second, third = Brighten(), Brighten(-0.06), Brighten(0.03)
    holds = [margins(net, x, y) <= 0]
    for attack in (Brighten(), Brighten(-0.06)):
        holds.append(holds[-1] & (margins(net, attack(net, x, y), y) <= 0))
    WorstCase([first, second, third])(net, x, y)
    assert [attack.samples for attack in (first, second, third)] == [[int(h.sum())] for h in holds]
    read: list[int] = []

    def counted(z: Tensor) -> Tensor:
        read.append(len(z))
        return net(z)  # type: ignore[no-any-return]  # a tensor

    WorstCase([CHEAP, PGD(THREAT, steps=3, start="zero")])(counted, x, y)
    right, left = 56, int(((margins(net, x, y) <= 0) & (margins(net, CHEAP(net, x, y), y) <= 0)).sum())
    assert 0 < left < right
    # One look at all, a step and a look of the first attack, three steps and a look of the second.
    assert read == [64, right, right, *[left] * 3, left]


def test_where_nothing_holds_no_attack_runs(net: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    x, never = labelled[0], Brighten()
    with torch.no_grad():
        wrong = (net(x).argmax(1) + 1) % 10
    assert torch.equal(WorstCase([never, CHEAP])(net, x, wrong), x)
    assert never.samples == []


def test_a_model_that_cannot_be_taken_apart_is_given_whole_batches(
    net: nn.Module, labelled: tuple[Tensor, Tensor]
) -> None:
    x, y = labelled

    class Together:
        divisible = False

        def __call__(self, z: Tensor) -> Tensor:
            assert len(z) == 64
            return net(z)  # type: ignore[no-any-return]  # a tensor

    found = WorstCase([CHEAP, Brighten(), STRONG])(Together(), x, y)
    alone = torch.stack([margins(net, attack(net, x, y), y) for attack in (CHEAP, Brighten(), STRONG)]).amax(0)
    # What is wrong as it is may become worse here; what fools at all is the same.
    torch.testing.assert_close(margins(net, found, y), torch.maximum(alone, margins(net, x, y)))


def test_noise_belongs_to_the_sample_whatever_batch_it_is_in(net: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    attack = WorstCase([UniformNoise(THREAT, draws=2), OTHER, PGD(THREAT, steps=3, restarts=2)])
    whole = attack(net, x, y, generator=[seeded(0, i) for i in range(64)])
    parts = [
        attack(net, x[rows], y[rows], generator=[seeded(0, i) for i in rows.tolist()])
        for rows in (torch.arange(0, 5), torch.arange(5, 64))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(attack(net, x, y, generator=[seeded(1, i) for i in range(64)]), whole)


def test_threats_of_two_kinds_and_normalised_inputs(net: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    space = PixelSpace(mean=0.3, std=0.2)

    def normalised(z: Tensor) -> Tensor:
        return net(z * 0.2 + 0.3)  # type: ignore[no-any-return]  # a tensor

    attacks = [PGD(ThreatModel(norm, eps, space), steps=4, start="zero") for norm, eps in (("linf", 0.05), ("l2", 0.4))]
    both = WorstCase(attacks)
    assert both.threat is None
    assert both.reach is None
    z = (x - 0.3) / 0.2
    found = both(normalised, z, y)
    single = torch.stack([margins(normalised, attack(normalised, z, y), y) for attack in attacks])  # type: ignore[arg-type]  # a function will do
    clean = margins(net, x, y)
    assert torch.equal(margins(normalised, found, y) > 0, torch.maximum(single.amax(0), clean) > 0)  # type: ignore[arg-type]


def test_each_attack_is_held_to_its_own_promise(net: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AttackError, match=r"Brighten moved an input by 0\.2"):
        WorstCase([CHEAP, Brighten(0.2)])(net, *labelled)


@pytest.mark.parametrize("attacks", [[], [CHEAP]])
def test_fewer_than_two_attacks_are_refused(attacks: list[Any]) -> None:
    with pytest.raises(ValueError, match="WorstCase takes two or more attacks"):
        WorstCase(attacks)


def test_names_threats_and_reaches() -> None:
    assert WorstCase([CHEAP, STRONG]).name == "worst_fgsm_pgd5_linf_0.06"
    assert WorstCase([CHEAP, Brighten()]).name == "worst_fgsm_brighten_linf_0.06"
    assert WorstCase([CHEAP, STRONG]).threat == THREAT
    assert WorstCase([CHEAP, STRONG]).reach == 0.06
    assert WorstCase([CHEAP, NFGSM(THREAT)]).reach == pytest.approx(0.18)
    assert WorstCase([CHEAP, Brighten()]).reach == 0.06  # what an attack does not state is its radius
    other = FGSM(ThreatModel("linf", 0.2))
    assert WorstCase([CHEAP, other]).threat is None
    assert WorstCase([CHEAP, other]).name == "worst_fgsm_linf_0.06_fgsm_linf_0.2"
    assert WorstCase([CHEAP, lambda f, x, y: x]).threat is None


# -- through RobustAccuracy ------------------------------------------------------------------------------------------


class Learnt(zoo.ListBatch):
    """Right about most of its batches, and sure of some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 10))
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        x, y = self.batch(48)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            optimizer.step()


def accuracies(attacks: dict[str, Any], batch_size: int = 32) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[RobustAccuracy(attacks)])
    trainer.validate(Learnt(), DataLoader(TensorDataset(*Learnt.batch(48)), batch_size), verbose=False)
    return {key.removeprefix("robust/val/"): float(value) for key, value in trainer.callback_metrics.items()}


def test_robust_accuracy_under_the_worst_case_is_that_of_its_attacks_together() -> None:
    # FGSM draws no random numbers, so that the second attack starts from the same noise alone and behind it.
    parts = {"a": FGSM(THREAT), "b": PGD(THREAT, steps=3), "c": Brighten()}
    single = {name: accuracies({name: attack}) for name, attack in parts.items()}
    union = accuracies(parts)
    both = accuracies({"worst": WorstCase([parts["a"], parts["b"]])})
    assert both["accuracy"] == both["accuracy_worst"] == accuracies({k: parts[k] for k in "ab"})["accuracy"]
    assert both["accuracy"] <= min(single["a"]["accuracy"], single["b"]["accuracy"]) < both["clean_accuracy"]
    assert accuracies({"worst": WorstCase(list(parts.values()))})["accuracy"] == union["accuracy"]
    assert accuracies({"worst": WorstCase([parts["a"], parts["b"]])}, batch_size=7)["accuracy"] == both["accuracy"]


def test_a_curve_over_the_radius_can_be_drawn_of_the_worst_case() -> None:
    both = WorstCase([FGSM(THREAT), PGD(THREAT, steps=3)])
    trainer = zoo.trainer(callbacks=[RobustAccuracy(both, curve=[0.02, 0.06, 0.2])])
    trainer.validate(Learnt(), DataLoader(TensorDataset(*Learnt.batch(48)), 16), verbose=False)
    values = {key.removeprefix("robust/val/"): float(value) for key, value in trainer.callback_metrics.items()}
    curve = [values[f"curve/{radius}"] for radius in (0.02, 0.06, 0.2)]
    assert values["clean_accuracy"] >= curve[0] > curve[1] > curve[2]
    assert curve[1] == pytest.approx(values["accuracy"], abs=1 / 48 + 1e-6)


def test_training_may_be_against_the_worst_case() -> None:
    from lightning_robust import AdversarialTraining

    both = WorstCase([FGSM(THREAT), Brighten()])
    module = zoo.built(zoo.ListBatch)
    callback = AdversarialTraining(both, share=0.5, warmup_epochs=2)
    trainer = zoo.trainer(callbacks=[callback])
    trainer.fit(module, zoo.loader(zoo.ListBatch))
    assert "robust/train/accuracy" in trainer.callback_metrics
