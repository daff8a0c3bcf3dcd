"""CIFAR-10 as it lies on disk, on random pictures; and one real step of its recipe."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.demo import CIFAR10, PreActClassifier, PreActResNet18
from lightning_robust.recipe import compose, instantiate

PER_FILE = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pictures in the format of the data set."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "cifar-10-batches-py").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pictures = draw.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        content = {b"data": pictures, b"labels": draw.integers(0, 10, PER_FILE).tolist()}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    return root


def test_pictures_are_read_as_they_lie_there_and_the_last_ones_are_held_out(root: Path) -> None:
    data = CIFAR10(str(root), batch_size=8, held_out=20)
    data.setup("fit")
    assert {part: len(images) for part, images in data.parts.items()} == {"train": 130, "val": 20, "test": 30}
    file = pickle.loads((root / "cifar-10-batches-py" / "data_batch_5").read_bytes())
    image, label = data.parts["val"][-1]
    assert np.array_equal((image * 255).round().to(torch.uint8).flatten().numpy(), file[b"data"][-1])
    assert int(label) == file[b"labels"][-1]
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape) == ((8, 3, 32, 32), (8,))


def test_training_pictures_are_shifted_and_mirrored_and_no_others(root: Path) -> None:
    data = CIFAR10(str(root), held_out=20)
    data.setup("fit")
    plain = data.parts["train"].tensors[0]
    torch.manual_seed(0)
    shifted = data.train_dataloader().dataset
    assert len(shifted) == 130
    seen = [shifted[0][0] for _ in range(50)]
    assert len({image.numpy().tobytes() for image in seen}) > 30
    inner = plain[0][:, 4:28, 4:28]  # in every picture, somewhere within four pixels, mirrored or not
    for image in seen:
        places = [(side, i, j) for side in (image, image.flip(2)) for i in range(9) for j in range(9)]
        assert any(torch.equal(side[:, i : i + 24, j : j + 24], inner) for side, i, j in places)
    torch.testing.assert_close(next(iter(data.val_dataloader()))[0], data.parts["val"].tensors[0])


def test_without_the_folder_it_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected CIFAR-10 in .*unpack it, and give"):
        CIFAR10(str(tmp_path)).setup("fit")


def test_the_network_is_the_published_one() -> None:
    net = PreActResNet18()
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(11.17e6, rel=1e-3)
    assert sum(isinstance(part, torch.nn.Conv2d) for part in net.modules()) == 20  # 17 and three short cuts
    assert {name for name, _ in net.named_buffers() if "num_batches" not in name and "running" not in name} == {
        "mean",
        "std",
    }
    module = PreActClassifier(width=2)
    (optimizer,), (schedule,) = module.configure_optimizers()
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [rates[i] for i in (0, 99, 100, 149, 150, 199)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_recipe_builds_and_takes_a_step(root: Path, tmp_path: Path) -> None:
    recipe = compose(
        "adversarial/cifar10",
        [
            f"vars.root={root}", "data.init_args.batch_size=4", "data.init_args.held_out=6", "data.init_args.workers=0",
            "model.init_args.width=8", "trainer.max_epochs=1", "trainer.limit_train_batches=1",
            "trainer.accelerator=cpu", "callbacks.robust.init_args.max_samples=4", "callbacks.report=null",
        ],
    )  # fmt: skip
    trainer, module, data = instantiate(recipe, tmp_path / "cifar10" / "version_0", log=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, data)
    assert trainer.global_step == 1
    moved: Any = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in module.named_parameters()} <= moved
    assert {"robust/val/accuracy", "robust/train/accuracy"} <= set(trainer.callback_metrics)
