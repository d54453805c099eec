"""Stratified splits, and the partition of labelled rows into sites by label skew.

The share of each class that a site gets is drawn from Dirichlet(alpha), after Hsu et al., "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification", arXiv:1909.06335. There every site draws its own
mix of classes; here every class is dealt out to the sites, as in Yurochkin et al., "Bayesian Nonparametric Federated
Learning of Neural Networks", arXiv:1905.12022, so that every row is used exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from giva_core.errors import DataError

#: What every site gets at least: training rows, and a share of the rows of each split.
MIN_TRAIN_ROWS, MIN_SHARE = 8, 0.02
_DRAWS = 1000


def allocate(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers `(k,)` that add up to `total`, in proportion to `shares` `(k,)`; largest remainders round up."""
    exact = total * shares / shares.sum()
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def stratified_take(
    rows: np.ndarray, classes: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Take `count` of `rows` at random, in the proportions of their classes.

    Args:
        rows: Indices `(m,)` into `classes`.
        classes: Class ids of all rows `(n,)`.
        count: How many to take, at most m.
        rng: Source of the draws.

    Returns:
        The taken and the other rows, each in random order.
    """
    rows = rng.permutation(rows)
    taken = np.zeros(len(rows), dtype=bool)
    for class_id, quota in enumerate(allocate(count, np.bincount(classes[rows]))):
        taken[np.flatnonzero(classes[rows] == class_id)[:quota]] = True
    return rows[taken], rows[~taken]


def split(
    rows: np.ndarray,
    classes: np.ndarray,
    *,
    test_share: float,
    validation_share: float,
    train_examples: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Stratified `train`, `validation` and `test` rows, disjoint and in random order.

    Neither test and validation rows nor later draws from `rng` depend on `train_examples`, the size to which the
    training rows are cut (0: not at all).
    """
    test, rest = stratified_take(rows, classes, round(test_share * len(rows)), rng)
    validation, train = stratified_take(rest, classes, round(validation_share * len(rows)), rng)
    (own_rng,) = rng.spawn(1)
    if 0 < train_examples < len(train):
        train, _ = stratified_take(train, classes, train_examples, own_rng)
    return {"train": train, "validation": validation, "test": test}


def dirichlet_partition(
    classes: Mapping[str, np.ndarray], num_sites: int, alpha: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The site of every row, by label skew.

    For each class the sites' shares `(num_sites,)` are drawn from Dirichlet(alpha, ..., alpha). They hold for all
    splits, so that a site's test rows look like its training rows. All shares are drawn again until every site has at
    least 2 % of each split, and 8 training rows.

    Args:
        classes: Class ids `(n,)` by split, in random order; one split is called `train`.
        num_sites: Number of sites.
        alpha: Concentration; the smaller, the more the sites differ.
        rng: Source of the draws.

    Returns:
        Site numbers `(n,)` from 0, by split.

    Raises:
        DataError: 1000 draws did not give every site enough.
    """
    num_classes = 1 + max(int(ids.max()) for ids in classes.values())
    for _ in range(_DRAWS):
        shares = rng.dirichlet(np.full(num_sites, alpha), size=num_classes)
        sites = {name: _deal(ids, shares) for name, ids in classes.items()}
        if all(_enough(name, np.bincount(of, minlength=num_sites)) for name, of in sites.items()):
            return sites
    raise DataError(
        "no draw gave every site enough examples",
        got=f"{num_sites} sites, alpha {alpha:g}, {_DRAWS} draws",
        expected=f"at least {MIN_TRAIN_ROWS} training examples and {MIN_SHARE:.0%} of each split at every site",
        remedy="take fewer sites, a larger alpha or more training examples",
    )


def _deal(ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Site of each row `(n,)`: the rows of class c are dealt out in the proportions `shares[c]` `(num_sites,)`."""
    sites = np.empty(len(ids), dtype=np.int64)
    for class_id, share in enumerate(shares):
        rows = np.flatnonzero(ids == class_id)
        sites[rows] = np.repeat(np.arange(len(share)), allocate(len(rows), share))
    return sites


def _enough(name: str, counts: np.ndarray) -> bool:
    floor = MIN_TRAIN_ROWS if name == "train" else 1
    return bool(counts.min() >= max(floor, MIN_SHARE * counts.sum()))
