"""The pictures for TensorBoard."""

import numpy as np
import pytest

from cnnopt import pictures


def test_a_confusion_matrix_has_the_shares_of_each_row():
    counts = [[8, 2], [0, 5]]
    found = pictures.confusion(counts, ["cat", "dog"])
    # The corner of a cell has no number on it.
    cells = [(x, y) for x, y in zip(*np.where((found == pictures.shade(0.8)).all(axis=2)), strict=True)]
    assert len(cells) > 500
    for share in (0.8, 0.2, 1.0, 0.0):
        assert (found == pictures.shade(share)).all(axis=2).any()


@pytest.mark.parametrize("classes", [2, 10, 20, 100])
def test_it_has_room_for_any_number_of_classes(classes):
    found = pictures.confusion(np.eye(classes, dtype=int), [f"class {i}" for i in range(classes)])
    assert found.dtype == np.uint8
    assert (found == pictures.shade(1)).all(axis=2).sum() > 20 * classes


def test_many_steps_are_thinned_out_from_first_to_last():
    history = {step: {"stem": step / 1000} for step in range(1, 1001)}
    found = pictures.zeros(history)
    assert found.shape[1] < 1000
    assert {tuple(color) for color in found[30]} >= {pictures.shade(0.001), pictures.shade(1.0)}


def test_right_answers_are_green_and_wrong_ones_red():
    image = np.zeros((32, 32, 3), np.uint8)
    shown = [pictures.Answer(image, "cat", answer, 0.9) for answer in ("cat", "dog")]
    colors = [tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in (pictures.RIGHT, pictures.WRONG)]
    for number, each in enumerate(shown):
        found = pictures.answers([each])
        assert (found == colors[number]).all(axis=2).any()
        assert not (found == colors[1 - number]).all(axis=2).any()
    assert pictures.answers(shown * 6).shape[1] > pictures.answers(shown).shape[1]
