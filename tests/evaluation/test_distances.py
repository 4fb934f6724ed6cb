"""Distances of features, against closed forms and independent computations in float64."""

import math

import pytest
import torch

from ddpm_cli.evaluation import distances
from ddpm_cli.evaluation.distances import frechet, inception_score, kid, precision_recall, squared_mmd
from ddpm_cli.evaluation.moments import Statistics, moments, together


def normal(count, width=8, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, width, dtype=torch.float64, generator=generator)


def distance(x, y):
    return frechet(moments(x).statistics, moments(y).statistics)


def test_moments_are_those_of_torch_however_they_are_divided():
    x = 1e4 + normal(3000, 20)
    whole = moments(x)
    torch.testing.assert_close(whole.statistics.sigma, torch.cov(x.T), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.mean, x.mean(0), rtol=1e-14, atol=0)
    parts = together(map(moments, torch.split(x, [1, 1999, 7, 993])))
    assert parts.count == 3000
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)


def test_a_covariance_needs_two_features():
    with pytest.raises(ValueError, match="two features"):
        _ = moments(normal(1)).statistics
    with pytest.raises(ValueError, match="no features"):
        together([])


def test_frechet_distance_of_gaussians_in_closed_form():
    """Of covariances that commute, the distance is that of the deviations along each axis."""
    turn = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.tensor([[0, 0.1, 1, 2, 3, 400], [0.5, 0, 1, 7, 2, 300]], dtype=torch.float64)
    first, second = (Statistics(normal(6)[:, i], turn @ torch.diag(s**2) @ turn.T) for i, s in enumerate((a, b)))
    expected = float((first.mu - second.mu).square().sum() + (a - b).square().sum())
    assert frechet(first, second) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("n", "m", "width"), [(30, 50, 100), (300, 200, 40)])
def test_frechet_distance_from_the_features_themselves(n, m, width):
    """The trace of the root is the nuclear norm of X Y^T / sqrt((n - 1)(m - 1)), with centred features in rows.

    The covariances of the first case are singular.
    """
    x, y = normal(n, width), 0.5 + normal(m, width, 1, 2.0)
    X, Y = x - x.mean(0), y - y.mean(0)
    shared = torch.linalg.svdvals(X @ Y.T / math.sqrt((n - 1) * (m - 1))).sum()
    traces = X.square().sum() / (n - 1) + Y.square().sum() / (m - 1)
    expected = float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * shared)
    assert distance(x, y) == pytest.approx(expected, rel=1e-12 if n > width else 1e-8)


def test_frechet_distance_of_a_set_and_itself_is_0_also_if_it_is_small():
    for x in (normal(200), normal(20, 64)):
        assert distance(x, x) < 1e-10
        assert distance(x, x + 3) == pytest.approx(9 * x.shape[1], rel=1e-9)


def test_other_numbers_of_features_are_refused():
    with pytest.raises(ValueError, match="4 and 8 features"):
        distance(normal(9, 4), normal(9, 8))


def test_mmd_is_the_mean_over_pairs():
    x, y = normal(5, 3), normal(7, 3, 1)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1) ** 3

    def mean(pairs):
        pairs = list(pairs)
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    among = [mean((a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y)]
    assert squared_mmd(x, y) == pytest.approx(sum(among) - 2 * mean((a, b) for a in x for b in y), rel=1e-12)
    with pytest.raises(ValueError, match="two features"):
        squared_mmd(x, y[:1])


def test_kid_is_unbiased():
    """Between halves of one distribution it is 0; of deviations 2 and 1 it is 3 / D (16 + 1 - 8)."""
    for scale, expected in ((1, 0), (2, 3 / 8 * 9)):
        found = torch.tensor([squared_mmd(normal(60, 8, 2 * i, scale), normal(60, 8, 2 * i + 1)) for i in range(300)])
        assert abs(float(found.mean()) - expected) < 3 * float(found.std()) / 300**0.5


def test_kid_averages_random_subsets():
    x, y = normal(400), normal(300, 8, 1, 1.5)
    found = kid(x, y, subsets=200, subset_size=50)
    assert found == kid(x, y, subsets=200, subset_size=50)
    assert found != kid(x, y, subsets=200, subset_size=50, seed=1)
    assert abs(found.mean - squared_mmd(x, y)) < 4 * found.deviation / 200**0.5
    whole = kid(x[:300], y, subsets=3)
    assert whole.mean == pytest.approx(squared_mmd(x[:300], y))
    assert whole.deviation < 1e-12


def test_inception_score_of_sure_and_unsure_networks():
    assert inception_score(torch.zeros(50, 7)) == pytest.approx((1, 0))
    classes = torch.arange(70) % 7
    assert inception_score(1000 * torch.nn.functional.one_hot(classes).double(), splits=1).mean == pytest.approx(7)
    assert inception_score(1000 * torch.nn.functional.one_hot(classes.sort()[0]).double(), splits=7).mean > 4
    with pytest.raises(ValueError, match="9 images"):
        inception_score(torch.zeros(9, 3))


def test_inception_score_by_its_definition():
    logits = normal(40, 5)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    terms = [float(q * (q / mean).log()) for row in p for q, mean in zip(row, p.mean(0), strict=True)]
    assert inception_score(logits, splits=1).mean == pytest.approx(math.exp(sum(terms) / 40))


def by_brute_force(real, fake, k):
    """Precision and recall from all distances."""
    radii = [torch.cdist(x, x).sort(1).values[:, k] for x in (real, fake)]
    between = torch.cdist(fake, real)
    return (
        (between <= radii[0]).any(1).double().mean().item(),
        (between <= radii[1][:, None]).any(0).double().mean().item(),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [(1024, 8192), (7, 13)])
def test_precision_and_recall_by_brute_force(monkeypatch, k, block):
    monkeypatch.setattr(distances, "_ROWS", block[0])
    monkeypatch.setattr(distances, "_COLUMNS", block[1])
    real, fake = normal(60, 4), normal(45, 4, 1, 1.3)
    found = precision_recall(real, fake, k)
    assert found == pytest.approx(by_brute_force(real, fake, k))
    assert 0.1 < found.precision < 0.95
    assert found.precision != found.recall


def test_precision_and_recall_of_equal_and_of_disjoint_sets():
    x = normal(50, 16)
    assert precision_recall(x, x[torch.randperm(50)]) == (1, 1)
    assert precision_recall(x, x + 1e6) == (0, 0)
    narrow = 1e-3 * normal(50, 16, 1)  # inside the wide set, of which it covers a part
    found = precision_recall(x, narrow)
    assert (found.precision, found.recall < 0.5) == (1, True)


def test_duplicates_have_no_distance():
    """Five copies of a feature have a ball of radius 0, in which each of them is."""
    x = (1e3 * normal(4, 300)).repeat(5, 1).float()
    assert precision_recall(x, x + 0.0) == (1, 1)
    assert precision_recall(x, x * (1 + 1e-3)) == (0, 0)
    assert distances._squared_distances(x.double(), x.double()).diagonal().abs().max() == 0


def test_precision_needs_more_than_k_features():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(normal(3), normal(9))


def test_progress_counts_all_pairs():
    seen = []
    precision_recall(normal(1500), normal(9), progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1] == (1500**2 + 81 + 1500 * 9,) * 2
