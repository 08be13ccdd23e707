"Intervals and p-values against scipy, against simulation, and against themselves."
import json

import numpy as np
import pytest
from scipy import stats

from proj.compare import (Summary, bootstrap, mean_interval, mean_intervals, movers, paired_difference, paired_differences, sign_flip_p, summarise)
from proj.core import ConfigError, DataError
from proj.metrics import ledger


def reciprocal_ranks(generator, size, centre=0.5):
    "Reciprocal ranks as retrieval gives them: log-normal ranks, many of them 1."
    return 1 / np.maximum(1, np.floor(np.exp(generator.normal(centre, 2.5, size))))


@pytest.mark.parametrize("n", [8, 40, 200])
def test_interval_is_scipys_bca(n):
    values = reciprocal_ranks(np.random.default_rng(n), n)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0), vectorized=True)
    ours = mean_interval(values, n_resamples=20_000)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours["value"] == values.mean() and ours["n"] == n
    assert ours["ci95"] == pytest.approx(list(theirs.confidence_interval), abs=0.04 * width)


def test_bootstrap_is_the_loop_it_stands_for():
    "Distribution of the means and stated errors against resampling by index, one at a time."
    values = reciprocal_ranks(np.random.default_rng(1), 30)
    means, errors = bootstrap(values[None], n_resamples=20_000)
    generator = np.random.default_rng(2)
    picks = [generator.choice(values, 30) for _ in range(20_000)]
    assert stats.ks_2samp(means[:, 0], [p.mean() - values.mean() for p in picks]).pvalue > 0.01
    assert stats.ks_2samp(errors[:, 0], [p.std() / np.sqrt(30) for p in picks]).pvalue > 0.01


@pytest.mark.parametrize("n", [6, 12])
def test_p_value_is_scipys_exact_one(n):
    generator = np.random.default_rng(n)
    a, b = generator.random(n), generator.random(n) * 0.8
    exact = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf, vectorized=False).pvalue
    assert paired_difference(a, b)["p"] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("n, centre", [(100, 0.5), (100, 2.5), (1000, 0.5)])
def test_mean_intervals_cover_what_they_say(n, centre):
    "MRR and NDCG@10 of one relevant document: 94 to 96 % of the intervals hold the true mean, give or take the simulation's own error."
    generator = np.random.default_rng(3)
    population = reciprocal_ranks(generator, 100_000, centre)
    for values in [population, np.where(population >= 0.1, 1 / np.log2(1 + 1 / population), 0)]:
        samples = generator.choice(values, (1_500, n))
        held = np.mean([r["ci95"][0] <= values.mean() <= r["ci95"][1] for r in mean_intervals(samples, n_resamples=2_000)])
        assert 0.94 - 0.012 < held < 0.96 + 0.012  # two standard errors of 1,500 samples


@pytest.mark.parametrize("unchanged", [0.3, 0.6, 0.85])
def test_difference_intervals_do_not_cover_less_than_they_say(unchanged):
    generator = np.random.default_rng(4)
    a, b, same = reciprocal_ranks(generator, 100_000), reciprocal_ranks(generator, 100_000, 1.5), generator.random(100_000) < unchanged
    a = np.where(same, b, a)
    picks = generator.integers(0, 100_000, (1_500, 100))
    found = paired_differences(a[picks], b[picks], n_resamples=2_000)
    held = np.mean([r["ci95"][0] <= (a - b).mean() <= r["ci95"][1] for r in found])
    assert held > 0.94 - 0.012


def test_p_values_are_uniform_when_there_is_no_difference():
    generator = np.random.default_rng(5)
    a, b = reciprocal_ranks(generator, (2_000, 60)), reciprocal_ranks(generator, (2_000, 60))
    p = sign_flip_p(a - b, n_resamples=2_000)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.04 < np.mean(p <= 0.05) < 0.06


def test_p_value_is_never_zero_and_small_for_a_clear_difference():
    found = paired_difference(np.ones(50), np.zeros(50), n_resamples=999)
    assert found == dict(value=1.0, ci95=[1.0, 1.0], p=1 / 1000, n=50)


def test_pairing_removes_what_both_systems_share():
    generator = np.random.default_rng(6)
    hard = generator.random(300)
    a, b = hard + 0.02 + 0.05 * generator.random(300), hard + 0.05 * generator.random(300)
    assert paired_difference(a, b)["ci95"][0] > 0
    assert mean_interval(a)["ci95"][0] < b.mean()  # unpaired, nothing could be said


def test_exchanging_the_systems_changes_the_sign_only():
    generator = np.random.default_rng(7)
    a, b = reciprocal_ranks(generator, 80), reciprocal_ranks(generator, 80)
    one, two = paired_difference(a, b), paired_difference(b, a)
    assert two["value"] == -one["value"] and two["p"] == one["p"]
    assert two["ci95"] == pytest.approx([-one["ci95"][1], -one["ci95"][0]])


