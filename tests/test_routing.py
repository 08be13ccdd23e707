"Routing metrics against double loops, resampling by index and simulation; guarantees over a thousand calibrations; baselines against formulas; the figures on real prompts."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.spatial import ConvexHull

from proj.core import ConfigError, DataError, rng
from proj.quality_at_cost import Curve, Plane, apgr_values, climbs, comparisons_of, corner_weights, corners, pairwise_accuracy, trade_offs
from proj.routing import _figure, cost_quality_plane, evaluate_routers, resamples, truth_of, values_of, verdict
from proj.routing_baselines import BASELINES, RouterRows, bradley_terry, fit_baselines, quality_of
from proj.thresholds import betting, hoeffding_bentkus, loss_threshold, share_threshold


@pytest.fixture(scope="module")
def mmlu(data_dir):
    rows = [json.loads(line) for line in open(data_dir / "routellm/mmlu.jsonl", encoding="utf-8")]
    return RouterRows([r["prompt"] for r in rows], [[r["score_a"], r["score_b"]] for r in rows], [r["subject"] for r in rows])


# ---- two models

def walked(score, gain):
    "Every order of equal scores in turn is too much: 4,000 random ones, prompt by prompt."
    areas = []
    for seed in range(4_000):
        order = np.lexsort((np.random.default_rng(seed).random(len(score)), -score))
        reached, area = 0.0, 0.0
        for i in order:
            area += reached + gain[i] / 2
            reached += gain[i]
        areas.append(area / len(score) / reached)
    return np.mean(areas)


def test_apgr_is_the_expectation_over_the_orders_of_equal_scores():
    score, gain = np.array([3., 1, 1, 1, 0, 0, 2]), np.array([1., 0, 1, -1, 1, 0, 0])
    ours = Curve(score, gain).metrics(np.ones((1, 7)))["apgr"][0]
    assert ours == pytest.approx(walked(score, gain), abs=0.01) and ours == pytest.approx(apgr_values(score, gain).mean(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(2, 40), elements=st.integers(-3, 3).map(float)), st.data())
def test_curve_agrees_with_a_loop_over_thresholds(score, data):
    gain = data.draw(arrays(np.float64, len(score), elements=st.sampled_from([-1., -.25, 0, .5, 1])))
    counts = data.draw(arrays(np.float64, len(score), elements=st.integers(0, 3).map(float)))
    found = Curve(score, gain).metrics(counts[None])
    whole, n = (counts * gain).sum(), counts.sum()
    if whole <= 1e-9 or n == 0: return
    points = [(0., 0.)] + [(counts[score >= t].sum() / n, (counts * gain)[score >= t].sum() / whole) for t in np.unique(score)[::-1]]
    x, y = map(np.array, zip(*points))
    assert found["apgr"][0] == pytest.approx(np.trapezoid(y, x), abs=1e-9)
    for level in (.5, .8):
        grid = np.linspace(0, 1, 20_001)
        first = grid[np.argmax(np.interp(grid, x, y) >= level - 1e-9)] if len(np.unique(x)) == len(x) else None
        if first is not None: assert found[f"cpt@{level * 100:.0f}"][0] == pytest.approx(first, abs=2e-4)


def test_limits():
    gain = np.array([1., 0, 0, 0, -1, 1, 1, 0])
    for constant in (0., -7, 1e9):
        found = Curve(np.full(8, constant), gain).metrics(np.ones((1, 8)))
        assert [float(v[0]) for v in found.values()] == pytest.approx([.5, .5, .8], abs=1e-12)
    best, worst = Curve(gain, gain).metrics(np.ones((1, 8))), Curve(-gain, gain).metrics(np.ones((1, 8)))
    assert best["apgr"] + worst["apgr"] == pytest.approx(1) and best["cpt@50"][0] == 1 / 8
    assert np.isnan(Curve(gain, -gain).metrics(np.ones((1, 8)))["cpt@50"][0])  # no gap: never reached
    random = Curve(np.random.default_rng(0).random(200_000), np.tile(gain, 25_000)).metrics(np.ones((1, 200_000)))
    assert random["apgr"][0] == pytest.approx(.5, abs=.01)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_only_the_order_counts(seed):
    draw = np.random.default_rng(seed)
    score, gain = draw.normal(size=50), draw.integers(-1, 2, 50) + .2
    gain[0] += max(0, 1 - gain.sum())  # a gap that can be recovered
    shuffled = draw.permutation(50)
    one, two, three = (Curve(s, g).metrics(np.ones((1, 50))) for s, g in ((score, gain), (np.exp(3 * score) - 7, gain), (score[shuffled], gain[shuffled])))
    for metric in one: assert one[metric] == pytest.approx(two[metric], abs=1e-9) and one[metric] == pytest.approx(three[metric], abs=1e-9)


