"""The recipe contract: merging, switching off, fractions, typos, building."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
from omegaconf import OmegaConf

from lightning_robust import NFGSM, PGD, AdversarialTraining, RobustAccuracy, ThreatModel
from lightning_robust.recipe import Recipe, RecipeError, available, compose, instantiate

BORING = "{class_path: pytorch_lightning.demos.boring_classes.BoringModel}"
LINF = {"norm": "linf", "eps": 0.1}
THREAT = ThreatModel("linf", eps=0.1)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def boring(folder: Path, text: str = "", name: str = "boring") -> Path:
    """A recipe that needs no data, and is quick to build."""
    return write(folder, name, f"model: {BORING}\n{text}\n")


def component(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def with_callback(folder: Path, callback: dict[str, Any]) -> Recipe:
    return compose(boring(folder, OmegaConf.to_yaml(OmegaConf.create({"callbacks": {"it": callback}}))))


def built(recipe: Recipe, folder: Path, kind: type = object) -> Any:
    trainer, _, _ = instantiate(recipe, folder / "name" / "version_0", log=False)
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


# -- merging ---------------------------------------------------------------------------------------------------------


def test_bases_are_merged_in_order_and_the_recipe_comes_last(tmp_path: Path) -> None:
    boring(tmp_path, "vars: {a: 1, b: 1, c: 1}", "first")
    write(tmp_path, "second", "vars: {b: 2, c: 2}")
    recipe = compose(write(tmp_path, "child", "base: [first, second]\nvars: {c: 3}"))
    assert recipe.resolved["vars"] == {"a": 1, "b": 2, "c": 3}
    assert compose(tmp_path / "child.yaml", ["vars.a=4"]).resolved["vars"]["a"] == 4


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    boring(tmp_path, "seed: 7", "grandparent")
    write(tmp_path, "parent", "base: grandparent")
    assert compose(write(tmp_path, "child", "base: parent")).resolved["seed"] == 7


def test_a_base_is_looked_for_beside_the_recipe_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boring(tmp_path / "here", "seed: 1", "parent")
    boring(tmp_path / "elsewhere", "seed: 2", "parent")
    child = write(tmp_path / "here", "child", "base: parent.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert compose(child).resolved["seed"] == 1


@pytest.mark.parametrize("base", ["itself", "itself.yaml", "other", "../deeper/itself.yaml"])
def test_a_recipe_that_is_its_own_base_is_an_error(tmp_path: Path, base: str) -> None:
    write(tmp_path / "deeper", "other", "base: itself")
    path = write(tmp_path / "deeper", "itself", f"base: {base}")
    with pytest.raises(RecipeError, match="is its own base"):
        compose(path)


def test_null_switches_a_callback_off_and_a_later_override_brings_it_back(tmp_path: Path) -> None:
    timer = "class_path: pytorch_lightning.callbacks.Timer"
    boring(tmp_path, f"callbacks: {{timer: {{{timer}}}}}", "parent")
    child = write(tmp_path, "child", "base: parent\ncallbacks: {timer: null}")
    assert compose(child).resolved["callbacks"] == {}
    again = ["callbacks.timer.class_path=pytorch_lightning.callbacks.Timer", "callbacks.timer.init_args.interval=epoch"]
    expected = component("pytorch_lightning.callbacks.Timer", interval="epoch")
    assert compose(child, again).resolved["callbacks"]["timer"] == expected


def test_another_class_drops_the_arguments_of_the_old_one(tmp_path: Path) -> None:
    where = "callbacks.report.init_args.attacks"
    changes = [f"{where}.class_path=lightning_robust.NFGSM", f"{where}.init_args.threat={{norm: linf, eps: 0.1}}"]
    report = compose("standard", changes).resolved["callbacks"]["report"]["init_args"]
    assert report["attacks"] == component("lightning_robust.NFGSM", threat=LINF)
    assert report["stages"] == ["test"]


def test_naming_the_same_class_again_keeps_its_arguments() -> None:
    changes = ["model.class_path=lightning_robust.demo.Classifier", "model.init_args.size=32"]
    assert compose("standard", changes).resolved["model"]["init_args"] == {"lr": 0.004, "size": 32}


def test_a_new_named_callback_may_be_added(tmp_path: Path) -> None:
    changes = [
        "callbacks.rate.class_path=pytorch_lightning.callbacks.LearningRateMonitor",
        "callbacks.rate.init_args.logging_interval=step",
    ]
    recipe = compose(boring(tmp_path), changes)
    callback = built(recipe, tmp_path, pytorch_lightning.callbacks.LearningRateMonitor)
    assert callback.logging_interval == "step"


def test_a_valid_key_that_the_base_does_not_mention_is_accepted(tmp_path: Path) -> None:
    recipe = compose(boring(tmp_path), ["trainer.gradient_clip_val=1.0", "trainer.log_every_n_steps=5"])
    trainer, _, _ = instantiate(recipe, tmp_path, log=False)
    assert (trainer.gradient_clip_val, trainer.log_every_n_steps) == (1.0, 5)


# -- values ----------------------------------------------------------------------------------------------------------


def test_interpolation_sees_overrides() -> None:
    recipe = compose("quickstart", ["vars.eps=0.3", "vars.method=madry"]).resolved["callbacks"]
    assert recipe["adversarial"]["init_args"]["method"] == "madry"
    assert recipe["adversarial"]["init_args"]["attack"]["init_args"]["eps"] == 0.3
    assert recipe["report"]["init_args"]["attacks"]["init_args"]["threat"]["eps"] == 0.3


@pytest.mark.parametrize(
    ("written", "number"),
    [("8/255", 8 / 255), ("8 / 255", 8 / 255), ("0.5/2", 0.25), ("0.2", 0.2), ("-1/4", -0.25), ("1e-3", 1e-3)],
)
def test_fractions_and_numbers_need_no_quotes(tmp_path: Path, written: str, number: float) -> None:
    text = f"vars: {{eps: {written}}}\nseed: 0"
    recipe = boring(tmp_path, f"{text}\ntrainer: {{max_time: null, gradient_clip_val: '${{frac:${{vars.eps}}}}'}}")
    for composed in (compose(recipe), compose(boring(tmp_path, name="b"), [f"trainer.gradient_clip_val={written}"])):
        assert composed.resolved["trainer"]["gradient_clip_val"] == number
    assert compose(recipe).resolved["vars"]["eps"] == number


@pytest.mark.parametrize("text", ["1/2/3", "a/b", "runs/8", "2024-01/02"])
def test_what_only_looks_like_a_fraction_stays_text(tmp_path: Path, text: str) -> None:
    assert compose(boring(tmp_path, f"vars: {{path: {text}}}")).resolved["vars"]["path"] == text


@pytest.mark.parametrize("text", ["8/0", "1.2.3/4"])
def test_a_fraction_that_is_no_number_is_a_recipe_error_with_its_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        compose(boring(tmp_path, "vars: {eps: 1}"), [f"vars.eps={text}"])


def test_a_whole_number_of_batches_stays_a_whole_number(tmp_path: Path) -> None:
    # One batch is not 100 % of them.
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval")
    recipe = compose(boring(tmp_path), [f"trainer.{name}=1" for name in names])
    trainer, _, _ = instantiate(recipe, tmp_path, log=False)
    assert {name: repr(getattr(trainer, name)) for name in names} == dict.fromkeys(names, "1")


@pytest.mark.parametrize("which", ["raw_yaml", "resolved_yaml"])
@pytest.mark.parametrize("name", available())
def test_what_a_run_writes_down_composes_to_the_same_run(tmp_path: Path, name: str, which: str) -> None:
    recipe = compose(name, ["vars.eps=8/255", "callbacks.report=null", "trainer.gradient_clip_val=1.0"])
    assert compose(write(tmp_path, "again", getattr(recipe, which))).resolved == recipe.resolved


def test_what_a_run_writes_down_does_not_need_its_bases_any_more(tmp_path: Path) -> None:
    boring(tmp_path / "mine", "seed: 7", "parent")
    recipe = compose(write(tmp_path / "mine", "child", "base: parent\ntrainer: {max_epochs: 3}"))
    assert compose(write(tmp_path / "run", "recipe", recipe.raw_yaml)).resolved == recipe.resolved


# -- typos -----------------------------------------------------------------------------------------------------------

ATTACK = "callbacks.report.init_args.attacks"
TYPOS = {
    "trainr.max_epochs=5": ("trainr", "trainer"),
    "vars.epps=0.1": ("vars.epps", "vars.eps"),
    "trainer.max_epoch=5": ("trainer.max_epoch", "trainer.max_epochs"),
    "model.init_args.lrr=1": ("model.init_args.lrr", "model.init_args.lr"),
    "data.init_args.batchsize=1": ("data.init_args.batchsize", "data.init_args.batch_size"),
    "callbacks.report.init_arg.seed=1": ("callbacks.report.init_arg", "callbacks.report.init_args"),
    "callbacks.report.init_args.max_sample=5": (
        "callbacks.report.init_args.max_sample",
        "callbacks.report.init_args.max_samples",
    ),
    f"{ATTACK}.init_args.step=5": (f"{ATTACK}.init_args.step", f"{ATTACK}.init_args.steps"),
    f"{ATTACK}.init_args.threat.epps=0.1": (
        f"{ATTACK}.init_args.threat.epps",
        f"{ATTACK}.init_args.threat.eps",
    ),
    "callbacks.reprot=null": ("callbacks.reprot", "callbacks.report"),
    "model.class_path=lightning_robust.demo.Clasifier": ("model.class_path", "lightning_robust.demo.Classifier"),
    "callbacks.report.class_path=lightning_robust.RobustAcuracy": (
        "callbacks.report.class_path",
        "lightning_robust.RobustAccuracy",
    ),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_answered_with_the_full_key_and_the_nearest_valid_one(typo: str) -> None:
    key, nearest = TYPOS[typo]
    with pytest.raises(RecipeError) as caught:
        compose("quickstart", [typo])
    assert key in str(caught.value)
    assert f"Did you mean {nearest!r}?" in str(caught.value)


def test_a_typo_in_the_name_of_a_recipe_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"quickstrat: .*Did you mean 'quickstart'\?"):
        compose("quickstrat")


@pytest.mark.parametrize(
    ("attacks", "key"),
    [
        ([component("lightning_robust.PGD", threat=LINF), component("lightning_robust.PGD", stepz=3)], "[1]"),
        ({"strong": component("lightning_robust.PGD", threat=LINF, stepz=3)}, ".strong"),
    ],
    ids=["list", "dict"],
)
def test_components_in_lists_and_dicts_are_checked_too(tmp_path: Path, attacks: Any, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_callback(tmp_path, component("lightning_robust.RobustAccuracy", attacks=attacks))
    full = f"callbacks.it.init_args.attacks{key}.init_args.step"
    assert f"{full}z: PGD has no such argument" in str(caught.value)
    assert f"Did you mean '{full}s'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {class_path: nowhere_at_all.Net}", "model.class_path: cannot import 'nowhere_at_all'"),
        ("model: {class_path: Net}", "model.class_path"),
        ("model: {init_args: {}}", "model: expected {class_path"),
        ("trainer: {max_epochs: 1}", "model: a recipe needs a model"),
        ("- a\n- b", "must hold keys (about, base"),
        (f"model: {BORING}\ntrainer: {{callbacks: []}}", "trainer.callbacks: callbacks have a key of their own"),
        (f"model: {BORING}\ntrainer: {{max_epochs: '${{vars.epochs}}'}}", "vars.epochs"),
        ("model: {class_path: [", "broken.yaml"),
    ],
)
def test_a_recipe_that_cannot_be_composed_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(write(tmp_path, "broken", text))
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["max_epochs", "--fast", "trainer.max_epochs=[", "=5", "trainer=5", "vars=1"])
def test_an_override_that_is_none_is_a_recipe_error(override: str) -> None:
    with pytest.raises(RecipeError):
        compose("quickstart", [override])


# -- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.init_args.lr=fast", "lr"),
        ("data.init_args.batch_size=big", "batch_size"),
        ("trainer.max_epochs=ten", "max_epochs"),
        ("seed=abc", "seed"),
        ("callbacks.report.init_args.max_samples=many", "max_samples"),
        ("callbacks.adversarial.init_args.method=madri", "madri"),
        (f"{ATTACK}.init_args.steps=many", "steps"),
        (f"{ATTACK}.init_args.threat.norm=l7", "norm"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_recipe_error_that_names_its_key(
    tmp_path: Path, override: str, name: str
) -> None:
    recipe = compose("quickstart", [override])
    with pytest.raises(RecipeError, match="cannot be built") as caught:
        instantiate(recipe, tmp_path)
    assert name in str(caught.value)


PGD3 = component("lightning_robust.PGD", threat=LINF, steps=3)
ONE_STEP = component("lightning_robust.NFGSM", threat=LINF)
BALL = component("lightning_robust.ThreatModel", **LINF)


@pytest.mark.parametrize(
    ("attack", "method", "expected"),
    [
        (PGD3, "madry", PGD(THREAT, steps=3)),
        (PGD3, "trades", PGD(THREAT, steps=3)),
        (ONE_STEP, "n-fgsm", NFGSM(THREAT)),
        (BALL, "n-fgsm", NFGSM(THREAT)),
        (BALL, "madry", PGD(THREAT, steps=10)),
    ],
    ids=["PGD madry", "PGD trades", "NFGSM", "ThreatModel n-fgsm", "ThreatModel madry"],
)
def test_adversarial_training_is_built_with_its_attack(
    tmp_path: Path, attack: dict[str, Any], method: str, expected: Any
) -> None:
    recipe = with_callback(tmp_path, component("lightning_robust.AdversarialTraining", attack=attack, method=method))
    callback = built(recipe, tmp_path, AdversarialTraining)
    assert (callback.method, callback.attack) == (method, expected)


@pytest.mark.filterwarnings("ignore:NFGSM is a training attack")  # built here, not used
@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        (PGD3, {"pgd3_linf_0.1": PGD(THREAT, steps=3)}),
        (ONE_STEP, {"nfgsm_linf_0.1": NFGSM(THREAT)}),
        ([PGD3, ONE_STEP], {"pgd3_linf_0.1": PGD(THREAT, steps=3), "nfgsm_linf_0.1": NFGSM(THREAT)}),
        ({"strong": PGD3, "quick": ONE_STEP}, {"strong": PGD(THREAT, steps=3), "quick": NFGSM(THREAT)}),
    ],
    ids=["PGD", "NFGSM", "list", "dict"],
)
def test_robust_accuracy_is_built_with_one_attack_a_list_or_a_dict(
    tmp_path: Path, attacks: Any, expected: dict[str, Any]
) -> None:
    recipe = with_callback(tmp_path, component("lightning_robust.RobustAccuracy", attacks=attacks))
    assert built(recipe, tmp_path, RobustAccuracy).attacks == expected


def test_a_users_own_attack_function_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_attacks.py").write_text("def nothing(logits_fn, x, y, *, generator=None):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    callback = component("lightning_robust.RobustAccuracy", attacks="my_own_attacks.nothing")
    assert list(built(with_callback(tmp_path, callback), tmp_path, RobustAccuracy).attacks) == ["nothing"]


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_a_module_gets_the_trainer_and_logger_of_its_own_namespace(tmp_path: Path, namespace: str) -> None:
    model = f"model: {{class_path: {namespace}.demos.boring_classes.BoringModel}}"
    report = OmegaConf.to_yaml(OmegaConf.create({"callbacks": {"it": component("lightning_robust.RobustAccuracy")}}))
    recipe = compose(write(tmp_path, "boring", f"{model}\n{report}"), [f"callbacks.it.init_args.attacks={PGD3}"])
    trainer, module, data = instantiate(recipe, tmp_path / "boring" / "version_3")
    for thing in (trainer, trainer.logger, module):
        assert type(thing).__module__.startswith(namespace)
    assert Path(trainer.logger.log_dir) == tmp_path / "boring" / "version_3"
    assert data is None
    assert any(isinstance(callback, RobustAccuracy) for callback in trainer.callbacks)


def test_no_configuration_is_saved_that_a_resumed_run_would_trip_over(tmp_path: Path) -> None:
    trainer, _, _ = instantiate(compose("quickstart"), tmp_path / "quickstart" / "version_0")
    assert not [c for c in trainer.callbacks if "SaveConfig" in type(c).__name__]


@pytest.mark.parametrize("override", ["seed=1", "seed=abc"], ids=["built", "failed"])
def test_the_command_line_of_the_process_is_neither_read_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    argv = ["program", "--trainer.max_epochs=99", "--garbage"]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        trainer, _, _ = instantiate(compose(boring(tmp_path), [override, "trainer.max_epochs=3"]), tmp_path, log=False)
        assert trainer.max_epochs == 3
    except RecipeError:
        assert override == "seed=abc"
    assert sys.argv is argv
    assert argv == ["program", "--trainer.max_epochs=99", "--garbage"]


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    def weights(seed: int) -> list[float]:
        _, module, _ = instantiate(compose(boring(tmp_path), [f"seed={seed}"]), tmp_path, log=False)
        return list(module.layer.weight.flatten().tolist())

    assert weights(1) == weights(1) != weights(2)


def test_a_callback_is_built_for_either_lightning(tmp_path: Path) -> None:
    recipe = compose("quickstart")
    trainer, module, data = instantiate(recipe, tmp_path / "quickstart" / "version_0")
    kinds = [type(c).__name__ for c in trainer.callbacks]
    assert kinds.count("RobustAccuracy") == 2
    assert kinds.count("AdversarialTraining") == 1
    assert kinds.count("ModelCheckpoint") == 2  # the best weights, and the newest
    assert (type(module).__name__, type(data).__name__) == ("Classifier", "Digits")
