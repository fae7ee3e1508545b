"""Validation images: a share of each class, drawn from the seed alone, and no longer among the training images."""

import dataclasses
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnopt.data import datasets
from cnnopt.data.datasets import DATASETS, DataError
from cnnopt.data.validation import held_out
from tests.helpers.cifar_copies import PYTHON_10, small_copy


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_each_class_gives_its_share_to_within_one_image(sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    count = data.draw(st.integers(0, len(labels) - 1))
    np.random.default_rng(1).shuffle(labels)
    chosen = held_out(labels, count, np.random.default_rng(data.draw(st.integers(0, 9))))
    assert len(set(chosen)) == len(chosen) == count
    assert list(chosen) == sorted(chosen)
    found = np.bincount(labels[chosen], minlength=len(sizes))
    assert np.all(abs(found - count * np.array(sizes) / len(labels)) < 1)


@pytest.mark.parametrize(("count", "each"), [(5000, 500), (10, 1)])
def test_equal_classes_give_equally_many(count, each):
    labels = np.random.default_rng(0).permutation(np.arange(50_000) % 10)
    assert np.bincount(labels[held_out(labels, count, np.random.default_rng(0))]).tolist() == [each] * 10


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_the_training_split_is_divided_and_nothing_else_changes():
    whole, divided = (datasets.load("synthetic", seed=3, validation=count) for count in (0, 100))
    assert (whole.monitored, divided.monitored) == ("test", "val")
    assert (len(whole.validation_images), len(divided.validation_images)) == (0, 100)
    assert len(divided.train_images) == DATASETS["synthetic"] - 100
    np.testing.assert_array_equal(divided.test_images, whole.test_images)
    np.testing.assert_array_equal(divided.test_labels, whole.test_labels)
    everything = dict(zip(rows(whole.train_images), whole.train_labels, strict=True))
    assert len(everything) == DATASETS["synthetic"], "no image twice, so that they can be told apart"
    seen = rows(divided.train_images) + rows(divided.validation_images)
    assert sorted(seen) == sorted(everything)
    labels = [*divided.train_labels, *divided.validation_labels]
    assert labels == [everything[row] for row in seen]
    # Both parts keep the order of the whole.
    place = {row: i for i, row in enumerate(rows(whole.train_images))}
    for part in (divided.train_images, divided.validation_images):
        order = [place[row] for row in rows(part)]
        assert order == sorted(order)


def test_the_seed_decides_which_images_and_nothing_else_does():
    first, again, other = (datasets.load("digits", seed=seed, validation=137) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.validation_images, again.validation_images)
    assert not np.array_equal(first.validation_images, other.validation_images)


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
@pytest.mark.parametrize("count", [10, 11, 137])
def test_each_class_has_a_validation_image(dataset, count):
    images = datasets.load(dataset, validation=count)
    assert np.all(np.bincount(images.validation_labels, minlength=10) > 0)
    assert np.all(np.bincount(images.train_labels, minlength=10) > 0)


@pytest.mark.parametrize(
    ("dataset", "count", "message"),
    [
        ("digits", 9, "--validation 9: digits has 10 classes, and each needs an image; use at least 10"),
        ("cifar10", 1, "--validation 1: cifar10 has 10 classes, and each needs an image; use at least 10"),
        ("cifar100", 99, "--validation 99: cifar100 has 100 classes, and each needs an image; use at least 100"),
    ],
)
def test_too_few_are_refused_before_any_image_is_read(dataset, count, message, monkeypatch, tmp_path):
    monkeypatch.setenv("CNNOPT_DATA_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        datasets.check(dataset, None, count)
    assert str(caught.value) == message


def test_a_copy_with_too_few_images_is_refused(tmp_path):
    copy = small_copy(PYTHON_10, images_per_file=4)
    copy.folder(tmp_path)
    with pytest.raises(DataError, match="--validation 20: there are 20 training images; use fewer"):
        datasets.load("cifar10", tmp_path, validation=20)
    with pytest.raises(
        DataError, match=r"--validation 10: no (training|validation) image of class class_[0-9] among 20"
    ):
        datasets.load("cifar10", tmp_path, validation=10)


def test_ranks_of_a_host_map_the_divided_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small_copy(PYTHON_10, images_per_file=40).folder(tmp_path / "data")
    for validation, seed in ((50, 0), (50, 1), (60, 1), (0, 1), (50, 0)):
        alone, first, second = (
            datasets.load("cifar10", tmp_path / "data", seed=seed, validation=validation, share=share)
            for share in (False, True, True)
        )
        for found in (first, second):
            for part in ("train_images", "train_labels", "validation_images", "validation_labels", "test_images"):
                np.testing.assert_array_equal(getattr(found, part), getattr(alone, part))
        assert isinstance(second.train_images, np.memmap)
        assert isinstance(second.validation_images, np.memmap) == (validation > 0)
    assert len([path for path in tmp_path.glob("cnnopt-*/*") if path.is_dir()]) == 1, "one copy, of the last order"


def test_a_fingerprint_tells_other_validation_images_and_other_images_apart():
    first, again, other = (datasets.load("digits", seed=seed, validation=137) for seed in (1, 1, 2))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.fingerprint().startswith("1,300 training and 360 test images, digest ")
    dark = first.train_images.copy()
    dark[64] = 0
    assert dataclasses.replace(first, train_images=dark).fingerprint() != first.fingerprint()