def test_resampling_is_that_by_index():
    draw = np.random.default_rng(1)
    score, gain = draw.integers(0, 5, 60).astype(float), draw.choice([-1., 0, 1], 60, p=[.1, .5, .4])
    ours = np.concatenate([Curve(score, gain).metrics(counts)["apgr"] for counts in resamples(60, 0, 4_000)])
    theirs = [apgr_values(score[i], gain[i]).mean() for i in draw.integers(0, 60, (4_000, 60))]
    assert len(ours) == 4_000 and stats.ks_2samp(ours, theirs).pvalue > .01


def test_intervals_hold_the_truth(record_property):
    "300 experiments of 300 prompts each: a router, and the difference of two on the same draws. Within three standard errors of 95 %."
    draw = np.random.default_rng(2)
    gain = draw.choice([-1., 0, 1], 100_000, p=[.08, .67, .25])
    routers = [gain + noise * draw.normal(size=100_000) for noise in (2, 3)]
    def measured(i, counts):
        a, b = (Curve(score[i], gain[i]).metrics(counts) for score in routers)
        return np.stack([a["apgr"], a["cpt@50"], a["apgr"] - b["apgr"], a["cpt@50"] - b["cpt@50"]])  # (4, b)
    truth, held = measured(np.arange(100_000), np.ones((1, 100_000)))[:, 0], []
    for seed in range(300):
        i = draw.integers(0, 100_000, 300)
        draws = np.concatenate([measured(i, counts) for counts in resamples(300, seed, 400)], axis=1)
        held.append([low <= value <= high for value, (low, high) in zip(truth, (_figure(0, d, 300)["ci95"] for d in draws))])
    record_property("coverage of apgr, cpt@50, their differences", np.mean(held, 0).tolist())
    assert (np.abs(np.mean(held, 0) - .95) <= 3 * np.sqrt(.95 * .05 / 300)).all()


# ---- many models

def test_trade_offs_are_what_a_loop_over_lambda_chooses():
    draw = np.random.default_rng(3)
    scores, cost = draw.random((40, 4)), np.array([3., 1, 2, 7])
    slopes, models = climbs(scores, cost)
    for price in (-.3, 0, .01, .05, .1, .3, 1):
        wanted = [max(range(4), key=lambda j: scores[i, j] - price * cost[j]) for i in range(40)]
        assert models[(slopes >= price).sum(0), np.arange(40)].tolist() == wanted
    chosen = trade_offs(scores, cost)
    spent = cost[chosen].mean(0)
    assert (chosen[:, 0] == 1).all() and (chosen[:, -1] == 3).all() and (np.diff(spent) > 0).all() and chosen.shape[1] <= 21


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_corners_are_those_of_a_convex_hull(k, seed):
    draw = np.random.default_rng(seed)
    x, y = draw.random(k), draw.random(k)
    at = corners(x, y)
    assert x[at[0]] == x.min() and y[at[-1]] == y.max() and (np.diff(x[at]) > 0).all() and (np.diff(y[at]) > 0).all()
    base = np.array([[x.min(), -1], [x.max(), -1], [x.max(), y.max()]])  # money may be left over
    area = ConvexHull(np.concatenate([np.stack([x, y], 1), base])).volume
    assert corner_weights(x[at], x.max()) @ y[at] * np.ptp(x) + np.ptp(x) == pytest.approx(area, rel=1e-9)


