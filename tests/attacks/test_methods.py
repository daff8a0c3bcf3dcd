"""Methods of adversarial training and the attacks that they need."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lightning_robust.attacks import FGSM, NFGSM, PGD, JointThreat, ThreatModel
from lightning_robust.attacks.methods import (
    BETA,
    FEEDS,
    STEP_COST,
    Method,
    attack_for,
    cost_of,
    forwards_of,
    in_model_units,
    method_named,
    name_of,
)
from lightning_robust.attacks.noise import UniformNoise
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


@pytest.mark.parametrize(
    ("method", "attack"),
    [
        ("mart", PGD(THREAT)),
        ("fgsm", FGSM(THREAT)),
        ("fgsm-rs", FGSM(THREAT, start="uniform")),
    ],
)
def test_newer_methods_have_usual_attacks_too(method: Any, attack: Any) -> None:
    assert attack_for(method, THREAT) == attack


@pytest.mark.parametrize(
    ("method", "attack"),
    [
        ("fgsm", FGSM(THREAT, step=0.8)),
        ("fgsm-rs", FGSM(THREAT, start="uniform", step=1.0)),
        ("n-fgsm", NFGSM(THREAT, noise=1.0)),
        ("mart", PGD(THREAT, steps=3, start="zero")),
        ("madry", FGSM(THREAT)),
        ("madry", UniformNoise(THREAT)),
        ("mart", lambda logits_fn, x, y: x),
    ],
)
def test_an_attack_with_settings_of_its_own_is_taken_as_it_is(method: Any, attack: Any) -> None:
    assert attack_for(method, attack) is attack


@pytest.mark.parametrize(
    ("method", "attack", "says"),
    [
        ("fgsm", FGSM(THREAT, start="uniform"), "give a ThreatModel .or FGSM with its settings., got fgsm-rs_linf_0.1"),
        ("fgsm-rs", FGSM(THREAT), "method='fgsm-rs' brings its own attack.*got fgsm_linf_0.1"),
        ("fgsm", PGD(THREAT, steps=1), "or FGSM with its settings.*got pgd1_linf_0.1"),
        ("n-fgsm", FGSM(THREAT), "or NFGSM with its settings.*got fgsm_linf_0.1"),
        ("fgsm", len, "brings its own attack.*got len"),
        ("trades", FGSM(THREAT), "crafts with PGD on its own objective.*got fgsm_linf_0.1"),
        ("trades", PGD(THREAT, objective="margin"), "sets objective.*got objective=margin"),
    ],
)
def test_an_attack_that_is_another_method_is_refused(method: Any, attack: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attack_for(method, attack)


@pytest.mark.parametrize("method", get_args(Method))
def test_several_inputs_have_every_method_but_the_one_that_is_for_linf(method: Any) -> None:
    joint = JointThreat((THREAT, ThreatModel("linf", 0.2)))
    assert attack_for(method, joint).threat == joint


def test_n_fgsm_is_for_linf() -> None:
    with pytest.raises(ValueError, match="defined for norm 'linf'"):
        attack_for("n-fgsm", ThreatModel("l2", 1.0))


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (PGD(THREAT, steps=7), 7),
        (PGD(THREAT, steps=7, restarts=3), 21),
        (FGSM(THREAT), 1),
        (NFGSM(THREAT), 1),
        (lambda logits_fn, x, y: x, None),
    ],
)
def test_passes_are_counted_where_they_are_known(attack: Any, passes: int | None) -> None:
    assert forwards_of(attack) == passes
    for share, adds in ((1.0, False), (0.5, True)):
        expected = None if passes is None else 1 + STEP_COST * passes * share + (1.2 if adds else 0.0)
        assert cost_of(attack, share, adds) == expected


def test_which_methods_feed_the_step_and_which_weigh_a_divergence() -> None:
    assert set(get_args(Method)) - set(FEEDS) == {"trades"}
    assert BETA == {"trades": 6.0, "mart": 5.0}  # as published


@pytest.mark.parametrize(
    ("written", "meant"), [("n_fgsm", "n-fgsm"), ("fgsm-sr", "fgsm-rs"), ("MART", None), ("pgd", None)]
)
def test_an_unknown_method_is_refused_with_the_nearest(written: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match=f"got '{written}'." + (f".*Did you mean '{meant}'" if meant else "")):
        method_named(written)
