"""Settings as plain dicts, there and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_robust import NFGSM, PGD, InputGradientPenalty, PixelSpace, RightReasons, ThreatModel
from lightning_robust.attach.specs import built, plain
from lightning_robust.attacks import JointThreat

PIXELS = PixelSpace(bounds=(0, 255), mean=(1.0, 2.0, 3.0), std=2.0)
SETTINGS: list[Any] = [
    ThreatModel("l2", 0.5, PIXELS),
    PGD(ThreatModel("linf", 0.1), steps=3, restarts=2, start="zero"),
    PGD(JointThreat((ThreatModel("linf", 0.1), ThreatModel("l2", 1.0))), steps=2),
    NFGSM(ThreatModel("linf", 0.1)),
    InputGradientPenalty("double_backward"),
    RightReasons(mask_key=("extra", 0)),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: type(setting).__name__)
def test_what_is_built_from_plain_settings_is_what_was_there(setting: Any) -> None:
    stored = plain(setting)
    assert stored["class_path"].startswith("lightning_robust.")
    json.dumps(stored)  # nothing but plain data
    assert built(stored) == setting


def test_what_is_not_ours_stays_as_it_is() -> None:
    other = object()
    for value in (3, "x", None, other, {"class_path": "torch.optim.SGD"}):
        assert plain(value) == value
        assert built(value) == value
    assert plain([ThreatModel("linf", 0.1), other])[1] is other
    assert built(plain({"a": (ThreatModel("linf", 0.1),)})["a"]) == (ThreatModel("linf", 0.1),)


def test_a_class_from_elsewhere_is_not_built() -> None:
    with pytest.raises(ValueError, match=r"expected a class of lightning_robust .*got 'subprocess.Popen'"):
        built({"class_path": "subprocess.Popen", "init_args": {"args": "true"}})