def test_aiq_of_two_models_and_of_single_models():
    draw = np.random.default_rng(4)
    quality, cost = draw.random((500, 3)) * [.5, .8, 1], np.tile([1., 2, 4], (500, 1))
    single = Plane(np.tile([.25, .4, .5], (500, 1)), quality, cost)
    means = quality.mean(0)
    at = corners(cost[0], means)
    assert single.values().mean() == pytest.approx(corner_weights(cost[0][at], 4) @ means[at])
    flat = Plane(np.zeros((500, 2)), quality[:, [0, 2]], cost[:, [0, 2]])
    assert flat.aiq(np.ones((1, 500)))[0] == pytest.approx(means[[0, 2]].mean())  # half way on average


def test_a_random_router_does_not_seem_to_beat_the_line():
    "The corners of a hull flatter noise unless other prompts have chosen them: 300 random routers, of which at most 5 % may be shown to be better."
    draw = np.random.default_rng(5)
    quality, cost = draw.random((600, 2)) < [.7, .8], np.tile([1., 10], (600, 1))
    quality = quality.astype(float)
    routers = [Plane(draw.random((600, 2)), quality, cost) for _ in range(300)]
    line = quality.mean()
    crossed = np.array([router.values().mean() - line for router in routers])
    naive = np.array([Plane.weights(*router.points()) @ router.points()[1] - line for router in routers])
    assert abs(crossed.mean()) < .0006 < .002 < naive.mean()


def test_dearer_models_are_not_bought_for_nothing():
    quality = np.array([[1., 1], [1, 1], [0, 1], [0, 0]])
    found = evaluate_routers(dict(oracle=quality, cheapest=-np.tile([1., 5], (4, 1))), quality, [1, 5], n_resamples=50)["systems"]
    assert found["oracle"]["mean_score"]["value"] == .75 and found["oracle"]["regret"]["value"] == 0 and found["cheapest"]["mean_score"]["value"] == .5
    assert found["oracle"]["cpt@80"]["value"] == pytest.approx(.2)  # a quarter of the prompts closes all of the gap
    own = np.array([[1., 5], [1, 5], [1, 9], [1, 5]])
    assert Plane(quality, quality, own).points()[0][-1] == own[:, 1].mean()


# ---- all together

def test_the_ledger_has_the_figures_as_its_means():
    draw = np.random.default_rng(6)
    quality = draw.random((80, 3))
    quality[:20, 1] = np.nan
    scores, cost = draw.random((80, 3)), draw.random((80, 3)) + [0, 1, 2]
    quality[:, 2] += .1
    found, truth = evaluate_routers(dict(a=scores), quality, cost, n_resamples=50)["systems"]["a"], truth_of(quality, cost)
    for metric, values in values_of(scores, truth).items():
        assert len(values) == 60 == found[metric]["n"] and values.mean() == pytest.approx(found[metric]["value"], abs=1e-12)
    assert found["pairwise_accuracy"]["n"] == 80


def test_pairwise_accuracy_is_a_loop():
    draw = np.random.default_rng(7)
    quality, scores = draw.integers(0, 3, (30, 4)).astype(float), draw.integers(0, 4, (30, 4)) / 4
    quality[draw.random((30, 4)) < .3] = np.nan
    for band in (None, .25):
        for i, value in enumerate(pairwise_accuracy(scores, comparisons_of(quality), band)):
            right = []
            for j in range(4):
                for k in range(j + 1, 4):
                    if np.isnan(quality[i, [j, k]]).any() or band is None and quality[i, j] == quality[i, k]: continue
                    gap = scores[i, j] - scores[i, k]
                    said = 0 if abs(gap) <= (band or 0) else np.sign(gap)
                    right.append(said == np.sign(quality[i, j] - quality[i, k]))
            assert value == pytest.approx(np.mean(right)) if right else np.isnan(value)


def test_same_seed_same_figures():
    draw = np.random.default_rng(8)
    quality, predictions = draw.random((50, 2)) + [.3, 0], dict(a=draw.random((50, 2)), b=draw.random((50, 2)))
    one, two, other = (evaluate_routers(predictions, quality, [2, 1], seed=seed, n_resamples=200) for seed in (0, 0, 1))
    assert one == two != other and json.loads(json.dumps(one)) == one


