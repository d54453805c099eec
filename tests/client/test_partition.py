"""Splits and label skew: nothing is lost, nothing is used twice, and proportions hold."""

from __future__ import annotations

import numpy as np
import pytest

from client.partition import allocate, dirichlet_partition, split, stratified_take
from giva_core.errors import DataError


def skewed(num_rows: int, seed: int = 0) -> np.ndarray:
    """Class ids `(num_rows,)` of five classes of very different size."""
    shares = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(5), allocate(num_rows, shares)))


def cut(classes: np.ndarray, train_examples: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = np.arange(len(classes))
    return split(rows, classes, test_share=0.2, validation_share=0.1, train_examples=train_examples, rng=rng)


def test_allocate_adds_up_and_gives_the_largest_remainders_first() -> None:
    np.testing.assert_array_equal(allocate(10, np.array([1.0, 1.0, 1.0])), [4, 3, 3])
    np.testing.assert_array_equal(allocate(7, np.array([0.5, 0.3, 0.2])), [4, 2, 1])  # 3.5, 2.1, 1.4
    np.testing.assert_array_equal(allocate(0, np.array([2, 3])), [0, 0])
    for total in range(60):
        shares = np.random.default_rng(total).dirichlet(np.full(7, 0.3))
        counts = allocate(total, shares)
        assert counts.sum() == total and np.abs(counts - total * shares).max() < 1


def test_stratified_take_has_the_proportions_of_the_whole() -> None:
    classes = skewed(1000)
    taken, rest = stratified_take(np.arange(1000), classes, 100, np.random.default_rng(1))
    np.testing.assert_array_equal(np.bincount(classes[taken]), [50, 25, 15, 8, 2])
    np.testing.assert_array_equal(np.sort(np.concatenate([taken, rest])), np.arange(1000))


def test_split_is_disjoint_complete_and_random() -> None:
    classes = skewed(997)
    rows = cut(classes)
    assert {name: len(part) for name, part in rows.items()} == {"train": 698, "validation": 100, "test": 199}
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(997))
    assert not np.array_equal(rows["test"], cut(classes, seed=1)["test"])
    assert np.any(np.diff(rows["train"]) < 0)


def test_the_number_of_training_examples_changes_no_test_row() -> None:
    classes = skewed(997)
    few, all_of_them = cut(classes, train_examples=100), cut(classes)
    np.testing.assert_array_equal(few["test"], all_of_them["test"])
    np.testing.assert_array_equal(few["validation"], all_of_them["validation"])
    assert len(few["train"]) == 100 and set(few["train"]) <= set(all_of_them["train"])
    np.testing.assert_array_equal(np.bincount(classes[few["train"]]), [50, 25, 15, 8, 2])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 100.0])
def test_every_site_has_enough_and_its_test_rows_look_like_its_training_rows(alpha: float) -> None:
    classes = {"train": skewed(1400), "validation": skewed(200), "test": skewed(400)}
    sites = dirichlet_partition(classes, 3, alpha, np.random.default_rng(0))
    for name, ids in classes.items():
        assert sites[name].shape == ids.shape and set(sites[name]) == {0, 1, 2}
        assert np.bincount(sites[name]).min() >= 0.02 * len(ids)
    for site in range(3):
        train, test = (np.bincount(classes[n][sites[n] == site], minlength=5) for n in ("train", "test"))
        assert np.abs(train * 400 / 1400 - test).max() < 2  # rounding only


def test_a_smaller_alpha_makes_sites_differ_more() -> None:
    classes = {"train": skewed(2000)}

    def unevenness(alpha: float) -> float:
        sites = dirichlet_partition(classes, 4, alpha, np.random.default_rng(3))["train"]
        counts = np.array([np.bincount(classes["train"][sites == site], minlength=5) for site in range(4)])
        return float((counts / counts.sum(axis=1, keepdims=True)).std(axis=0).sum())

    assert unevenness(0.2) > 2 * unevenness(20.0)


def test_the_same_seed_gives_the_same_sites() -> None:
    classes = {"train": skewed(500)}
    first, again, other = (dirichlet_partition(classes, 4, 0.5, np.random.default_rng(s))["train"] for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_too_many_sites_for_the_examples() -> None:
    with pytest.raises(DataError, match=r"4 sites, alpha 0\.5, 1000 draws.*fewer sites"):
        dirichlet_partition({"train": skewed(31)}, 4, 0.5, np.random.default_rng(0))
