"""Who is labeled, invalid or in the pool, round after round, against plain lists; the measures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import seeded

import datasets
from datasets import KnownClasses, digits, open_set
from errors import UserError


@st.composite
def problems(draw):
    """Who is known among 3 to 80 images, at least two of them, and a percentage that fits."""
    known = draw(st.lists(st.booleans(), min_size=3, max_size=80).filter(lambda k: sum(k) >= 2))
    smallest = -(-100 // sum(known))  # labels one image
    return known, draw(st.integers(smallest, 99))


@settings(deadline=None, max_examples=60)
@given(problems(), st.booleans(), st.integers(0, 2**40), st.lists(st.integers(1, 30), max_size=10))
def test_rounds_equal_plain_lists(problem, drop_unknown, seed, batches):
    is_known, percent = problem
    known, draws = torch.tensor(is_known), seeded(seed)
    split = open_set.initial_split(known, percent, draws)
    labeled, invalid = split.labeled.tolist(), []
    pool = [i for i in range(len(known)) if i not in labeled]
    assert [indices.tolist() for indices in split] == [sorted(labeled), [], pool]
    assert len(labeled) == sum(is_known) * percent // 100
    assert all(is_known[i] for i in labeled)
    for batch in batches:
        if not pool:
            break
        queried = split.pool[torch.randperm(len(pool), generator=draws)[:batch]]
        found = [i for i in queried.tolist() if is_known[i]]
        others = [i for i in queried.tolist() if not is_known[i]]
        findable = sum(is_known[i] for i in pool)
        assert open_set.precision(queried, known) == len(found) / len(queried)
        recall = (len(found) + len(labeled)) / (findable + len(labeled))
        assert open_set.recall(split, queried, known) == recall

        split = open_set.update(split, queried, known, drop_unknown)
        labeled, invalid = sorted(labeled + found), invalid + others
        pool = [i for i in pool if i not in found + others * drop_unknown]
        assert [indices.tolist() for indices in split] == [labeled, invalid, pool]
        assert all(indices.dtype == torch.int64 for indices in split)


@pytest.mark.parametrize("count, percent, labeled", [(334, 8, 26), (375, 18.4, 69)])
def test_initial_count_is_rounded_down(count, percent, labeled):
    """The percentage is taken as typed: in binary, 375 * 18.4 / 100 is 68.99999999999999."""
    known = torch.arange(1000) < count
    assert len(open_set.initial_split(known, percent, seeded(0)).labeled) == labeled


def test_initial_split_draws_every_known_image_alike():
    """Its generator alone decides: what was drawn elsewhere plays no part."""
    known = torch.arange(50) % 5 == 0  # 10 known images, 3 of them drawn
    first, counts = open_set.initial_split(known, 30, seeded(0)).labeled, torch.zeros(50)
    for seed in range(3000):
        labeled = open_set.initial_split(known, 30, seeded(seed)).labeled
        assert seed > 0 or labeled.equal(first)
        counts[labeled] += 1
    assert (counts[known] / 3000 - 0.3).abs().max() < 0.05  # 6 standard deviations
    assert counts[~known].sum() == 0


@pytest.mark.parametrize("percent", [0.01, 100.0])
def test_a_start_with_nothing_labeled_or_nothing_left_is_refused(percent):
    with pytest.raises(UserError, match="--init-percent"):
        open_set.initial_split(torch.arange(1000) % 2 == 0, percent, seeded(0))


@pytest.mark.parametrize(
    "which, order, num_known",
    [
        (KnownClasses(4), range(10), 4),  # as published
        (KnownClasses(9, seed=1), np.random.default_rng(1).permutation(10), 9),
        (KnownClasses(4, names=["7", "2"]), [2, 7, 0, 1, 3, 4, 5, 6, 8, 9], 2),
        (KnownClasses(2, order="5 3 9"), [5, 3, 9, 0, 1, 2, 4, 6, 7, 8], 2),  # a protocol's
        (KnownClasses(2, seed=1, order="5 3 9"), np.random.default_rng(1).permutation(10), 2),
    ],
)
def test_classes_are_renumbered_alike_in_training_and_test(which, order, num_known):
    raw, data = digits.load(None), datasets.create("digits", None, torch.device("cpu"), which)
    assert (data.num_known, data.classes) == (num_known, tuple(map(str, order)))
    number = {label: min(place, num_known) for place, label in enumerate(order)}
    assert data.targets.tolist() == [number[label] for label in raw.train_labels]
    assert torch.equal(data.known, data.targets < num_known)
    test = np.array([number[label] for label in raw.test_labels])
    tested = test < num_known
    assert data.test_targets.tolist() == test[tested].tolist()
    for images, expected in ((data.train, raw.train), (data.test, raw.test[tested])):
        assert (images.pixels[:-1].view(expected.shape).numpy() == expected).all()


# Recall of `random` in rounds 0 to 9 of CIFAR-100 with 20 known classes, 8 percent labeled at the
# start and 1,500 images per query.
PUBLISHED = (0.1094, 0.1364, 0.1628, 0.1874, 0.2120, 0.2359, 0.2595, 0.2840, 0.3061, 0.3279)
COUNTED = {  # expected values: who stays in the pool decides them, no network plays a part
    "stays": (0.1080, 0.1354, 0.1621, 0.1880, 0.2133, 0.2380, 0.2620, 0.2854, 0.3081, 0.3302),
    "removed": (0.1080, 0.1361, 0.1641, 0.1922, 0.2202, 0.2483, 0.2763, 0.3044, 0.3324, 0.3605),
}


@pytest.mark.parametrize("unknown", COUNTED)
def test_random_baseline_follows_from_counting(unknown):
    known = torch.arange(50_000) % 100 < 20
    curves = torch.zeros(4, 10, dtype=torch.float64)
    for seed in range(4):
        draws = seeded(seed)
        split = open_set.initial_split(known, 8, draws)
        for number in range(10):
            queried = split.pool[torch.randperm(len(split.pool), generator=draws)[:1500]]
            curves[seed, number] = open_set.recall(split, queried, known)
            split = open_set.update(split, queried, known, unknown == "removed")
    mean = curves.mean(0).numpy()
    assert np.abs(mean - COUNTED[unknown]).max() < 0.01
    assert (np.abs(mean - PUBLISHED).max() < 0.01) == (unknown == "stays")
