"Intervals and p-values against scipy, against simulation, and against themselves."
import json

import numpy as np
import pytest
from scipy import stats

from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from proj.compare import (Summary, bootstrap, earliest_within, holm, mean_interval, mean_intervals, movers, paired_difference, paired_differences, power,
                          sign_flip_p, summarise, wins_ties_losses)
from proj.core import ConfigError, DataError
from proj.metrics import Ranks, ledger, ndcg, reciprocal_rank


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


def two_systems(generator, size):
    "Ranks of the right document by two systems: hard queries are hard for both, four of ten have the same rank."
    hard = generator.normal(0.5, 2, size)
    return [Ranks(np.arange(size), np.maximum(1, np.floor(np.exp(hard + worse + generator.normal(0, 1.2, size)))), np.ones(size), range(size)) for worse in (0, 0.4)]


def share_held(found, truth): return np.mean([r["ci95"][0] <= truth <= r["ci95"][1] for r in found])


@pytest.mark.parametrize("metric, k", [(reciprocal_rank, None), (ndcg, 10)], ids=["mrr", "ndcg@10"])
@pytest.mark.parametrize("n, n_resamples", [(100, 10_000), (1000, 4_000)])
def test_intervals_hold_the_truth_as_often_as_they_say(n, n_resamples, metric, k, record_property):
    "2,000 simulated experiments of n queries each. The noise that 4,000 resamples bring into the ends, a quarter of a percentage point, averages out over the experiments."
    generator = np.random.default_rng(n)
    a, b = (metric(ranks, k) for ranks in two_systems(generator, 100_000))
    means, differences = [], []
    for _ in range(4):  # in parts, for memory
        picks = generator.integers(0, len(a), (500, n))
        means.append(share_held(mean_intervals(a[picks], n_resamples=n_resamples), a.mean()))
        differences.append(share_held(paired_differences(a[picks], b[picks], n_resamples=n_resamples), (a - b).mean()))
    record_property("coverage of the mean, of the difference", (float(np.mean(means)), float(np.mean(differences))))
    assert 0.94 <= np.mean(means) <= 0.96 and 0.94 <= np.mean(differences) <= 0.96


@pytest.mark.parametrize("centre", [1.5, 2.5])
def test_mean_intervals_of_weak_systems(centre):
    "Few queries with a high value: 94 to 96 %, give or take two standard errors of 1,500 samples."
    generator = np.random.default_rng(3)
    population = reciprocal_ranks(generator, 100_000, centre)
    held = share_held(mean_intervals(generator.choice(population, (1_500, 100)), n_resamples=2_000), population.mean())
    assert 0.94 - 0.012 < held < 0.96 + 0.012


@pytest.mark.parametrize("unchanged", [0.3, 0.6, 0.85])
def test_difference_intervals_do_not_cover_less_than_they_say(unchanged):
    generator = np.random.default_rng(4)
    a, b, same = reciprocal_ranks(generator, 100_000), reciprocal_ranks(generator, 100_000, 1.5), generator.random(100_000) < unchanged
    a = np.where(same, b, a)
    picks = generator.integers(0, 100_000, (1_500, 100))
    found = paired_differences(a[picks], b[picks], n_resamples=2_000)
    held = np.mean([r["ci95"][0] <= (a - b).mean() <= r["ci95"][1] for r in found])
    assert held > 0.94 - 0.012


@pytest.mark.parametrize("large", [1, 2, 3])
def test_a_few_large_differences_among_tiny_ones_do_not_blow_up_the_interval(large):
    "Resamples that miss them state hardly any error; a ratio to that would make the interval dozens of times too long."
    d = np.concatenate([np.random.default_rng(large).normal(0, 1e-4, 90), np.full(large, 0.4)])
    low, high = paired_difference(d, np.zeros(len(d)))["ci95"]
    textbook = stats.t.interval(0.95, len(d) - 1, d.mean(), d.std(ddof=1) / np.sqrt(len(d)))
    assert 0.7 < (high - low) / (textbook[1] - textbook[0]) < 1.6


def test_p_values_are_uniform_when_there_is_no_difference():
    generator = np.random.default_rng(5)
    a, b = reciprocal_ranks(generator, (2_000, 60)), reciprocal_ranks(generator, (2_000, 60))
    p = sign_flip_p(a - b, n_resamples=2_000)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.04 < np.mean(p <= 0.05) < 0.06


@pytest.mark.parametrize("n", [5, 8, 11])
def test_p_values_of_many_metrics_are_scipys_exact_ones(n):
    "Sign flips, all of them, against ours within four standard errors of 10,000 draws; ties, zeros and equal values among the differences."
    generator = np.random.default_rng(n)
    a, b = generator.integers(0, 4, (2, 6, n)) / 4
    exact = [stats.permutation_test((x, y), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True).pvalue
             for x, y in zip(a, b)]
    assert sign_flip_p(a - b) == pytest.approx(exact, abs=4 * 0.5 / np.sqrt(10_000))


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


# ---- several systems

