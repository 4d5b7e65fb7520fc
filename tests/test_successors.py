"""EAOA and EOAL: each loss, score, clustering and query against a plain computation."""

import math
import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from test_strategies import best, only_read, pool, seeded, softmax
from torch.nn.functional import cross_entropy

import models
from models.objective import Batch
from query_strategies import PoolOutputs, clustering, eaoa, eoal, select

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it lacks an approximate search
    from finch import FINCH

KNOWN, FEATURES = 3, 4


def random(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


KINDS = {  # of the images in a batch: K is an invalid one
    "both": [0, 2, KNOWN, 1, KNOWN, 1, 1],
    "labeled": [0, 2, 1, 1],
    "invalid": [KNOWN, KNOWN],
    "none": [],
}


def lse(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def mean(values):
    return sum(values) / len(values) if values else 0


# ---- losses ------------------------------------------------------------------------------------


def plain_energy_loss(logits, targets):
    above, below = [], []
    for row, target in zip(logits.tolist(), targets, strict=True):
        energy = -lse(row[:KNOWN])
        if target < KNOWN:
            above.append(max(0, energy + 25) ** 2)
        else:
            below.append(max(0, -7 - energy) ** 2)
    return mean(above) + mean(below)


def plain_open_set_loss(heads, targets, any_invalid):
    own, largest, is_class, is_not = [], [], [], []
    for (first, second), target in zip(heads.tolist(), targets, strict=True):
        pairs = [softmax(pair) for pair in zip(first, second, strict=True)]
        no, yes = ([-math.log(pair[i] + 1e-8) for pair in pairs] for i in (0, 1))
        if target < len(pairs):
            own.append(yes[target])
            largest.append(max((no[c] for c in range(len(no)) if c != target), default=0))
        else:
            is_class.append(0.8 * mean(yes))
            is_not.append(0.8 * mean(no))
    if not any_invalid:
        return 0.5 * (mean(own) + mean(largest))
    return 0.5 * (0.2 * mean(own) + 0.2 * mean(largest) + mean(is_class) + mean(is_not))


def plain_cluster_loss(features, clusters, centers):
    pulls, pushes = [], []
    for f, c in zip(features.tolist(), clusters.tolist(), strict=True):
        d = [math.dist(f, center) for center in centers.tolist()]
        pulls.append(d[c])
        others = [math.exp(d[c] - d[o]) for o in range(len(d)) if o != c]
        pushes.append(math.log(1 + sum(others)))
    return 0.1 * mean(pulls) + mean(pushes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_energy_loss_against_a_loop_and_finite_differences(seed, kind):
    targets = torch.tensor(KINDS[kind], dtype=torch.int64)
    logits = random(seed, len(targets), KNOWN + 1, scale=12).requires_grad_()
    loss = eaoa.energy_loss(logits, targets)
    assert loss.item() == pytest.approx(plain_energy_loss(logits, KINDS[kind]))
    assert torch.autograd.gradcheck(lambda a: eaoa.energy_loss(a, targets), logits)


@pytest.mark.parametrize("known", [1, KNOWN])
@pytest.mark.parametrize("any_invalid", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_open_set_loss_against_a_loop_and_finite_differences(kind, any_invalid, known):
    targets = [known if target == KNOWN else min(target, known - 1) for target in KINDS[kind]]
    if not any_invalid:
        targets = [target for target in targets if target < known]
    heads = random(len(kind), len(targets), 2, known, scale=2).requires_grad_()

    def loss_of(heads):
        images = torch.tensor(targets, dtype=torch.int64)
        return eoal.open_set_loss(heads, images, any_invalid)

    plain = plain_open_set_loss(heads, targets, any_invalid)
    assert loss_of(heads).item() == pytest.approx(plain, abs=1e-7)
    assert torch.autograd.gradcheck(loss_of, heads)


@pytest.mark.parametrize("centers", [1, 5])
@pytest.mark.parametrize("images", [0, 1, 6])
def test_cluster_loss_against_a_loop_and_finite_differences(images, centers):
    features = random(1, images, FEATURES).requires_grad_()
    clusters = torch.randint(centers, (images,), generator=seeded(2))
    centers = random(3, centers, FEATURES)
    loss = eoal.cluster_loss(features, clusters, centers)
    assert loss.item() == pytest.approx(plain_cluster_loss(features, clusters, centers))
    assert torch.autograd.gradcheck(lambda f: eoal.cluster_loss(f, clusters, centers), features)


def test_an_image_on_its_center_has_a_finite_gradient():
    features = random(0, 2, FEATURES).requires_grad_()
    eoal.cluster_loss(features, torch.tensor([0, 1]), features.detach()).backward()
    assert features.grad.isfinite().all()


# ---- objectives ---------------------------------------------------------------------------------


INVALID = [9, 3, 9, *range(15, 33)]


class Training:
    """A linear network with a method's objective on its features."""

    def __init__(self, method):
        device, purposes = torch.device("cpu"), iter(range(9))
        self.network = models.create("resnet20", KNOWN + 1, FEATURES, seeded(0), device)
        self.inputs = torch.randn(40, self.network.feature_dim, generator=seeded(1))
        self.targets = torch.randint(KNOWN, (40,), generator=seeded(2))
        invalid = torch.tensor(INVALID)
        self.targets[invalid] = KNOWN
        self.objective = method.objective(
            self.network, [0.5] * (KNOWN + 1), invalid, lambda *_: seeded(next(purposes))
        )
        self.layer = torch.nn.Linear(FEATURES, FEATURES)

    def features_of(self, indices):
        with torch.inference_mode():
            return self.layer(self.inputs[indices])

    def batch(self, index):
        features = self.layer(self.inputs[index])
        return Batch(index, features, self.network.fc(features), self.targets[index])


@pytest.mark.parametrize("kind", ["both", "labeled", "invalid"])
@pytest.mark.parametrize("method", [eaoa, eoal])
def test_objective_is_the_sum_of_its_parts(method, kind):
    """PROTOCOL's means count once per batch, beside the mean of the cross-entropy."""
    training = Training(method)
    objective, is_invalid = training.objective, training.targets == KNOWN
    objective.before_epoch(training.features_of)
    wanted = {"both": is_invalid | True, "labeled": ~is_invalid, "invalid": is_invalid}[kind]
    batch = training.batch(wanted.nonzero()[:, 0])
    expected = cross_entropy(batch.logits / 0.5, batch.targets)
    if method is eaoa:
        expected = expected + 0.01 * eaoa.energy_loss(batch.logits, batch.targets)
    else:
        heads = objective.heads(batch.features)
        expected = expected + eoal.open_set_loss(heads, batch.targets, True)
    if method is eoal and kind != "labeled":
        features = training.features_of(is_invalid.nonzero()[:, 0])
        clusters = clustering.clusters(features, KNOWN)
        centers = torch.stack([features[clusters == c].mean(0) for c in range(KNOWN)])
        of_invalid = batch.features[batch.targets == KNOWN]
        expected = expected + 0.1 * eoal.cluster_loss(of_invalid, clusters, centers)
    assert objective(batch).item() == pytest.approx(len(batch.index) * expected.item(), rel=1e-5)


# ---- EAOA's query ------------------------------------------------------------------------------


def test_k_follows_the_precisions():
    assert eaoa.adapted_k(()) == 5
    assert eaoa.adapted_k((0.66, 0.9, 0.6, 0.65, 0.55)) == 7
    assert eaoa.adapted_k((0.5,) * 9) == 1
    assert eaoa.adapted_k((*(0.0,) * 9, 1.0)) == 2


def plain_counts(pool, features, targets, known, neighbors):
    """By sorting, image by image; all distances differ."""
    sizes = [targets.count(c) for c in range(known + 1)]
    counts = [[0.0] * (known + 1) for _ in pool]
    unit = [[x / math.hypot(*row) for x in row] for row in pool]
    for row, c in zip(features, targets, strict=True):
        image = [x / math.hypot(*row) for x in row]
        for j in sorted(range(len(unit)), key=lambda j: math.dist(unit[j], image))[:neighbors]:
            counts[j][c] += 1 / (sizes[c] / (sum(sizes[:known]) / known))
    return counts


@pytest.mark.parametrize("neighbors", [3, 250])
@pytest.mark.parametrize("invalid", [0, 7])
def test_neighbor_counts_against_sorting(invalid, neighbors, monkeypatch):
    monkeypatch.setattr(eaoa, "BLOCK", 100)
    monkeypatch.setattr(eaoa, "NEIGHBORS", neighbors)
    targets = [0, 0, 2, 0, 2, 2, 2, 2, *[3] * invalid]  # class 1 has no images
    images, features = random(0, 40, 2).float(), random(1, len(targets), 2).float()
    counts = eaoa.neighbor_counts(images, features, torch.tensor(targets), 3, seeded(0))
    plain = plain_counts(images.tolist(), features.tolist(), targets, 3, neighbors)
    torch.testing.assert_close(counts, torch.tensor(plain, dtype=torch.float64))


def plain_query(outputs, count, draws):
    """PROTOCOL's lines, one after the other."""
    known, images = outputs.num_known, range(outputs.size)

    def posterior(values, pick):
        seed = int(torch.randint(2**31, (), generator=draws))
        low, high = min(values), max(values)
        column = np.array([[(value - low) / (high - low)] for value in values])
        mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
        mixture.fit(column)
        component = pick(range(2), key=lambda i: mixture.means_[i, 0])
        return mixture.predict_proba(column)[:, component].tolist()

    def softplus(x):
        return math.log1p(math.exp(x))

    p1 = posterior([-lse(a[:known]) + softplus(a[known]) for a in outputs.logits.tolist()], min)
    torch.randperm(
        outputs.size, generator=draws
    )  # for equally near images, of which there are none
    invalid = len(outputs.invalid_features)
    rows = [*outputs.labeled_features.tolist(), *outputs.invalid_features.tolist()]
    targets = outputs.labeled_targets.tolist() + [known] * invalid
    named = plain_counts(outputs.features.tolist(), rows, targets, known, eaoa.NEIGHBORS)
    p2 = posterior([-lse(n[:known]) + (softplus(n[known]) if invalid else 0) for n in named], min)
    clean = [a * b for a, b in zip(p1, p2, strict=True)]
    z = outputs.classifier_logits.tolist()
    info = posterior([math.log(1 - max(softmax(row))) for row in z], max)

    k = 5
    for precision in outputs.precisions:
        k = k + 1 if precision > 0.65 else max(1, k - 1) if precision < 0.55 else k
    share, chosen = math.ceil(count / known), []
    for c in range(known):
        of_class = [i for i in images if z[i].index(max(z[i])) == c]
        top = [of_class[i] for i in best([clean[i] for i in of_class], k * share, draws)]
        chosen += [top[i] for i in best([info[i] for i in top], share, draws)]
    order = torch.randperm(len(chosen), generator=draws).tolist()
    chosen = [chosen[i] for i in order][:count]
    rest = best([-1 if i in chosen else clean[i] for i in images], count - len(chosen), draws)
    return chosen + rest


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # ten iterations
@pytest.mark.parametrize("invalid", [0, 12])
@pytest.mark.parametrize("seed", range(6))
def test_eaoa_against_a_transcription_of_the_protocol(seed, invalid, monkeypatch):
    monkeypatch.setattr(eaoa, "NEIGHBORS", 15)
    outputs = pool(seed, 60, invalid=invalid)._replace(precisions=(0.1,) * seed)
    if seed % 2:  # no image is predicted as class 0
        outputs.classifier_logits[:, 0] = -9
    given = only_read("EAOA", outputs)
    for count in (1, 20, 50):
        expected = plain_query(given, count, seeded(seed))
        assert select("EAOA", given, count, seeded(seed)).tolist() == expected


# ---- FINCH -------------------------------------------------------------------------------------


def same_clusters(labels, other):
    pairs = set(zip(labels.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(other.tolist()))


def vectors(seed, size, kind):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(size, 8))
    if kind == "clustered":
        drawn = 0.3 * drawn + rng.normal(size=(12, 8))[rng.integers(12, size=size)]
    elif kind == "positive":
        drawn = np.abs(drawn)
    return torch.from_numpy(drawn.astype(np.float32))


VECTORS = ["normal", "clustered", "positive"]


@pytest.mark.parametrize("features", [2, 8])  # of 2, many are nearer than float32 can tell
def test_first_neighbors_against_the_full_matrix(features, monkeypatch):
    monkeypatch.setattr(clustering, "BLOCK", 1000)
    rows = vectors(0, 300, "clustered")[:, :features]
    unit = torch.nn.functional.normalize(rows.double())
    nearest = torch.cdist(unit, unit).fill_diagonal_(math.inf).argmin(1)
    assert clustering.first_neighbors(rows).equal(nearest)


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("seed", range(2))
def test_clusters_are_the_librarys(kind, seed):
    rows = vectors(seed, 200, kind)
    nearest = clustering.first_neighbors(rows).numpy()
    found = clustering.partitions(rows)
    for count in (2, 7, 40, len(set(found[0].tolist()))):
        partitions, sizes, requested = FINCH(rows.numpy(), count, nearest, verbose=False)
        assert [each.max() + 1 for each in found] == sizes
        assert all(map(np.array_equal, found, partitions.T))
        clusters = clustering.clusters(rows, count).numpy()
        assert same_clusters(clusters, requested)
        assert set(clusters.tolist()) == set(range(count))


def test_few_or_equal_vectors_have_clusters(capfd):
    zeros, ones = torch.zeros(5, 3), torch.ones(5, 3)
    for rows in (ones[:1], ones[:2], ones, zeros, zeros[:1], torch.cat([zeros, ones]), -ones):
        for count in (1, 2, 50):
            labels = clustering.clusters(rows, count)
            assert labels.shape == rows.shape[:1]
            assert set(labels.tolist()) == set(range(labels.max() + 1))
            assert labels.max() < count
    assert capfd.readouterr() == ("", "")


def test_going_down_to_few_clusters_takes_less_than_a_second():
    """finch.FINCH takes 10 s: of these vectors it merges 1,300 clusters, one pair at a time."""
    rows = torch.rand(6000, 128, generator=seeded(0)) - 0.5
    labels = np.arange(6000) % 1300
    begin = time.process_time()
    merged = clustering.merge(rows.clamp(min=0).numpy(), labels, 20)
    assert time.process_time() - begin < 3  # on a busy machine
    assert len(set(merged.tolist())) == 20


# ---- EOAL's query ------------------------------------------------------------------------------


def plain_score(heads, distances):
    def entropy(probabilities):
        return -sum(p * math.log(p) for p in probabilities if p)

    pairs = [softmax(pair) for pair in zip(*heads, strict=True)]
    value = mean([entropy(pair) for pair in pairs]) / math.log(2)
    if distances and len(distances) > 1:
        value -= entropy(softmax([-d for d in distances])) / math.log(len(distances))
    return value


@pytest.mark.parametrize("centers", [None, 1, 4])
@pytest.mark.parametrize("known", [1, 3])
def test_score_against_a_loop(known, centers):
    heads = random(0, 9, 2, known, scale=3)
    distances = None if centers is None else random(1, 9, centers).abs()
    rows = [None] * 9 if centers is None else distances.tolist()
    plain = [plain_score(*both) for both in zip(heads.tolist(), rows, strict=True)]
    assert eoal.score(heads, distances).tolist() == pytest.approx(plain)


def plain_rounds(cluster, count):
    number, chosen = max(cluster) + 1, []
    while len(chosen) < count:
        for c in range(number):
            waiting = [i for i in range(len(cluster)) if cluster[i] == c and i not in chosen]
            chosen += waiting[: count // number]
    return chosen[:count]


@pytest.mark.parametrize("seed", range(4))
def test_rounds_over_the_clusters_against_a_loop(seed):
    cluster = [*torch.randint(5, (40,), generator=seeded(seed)).tolist(), *range(5)]
    for count in (5, 6, 17, 45):
        rounds = eoal.in_rounds(torch.tensor(cluster), count)
        assert rounds.tolist() == plain_rounds(cluster, count)


def open_set_outputs(unknown=(), size=40):
    """Four directions, ten images each; image i of a direction is the i-th surest by the heads."""
    angle = torch.arange(size) % 4 * math.pi / 2 + 0.001 * (torch.arange(size) // 4)
    features = torch.stack([angle.cos(), angle.sin(), torch.arange(size) // 4 + 0.0], 1)
    features[:, 2] = 0.01 * (10 - features[:, 2])
    logits = torch.zeros(size, 3)
    logits[list(unknown), 2] = 1
    network = models.create("resnet20", 3, 3, seeded(0), torch.device("cpu"))
    made = eoal.objective(network, None, torch.arange(0), lambda *_: seeded(0))
    with torch.no_grad():  # both classes' heads see the third feature alone
        made.weight.zero_()[2:, 2] = 100
    return PoolOutputs(size, 2, features, logits, objective=made)


def test_eoal_takes_equally_many_of_the_lowest_scores_from_each_cluster():
    queried = select("EOAL", open_set_outputs(), 8, seeded(0)).tolist()
    assert sorted(queried) == [*range(8)]  # the two surest of each direction
    queried = select("EOAL", open_set_outputs(), 10, seeded(0)).tolist()
    assert {*range(8)} < set(queried)


def test_eoal_prefers_images_predicted_as_known():
    unknown = [*range(20), *range(25, 40)]
    queried = select("EOAL", open_set_outputs(unknown), 8, seeded(0)).tolist()
    assert set(queried[:5]) == {*range(20, 25)}
    assert set(queried[5:]) < {0, 1, 2, 3}  # then the lowest scores of the others


def test_eoal_queries_fewer_images_than_there_are_clusters():
    for count in (1, 2, 3):
        queried = select("EOAL", open_set_outputs(), count, seeded(0)).tolist()
        assert set(queried) <= {0, 1, 2, 3}
