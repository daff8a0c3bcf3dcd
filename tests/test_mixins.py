"""Mixins do what callbacks do, to the last bit, and a checkpoint brings its temperature along."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    NFGSM,
    PGD,
    AdversarialTraining,
    CalibratedMixin,
    CalibrationMonitor,
    CorruptionMonitor,
    InputGradientPenalty,
    OODMonitor,
    RobustAccuracy,
    RobustTrainingMixin,
    SaliencyRegularization,
    SaliencySnapshots,
    TemperatureScaling,
    ThreatModel,
    calibrated,
    load_temperature,
)
from lightning_robust.penalties import PENALTIES

THREAT = ThreatModel("linf", 0.1)
ATTACK = PGD(THREAT, steps=2)
DEFENCES: dict[str, Any] = {
    "madry": lambda: [AdversarialTraining(ATTACK)],
    "trades": lambda: [AdversarialTraining(ATTACK, "trades", beta=2.0)],
    "n-fgsm": lambda: [AdversarialTraining(THREAT, "n-fgsm")],
    "penalty": lambda: [SaliencyRegularization(InputGradientPenalty(), 0.5)],
    "madry and penalty": lambda: [AdversarialTraining(ATTACK), SaliencyRegularization(InputGradientPenalty(), 0.5)],
    "penalty and n-fgsm": lambda: [
        SaliencyRegularization(InputGradientPenalty("double_backward"), 0.5),
        AdversarialTraining(THREAT, "n-fgsm"),
    ],
    "trades and clean penalty": lambda: [
        AdversarialTraining(ATTACK, "trades", beta=2.0),
        SaliencyRegularization(InputGradientPenalty(), 0.5, at="clean"),
    ],
    "madry and clean penalty": lambda: [
        SaliencyRegularization(InputGradientPenalty(), 0.5, at="clean"),
        AdversarialTraining(ATTACK),
    ],
}


def data(n: int = 48, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n)), 16)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


def fitted(shape: type[Any], *callbacks: Any, **settings: Any) -> Any:
    module = zoo.built(shape)
    zoo.trainer(**{"max_epochs": 2, "callbacks": list(callbacks), **settings}).fit(module, data())
    return module


def defended(base: type[Any], defences: Any, **attributes: Any) -> type[Any]:
    members = {"configure_robustness": lambda self: defences(), **attributes}
    bases = (base,) if issubclass(base, RobustTrainingMixin) else (RobustTrainingMixin, base)
    return type("Defended", bases, members)


class ByHand(RobustTrainingMixin, zoo.ListBatch):
    by_hand = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.perturbed(batch)
        return self.robust_loss(F.cross_entropy(self(x), y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.perturbed(batch)
        assert x is batch[0]
        loss = F.cross_entropy(self(x), y)
        assert self.robust_loss(loss) is loss
        self.log("val_loss", loss)


class ManualByHand(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("name", DEFENCES)
def test_a_mixin_trains_the_very_weights_that_callbacks_train(name: str) -> None:
    defences = DEFENCES[name]
    plain, expected = fitted(zoo.ListBatch), fitted(zoo.ListBatch, *defences())
    assert not torch.equal(flat(plain), flat(expected))
    assert torch.equal(flat(fitted(defended(zoo.ListBatch, defences))), flat(expected))


@pytest.mark.parametrize("shape", [ByHand, ManualByHand])
@pytest.mark.parametrize("name", DEFENCES)
def test_a_step_that_calls_its_defences_by_hand_trains_the_very_same_weights(name: str, shape: type[Any]) -> None:
    defences = DEFENCES[name]
    expected = fitted(zoo.ListBatch, *defences())
    assert torch.equal(flat(fitted(defended(shape, defences))), flat(expected))


def test_without_defences_a_mixin_changes_nothing_by_hand_or_not() -> None:
    expected = flat(fitted(zoo.ListBatch))
    for base in (zoo.ListBatch, ByHand, ManualByHand):
        assert torch.equal(flat(fitted(defended(base, list))), expected)


@pytest.mark.parametrize("name", DEFENCES)
def test_manual_optimisation_trains_the_very_same_weights_without_asking(name: str) -> None:
    expected = flat(fitted(zoo.ListBatch, *DEFENCES[name]()))
    assert torch.equal(flat(fitted(defended(zoo.ManualOptimisation, DEFENCES[name]))), expected)
    assert torch.equal(flat(fitted(zoo.ManualOptimisation, *DEFENCES[name]())), expected)


def test_a_step_that_forgets_to_call_its_defences_is_an_error() -> None:
    cases = [("madry", r"AdversarialTraining\(madry\).*self\.perturbed"), ("penalty", r"Saliency.*self\.robust_loss")]
    for (name, says), shape in itertools.product(cases, (zoo.ListBatch, zoo.ManualOptimisation)):
        module = zoo.built(defended(shape, DEFENCES[name], by_hand=True))
        trainer = zoo.trainer()
        with pytest.raises(RuntimeError, match=says):
            trainer.fit(module, data())
        assert trainer.global_step == (shape is zoo.ManualOptimisation)  # which has stepped by then
        assert not {"training_step", "_lightning_robust_seam"} & set(vars(module))


def test_a_step_that_calls_only_one_of_two_is_an_error_that_names_the_other() -> None:
    class Forgetful(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = self.perturbed(batch)
            return F.cross_entropy(self(x), y)

    with pytest.raises(RuntimeError, match=r"^SaliencyRegularization\(input_gradient\): .*self\.robust_loss"):
        fitted(defended(Forgetful, DEFENCES["madry and penalty"]))


def test_a_second_batch_in_one_step_is_refused_instead_of_getting_the_noise_of_the_first() -> None:
    class Two(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            first, second = self.perturbed([x[:8], y[:8]]), self.perturbed([x[8:], y[8:]])
            return F.cross_entropy(self(torch.cat([first[0], second[0]])), y)

    with pytest.raises(RuntimeError, match="once"):
        fitted(defended(Two, DEFENCES["madry"]))


def test_validation_and_testing_by_hand_see_the_batch_as_it_is() -> None:
    class Tested(ByHand):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            ByHand.validation_step(self, batch, batch_idx)

    module = zoo.built(defended(Tested, DEFENCES["madry and penalty"]))
    trainer = zoo.trainer(max_epochs=1)
    trainer.fit(module, data(), data(seed=1))  # asserts in its validation_step
    trainer.test(module, data(seed=1), verbose=False)
    x, y = next(iter(data()))
    assert module.perturbed([x, y])[0] is x  # and without a Trainer at all
    assert not {"training_step", "_lightning_robust_seam"} & set(vars(module))


def test_a_shared_step_is_attacked_in_training_alone() -> None:
    seen: dict[str, list[Tensor]] = {"train": [], "val": []}

    class Shared(ByHand):
        def step(self, batch: Any, stage: str) -> Tensor:
            x, y = self.perturbed(batch)
            seen[stage].append(x.detach().clone())
            return self.robust_loss(F.cross_entropy(self(x), y))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.step(batch, "train")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.step(batch, "val")

    module = zoo.built(defended(Shared, DEFENCES["madry"]))
    loader = DataLoader(TensorDataset(zoo.images(16), zoo.labels(16)), 16)
    zoo.trainer(num_sanity_val_steps=0).fit(module, loader, loader)
    clean = zoo.images(16)
    assert torch.equal(seen["val"][0], clean)
    # Training reads the step twice more, on the way to find and craft; the last one is the step itself.
    assert not torch.equal(seen["train"][-1], clean)
    assert float((seen["train"][-1] - clean).abs().max()) == pytest.approx(THREAT.eps, abs=1e-6)


def test_bare_attacks_threats_and_penalties_stand_for_their_callbacks() -> None:
    cases: list[tuple[Any, Any]] = [
        (THREAT, AdversarialTraining(THREAT)),
        (ATTACK, AdversarialTraining(ATTACK)),
        (NFGSM(THREAT), AdversarialTraining(THREAT, "n-fgsm")),
        *((kind(), SaliencyRegularization(kind())) for kind in PENALTIES),
    ]
    for bare, meant in cases:
        (callback,) = defended(zoo.ListBatch, lambda bare=bare: [bare])().configure_callbacks()
        assert type(callback) is type(meant)
        assert callback.settings() == meant.settings()


def test_callbacks_of_other_bases_come_first_and_a_single_one_need_not_be_in_a_list() -> None:
    early, late = pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.LambdaCallback()

    class Own(zoo.ListBatch):
        def configure_callbacks(self) -> Any:
            return early

    class Both(RobustTrainingMixin, Own):
        def configure_robustness(self) -> Any:
            return [THREAT]

        def configure_callbacks(self) -> Any:
            return [*super().configure_callbacks(), late]

    first, second, third = Both().configure_callbacks()
    assert (first, third) == (early, late)
    assert isinstance(second, AdversarialTraining)


@pytest.mark.parametrize("base", [pl.LightningModule, lightning.LightningModule])
@pytest.mark.parametrize("by_hand", [False, True])
def test_both_namespaces_are_served(base: type[Any], by_hand: bool) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.perturbed(batch) if by_hand else batch
        loss = F.cross_entropy(self.net(x), y)
        return self.robust_loss(loss) if by_hand else loss

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    members = {"training_step": training_step, "configure_optimizers": configure_optimizers}
    shape = defended(type("Own", (base,), members), DEFENCES["madry and penalty"], by_hand=by_hand)
    trainer_of = pl.Trainer if base is pl.LightningModule else lightning.Trainer
    pl.seed_everything(0, verbose=False)
    module = shape()
    module.net = zoo.network()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer_of(accelerator="cpu", max_epochs=2, enable_checkpointing=False, **quiet).fit(module, data())
    assert torch.equal(flat(module), flat(fitted(zoo.ListBatch, *DEFENCES["madry and penalty"]())))


def test_a_step_by_hand_that_fails_leaves_nothing_behind() -> None:
    class Failing(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = zoo.built(defended(Failing, DEFENCES["madry and penalty"]))
    before = set(vars(module))
    with pytest.raises(ZeroDivisionError):
        zoo.trainer().fit(module, data())
    assert not {"training_step", "_lightning_robust_seam", "log", "log_dict", "manual_backward"} & (
        set(vars(module)) - before
    )


class Monitored(RobustTrainingMixin, zoo.ListBatch):
    def configure_robustness(self) -> Any:
        return [TemperatureScaling()]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("another_trainer", [False, True])
def test_a_monitor_keeps_what_it_found_from_fit_to_test(another_trainer: bool) -> None:
    module = zoo.built(Monitored)
    trainer = zoo.trainer(max_epochs=3)
    trainer.fit(module, learnable(160, 2), learnable(96, 1))
    fitted_temperature = float(trainer.callback_metrics["calibration/val/temperature"])
    trainer = zoo.trainer() if another_trainer else trainer
    trainer.test(module, learnable(96, 3), verbose=False)
    assert float(trainer.callback_metrics["calibration/test/temperature"]) == fitted_temperature


def test_callbacks_are_built_once_for_a_module_and_anew_for_its_copies() -> None:
    module = zoo.built(Monitored)
    (first,) = module.configure_callbacks()
    assert module.configure_callbacks() == [first]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), Monitored()):
        (other,) = twin.configure_callbacks()
        assert isinstance(other, TemperatureScaling)
        assert other is not first
        assert twin.configure_callbacks() == [other]
    assert module.configure_callbacks() == [first]
    assert set(module.state_dict()) == set(zoo.ListBatch().state_dict())


def test_a_module_that_is_trained_twice_trains_the_same_weights_as_with_callbacks() -> None:
    weights = []
    for mixed in (False, True):
        module = zoo.built(defended(zoo.ListBatch, DEFENCES["madry and penalty"]) if mixed else zoo.ListBatch)
        callbacks = [] if mixed else DEFENCES["madry and penalty"]()
        for _ in range(2):
            zoo.trainer(max_epochs=1, callbacks=callbacks).fit(module, data())
        weights.append(flat(module))
    assert torch.equal(*weights)


# -- everything that callbacks do ------------------------------------------------------------------------------------


def everything() -> list[Any]:
    return [
        AdversarialTraining(ATTACK),
        SaliencyRegularization(InputGradientPenalty(), 0.5),
        RobustAccuracy(ATTACK),
        RobustAccuracy(PGD(THREAT, steps=3), name="strong"),
        CalibrationMonitor(),
        OODMonitor(),
        CorruptionMonitor(max_samples=16, per_epoch=2),
        SaliencySnapshots(["gradient"]),
        TemperatureScaling(),
    ]


@pytest.mark.parametrize("base", [zoo.ListBatch, zoo.ManualOptimisation, ByHand, ManualByHand])
def test_all_defences_and_monitors_of_a_mixin_train_and_measure_what_callbacks_do(base: type[Any]) -> None:
    validation = {"validation_step": zoo.ListBatch.validation_step, "forward": zoo.ListBatch.forward}
    found = []
    for mixed in (False, True):
        module = zoo.built(defended(base, everything, **validation) if mixed else zoo.ListBatch)
        trainer = zoo.trainer(max_epochs=2, callbacks=[] if mixed else everything())
        trainer.fit(module, data(), data())
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k}
        found.append((flat(module), metrics))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    measured = {"robust.strong/val/accuracy", "ood/val/synthetic_noise/msp_auroc", "saliency/val/flips"}
    assert {*measured, "shift/val/mean_accuracy"} <= set(found[1][1])


class Parts(RobustTrainingMixin, zoo.ListBatch):
    def __init__(self, threat: Any = THREAT, penalty: Any = None, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.threat, self.penalty = threat, penalty

    def configure_robustness(self) -> Any:
        return [*super().configure_robustness(), self.threat, *([self.penalty] if self.penalty else [])]


def test_hyper_parameters_are_class_paths_and_plain_dicts_and_load_what_was_saved(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = Parts(PGD(THREAT, steps=2), InputGradientPenalty())
    attack = {"class_path": "lightning_robust.PGD", "init_args": {"steps": 2, "restarts": 1}}
    stored = module.hparams["threat"]
    assert stored["class_path"] == attack["class_path"]
    assert stored["init_args"]["threat"]["init_args"]["eps"] == 0.1
    assert module.hparams_initial["penalty"]["class_path"] == "lightning_robust.InputGradientPenalty"
    assert module.hparams["width"] == 3
    trainer = zoo.trainer()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "parts.ckpt")
    loaded = Parts.load_from_checkpoint(tmp_path / "parts.ckpt")  # which reads plain data only
    assert loaded.hparams == module.hparams
    for parts in (module, loaded):
        attacked, penalised = parts.configure_callbacks()
        assert attacked.attack == PGD(THREAT, steps=2)
        assert penalised.penalty == InputGradientPenalty()
    zoo.trainer().fit(loaded, data())


def test_only_classes_of_this_package_are_built_from_hyper_parameters() -> None:
    with pytest.raises(ValueError, match=r"expected a class of lightning_robust .*got 'os.system'"):
        Parts({"class_path": "os.system", "init_args": {}}).configure_callbacks()


class Left(RobustTrainingMixin):
    def configure_robustness(self) -> Any:
        return [*super().configure_robustness(), CalibrationMonitor()]


class Both(Left, Parts):
    pass


def test_several_bases_bring_their_defences_together_and_the_class_stays_what_it_was() -> None:
    module = Both()
    assert [type(c).__name__ for c in module.configure_callbacks()] == ["AdversarialTraining", "CalibrationMonitor"]
    assert Both.forward is zoo.ListBatch.forward
    assert set(module.state_dict()) == set(zoo.ListBatch().state_dict())
    assert set(module.hparams) == {"threat", "penalty", "width"}


# -- CalibratedMixin -------------------------------------------------------------------------------------------------


class Plain(zoo.ListBatch):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Calibrated(CalibratedMixin, Plain):
    pass


TEACHER = torch.randn(64, 10, generator=torch.Generator().manual_seed(42))


def learnable(n: int, seed: int) -> DataLoader[Any]:
    """Labels that can be learnt, but for a quarter of them."""
    x = zoo.images(n, seed)
    right = ((x.flatten(1) - 0.5) @ TEACHER).argmax(1)
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.25
    return DataLoader(TensorDataset(x, torch.where(wrong, (right + 1) % 10, right)), 32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run with a temperature: a few epochs on noisy labels, overconfident, so that T is not 1."""
    module = zoo.built(Plain)
    trainer = zoo.trainer(max_epochs=20, callbacks=[TemperatureScaling()])
    trainer.fit(module, learnable(160, 2), learnable(96, 1))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert 1.2 < load_temperature(tmp_path / "x.ckpt") < 20
    return tmp_path / "x.ckpt"