def test_holm_is_the_table_by_hand():
    "Holm (1979), k = 4: the smallest p times 4, the next times 3, ...; none below the one before, none above 1."
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.9]) == pytest.approx([1, 1, 1]) and holm([0.2]) == [0.2]
    assert holm(np.array([[0.01, 0.5], [0.02, 0.001]])) == pytest.approx(np.array([[0.02, 0.5], [0.02, 0.002]]))  # each metric by itself
    with pytest.raises(DataError, match="between 0 and 1, got 1.2"): holm([0.1, 1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_rule_rejects(p):
    "The rule as it is stated: walk from the smallest p, stop at the first p > alpha / (k - i)."
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all() and (adjusted <= 1).all()
    for alpha in (0.05, 0.2):
        rejected = set()
        for i, at in enumerate(np.argsort(p, kind="stable")):
            if p[at] * (len(p) - i) > alpha: break
            rejected.add(int(at))
        assert set(np.flatnonzero(adjusted <= alpha).tolist()) == rejected


# ---- how many queries

@pytest.mark.parametrize("unchanged, delta", [(0.3, 0.05), (0.7, 0.05), (0.7, 0.02)])
def test_so_many_queries_show_the_difference_four_times_out_of_five(unchanged, delta):
    generator = np.random.default_rng(10)
    world = np.where(generator.random(100_000) < unchanged, 0, generator.normal(0, 0.3, 100_000))
    world += delta - world.mean()
    n = power(world, delta)
    p = np.concatenate([sign_flip_p(generator.choice(world, (500, n)), n_resamples=999) for _ in range(4)])
    assert 0.77 < np.mean(p <= 0.05) < 0.83  # three standard errors of 2,000 trials


def test_power_agrees_with_the_noncentral_t():
    "The exact power of the t-test at n and n - 2 queries lies on either side of 80 %."
    generator = np.random.default_rng(11)
    for delta in (0.3, 0.1, 0.03):
        d = generator.normal(0, 0.4, 500)
        d *= 0.4 / d.std(ddof=1)
        def exact(n):
            limit = stats.t.ppf(0.975, n - 1)
            return stats.nct.sf(limit, n - 1, delta / 0.4 * np.sqrt(n)) + stats.nct.cdf(-limit, n - 1, delta / 0.4 * np.sqrt(n))
        n = power(d, delta)
        assert exact(n - 2) < 0.8 < exact(n + 1)


def test_power_of_smallest_cases():
    assert power(np.full(10, 0.3), 0.1) == 6 and 2 * 0.5**6 < 0.05 < 2 * 0.5**5  # what sign flips can show at all
    assert power([[0.1, -0.1, 0.3], [0, 0, 0]], 0.05)[1] == 6
    assert power([0.1, -0.1], 0.02, chance=0.9) > power([0.1, -0.1], 0.02)
    for call, error, says in [(lambda: power([0.1], 0.1), DataError, "two at least"), (lambda: power([0.1, 0.2], -1), ConfigError, "delta should be"),
                              (lambda: power([0.1, 0.2], np.nan), ConfigError, "got nan"), (lambda: power([], 0.1), DataError, "at least one query")]:
        with pytest.raises(error, match=says) as raised: call()
        assert "\n" not in str(raised.value)


# ---- wins, ties, losses; properties

matrices = st.integers(1, 9).flatmap(lambda n: st.tuples(*[arrays(np.float64, (3, n), elements=st.integers(0, 8).map(lambda i: i / 8))] * 2))


@settings(deadline=None, max_examples=60)
@given(matrices, st.randoms())
def test_differences_are_antisymmetric_and_do_not_depend_on_the_order_of_queries(pair, random):
    a, b = pair
    n = a.shape[1]
    one, two = (paired_differences(x, y, n_resamples=200) for x, y in [(a, b), (b, a)])
    for d, e, c, f in zip(one, two, wins_ties_losses(a - b), wins_ties_losses(b - a)):
        assert (e["value"], e["p"], e["n"]) == (-d["value"], d["p"], n)
        assert (d["ci95"] is None) == (n == 1) and (n == 1 or e["ci95"] == pytest.approx([-d["ci95"][1], -d["ci95"][0]], abs=1e-12))
        assert sum(c.values()) == n and (f["wins"], f["ties"], f["losses"]) == (c["losses"], c["ties"], c["wins"])
    order = random.sample(range(n), n)
    for d, e in zip(one, paired_differences(a[:, order], b[:, order], n_resamples=200)):
        assert e["value"] == pytest.approx(d["value"], abs=1e-12) and e["n"] == d["n"]


# ---- the earliest step as good as the best

def test_earliest_step_is_the_first_whose_interval_reaches_zero():
    "Against the definition, step by step."
    generator = np.random.default_rng(12)
    hard, later = generator.normal(0, 0.3, 150), 0
    for _ in range(20):
        steps = {step: 0.5 + 0.2 * min(step, 4) / 4 + hard + generator.normal(0, 0.1, 150) for step in (1, 2, 3, 4, 6, 8)}
        best = max(steps, key=lambda step: (steps[step].mean(), -step))
        expected = next(step for step in sorted(steps) if step == best or paired_difference(steps[step], steps[best], n_resamples=2_000)["ci95"][1] >= 0)
        assert earliest_within(dict(reversed(steps.items())), n_resamples=2_000) == expected <= best
        later += best > expected
    assert later > 5


def test_earliest_step_of_smallest_cases():
    same = np.random.default_rng(13).random(40)
    assert earliest_within({3: same, 9: same}) == 3 and earliest_within({5: same}) == 5
    assert earliest_within({1: same, 2: same + 1}) == 2
    assert earliest_within({1: [0.2], 2: [0.9]}) == 2  # a single query has no interval: only the best is left
    for bad, says in [({}, "no steps"), ({1: [1, 2], 2: [1]}, "between 1 and 2 values"), ({1: [1, np.nan]}, "nan")]:
        with pytest.raises(DataError, match=says): earliest_within(bad)
