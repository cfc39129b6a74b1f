from data.errors import DataError
from data.store import ChipStore
from utils.train.validation import split_labelled

import numpy as np
import pytest
import torch


def labelled(names, labels):
    """Chips that hold their own position as their grey level."""
    chips = np.arange(len(names), dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    return ChipStore(chips, torch.device("cpu")), np.asarray(labels), names


def test_an_object_is_in_one_part_and_each_class_in_both():
    numbers = np.concatenate([1000 * i + np.arange(3) for i in range(20)])  # 20 objects of three frames
    names, labels = [f"Gotcha{number}.png" for number in numbers], np.repeat(np.arange(20) % 4, 3)
    parts = split_labelled(labelled(names, labels), 0.4)
    seen = [{int(name[6:-4]) // 1000 for name in names} for *_, names in parts]
    assert not seen[0] & seen[1] and len(seen[0]) == 12 and len(seen[1]) == 8
    for store, classes, names in parts:
        assert set(classes) == set(range(4))
        positions = store[:][:, 0, 0].tolist()
        assert [labels[i] for i in positions] == classes.tolist()
        assert [int(name[6:-4]) for name in names] == [numbers[i] for i in positions]


def test_without_frame_numbers_each_chip_is_an_object():
    names = [f"{name}.png" for name in ("ab", "cd", "ef", "gh", "ij", "kl")]
    first, second = split_labelled(labelled(names, [0, 0, 0, 1, 1, 1]), 0.3)
    assert sorted(second[1]) == [0, 1] and sorted(first[2] + second[2]) == names


def test_a_class_of_one_object_leaves_none_to_choose_by():
    with pytest.raises(DataError, match="all 2 labelled chips of val/ would be learned from; lower VAL_SHARE"):
        split_labelled(labelled(["Gotcha1.png", "Gotcha900.png"], [0, 1]), 0.5)