@pytest.mark.parametrize("change, message", [
    (dict(predictions={}), "no predictions"),
    (dict(predictions=dict(a=np.zeros((3, 3)))), "score of 'a' has the shape (3, 3); expected (3, 2)"),
    (dict(predictions=dict(a=[[0, 0], [0, np.nan], [0, 0]])), "score of 'a' of prompt 1 and model 1 is nan; expected a finite number"),
    (dict(quality=np.zeros(3)), "quality has the shape (3,)"),
    (dict(quality=np.zeros((0, 2))), "quality has the shape (0, 2)"),
    (dict(quality=[[0, np.inf], [0, 1], [1, 1]]), "quality of prompt 0 and model 1 is inf"),
    (dict(cost=[1, np.nan]), "cost of prompt 0 and model 1 is nan"),
    (dict(cost=[1, 2, 3]), "cost has the shape (3,)"),
    (dict(models=["gpt"]), "1 names for 2 models"),
    (dict(strong="gpt-5"), "unknown model 'gpt-5'; did you mean 'gpt-4'"),
    (dict(strong="mixtral"), "strong and weak are both 'mixtral'"),
    (dict(pairs=[("a", "b")]), "unknown router 'b'"),
    (dict(comparisons=([0, 3], [0, 0], [1, 1], [1, 1])), "comparison 1 has the row 3; expected 0 to 2"),
    (dict(comparisons=([0], [0], [2], [1])), "comparison 0 has the second model 2; expected 0 to 1"),
    (dict(comparisons=([0], [0], [1], [2])), "comparison 0 has the label 2; expected -1 to 1"),
    (dict(comparisons=([0, 1], [0], [1], [1])), "all of one length"),
])
def test_errors_are_one_line(change, message):
    given = dict(predictions=dict(a=np.zeros((3, 2))), quality=[[1., 0], [1, 1], [0, 1]], cost=[2, 1], models=["gpt-4", "mixtral"], n_resamples=20) | change
    with pytest.raises((ConfigError, DataError)) as error: evaluate_routers(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_measured_is_said():
    quality = np.array([[0., 1], [0, 1], [1, 1]])
    found = evaluate_routers(dict(a=quality, b=-quality), quality, [2, 1], models=["dear", "cheap"], n_resamples=50)
    assert found["notes"] == ["no apgr, no cpt: 'dear' is not better than 'cheap' on these prompts"] and "apgr" not in found["systems"]["a"]
    one = evaluate_routers(dict(a=quality[:1]), 1 - quality[:1], [2, 1], n_resamples=20)["systems"]["a"]
    assert one["apgr"] == dict(value=one["apgr"]["value"], ci95=None, n=1)
    votes = evaluate_routers(dict(a=quality), np.full((3, 2), np.nan), [2, 1], comparisons=([0, 1], [0, 0], [1, 1], [-1, 1]), n_resamples=20)
    assert set(votes["systems"]["a"]) == {"pairwise_accuracy"} and votes["systems"]["a"]["pairwise_accuracy"]["value"] == .5
    few = evaluate_routers(dict(a=quality, b=-quality), np.array([[1., 0], [0, 1], [1., 0]]), [2, 1], n_resamples=200)  # a third of the resamples has no gap
    assert few["systems"]["a"]["apgr"]["ci95"] is None and few["differences"]["a - b"]["apgr"]["p"] == 1


def test_verdict_says_yes_no_and_not_shown():
    draw = np.random.default_rng(9)
    quality = (draw.random((400, 2)) < [.8, .5]).astype(float)
    result = evaluate_routers(dict(oracle=quality, best_single=np.tile([.8, .5], (400, 1)), random=draw.random((400, 2))), quality, [2, 1], n_resamples=300,
                              pairs=[("oracle", "best_single"), ("best_single", "oracle"), ("random", "best_single")])
    assert verdict(result, "oracle").startswith("beats best single model: yes (aiq +0.") and "yes (mean_score" in verdict(result, "oracle")
    assert verdict(result, "best_single", "oracle").startswith("beats oracle: no (aiq -0.")
    assert "not shown by n = 400 (apgr" in verdict(result, "random") and "no (mean_score" in verdict(result, "random")


def test_the_plane_has_three_lines(tmp_path):
    draw = np.random.default_rng(10)
    quality = draw.random((60, 3)) * [.5, .7, 1]
    ax = cost_quality_plane(quality + draw.normal(size=(60, 3)), quality, [1, 2, 4], ["a", "b", "c"], name="ours")
    ax.figure.savefig(tmp_path / "plane.png")
    oracle, ours, _, single = ax.get_lines()[:4]
    assert [line.get_label() for line in (oracle, ours, single)] == ["oracle", "ours", "single models"] and (tmp_path / "plane.png").stat().st_size > 2_000
    assert oracle.get_ydata()[-1] == pytest.approx(quality.max(1).mean()) and single.get_ydata()[0] == pytest.approx(quality[:, 0].mean())


# ---- guarantees

def test_share_is_held_over_a_thousand_calibrations(mmlu, record_property):
    "Real score ties, 200 prompts to calibrate on, the rest to come."
    score = fit_baselines(mmlu.take(np.arange(0, len(mmlu), 10)), [10, 1], ["words_ridge"])["words_ridge"](mmlu.take(np.arange(1, len(mmlu), 4)))
    score, draw, shares = np.round(score[:, 0] - score[:, 1], 3), np.random.default_rng(11), {None: [], .1: []}
    for _ in range(1_000):
        at = draw.integers(0, len(score), 200)
        for delta, found in shares.items(): found.append(share_threshold(score[at], .3, delta)(score).mean())
    record_property("mean share, share held with delta .1", (float(np.mean(shares[None])), float(np.mean(np.array(shares[.1]) <= .3))))
    assert .28 <= np.mean(shares[None]) <= .3 + 3 * np.std(shares[None]) / np.sqrt(1_000)
    assert np.mean(np.array(shares[.1]) <= .3) >= .9 - 3 * np.sqrt(.09 / 1_000)


@pytest.mark.parametrize("bound, most", [("betting", .02), ("betting", .04), ("hoeffding_bentkus", .06)])
def test_loss_is_held_over_a_thousand_calibrations(mmlu, bound, most, record_property):
    "1,000 prompts to calibrate on, drawn from all; the loss on all may be above the limit in at most 10 %."
    train = mmlu.take(np.arange(0, len(mmlu), 10))
    prior = fit_baselines(train, [10, 1], ["category_prior"])["category_prior"]
    score, grid = (np.subtract(*prior(rows).T) for rows in (mmlu, train))
    gain, draw, grid = np.subtract(*mmlu.quality.T), np.random.default_rng(12), np.quantile(grid, np.linspace(0, 1, 21))
    broken, shares = [], []
    for seed in range(1_000):
        at = draw.integers(0, len(score), 1_000)
        found = loss_threshold(score[at], gain[at], grid, most, bound=bound, seed=seed)
        broken.append(np.where(found(score), 0, gain).mean() > most), shares.append(found.share)
    record_property(f"{bound}, at most {most}: broken, mean share of strong calls", (float(np.mean(broken)), float(np.mean(shares))))
    assert np.mean(broken) <= .1 + 3 * np.sqrt(.09 / 1_000) and (bound != "betting" or np.mean(shares) < .9)


def test_p_values_are_valid_at_the_edge(record_property):
    "Where the mean is exactly what the hypothesis says, at most 10 % are below .1: 2,000 samples of each kind."
    draw, found = np.random.default_rng(13), {}
    for kind, (values, mean) in dict(coin=(draw.random((300, 2_000)) < .3, .3), three=(draw.choice([0, .5, 1], (300, 2_000), p=[.05, .75, .2]), .575), flat=(draw.random((300, 2_000)), .5)).items():
        for test in (betting, hoeffding_bentkus): found[kind, test.__name__] = float((test(values.astype(float), mean) <= .1).mean())
    record_property("rejected at .1", str(found))
    assert max(found.values()) <= .1 + 3 * np.sqrt(.09 / 2_000)


def test_hoeffding_bentkus_by_hand():
    assert hoeffding_bentkus(np.zeros((50, 1)), .1)[0] == pytest.approx(min(.9**50, np.e * .9**50), rel=1e-9)  # exp(-n KL(0, .1)) = .9 ** n
    assert hoeffding_bentkus(np.full((50, 1), .4), .1)[0] == 1


@pytest.mark.parametrize("call, message", [
    (lambda: share_threshold([], .3), "at least 1 calibration prompts"),
    (lambda: share_threshold([1, np.nan], .3), "score 1 is nan"),
    (lambda: share_threshold([1, 2], 0), "share is 0; expected a number above 0 and below 1"),
    (lambda: share_threshold([1, 2], .3, delta=1.5), "delta is 1.5"),
    (lambda: loss_threshold([1, 2], [0.], [0], .1), "at least 2"),
    (lambda: loss_threshold([1, 2, 3], [0., 1], [0], .1), "3 scores and 2 gains"),
    (lambda: loss_threshold([1, 2], [0., 2], [0], .1), "beyond the width of 1"),
    (lambda: loss_threshold([1, 2], [0., 1], [0], 1), "most is 1; expected a number above 0 and below 1"),
    (lambda: loss_threshold([1, 2], [0., 1], [0], .1, bound="beting"), "did you mean 'betting'"),
])
def test_threshold_errors(call, message):
    with pytest.raises((ConfigError, DataError)) as error: call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_few_prompts_guarantee_nothing_but_the_strong_model():
    found = loss_threshold(np.arange(5.), np.zeros(5), [-1, 2], .01)
    assert found.value == -np.inf and found.share == 1 and found([0, -9]).all()
    assert share_threshold(np.arange(5.), .01).share == 0


# ---- baselines

def test_bradley_terry_is_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    draw = np.random.default_rng(14)
    true = np.array([1., .3, 0, -.4, -.9])
    first = draw.integers(0, 5, 4_000)
    second = (first + draw.integers(1, 5, 4_000)) % 5
    label = np.where(draw.random(4_000) < 1 / (1 + np.exp(true[second] - true[first])), 1, -1)
    design = np.eye(5)[first] - np.eye(5)[second]
    theirs = LogisticRegression(C=100, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(design, label).coef_[0]
    ours = bradley_terry((np.zeros(4_000), first, second, label), 5)
    assert ours.models == pytest.approx(theirs - theirs.mean(), abs=1e-4) and ours.models == pytest.approx(true, abs=.15) and ours.eta == 0


def test_rao_kupper_recovers_its_own_draws():
    draw, true, eta = np.random.default_rng(15), np.array([.8, .1, -.9]), .4
    first = draw.integers(0, 3, 30_000)
    second = (first + draw.integers(1, 3, 30_000)) % 3
    gap, u = true[first] - true[second], draw.random(30_000)
    win, loss = 1 / (1 + np.exp(eta - gap)), 1 / (1 + np.exp(eta + gap))
    found = bradley_terry((np.zeros(30_000), first, second, np.where(u < win, 1, np.where(u > 1 - loss, -1, 0))), 3, "rao_kupper")
    assert found.models == pytest.approx(true, abs=.06) and found.eta == pytest.approx(eta, abs=.03)
    never_lost = bradley_terry(([0, 0], [0, 1], [1, 2], [1, 1]), 3)
    assert np.isfinite(never_lost.models).all() and (np.diff(never_lost.models) < 0).all()
    with pytest.raises(DataError, match="no comparisons"): bradley_terry(([], [], [], []), 3)


def made(n, seed):
    draw = rng(seed, "rows")
    quality = draw.random((n, 3))
    quality[draw.random((n, 3)) < .3] = np.nan
    return RouterRows([f"word{i % 7} again" for i in range(n)], quality, np.array(list("abc"))[draw.integers(0, 3, n)], draw.normal(size=(n, 4)))


def test_baselines_see_training_rows_only_and_bear_unknown_quality():
    train, test = made(60, 0), made(30, 1)
    hidden = RouterRows(test.texts, np.full((30, 3), np.nan), test.category, test.vectors)
    for name, score in fit_baselines(train, [1, 2, 3]).items():
        if name == "oracle": continue
        found = score(hidden)
        assert found.shape == (30, 3) and np.isfinite(found).all() and np.array_equal(found, score(test)), name
    naive = []
    for vector in test.vectors:
        cosine = [vector @ other / np.linalg.norm(vector) / np.linalg.norm(other) for other in train.vectors]
        naive.append(np.nanmean(train.quality[np.argsort(cosine)[-40:]], axis=0))
    assert np.allclose(fit_baselines(train, [1, 2, 3], ["nearest_prompts"])["nearest_prompts"](test), naive)
    category = fit_baselines(train, [1, 2, 3], ["category_prior"])["category_prior"](test)
    there = train.quality[train.category == test.category[0], 1]
    assert category[0, 1] == pytest.approx((np.nansum(there) + 40 * np.nanmean(train.quality[:, 1])) / (np.isfinite(there).sum() + 40))


def test_rows_are_cut_with_their_comparisons():
    rows = made(50, 2)
    some = rows.take([7, 3, 40])
    fresh = comparisons_of(some.quality)
    assert {tuple(map(int, c)) for c in zip(*some.comparisons)} == {tuple(map(int, c)) for c in zip(*fresh)} and len(some.comparisons[0]) == len(fresh[0])
    votes = quality_of(rows.comparisons, 50, 3)
    assert np.array_equal(np.nanargmax(votes[np.isfinite(rows.quality).all(1)], 1), rows.quality[np.isfinite(rows.quality).all(1)].argmax(1))


@pytest.mark.parametrize("call, message", [
    (lambda: RouterRows([], np.zeros((0, 2))), "quality has the shape (0, 2)"),
    (lambda: RouterRows(["a"], np.zeros((2, 2))), "1 texts for 2 prompts"),
    (lambda: RouterRows(list("ab"), np.zeros((2, 2)), vectors=np.zeros((3, 4))), "3 vectors for 2 prompts"),
    (lambda: fit_baselines(RouterRows(list("ab"), np.full((2, 2), np.nan)), [1, 2]), "no quality is known"),
    (lambda: fit_baselines(RouterRows(["?", "!"], np.eye(2)), [1, 2], ["words_ridge"]), "no words that could be counted"),
    (lambda: fit_baselines(RouterRows(list("ab"), np.eye(2)), [1, 2, 3]), "cost has the shape (3,) for 2 models"),
    (lambda: fit_baselines(RouterRows(list("ab"), np.eye(2)), [1, 2], ["category_prior"]), "cannot be fitted: no category"),
    (lambda: fit_baselines(RouterRows(list("ab"), np.ones((2, 2))), [1, 2], ["combined_logistic"]), "1 different outcomes, not 2 to 16"),
    (lambda: fit_baselines(RouterRows(list("ab"), np.eye(2)), [1, 2], ["nearest"]), "did you mean 'cheapest'"),
])
def test_baseline_errors(call, message):
    with pytest.raises((ConfigError, DataError)) as error: call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_figures_on_mmlu(mmlu, record_property):
    "1,500 labelled prompts, half of the rest to test; what needs no sentence encoder."
    order = rng(0, "labelled").permutation(len(mmlu))
    train, test = mmlu.take(order[:1_500]), mmlu.take(np.sort(order[1_500::2]))
    fitted = fit_baselines(train, [24.7, .24], ["category_prior", "words_ridge", "combined_logistic", "best_single", "oracle"])
    result = evaluate_routers({name: score(test) for name, score in fitted.items()}, test.quality, [24.7, .24], models=["gpt-4", "mixtral"], n_resamples=100)
    apgr = {name: figures["apgr"]["value"] for name, figures in result["systems"].items()}
    record_property("apgr", apgr)
    assert apgr["category_prior"] == pytest.approx(.663, abs=.025) and apgr["words_ridge"] == pytest.approx(.628, abs=.025) and apgr["oracle"] == pytest.approx(1.28, abs=.025)
    assert apgr["combined_logistic"] > .65 and apgr["best_single"] == pytest.approx(.5, abs=1e-12)
    assert verdict(result, "category_prior").startswith("beats best single model: yes (aiq")


def test_every_baseline_says_what_it_is(): assert all(baseline.about and callable(baseline.fit) for baseline in BASELINES.values())
