"""Who is labeled, invalid or in the pool, round after round; the two measures; class numbering."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from datasets import DataError, digits, open_set

CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_sound(split, known, drop_unknown):
    """What holds for any split, whatever was queried before."""
    labeled, invalid, pool = (set(indices.tolist()) for indices in split)
    for indices in split:
        assert indices.dtype == torch.int64
        assert indices.tolist() == sorted(set(indices.tolist()))
    assert labeled | invalid | pool == set(range(len(known)))
    assert not labeled & pool
    assert not labeled & invalid
    assert known[split.labeled].all()
    assert not known[split.invalid].any()
    assert not invalid & pool if drop_unknown else invalid <= pool


@st.composite
def open_sets(draw):
    """Who is known among 3 to 80 images, at least two of them, and a percentage that fits."""
    known = draw(st.lists(st.booleans(), min_size=3, max_size=80).filter(lambda k: sum(k) >= 2))
    smallest = -(-100 // sum(known))  # labels one image
    return torch.tensor(known), draw(st.integers(smallest, 99))


@settings(deadline=None, max_examples=60)
@given(open_sets(), st.booleans(), st.integers(0, 2**40), st.lists(st.integers(1, 30), max_size=10))
def test_ten_rounds_lose_and_mix_up_nobody(open_set_problem, drop_unknown, seed, batches):
    known, percent = open_set_problem
    draws = seeded(seed)
    split = open_set.initial_split(known, percent, draws)
    assert_sound(split, known, drop_unknown)
    assert len(split.labeled) == int(known.sum()) * percent // 100
    assert len(split.invalid) == 0
    seen = set()
    for batch in batches:
        if len(split.pool) == 0:
            break
        queried = split.pool[torch.randperm(len(split.pool), generator=draws)[:batch]]
        known_queried = {i for i in queried.tolist() if known[i]}
        known_pool = {i for i in split.pool.tolist() if known[i]}
        assert open_set.precision(queried, known) == len(known_queried) / len(queried)
        labeled = set(split.labeled.tolist())
        expected = len(known_queried | labeled) / len(known_pool | labeled)
        assert open_set.recall(split, queried, known) == expected

        before = [indices.clone() for indices in split]
        after = open_set.update(split, queried, known, drop_unknown)
        assert all(torch.equal(a, b) for a, b in zip(split, before, strict=True))
        split = after
        seen |= set(queried.tolist())
        assert_sound(split, known, drop_unknown)
        assert set(split.labeled.tolist()) == labeled | known_queried
        assert set(split.invalid.tolist()) == {i for i in seen if not known[i]}
    # Whatever came before, recall is 1 once all the rest is queried.
    if len(split.pool):
        assert open_set.recall(split, split.pool, known) == 1.0


def test_an_unknown_image_queried_twice_is_invalid_once():
    known = torch.tensor([True, True, False, False])
    split = open_set.initial_split(known, 50, seeded(0))
    for queried in ([2], [2, 3], [3, 2]):
        split = open_set.update(split, torch.tensor(queried), known, drop_unknown=False)
    assert split.invalid.tolist() == [2, 3]
    assert {2, 3} <= set(split.pool.tolist())


def test_initial_count_is_rounded_down():
    known = torch.arange(1000) % 3 == 0  # 334 known images
    for percent, count in ((8, 26), (0.3, 1), (99.9, 333), (50, 167)):
        assert len(open_set.initial_split(known, percent, seeded(0)).labeled) == count


def test_initial_split_depends_on_the_seed_alone():
    known = torch.arange(2000) % 5 == 0
    first = open_set.initial_split(known, 10, seeded(1))
    torch.manual_seed(12345)  # what was drawn elsewhere plays no part
    again = open_set.initial_split(known, 10, seeded(1))
    other = open_set.initial_split(known, 10, seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.labeled, other.labeled)


def test_initial_split_draws_every_known_image_alike():
    known = torch.arange(50) % 5 == 0  # 10 known images, 3 of them drawn
    counts = torch.zeros(50)
    for seed in range(3000):
        counts[open_set.initial_split(known, 30, seeded(seed)).labeled] += 1
    assert (counts[known] / 3000 - 0.3).abs().max() < 0.05  # 6 standard deviations
    assert counts[~known].sum() == 0


@pytest.mark.parametrize("percent", [0.01, 100.0])
def test_a_start_with_nothing_labeled_or_nothing_left_is_refused(percent):
    known = torch.arange(1000) % 2 == 0
    with pytest.raises(DataError, match=r"--init-percent") as error:
        open_set.initial_split(known, percent, seeded(0))
    assert "\n" not in str(error.value)


# ---- classes -----------------------------------------------------------------------------------


def images_of(images):
    """The pixels of Images as the loader gave them, (N, H, W, 3) uint8."""
    return images.pixels[:-1].view(images.count, images.height, images.width, 3).numpy()


@pytest.fixture(scope="module")
def loaded():
    train, train_labels, test, test_labels = digits.load(None)
    return train, torch.from_numpy(train_labels), test, torch.from_numpy(test_labels)


@pytest.mark.parametrize("known_class", [1, 4, 9])
@pytest.mark.parametrize("class_seed", [None, 0, 1, 2])
def test_classes_are_renumbered_alike_in_training_and_test(loaded, known_class, class_seed):
    train, train_labels, test, test_labels = loaded
    data = datasets.create("digits", "", known_class, class_seed, CPU)
    assert (images_of(data.train) == train).all()
    number = {}  # of each label
    for label in range(10):
        (number[label],) = data.targets[train_labels == label].unique().tolist()
    numbers = sorted(number.values())
    assert numbers == [*range(known_class), *[known_class] * (10 - known_class)]
    assert torch.equal(data.known, data.targets < known_class)
    if class_seed is None:
        assert number == {label: min(label, known_class) for label in range(10)}
    expected = [number[label] for label in test_labels.tolist()]
    assert data.test_targets.tolist() == [n for n in expected if n < known_class]
    is_known = torch.tensor(expected) < known_class
    assert (images_of(data.test) == test[is_known.numpy()]).all()


@pytest.mark.parametrize("class_seed", range(4))
def test_known_are_the_first_classes_of_the_shuffled_order(loaded, class_seed):
    order = np.random.default_rng(class_seed).permutation(10).tolist()
    data = datasets.create("digits", "", 4, class_seed, CPU)
    for number, label in enumerate(order):
        assert (data.targets[loaded[1] == label] == min(number, 4)).all()


@pytest.mark.parametrize("known_class", [0, 10, 11])
def test_no_known_or_no_unknown_class_is_refused(known_class):
    with pytest.raises(DataError, match=r"choose 1 to 9$") as error:
        datasets.create("digits", "", known_class, None, CPU)
    assert "\n" not in str(error.value)


# ---- the random baseline -----------------------------------------------------------------------

# Recall of `random` in rounds 0 to 9 of CIFAR-100 with 20 known classes, 8 percent labeled at the
# start and 1,500 images per query.
PUBLISHED = "0.1094 0.1364 0.1628 0.1874 0.2120 0.2359 0.2595 0.2840 0.3061 0.3279"
COUNTED = {  # expected values: who stays in the pool decides them, no network plays a part
    "unknown stays": "0.1080 0.1354 0.1621 0.1880 0.2133 0.2380 0.2620 0.2854 0.3081 0.3302",
    "unknown removed": "0.1080 0.1361 0.1641 0.1922 0.2202 0.2483 0.2763 0.3044 0.3324 0.3605",
}


@pytest.mark.parametrize("reading", COUNTED)
def test_random_baseline_follows_from_counting(reading):
    known = torch.arange(50_000) % 100 < 20
    curves = []
    for seed in range(4):
        draws = seeded(seed)
        split = open_set.initial_split(known, 8, draws)
        curve = []
        for _ in range(10):
            queried = split.pool[torch.randperm(len(split.pool), generator=draws)[:1500]]
            curve.append(open_set.recall(split, queried, known))
            split = open_set.update(split, queried, known, reading == "unknown removed")
        curves.append(curve)
    mean = torch.tensor(curves).mean(0)

    def largest_difference(numbers):
        return (mean - torch.tensor([float(number) for number in numbers.split()])).abs().max()

    assert largest_difference(COUNTED[reading]) < 0.01
    assert (largest_difference(PUBLISHED) < 0.01) == (reading == "unknown stays")


def test_decimal_percentages_are_taken_as_typed():
    known = torch.arange(500) < 375
    split = open_set.initial_split(known, 18.4, torch.Generator().manual_seed(0))
    assert len(split.labeled) == 69  # 375 * 18.4 / 100 is 68.99999999999999 in binary