def test_same_seed_same_figures_alone_or_together():
    values = reciprocal_ranks(np.random.default_rng(8), (5, 150))
    assert mean_intervals(values) == mean_intervals(values) != mean_intervals(values, seed=1)
    for row, found in zip(values, mean_intervals(values)): assert mean_interval(row)["ci95"] == pytest.approx(found["ci95"], abs=1e-12)
    assert paired_differences(values, values[::-1]) == paired_differences(values, values[::-1])


def test_smallest_cases():
    assert mean_interval([0.25]) == dict(value=0.25, ci95=None, n=1)
    assert paired_difference([0.5], [0.25]) == dict(value=0.25, ci95=None, p=1.0, n=1)
    assert mean_interval([0.1] * 7)["ci95"] == pytest.approx([0.1, 0.1], abs=1e-15)
    for lone in [[0, 1], [0] * 99 + [1], [1] * 999 + [0]]:
        low, high = mean_interval(lone)["ci95"]
        assert 0 <= low < np.mean(lone) < high <= 1
        low, high = paired_difference(lone, np.zeros(len(lone)))["ci95"]
        assert np.isfinite([low, high]).all() and low < high


@pytest.mark.parametrize("call, message", [
    (lambda: mean_interval([]), "at least one query"),
    (lambda: mean_interval([1, 2, np.nan]), "value 2 is nan"),
    (lambda: paired_difference([1, np.inf], [0, 0]), "value 1 is inf"),
    (lambda: paired_difference([1, 2], [1]), "2 values cannot be paired with 1"),
    (lambda: summarise({"a": {"mrr": [1, 2]}}, ["q"]), "'a' has 2 values of 'mrr' for 1 queries"),
    (lambda: summarise({"a": {"mrr": [1, 2]}}, ["q", "q"]), "stands twice"),
    (lambda: summarise({}, ["q"]), "no values"),
])
def test_bad_values_are_refused(call, message):
    with pytest.raises(DataError, match=message) as error: call()
    assert "\n" not in str(error.value)


def test_summary_has_the_shape_of_metrics_json_and_prints_itself():
    values = reciprocal_ranks(np.random.default_rng(9), (3, 50))
    systems = {"trained": {"mrr": values[0], "hit@1": values[0] == 1}, "zero_shot": {"mrr": values[1], "map": values[1]}, "bm25": {"mrr": values[2]}}
    found = summarise(systems, [f"q{i}" for i in range(50)], n_resamples=500)
    assert list(found) == ["systems", "differences"] and list(found["differences"]) == ["trained - zero_shot", "trained - bm25"]
    assert set(found["systems"]["trained"]["hit@1"]) == {"value", "ci95", "n"} and set(found["differences"]["trained - bm25"]["mrr"]) == {"value", "ci95", "p", "n"}
    assert list(found["differences"]["trained - zero_shot"]) == ["mrr"]  # what both have
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text, html = repr(Summary(pool=2305, **found)), Summary(pool=2305, **found)._repr_html_()
    for part in ["50 queries", "pool of 2,305", "zero_shot", "mrr", f"{values[0].mean():.3f}", "p="]: assert part in text and part in html
    chosen = summarise(systems, range(50), pairs=[("bm25", "zero_shot")], n_resamples=500)
    assert list(chosen["differences"]) == ["bm25 - zero_shot"]
    with pytest.raises(ConfigError, match="did you mean 'bm25'"): summarise(systems, range(50), pairs=[("trained", "bm52")])


def test_html_escapes_names():
    assert "<b>" not in summarise({"<b>": {"mrr": [0, 1]}}, ["q1", "q2"], n_resamples=100)._repr_html_()


def test_movers_are_sorted_with_ties_by_id():
    ids = ["e", "d", "c", "b", "a"]
    a, b = ledger(ids, {"mrr": [1, 1, 0.5, 0, 0.25]}), ledger(ids[::-1], {"mrr": [0.25, 1, 0.75, 0.5, 0.5]})
    found = movers(a, b, "mrr")
    assert found["gained"] == [dict(query_id="d", a=1.0, b=0.5), dict(query_id="e", a=1.0, b=0.5)]
    assert found["lost"] == [dict(query_id="b", a=0.0, b=1.0), dict(query_id="c", a=0.5, b=0.75)]
    assert [row["query_id"] for row in movers(a, b, "mrr", k=1)["gained"]] == ["d"]
    assert movers(a, a, "mrr") == dict(gained=[], lost=[])
    with pytest.raises(DataError, match="'a' is in one ledger only"): movers(a, ledger(ids[:4], {"mrr": [1, 1, 1, 1]}), "mrr")
