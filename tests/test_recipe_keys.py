"""Valid keys come from signatures; how they are used in recipes is in test_recipe.py."""

from __future__ import annotations

import lightning.pytorch as new
import pytest
import pytorch_lightning as pl

from lightning_robust import PGD
from lightning_robust.recipe_keys import RecipeError, check, imported, namespace_of, unknown


def test_an_unknown_key_names_the_nearest_or_all_valid_ones() -> None:
    assert str(unknown("trainer.max_epoch", ["trainer.max_epochs", "trainer.logger"], "no")).endswith(
        "'trainer.max_epochs'?"
    )
    assert str(unknown("zzz", ["a", "b"], "no")).endswith("Valid: a, b.")


def test_settings_of_a_dataclass_are_checked_without_a_class_path() -> None:
    attack = {"class_path": "lightning_robust.PGD", "init_args": {"threat": {"norm": "linf", "epz": 0.1}}}
    callback = {"class_path": "lightning_robust.AdversarialTraining", "init_args": {"attack": attack}}
    recipe = {"model": {"class_path": "lightning_robust.demo.Classifier"}, "callbacks": {"adversarial": callback}}
    with pytest.raises(
        RecipeError, match=r"callbacks\.adversarial\.init_args\.attack\.init_args\.threat\.epz.*threat\.eps'"
    ):
        check(recipe)


def test_classes_are_found_by_their_path() -> None:
    assert imported("lightning_robust.PGD", "key") is PGD
    with pytest.raises(RecipeError, match=r"key: cannot import 'no_such_package'.*PYTHONPATH"):
        imported("no_such_package.Thing", "key")


def test_a_module_belongs_to_one_lightning() -> None:
    assert namespace_of(pl.LightningModule) == "pytorch_lightning"
    assert namespace_of(new.LightningModule) == "lightning.pytorch"
