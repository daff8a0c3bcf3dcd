"""Random fill: noise where the mask says so, every other bit as it was, beside an attack in any order."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, PixelSpace, RightReasons, SaliencyRegularization, ThreatModel
from lightning_robust.callbacks.random_fill import RandomFill
from lightning_robust.randomness import seeded, uniform
from lightning_robust.recipe import compose, instantiate

THREAT = ThreatModel("linf", 0.1)


class Masked(zoo.Shape):
    """Keeps what it is fed in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        self.fed.append(x.detach().clone())
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch[0].clone())
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def marks(n: int) -> Tensor:
    mask = torch.zeros(n, 1, 8, 8)
    mask[1:, :, :3] = 1  # the first sample has none
    return mask


def loader(n: int = 48, mask: Tensor | None = None, x: Tensor | None = None) -> DataLoader[Any]:
    mask, x = marks(n) if mask is None else mask, zoo.images(n) if x is None else x
    return DataLoader(TensorDataset(x, zoo.labels(n), mask), 16)


def fitted(*callbacks: Any, data: Any = None, kind: type[Any] = Masked, **settings: Any) -> Any:
    module = zoo.built(kind)
    module.fed.clear()
    zoo.trainer(callbacks=list(callbacks), **settings).fit(module, data or loader(), loader(16))
    return module


def steps(module: Any) -> list[Tensor]:
    """What the steps were fed, without what the probe read first."""
    return list(module.fed[-3:])


def test_noise_is_where_the_mask_is_and_all_other_bits_are_as_they_were() -> None:
    for number, fed in enumerate(steps(fitted(RandomFill(2)))):
        x, mask = zoo.images(48)[16 * number :][:16], marks(48)[16 * number :][:16] > 0
        assert torch.equal(fed[~mask], x[~mask])
        assert not bool((fed[mask] == x[mask]).any())


def test_noise_is_uniform_in_its_range_and_a_function_of_seed_step_and_batch() -> None:
    fed = steps(fitted(RandomFill(2, low=0.2, high=0.6, seed=5)))
    for step, found in enumerate(fed):
        who = zlib.crc32(b"RandomFill(batch[2]) None")
        expected = 0.2 + 0.4 * uniform(found, seeded(5, 0, step, step, who))
        mask = marks(48)[16 * step :][:16] > 0
        torch.testing.assert_close(found[mask], expected[mask])


def test_accumulated_batches_of_one_step_get_noise_of_their_own() -> None:
    fed = steps(fitted(RandomFill(2, seed=1), accumulate_grad_batches=3))
    regions = [x[1:, :, :3].flatten().tolist() for x in fed]
    assert regions[0][0] != regions[1][0] != regions[2][0]


def test_one_shade_fills_the_whole_mask_of_a_sample() -> None:
    fed = steps(fitted(RandomFill(2, shade=True)))[1]  # without the sample that has no mask
    shades = fed[:, 0, :3].flatten(1)
    assert torch.equal(shades, shades[:, :1].expand_as(shades))
    assert len(shades[:, 0].unique()) == len(shades)
    assert 0 <= float(shades.min()) < float(shades.max()) <= 1


def test_a_shade_is_the_same_pixel_value_in_all_channels_of_normalised_images() -> None:
    callback = RandomFill(2, pixels=PixelSpace(mean=(0.5, 0.2), std=(0.5, 0.1)), shade=True)
    callback._trainer = type("T", (), {"global_rank": 0, "global_step": 0})
    x = torch.zeros(4, 2, 3, 3)
    pixels = callback.pixels.to_pixels(callback._filled(x, torch.ones_like(x)))
    torch.testing.assert_close(pixels, pixels[:, :1, :1, :1].expand_as(pixels))
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1


