"""Methods of adversarial training and the attacks that they need."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lightning_robust.attacks import NFGSM, PGD, ThreatModel
from lightning_robust.attacks.methods import Method, attack_for, in_model_units, method_named, name_of
from lightning_robust.pixels import PixelSpace

THREAT = ThreatModel("linf", 0.1)


@pytest.mark.parametrize(
    ("method", "attack"), [("madry", PGD(THREAT)), ("trades", PGD(THREAT)), ("n-fgsm", NFGSM(THREAT))]
)
def test_a_threat_model_gets_the_methods_usual_attack(method: Any, attack: Any) -> None:
    assert attack_for(method, THREAT) == attack


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_is_known_by_its_name(method: str) -> None:
    assert method_named(method) == method


def test_what_is_no_attack_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\(logits_fn, x, y\) -> x_adv, got float"):
        attack_for("madry", 0.1)


def test_the_radius_in_the_models_units_is_eps_over_std() -> None:
    assert in_model_units(THREAT) == ""
    normalised = ThreatModel("linf", 0.1, PixelSpace(std=(0.5, 0.25)))
    assert in_model_units(normalised) == "eps 0.1 in pixels is 0.2 / 0.4 in the model's units"


def test_names_for_messages() -> None:
    assert name_of(PGD(THREAT, steps=3)) == "pgd3_linf_0.1"
    assert name_of(test_names_for_messages) == "test_names_for_messages"
