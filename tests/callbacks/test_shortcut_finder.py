"""A stamp that gives the class away is found in a real run; training does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PixelSpace
from lightning_robust.callbacks.shortcut_finder import ShortcutFinder
from lightning_robust.randomness import seeded
from lightning_robust.saliency import find_shortcuts, gradient, hidden_tiles
from lightning_robust.saliency.shortcuts import OUTSIDE

SIDE = 14


def samples(n: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Spots amid the picture (class 0), two in five with a stamp in a corner (class 1); and masks of the spots."""
    x, masks = torch.zeros(n, 1, SIDE, SIDE), torch.zeros(n, SIDE, SIDE)
    for i, (row, column) in enumerate((torch.randint(1, 5, (n, 2), generator=seeded(0)) * 2).tolist()):
        masks[i, row : row + 4, column : column + 4] = 1
    x[:, 0] = masks * torch.rand(n, SIDE, SIDE, generator=seeded(1))
    labels = (torch.arange(n) % 5 < 2).long()
    x[labels == 1, :, :2, -2:] = 1
    return x, labels, masks


class Stamped(pl.LightningModule):
    """Says class 1 where there is a stamp, by hand; what it learns besides is next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2))
        with torch.no_grad():
            weight = torch.zeros(2, SIDE, SIDE)
            weight[0, 2:-2, 2:-2], weight[1, :2, -2:] = 0.5, 3
            self.net[1].weight.copy_(weight.view(2, -1))
            self.net[1].bias.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def loader(batch_size: int = 16, **changed: Tensor) -> DataLoader[Any]:
    parts = dict(zip(("x", "labels", "masks"), samples(), strict=True)) | changed
    return DataLoader(TensorDataset(*parts.values()), batch_size)


def ours(trainer: Any) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("saliency")}


def validated(finder: ShortcutFinder, data: Any = None, module: Any = None, **settings: Any) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[finder], **settings)
    trainer.validate(module or Stamped(), data or loader(), verbose=False)
    return ours(trainer)


def stamped_rows() -> list[int]:
    return samples()[1].nonzero()[:, 0].tolist()


def members(finder: ShortcutFinder, stage: str = "val") -> list[int]:
    return sorted(int(i) for cluster in finder.found[stage] if cluster.flagged for i in cluster.members)


# -- what is found ---------------------------------------------------------------------------------------------------


def test_the_stamped_samples_are_flagged_at_the_end_of_a_fit() -> None:
    finder = ShortcutFinder(strict=True)
    trainer = zoo.trainer(max_epochs=2, callbacks=[finder])
    trainer.fit(Stamped(), loader(), loader())
    assert members(finder) == stamped_rows()
    logged, first = ours(trainer), finder.found["val"][0]
    assert logged["saliency/val_shortcuts/clusters"] == len(finder.found["val"])
    assert logged["saliency/val_shortcuts/flagged"] == sum(c.flagged for c in finder.found["val"])
    assert logged["saliency/val_shortcuts/flagged_samples"] == pytest.approx(24 / 60)
    assert logged["saliency/val_shortcuts/top_suspicion"] == pytest.approx(first.suspicion)
    assert logged["saliency/val_shortcuts/top_mass_on_corners"] > 0.9
    assert logged["saliency/val_shortcuts/top_error_rate"] == 0
    assert first.place == "top right corner"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_clusters_are_those_of_the_functions_also_in_inference_mode(stage: str) -> None:
    module, (x, labels, _), finder = Stamped(), samples(), ShortcutFinder(stages=["val", "test"], strict=True)
    getattr(zoo.trainer(callbacks=[finder]), stage)(module, loader(), verbose=False)
    module.eval()
    predictions = module.net(x).argmax(1)
    expected = find_shortcuts(hidden_tiles(module.net, x, predictions), labels, predictions)
    found = finder.found["test" if stage == "test" else "val"]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.members.sort().values, theirs.members.sort().values)
        torch.testing.assert_close(ours.mean_map, theirs.mean_map, atol=1e-6, rtol=1e-4)
        assert (ours.classes, ours.flagged, ours.place) == (theirs.classes, theirs.flagged, theirs.place)


def test_what_is_explained_is_the_prediction() -> None:
    finder = ShortcutFinder(strict=True)
    wrong = validated(finder, loader(labels=1 - samples()[1]))
    assert members(finder) == stamped_rows()
    assert wrong["saliency/val_shortcuts/top_error_rate"] == 1


def test_a_net_that_looks_at_the_spots_has_no_shortcut() -> None:
    module = Stamped()
    with torch.no_grad():
        module.net[1].weight[1].zero_()
        module.net[1].bias.copy_(torch.tensor([0.0, 0.1]))
    assert validated(ShortcutFinder(strict=True), module=module)["saliency/val_shortcuts/flagged"] == 0


def test_the_first_samples_are_explained_whatever_the_batches() -> None:
    found = []
    for size in (7, 25):
        finder = ShortcutFinder(max_samples=30, strict=True)
        validated(finder, loader(size))
        found.append([cluster.members.tolist() for cluster in finder.found["val"]])
        assert sorted(i for rows in found[-1] for i in rows) == list(range(30))
    assert found[0] == found[1]


def test_masks_in_the_batch_tell_what_lies_outside() -> None:
    finder = ShortcutFinder(foreground_key=2, strict=True)
    logged = validated(finder)
    assert logged["saliency/val_shortcuts/top_mass_outside_foreground"] > 0.9
    masses = [cluster.mass[OUTSIDE] for cluster in finder.found["val"] if not cluster.flagged]
    assert masses
    assert max(masses) < 0.1


def test_black_is_what_hides_also_in_normalised_inputs() -> None:
    module, x = Stamped(), samples()[0]
    layer = module.net[1]
    with torch.no_grad():  # the same net, behind the normalisation
        layer.bias.add_(0.5 * layer.weight.sum(1))
        layer.weight.mul_(0.25)
    finder, plain = ShortcutFinder(pixels=PixelSpace(mean=0.5, std=0.25), strict=True), ShortcutFinder(strict=True)
    logged, expected = validated(finder, loader(x=(x - 0.5) / 0.25), module), validated(plain)
    assert logged == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["gradient", gradient, "gradcam", partial(hidden_tiles, tiles=14)])
def test_other_methods_are_taken_by_name_or_as_functions(method: Any) -> None:
    module = Stamped()
    module.net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), *module.net)
    nn.init.ones_(module.net[0].weight)
    logged = validated(ShortcutFinder(method, strict=True), module=module)
    assert logged["saliency/val_shortcuts/clusters"] >= 2


# -- when, and what else ---------------------------------------------------------------------------------------------


class Counting(pl.Callback):
    """In which epochs something was found."""

    def __init__(self, finder: ShortcutFinder) -> None:
        self.finder, self.epochs = finder, list[int]()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.finder.found.pop("val", None):
            self.epochs.append(trainer.current_epoch + 1)


@pytest.mark.parametrize(("every", "expected"), [(None, [5]), (2, [2, 4, 5]), (1, [1, 2, 3, 4, 5])])
def test_the_last_epoch_is_explained_and_others_when_due(every: int | None, expected: list[int]) -> None:
    finder = ShortcutFinder(every_n_epochs=every, max_samples=20)
    counting = Counting(finder)
    zoo.trainer(max_epochs=5, callbacks=[finder, counting]).fit(Stamped(), loader(), loader())
    assert counting.epochs == expected


def test_training_does_not_change_by_a_bit() -> None:
    def weights(*callbacks: Any) -> Tensor:
        pl.seed_everything(0, verbose=False)
        module = zoo.ListBatch()  # with dropout and BatchNorm
        data = DataLoader(TensorDataset(zoo.images(48), zoo.labels(48)), 16, shuffle=True)
        zoo.trainer(max_epochs=3, callbacks=list(callbacks)).fit(module, data, data)
        return torch.cat([value.flatten().float() for value in module.state_dict().values()])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shuffl.*")
        assert torch.equal(weights(), weights(ShortcutFinder(every_n_epochs=1, strict=True)))


def test_the_picture_goes_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    validated(ShortcutFinder(classes=["spot", "stamp"]), logger=logger)
    logger.finalize("success")
    events = EventAccumulator(str(logger.log_dir))
    events.Reload()
    assert events.Tags()["images"] == ["saliency/val_shortcuts/clusters"]


def test_pictures_and_one_class_each_are_needed() -> None:
    flat = DataLoader(TensorDataset(samples()[0].flatten(1), samples()[1]), 16)
    finder = ShortcutFinder(strict=True)
    with pytest.warns(UserWarning, match=r"maps of pictures .* can be clustered.*Nothing is explained"):
        assert validated(finder, flat) == {}


def test_masks_that_do_not_fit_are_refused_before_anything_is_lost() -> None:
    finder = ShortcutFinder(foreground_key=1)
    with pytest.raises(ValueError, match=r"foreground_key=.* must lead to masks"):
        zoo.trainer(max_epochs=1, callbacks=[finder], num_sanity_val_steps=1).fit(Stamped(), loader(), loader())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_samples": 2}, "max_samples="),
        ({"every_n_epochs": 0}, "every_n_epochs="),
        ({"border": 0.5}, "border="),
        ({"method": "gradents"}, "Did you mean 'gradient'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ShortcutFinder(**settings)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(zoo.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(tmp_path / "found.json")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    one, two = fitted(), json.loads((tmp_path / "found.json").read_text())
    assert one["saliency/val_shortcuts/flagged"] > 0
    assert two == pytest.approx(one, abs=1e-6)


def fitted(**settings: Any) -> dict[str, float]:
    finder = ShortcutFinder(max_samples=47, foreground_key=2, strict=True)  # an uneven number
    trainer = zoo.trainer(callbacks=[finder], max_epochs=1, **settings)
    trainer.fit(Stamped(), loader(), loader())
    return ours(trainer)


@pytest.mark.slow
def test_decoys_are_found_and_clean_digits_have_none() -> None:
    from tests.benchmarks.shortcuts import found, trained

    module, data, _, _ = trained("decoys", seed=0)
    answer = found(module, data)
    assert answer.clusters[0].flagged
    assert answer.on_decoys >= 0.8
    for name in ("control", "clean"):
        module, data, _, _ = trained(name, seed=0)
        assert found(module, data).flagged == 0


if __name__ == "__main__":  # two gloo processes, as a script
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logged = fitted(devices=2, strategy="ddp_fork")
    Path(sys.argv[1]).write_text(json.dumps(logged))


def test_a_fit_whose_end_nobody_knew_says_that_nothing_was_looked_at() -> None:
    finder, x = ShortcutFinder(max_samples=20), samples(30)
    loader = DataLoader(TensorDataset(*x[:2]), 10)
    stop = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = zoo.trainer(callbacks=[finder, stop], max_epochs=9)
    with pytest.warns(UserWarning, match="no evaluation of this fit was known to be the last one"):
        trainer.fit(Stamped(), loader, loader)
    assert not finder.found
    trainer.validate(Stamped(), loader, verbose=False)
    assert finder.found["val"]


def test_more_samples_than_can_be_clustered_are_refused() -> None:
    with pytest.raises(ValueError, match="max_samples= from 3 to 5000"):
        ShortcutFinder(max_samples=50_000)
