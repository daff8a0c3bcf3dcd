"""Letters and patches: what they are made of, and that nothing is fetched."""

from __future__ import annotations

import hashlib
import pickle
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader

from lightning_robust.demo import Letters, Patches
from lightning_robust.demo.ood import _faces
from lightning_robust.randomness import untouched_random_state

each_set = pytest.mark.parametrize("kind", [Letters, Patches])
each_size = pytest.mark.parametrize("size", [28, 32, 64])


@each_set
@each_size
def test_items_are_pictures_of_the_size_asked_for_without_a_class(kind: type[Letters | Patches], size: int) -> None:
    data = kind(size=size)
    image, label = data[len(data) - 1]
    assert (image.shape, image.dtype, label) == ((1, size, size), torch.float32, -1)
    assert (data.images.min().item(), data.images.max().item()) == (0.0, 1.0)


@each_set
def test_nothing_is_loaded_before_it_is_used_and_then_once(kind: type[Letters | Patches]) -> None:
    data = kind()
    assert "images" not in vars(data)
    assert data[0][0].data_ptr() == data[0][0].data_ptr() == data.images.data_ptr()


@each_set
def test_a_loader_makes_batches_of_them_that_end(kind: type[Letters | Patches]) -> None:
    data = kind()
    batches = list(DataLoader(data, batch_size=100))
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.full((len(data),), -1))
    with pytest.raises(IndexError):
        data[len(data)]


@each_set
def test_a_worker_gets_the_same_pictures_and_global_streams_stay(kind: type[Letters | Patches]) -> None:
    data = kind()
    with untouched_random_state() as state:
        images = data.images
        assert state.is_current()
    assert torch.equal(pickle.loads(pickle.dumps(kind())).images, images)


def test_letters_are_26_of_12_faces_and_no_two_alike() -> None:
    letters = Letters()
    assert len(_faces()) == 12
    assert len(letters) == 12 * 26
    assert len({hashlib.sha256(image.numpy().tobytes()).digest() for image, _ in letters}) == 312


@each_size
def test_letters_are_centred_as_mnist_is(size: int) -> None:
    box = round(size * 20 / 28)
    for image in Letters(size).images[:, 0].numpy():
        rows, columns = np.nonzero(image.any(axis=1))[0], np.nonzero(image.any(axis=0))[0]
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == box
        middle = np.array(scipy.ndimage.center_of_mass(image))
        np.testing.assert_allclose(middle, (size - 1) / 2, atol=0.5 + 1e-4)


def test_letters_are_the_right_way_round() -> None:
    letters = Letters().images[:26, 0]  # of the first face
    l_shape, t_shape = letters[ord("L") - ord("A")], letters[ord("T") - ord("A")]
    assert l_shape.sum(1).argmax() > 14 > t_shape.sum(1).argmax()  # the bar of L is below, that of T above
    assert l_shape.sum(0).argmax() < 14  # the stem of L is on the left


def test_patches_lie_in_the_photos_and_do_not_overlap() -> None:
    patches = Patches().images
    assert len(patches) == 2 * (427 // 28) * (640 // 28)
    for first, name in ((0, "china.jpg"), (330, "flower.jpg")):
        grey = np.asarray(Image.fromarray(load_sample_image(name)).convert("L"), dtype=np.float32) / 255
        rows = [torch.cat(list(patches[first + 22 * i : first + 22 * (i + 1), 0]), dim=1) for i in range(15)]
        # Pillow rounds to 1/255.
        np.testing.assert_allclose(torch.cat(rows).numpy(), grey[: 15 * 28, : 22 * 28], atol=0.51 / 255)


@pytest.mark.parametrize(("kind", "module"), [(Letters, "matplotlib"), (Patches, "sklearn.datasets")])
def test_a_missing_package_is_an_error_with_the_remedy(
    kind: type[Letters | Patches], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    data = kind()  # not before it is used
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-robust\[demo\]'"):
        data[0]