def raw(path: Path, x: Tensor) -> Tensor:
    module = Plain()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        return module.eval()(x)


def test_a_module_loads_with_its_temperature_exactly_as_calibrated_does(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    mixed = Calibrated.load_from_checkpoint(checkpoint).eval()
    reference = calibrated(Plain, checkpoint)
    with torch.no_grad():
        assert torch.equal(mixed(x), reference(x))
        assert torch.equal(mixed(x), raw(checkpoint, x) / load_temperature(checkpoint))
    assert mixed.temperature == load_temperature(checkpoint)


def test_the_temperature_of_a_named_callback_is_loaded_by_its_name(tmp_path: Path) -> None:
    class Named(CalibratedMixin, Plain):
        temperature_name = "few"

    callbacks = [TemperatureScaling(), TemperatureScaling(name="few", max_samples=60)]
    trainer = zoo.trainer(max_epochs=20, callbacks=callbacks)
    trainer.fit(zoo.built(Plain), learnable(160, 2), learnable(96, 1))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    of_few = load_temperature(tmp_path / "x.ckpt", name="few")
    assert Named.load_from_checkpoint(tmp_path / "x.ckpt").temperature == of_few
    assert Calibrated.load_from_checkpoint(tmp_path / "x.ckpt").temperature != of_few


def test_in_train_mode_logits_are_those_that_are_trained(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    module = Calibrated.load_from_checkpoint(checkpoint).train()
    twin = Plain.load_from_checkpoint(checkpoint).train()
    torch.manual_seed(0)
    own = module(x)
    torch.manual_seed(0)
    assert torch.equal(own, twin(x))


def test_loading_twice_scales_once(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    module = Calibrated.load_from_checkpoint(checkpoint).eval()
    module.on_load_checkpoint(torch.load(checkpoint, weights_only=True))
    with torch.no_grad():
        assert torch.equal(module(x), raw(checkpoint, x) / load_temperature(checkpoint))
    assert sum(len(part._forward_hooks) for part in module.modules()) == 1


def test_a_deep_copy_and_a_state_dict_go_their_way_with_it(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    module = Calibrated.load_from_checkpoint(checkpoint).eval()
    twin = copy.deepcopy(module)
    assert set(module.state_dict()) == set(Plain().state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), module(x))
        twin.on_load_checkpoint({"state_dict": {}})  # a file without a temperature: the copy forgets, we do not
        assert torch.equal(twin(x), raw(checkpoint, x))
        assert torch.equal(module(x), raw(checkpoint, x) / load_temperature(checkpoint))


def test_a_checkpoint_without_a_temperature_loads_as_ever(tmp_path: Path) -> None:
    trainer = zoo.trainer()
    module = zoo.built(Calibrated)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = Calibrated.load_from_checkpoint(tmp_path / "plain.ckpt").eval()
    assert loaded.temperature is None
    x = zoo.images(20, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded(x), raw(tmp_path / "plain.ckpt", x))


def test_the_test_loop_shows_calibrated_probabilities_and_monitors_measure_raw_ones(checkpoint: Path) -> None:
    x, y = zoo.images(48, seed=5), zoo.labels(48)
    loader = DataLoader(TensorDataset(x, y), 16)
    temperature, z = load_temperature(checkpoint), raw(checkpoint, x)
    trainer = zoo.trainer(callbacks=[CalibrationMonitor(stages=["test"])])
    trainer.test(zoo.built(Calibrated), loader, ckpt_path=checkpoint, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(z / temperature, y)), rel=1e-5)
    assert metrics["calibration/test/nll"] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-5)
    predicted = trainer.predict(zoo.built(Calibrated), loader, ckpt_path=checkpoint)
    assert torch.equal(torch.cat(predicted), z / temperature)


def test_beside_the_callback_that_applies_a_temperature_it_is_applied_once(checkpoint: Path) -> None:
    x, y = zoo.images(48, seed=5), zoo.labels(48)
    loader = DataLoader(TensorDataset(x, y), 16)
    trainer = zoo.trainer(callbacks=[TemperatureScaling(apply=True)])
    trainer.test(zoo.built(Calibrated), loader, ckpt_path=checkpoint, verbose=False)
    expected = F.cross_entropy(raw(checkpoint, x) / load_temperature(checkpoint), y)
    assert float(trainer.callback_metrics["test_loss"]) == pytest.approx(float(expected), rel=1e-5)
    module = trainer.lightning_module.eval()
    with torch.no_grad():  # afterwards the callback is gone, and the mixin at work again
        assert torch.equal(module(x), raw(checkpoint, x) / load_temperature(checkpoint))


def test_a_copy_goes_by_its_own_mode(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    module = Calibrated.load_from_checkpoint(checkpoint).eval()
    twin = copy.deepcopy(module)
    module.train()  # trained on, with its copy as a teacher
    with torch.no_grad():
        assert torch.equal(twin(x), raw(checkpoint, x) / load_temperature(checkpoint))


def test_a_calibrated_module_can_be_sent_to_another_process(checkpoint: Path) -> None:
    x = zoo.images(20, seed=3)
    module = Calibrated.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_a_resumed_fit_trains_and_validates_on_raw_logits(checkpoint: Path) -> None:
    runs = {}
    for shape in (Plain, Calibrated):
        module = zoo.built(shape)
        trainer = zoo.trainer(max_epochs=21, callbacks=[TemperatureScaling()])
        trainer.fit(module, learnable(160, 2), learnable(96, 1), ckpt_path=checkpoint)
        metrics = {key: float(trainer.callback_metrics[key]) for key in ("val_loss", "calibration/val/temperature")}
        # Afterwards too: the temperature that was loaded belongs to the weights that were loaded.
        runs[shape] = flat(module), {**metrics, **trainer.test(module, data(seed=5), verbose=False)[0]}
    assert torch.equal(runs[Plain][0], runs[Calibrated][0])
    assert runs[Plain][1] == runs[Calibrated][1]
    assert set(runs[Plain][1]) >= {"val_loss", "test_loss", "calibration/val/temperature"}


def test_a_module_that_was_loaded_can_be_trained_on(checkpoint: Path) -> None:
    weights, losses = [], []
    for shape in (Plain, Calibrated):
        pl.seed_everything(0, verbose=False)
        module = shape.load_from_checkpoint(checkpoint)
        trainer = zoo.trainer()
        trainer.fit(module, data(64), data(64, seed=1))
        weights.append(flat(module))
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert torch.equal(*weights)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("base", [pl.LightningModule, lightning.LightningModule])
def test_a_calibrated_module_of_either_namespace(base: type[Any], checkpoint: Path) -> None:
    def init(self: Any) -> None:
        base.__init__(self)
        self.net = zoo.network()

    own = type("Own", (base,), {"__init__": init, "forward": lambda self, x: self.net(x)})
    mixed = type("Mixed", (CalibratedMixin, own), {}).load_from_checkpoint(checkpoint).eval()
    x = zoo.images(20, seed=3)
    with torch.no_grad():
        assert torch.equal(mixed(x), raw(checkpoint, x) / load_temperature(checkpoint))


def test_both_mixins_live_in_one_module(checkpoint: Path) -> None:
    class Both(CalibratedMixin, RobustTrainingMixin, Plain):
        def configure_robustness(self) -> Any:
            return [THREAT]

    module = Both.load_from_checkpoint(checkpoint)
    assert module.temperature == load_temperature(checkpoint)
    trainer = zoo.trainer(max_steps=1)
    trainer.fit(module.train(), data())
    assert any(isinstance(callback, AdversarialTraining) for callback in trainer.callbacks)
    assert module.temperature is None