def test_a_fraction_blends() -> None:
    callback = RandomFill(2, low=0.5, high=0.500001)
    callback._trainer = type("T", (), {"global_rank": 0, "global_step": 0})
    x = torch.ones(1, 4)
    filled = callback._filled(x, torch.tensor([[0.0, 0.5, 1.0, 0.25]]))
    torch.testing.assert_close(filled, torch.tensor([[1.0, 0.75, 0.5, 0.875]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
@pytest.mark.parametrize("squeezed", [True, False])
def test_masks_of_every_type_and_without_channels_mean_the_same(dtype: torch.dtype, squeezed: bool) -> None:
    mask = marks(48).to(dtype)
    found = steps(fitted(RandomFill(2), data=loader(mask=mask.squeeze(1) if squeezed else mask)))
    assert all(torch.equal(a, b) for a, b in zip(found, steps(fitted(RandomFill(2))), strict=True))


def test_validation_sees_the_data_as_they_are() -> None:
    assert torch.equal(fitted(RandomFill(2)).validated[0], zoo.images(16))


def test_the_batch_of_the_user_and_the_global_streams_are_left_alone() -> None:
    x = zoo.images(48)
    kept = x.clone()
    fitted(RandomFill(2), data=loader(x=x))
    assert torch.equal(x, kept)
    nothing = fitted(RandomFill(2), data=loader(mask=torch.zeros(48, 1, 8, 8)))
    plain = fitted()
    for one, other in zip(nothing.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)  # dropout drew the same


# -- beside others ---------------------------------------------------------------------------------------------------


class Keeping(AdversarialTraining):
    """Keeps the clean inputs that it attacks and what it finds."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self._clean is not None
        self.pairs.append((self._clean.batch[0].clone(), self._perturbed().clone()))


@pytest.mark.parametrize("method", ["madry", "trades", "mart", "n-fgsm"])
@pytest.mark.parametrize("first", [True, False])
def test_it_is_filled_first_and_then_attacked_in_any_order_of_callbacks(first: bool, method: str) -> None:
    attack: Any = THREAT if method == "n-fgsm" else PGD(THREAT, steps=2)
    keeping, fill = Keeping(attack, method), RandomFill(2)
    module = fitted(*((fill, keeping) if first else (keeping, fill)))
    alone = steps(fitted(RandomFill(2)))
    for number, (clean, found) in enumerate(keeping.pairs):
        assert torch.equal(clean, alone[number])
        reach = THREAT.eps * (3 if method == "n-fgsm" else 1)
        assert 0 < float((found - clean).abs().max()) <= reach + 1e-6
    other = fitted(*((Keeping(attack, method), RandomFill(2)) if first else (RandomFill(2), Keeping(attack, method))))
    for one, twin in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, twin)


@pytest.mark.parametrize("at", ["fed", "clean"])
def test_for_a_penalty_the_filled_batch_is_the_clean_one(at: str) -> None:
    seen: list[tuple[Tensor, Any]] = []

    def looking(logits_fn: Any, x: Tensor, y: Tensor, clean: Any = None) -> Tensor:
        seen.append((x.detach().clone(), clean))
        return logits_fn(x).square().mean()

    callbacks = [SaliencyRegularization(looking, at=at), AdversarialTraining(PGD(THREAT, steps=1)), RandomFill(2)]
    fitted(*callbacks)
    alone = steps(fitted(RandomFill(2)))
    for (x, clean), filled in zip(seen[-3:], alone, strict=True):
        if at == "clean":
            assert torch.equal(x, filled)
            assert clean is None
        else:
            assert torch.equal(clean, filled)
            assert 0 < float((x - filled).abs().max()) <= THREAT.eps + 1e-6


def test_two_fills_of_two_masks_and_a_penalty_share_a_step_in_any_order() -> None:
    both = torch.stack([marks(48), marks(48).flip(2)], 1).flatten(1, 2)  # overlap nowhere; as two leaves of a batch

    class Two(Masked):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:3], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch[:3], batch_idx)

    overlapping = torch.ones(48, 1, 8, 8)
    data = DataLoader(TensorDataset(zoo.images(48), zoo.labels(48), both[:, :1], overlapping), 16)
    make: list[Callable[[], Any]] = [
        lambda: RandomFill(2),
        lambda: RandomFill(3, seed=1),
        lambda: SaliencyRegularization(RightReasons(2)),
    ]
    runs = [steps(fitted(*(m() for m in order), data=data, kind=Two)) for order in itertools.permutations(make)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_two_fills_of_one_mask_need_names() -> None:
    with pytest.raises(ValueError, match="name="):
        fitted(RandomFill(2), RandomFill(2, seed=1))
    fitted(RandomFill(2), RandomFill(2, seed=1, name="second"))


def test_it_makes_a_model_unlearn_a_giveaway_in_the_mask() -> None:
    """The corner gives the class away; with noise there the model has to look at the rest."""
    y = torch.arange(240) % 10
    images = 0.3 * torch.rand(240, 1, 8, 8, generator=seeded(0))
    images[torch.arange(240), 0, 5, y % 8] += 0.4  # what should be looked at, 8 of 10 classes apart
    mask = torch.zeros(240, 1, 8, 8)
    mask[:, :, :2, :2] = 1
    shortcut = torch.where(mask > 0, (y / 9).view(-1, 1, 1, 1), images)
    fair = torch.where(mask > 0, uniform(images, seeded(1)), images)

    class Learning(Masked):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(shortcut, y, mask), 48)
    accuracy = {}
    for callbacks in ([], [RandomFill(2)]):
        module = fitted(*callbacks, data=data, kind=Learning, max_epochs=20).eval()
        accuracy[len(callbacks)] = float((module.net(fair).argmax(1) == y).float().mean())
    assert accuracy[1] > accuracy[0] + 0.1


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"low": 1.0}, r"must be increasing, got 1 and 1"),
        ({"low": 2, "high": 1}, r"must be increasing, got 2 and 1"),
        ({"pixels": PixelSpace(bounds=None), "low": 0}, "has no bounds: say low= and high="),
        ({"input_key": [0, 1]}, "RandomFill is about one input"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RandomFill(2, **arguments)


def test_the_first_batch_is_held_to_the_pixel_space_unless_a_range_is_given() -> None:
    normalised = loader(x=(zoo.images(48) - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"within \[0, 1\], got \[-2, 1.9.*These look normalised"):
        fitted(RandomFill(2), data=normalised)
    pixels = PixelSpace(mean=0.5, std=0.25)
    for fill in (RandomFill(2, pixels=pixels), RandomFill(2, low=-1, high=1), RandomFill(2, high=2)):
        fitted(fill, data=normalised)


def test_a_missing_mask_lists_the_batch_and_one_that_does_not_fit_says_how_it_should_look() -> None:
    with pytest.raises(KeyError, match=r"batch\[7\]; it has batch\[0\]"):
        fitted(RandomFill(7))
    with pytest.raises(ValueError, match=r"a mask of shape \(16, 5\) does not fit inputs \(16, 1, 8, 8\)"):
        fitted(RandomFill(2), data=loader(mask=torch.ones(48, 5)))


def test_nothing_of_it_stays_on_the_module_after_a_fit_and_after_a_crash() -> None:
    class Failing(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    callback, module = RandomFill(2), zoo.built(Masked)
    before = set(vars(module))
    zoo.trainer(callbacks=[callback]).fit(module, loader())
    assert "training_step" not in vars(module)
    with pytest.raises(ZeroDivisionError):
        zoo.trainer(callbacks=[callback, Failing()]).fit(module, loader())
    assert {name for name in set(vars(module)) - before if "robust" in name or "step" in name} == set()
    assert callback._trainer is None


def test_a_recipe_builds_it(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(
        "model: {class_path: pytorch_lightning.demos.boring_classes.BoringModel}\n"
        "callbacks: {it: {class_path: lightning_robust.callbacks.random_fill.RandomFill, init_args: "
        "{mask_key: 2, shade: true, high: 0.5, pixels: {mean: 0.5, std: 0.25}}}}\n"
    )
    trainer, _, _ = instantiate(compose(tmp_path / "it.yaml"), tmp_path / "name" / "version_0", log=False)
    callback = next(c for c in trainer.callbacks if isinstance(c, RandomFill))
    assert (callback.mask_path, callback.range, callback.shade) == ((2,), (0.0, 0.5), True)
    assert callback.pixels == PixelSpace(mean=0.5, std=0.25)
