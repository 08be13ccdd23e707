"Retriever and reranker as one system: one denominator, pessimistic ties, the best that is possible, outside references, whole runs."
import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.bench_losses import bench_losses
from proj.config import BenchLossesConfig, EvaluateConfig, PipelineConfig, make
from proj.core import ConfigError, DataError, ProjError, read_json, sha256_file
from proj.data.sources import load_data
from proj.data.store import from_tables
from proj.evaluate import Evaluation
from proj.metrics import of_system, read_ledger
from proj.models.cross import CrossEncoder, load_cross
from proj.models.lexical import BM25
from proj.pipeline import METRICS, SWEEP, Candidates, LexicalPool, Pipeline, Stages, best_of_each, blend, collapsed, load_retriever
from proj.report import Report
from proj.run import Run
from proj.train import fit
from proj.use import evaluate, pipeline, rank

from test_cross import SMALL
from test_train import config, write_pairs


class Table:
    "A first stage and a reranker in one: a score for every query and document, by their texts."
    def __init__(self, scores):
        self.scores, self.asked = np.asarray(scores, np.float64), []

    def blocks(self, queries, documents):
        yield slice(0, len(queries)), self.scores[np.ix_([int(q.split()[1]) for q in queries], [int(d.split()[1]) for d in documents])].astype(np.float32)

    def score_pairs(self, pairs, desc=""):
        self.asked += pairs
        return np.array([self.scores[int(q.split()[1]), int(d.split()[1])] for q, d in pairs], np.float32)


def store_of(grades, order=None):
    "A store of a matrix of grades (n, m); the documents in some order."
    n, m = np.shape(grades)
    return from_tables([(f"q{i}", f"query {i}") for i in range(n)], [(f"d{j}", f"document {j}") for j in (range(m) if order is None else order)],
                       [(f"q{i}", f"d{j}", float(grades[i][j])) for i in range(n) for j in range(m) if grades[i][j]])


@st.composite
def worlds(draw, values=st.integers(0, 3)):
    "(grades, first stage, reranker, depth): one to five right documents a query, few different scores."
    n, m = draw(st.integers(1, 3)), draw(st.integers(2, 25))
    grades = np.zeros((n, m))
    for row in grades:
        for j in draw(st.sets(st.integers(0, m - 1), min_size=1, max_size=5)): row[j] = draw(st.integers(1, 3))
    first, other = (np.array(draw(st.lists(st.lists(values, min_size=m, max_size=m), min_size=n, max_size=n)), float) for _ in range(2))
    return grades, first, other, draw(st.integers(2, 28))


# ---- one denominator

@settings(max_examples=60, deadline=None)
@given(worlds(), st.floats(0, 1))
def test_a_reranker_that_changes_nothing_lifts_by_exactly_nothing(world, alpha):
    grades, first, _, depth = world
    stages = Stages(store_of(grades), Table(first), depth).add("trained", Table(first))
    values, beside = stages.evaluation.values, stages.evaluation.beside
    assert set(values["trained"]) == {name for name in METRICS if not name.startswith("hit@") or int(name[4:]) <= depth}
    for metric in values["trained"]: assert np.array_equal(values["trained"][metric], values["first_stage"][metric]), metric
    for d in stages.depths:
        for metric in SWEEP: assert np.array_equal(beside[f"trained@{d}"][metric], values["first_stage"][metric]), (d, metric)
    assert all(f"trained@{d}" in beside and f"oracle@{d}" in beside for d in stages.depths)


def test_the_first_stage_is_measured_as_it_is_anywhere():
    "Through the candidates or alone: all known answers count on both sides, those beyond the depth too."
    draw = np.random.default_rng(0)
    grades, first = np.where(draw.random((12, 60)) < 0.08, draw.integers(1, 3, (12, 60)), 0), draw.integers(0, 9, (12, 60))
    grades[:, 0] = 1
    store = store_of(grades)
    stages = Stages(store, Table(first), 15).add("trained", Table(first))
    alone = Evaluation(store, metrics=list(stages.evaluation.values["first_stage"])).add("first_stage", Table(first))
    for metric, values in alone.values["first_stage"].items(): assert np.array_equal(values, stages.evaluation.values["first_stage"][metric]), metric
    assert all(row["lift"]["value"] == 0 and row["lift"]["ci95"] in (None, [0, 0]) for row in stages.sweep())
    assert "is not shown to help with 12 queries" in stages.verdict() and "+0.0000" in stages.verdict()


# ---- a naive pipeline

def worth(metric, ranking, grades):
    "A metric of one ranking, from its definition."
    name, _, cut = metric.partition("@")
    cut, gains = int(cut or len(ranking)), [grades[j] for j in ranking]
    hits = [i for i, g in enumerate(gains, 1) if g > 0]
    def dcg(values): return sum(g / math.log2(1 + i) for i, g in enumerate(values[:cut], 1))
    return {"mrr": lambda: 1 / hits[0] if hits[0] <= cut else 0, "hit": lambda: float(hits[0] <= cut), "recall": lambda: sum(i <= cut for i in hits) / len(hits),
            "map": lambda: np.mean([k / i for k, i in enumerate(hits, 1)]), "ndcg": lambda: dcg(gains) / dcg(sorted(grades, reverse=True))}[name]()


def naive_candidates(scores, depth):
    "Columns of one query's candidates, best first, with their ranks: behind all that are equal."
    ranks = {j: sum(s >= scores[j] for s in scores) for j in range(len(scores))}
    return [(j, ranks[j]) for j in sorted(ranks, key=lambda j: (-scores[j], j)) if ranks[j] <= depth]


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_candidates_are_those_of_a_naive_count(world):
    _, first, _, depth = world
    columns, ranks = best_of_each(first, depth)
    for row in range(len(first)):
        assert [(j, r) for j, r in zip(columns[row].tolist(), ranks[row].tolist()) if j >= 0] == naive_candidates(first[row], depth)
    n, m = first.shape
    candidates = Candidates([f"query {i}" for i in range(n)], [f"document {j}" for j in range(m)], Table(first), depth)
    assert len(candidates) == sum(len(naive_candidates(row, depth)) for row in first)
    for smaller in (1, 2, depth):
        within = candidates.within(smaller, candidates.base)
        for row, kept in zip(first, within): assert kept[np.isfinite(kept)].tolist() == [row[j] for j, _ in naive_candidates(row, min(smaller, depth))]


def naive_rankings(first, columns, values):
    "Every order that the values allow, the rest behind as the first stage has it (without ties there)."
    rest = [j for j in sorted(range(len(first)), key=lambda j: -first[j]) if j not in columns]
    return [[*order, *rest] for order in permutations(columns) if all(values[a] >= values[b] for a, b in zip(order, order[1:]))]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.sampled_from(["constant", "few", "all"]))
def test_ties_are_pessimistic_whatever_the_order_of_the_documents(seed, depth, kind):
    "The worst over all orders of tied candidates; a constant scorer is the extreme."
    draw, m = np.random.default_rng(seed), 8
    grades, first = draw.integers(0, 4, (3, m)) * (draw.random((3, m)) < 0.5), np.argsort(draw.random((3, m)), axis=1)
    grades[:, 0] = 1
    values = {"constant": np.zeros((3, m)), "few": draw.integers(0, 2, (3, m)), "all": draw.random((3, m))}[kind]
    found = Stages(store_of(grades), Table(first), depth).add("trained", Table(values)).evaluation
    for q in range(3):
        orders = naive_rankings(first[q], [j for j, _ in naive_candidates(first[q], depth)], values[q])
        for metric, measured in found.values["trained"].items():
            assert measured[q] == pytest.approx(min(worth(metric, order, grades[q]) for order in orders), abs=1e-12), metric
    moved = Stages(store_of(grades, draw.permutation(m)), Table(first), depth).add("trained", Table(values)).evaluation
    for system in ("first_stage", "oracle", "trained"):
        for metric, measured in found.values[system].items(): assert np.array_equal(measured, moved.values[system][metric]), (system, metric)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_the_oracle_is_the_best_of_all_orders(seed, depth):
    draw, m = np.random.default_rng(seed), 8
    grades, first = draw.integers(0, 4, (2, m)) * (draw.random((2, m)) < 0.5), np.argsort(draw.random((2, m)), axis=1)
    grades[:, 0] = 1
    found = Stages(store_of(grades), Table(first), depth).evaluation.values["oracle"]
    for q in range(2):
        orders = naive_rankings(first[q], [j for j, _ in naive_candidates(first[q], depth)], np.zeros(m))
        for metric in ("ndcg@10", "mrr", "map", "hit@1"): assert found[metric][q] == pytest.approx(max(worth(metric, order, grades[q]) for order in orders), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.floats(0, 1))
def test_nothing_is_better_than_the_oracle(world, alpha):
    grades, first, other, depth = world
    stages = Stages(store_of(grades), Table(first), depth).add("trained", Table(other), alpha)
    best = stages.evaluation.values["oracle"]
    for system in ("first_stage", "trained", "blended"):
        for metric, values in stages.evaluation.values[system].items(): assert (values <= best[metric] + 1e-12).all(), (system, metric)
    for d in stages.depths:
        for system in ("trained", "blended"):
            for metric in SWEEP: assert (stages.evaluation.beside[f"{system}@{d}"][metric] <= stages.evaluation.beside[f"oracle@{d}"][metric] + 1e-12).all()


def test_figures_are_those_of_an_outside_reference():
    import ir_measures
    draw, n, m, depth = np.random.default_rng(1), 25, 300, 120
    grades, first, other = np.where(draw.random((n, m)) < 0.03, draw.integers(1, 4, (n, m)), 0), draw.random((n, m)), draw.random((n, m))
    grades[:, 7] = 1
    stages = Stages(store_of(grades), Table(first), depth).add("trained", Table(other), 0.3)
    qrels = {f"q{i}": {f"d{j}": int(g) for j, g in enumerate(row) if g} for i, row in enumerate(grades)}
    names = {"mrr": "RR", "mrr@10": "RR@10", "ndcg@10": "nDCG@10", "map": "AP", "hit@1": "Success@1", "hit@3": "Success@3", "hit@10": "Success@10"} | {f"recall@{k}": f"R@{k}" for k in (1, 10, 100)}
    def composed(values, d):
        "The d best of the first stage by the values, then the others."
        run = {}
        for i in range(n):
            order = np.argsort(-first[i])
            order = [*sorted(order[:d], key=lambda j: -values(i, j, order[:d])), *order[d:]]
            run[f"q{i}"] = {f"d{j}": float(m - place) for place, j in enumerate(order)}
        return run
    def blended(i, j, top): return 0.3 / (1 + math.exp(-other[i, j])) + 0.7 * (first[i, j] - first[i, top].min()) / (first[i, top].max() - first[i, top].min())
    def check(values, run, metrics):
        expected = {(r.query_id, str(r.measure)): r.value for r in ir_measures.iter_calc([ir_measures.parse_measure(names[name]) for name in metrics], qrels, run)}
        for metric in metrics:
            for i in range(n): assert values[metric][i] == pytest.approx(expected[f"q{i}", names[metric]], abs=1e-9), (metric, i)
    assert set(names) == set(METRICS) and stages.depths == [10, 20, 50, 100, 120]
    values, beside = stages.evaluation.values, stages.evaluation.beside
    check(values["trained"], composed(lambda i, j, top: other[i, j], depth), METRICS)
    check(values["blended"], composed(blended, depth), METRICS)
    check(values["first_stage"], composed(lambda i, j, top: first[i, j], depth), METRICS)
    check(values["oracle"], composed(lambda i, j, top: grades[i, j] + first[i, j] / 10, depth), METRICS)
    for d in stages.depths:
        check(beside[f"trained@{d}"], composed(lambda i, j, top: other[i, j], d), SWEEP)
        check(beside[f"blended@{d}"], composed(blended, d), SWEEP)
    for row in stages.sweep():
        recall = np.mean([(first[i][grades[i] > 0] >= np.sort(first[i])[-row["depth"]]).mean() for i in range(n)])
        assert row["recall"]["value"] == pytest.approx(recall) and row["reranked"]["value"] == pytest.approx(beside[f"trained@{row['depth']}"]["ndcg@10"].mean())
        assert row["lift"]["value"] == pytest.approx((beside[f"trained@{row['depth']}"]["ndcg@10"] - values["first_stage"]["ndcg@10"]).mean())
        assert row["blended_lift"]["value"] == pytest.approx((beside[f"blended@{row['depth']}"]["ndcg@10"] - values["first_stage"]["ndcg@10"]).mean())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_the_blend_equals_its_formula(seed, alpha, flat):
    draw = np.random.default_rng(seed)
    base, scores = draw.normal(size=(4, 6)).round(1), draw.normal(size=(4, 6)) * 4
    if flat: base[0], base[1, :5] = 0.7, -2.0
    base[2, 3:], base[3] = np.nan, np.nan
    base[1, 5] = np.nan
    found = blend(base, scores, alpha)
    for q in range(4):
        there = [x for x in base[q] if not math.isnan(x)]
        for j in range(6):
            if math.isnan(base[q, j]):
                assert math.isnan(found[q, j])
                continue
            scaled = (base[q, j] - min(there)) / (max(there) - min(there)) if max(there) > min(there) else 0.5
            assert found[q, j] == pytest.approx(alpha / (1 + math.exp(-scores[q, j])) + (1 - alpha) * scaled, abs=1e-12)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="alpha is"): blend(base, scores, wrong)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 0.0, 0.4, 1.0]), st.sampled_from([1, 10, 60]))
def test_a_pipeline_ranks_as_it_is_measured(seed, alpha, steep):
    "Also where probabilities saturate: log-odds of 30 and 40 are both a probability of 1."
    draw, m = np.random.default_rng(seed), 9
    first, other = draw.random((1, m)), np.argsort(draw.random((1, m)), axis=1) * steep / 10 + 0.05 * steep
    ids = {f"d{j}": f"document {j}" for j in range(m)}
    both = Pipeline(Table(first), Table(other), 6, alpha)
    scores = next(both.blocks(["query 0"], list(ids.values())))[1][0]
    assert both.rank("query 0", ids).ids == [f"d{j}" for j in np.argsort(-scores, kind="stable")[:6]]  # equal ones by id


# ---- work and limits

def test_each_pair_is_scored_once():
    draw = np.random.default_rng(0)
    grades, first, other = np.eye(5, 70), draw.random((5, 70)), Table(draw.random((5, 70)))
    stages = Stages(store_of(grades), Table(first), 60).add("trained", other, 0.5)
    wanted = {(f"query {i}", f"document {j}") for i in range(5) for j in np.argsort(-first[i])[:60]}
    assert stages.depths == [10, 20, 50, 60] and len(other.asked) == 300 == len(stages.candidates) and set(other.asked) == wanted
    assert list(stages.milliseconds()) == stages.depths and sorted(stages.milliseconds().values()) == list(stages.milliseconds().values())
    stages.sweep(), stages.verdict(), repr(stages)
    assert len(other.asked) == 300


def test_a_depth_beyond_the_pool_is_the_pool():
    grades, first, other = np.eye(2, 5), np.arange(10).reshape(2, 5), np.arange(10)[::-1].reshape(2, 5)
    deep, all_of_it = (Stages(store_of(grades), Table(first), depth).add("trained", Table(other)) for depth in (50, 5))
    assert deep.depths == [5] and all(np.array_equal(deep.evaluation.values["trained"][m], all_of_it.evaluation.values["trained"][m]) for m in all_of_it.evaluation.values["trained"])
    assert deep.evaluation.values["trained"]["mrr"].tolist() == [1, 0.5]


def test_hits_beyond_the_candidates_are_not_claimed():
    grades, first = np.eye(2, 12), np.arange(24).reshape(2, 12)
    assert {name for name in Stages(store_of(grades), Table(first), 4).evaluation.values["first_stage"] if name.startswith("hit")} == {"hit@1", "hit@3"}


def test_a_pool_of_one_document():
    stages = Stages(store_of([[1]]), Table([[0.3]]), 10).add("trained", Table([[2.0]]), 0.5)
    assert all(values[metric].tolist() == [1] for values in stages.evaluation.values.values() for metric in values) and stages.depths == [1]
    assert len(stages.sweep()) == 1 and collapsed(stages.scores["trained"]) == 0
    assert Pipeline(Table([[0.3]]), Table([[2.0]]), 10).rank("query 0", {"d": "document 0"}).ids == ["d"]


def test_what_cannot_be_put_in_order():
    with pytest.raises(ConfigError, match="depth is 1; expected 2 or more"): Stages(store_of([[1, 0]]), Table([[1, 2]]), 1)
    everything_equal = Stages(store_of(np.eye(2, 30)), Table(np.zeros((2, 30))), 10).add("trained", Table(np.random.default_rng(0).random((2, 30))))
    assert len(everything_equal.candidates) == 0 and np.array_equal(everything_equal.evaluation.values["trained"]["mrr"], [1 / 30] * 2)
    assert len(Pipeline(Table(np.zeros((1, 9))), Table(np.zeros((1, 9))), 5).rank("query 0", {f"d{j}": f"document {j}" for j in range(9)})) == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_reranker_without_numbers_is_one_line(broken):
    scores = np.random.default_rng(0).random((3, 30))
    scores[1, 4:20] = broken
    with pytest.raises(DataError) as error: Stages(store_of(np.eye(3, 30)), Table(np.random.default_rng(1).random((3, 30))), 20).add("trained", Table(scores))
    assert "\n" not in str(error.value)


def test_a_damaged_cross_encoder_is_one_line():
    model = load_cross("tiny", texts=["query document 0 1 2"], max_length=16)
    model[0].model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(DataError, match="NaN or infinity") as error: Stages(store_of(np.eye(2, 6)), Table(np.random.default_rng(0).random((2, 6))), 4).add("trained", CrossEncoder(model, "fp32"))
    assert "\n" not in str(error.value)


def test_a_collapsed_reranker_is_named(tmp_path, caplog):
    draw = np.random.default_rng(0)
    stages = Stages(store_of(np.eye(6, 30)), Table(draw.random((6, 30))), 12)
    scores = draw.random((6, 30)) * 0.005  # closer than anything says
    scores[5] *= 1000
    stages.add("trained", Table(scores)).add("other", Table(draw.random((6, 30))))
    assert "trained has collapsed" in caplog.text and "other has collapsed" not in caplog.text
    run = Run.create(tmp_path / "run", dict(task="cross"), "")
    stages.evaluation.facts |= dict(depths=stages.sweep(), verdict=stages.verdict())
    stages.evaluation.save(run.folder)
    assert read_json(run / "metrics.json")["collapsed"] == {"trained": round(5 / 6, 4), "other": 0.0}
    said = str(Report(run).verdict())
    assert "trained has collapsed" in said and "83%" in said and "other has collapsed" not in said


def test_a_document_that_asks_is_left_out_on_both_sides():
    "exclude_self: a query that is a document of its own finds itself at rank 1, and that does not count."
    n = 6
    grades = np.roll(np.eye(n), 1, axis=1)
    store = from_tables([(f"d{i}", f"query {i}") for i in range(n)], [(f"d{j}", f"document {j}") for j in range(n)], [(f"d{i}", f"d{j}", 1.0) for i, j in zip(*np.nonzero(grades))])
    first = np.eye(n) * 2 + grades + np.random.default_rng(0).random((n, n)) / 10
    with_self, without = (Stages(store, Table(first), 4, exclude_self=flag).add("trained", Table(first)).evaluation.values for flag in (False, True))
    for name in ("first_stage", "trained"): assert (with_self[name]["mrr"] == 0.5).all() and (without[name]["mrr"] == 1).all()


def test_what_is_no_first_stage():
    for name in ("tiny", "scratch"):
        with pytest.raises(ConfigError, match="has learned nothing") as error: load_retriever(name)
        assert "\n" not in str(error.value)


def test_a_pool_of_words_is_saved_and_damaged(tmp_path):
    pool = LexicalPool(["a", "b"], ["sort a list", "ünï çödé"])
    pool.save(tmp_path / "pool.parquet")
    again = LexicalPool.load(tmp_path / "pool.parquet")
    assert (again.ids, again.texts) == (pool.ids, pool.texts)
    (tmp_path / "pool.parquet").write_bytes((tmp_path / "pool.parquet").read_bytes()[:50])
    with pytest.raises(DataError, match="cannot be read as a pool") as error: LexicalPool.load(tmp_path / "pool.parquet")
    assert "\n" not in str(error.value)


# ---- whole runs

@pytest.fixture(scope="module")
def pairs(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def reranker(pairs, tmp_path_factory):
    return fit(**SMALL | dict(data=str(pairs), out=str(tmp_path_factory.mktemp("runs") / "cross"), loss="bce", epochs=2, max_steps=None, eval_every=None, max_queries=None, alpha="validation", seed=3))


def same_figures(found, run, systems):
    theirs = read_json(run / "metrics.json")
    for system in systems:
        for metric, figure in theirs["systems"][system].items(): assert found["systems"][system][metric]["value"] == pytest.approx(figure["value"], abs=1e-9), (system, metric)
    assert found["pool"] == theirs["pool"]


def test_a_pair_is_measured_as_the_run_measured_itself(reranker, tmp_path):
    chosen = reranker.facts["alpha"]["chosen"]
    cfg = make(PipelineConfig, dict(retriever="bm25", reranker=str(reranker.folder), out=str(tmp_path / "pair"), depth=10, alpha=chosen, precision="fp32"))
    together = pipeline(cfg)
    found = read_json(tmp_path / "pair" / "metrics.json")
    same_figures(found, reranker, ["first_stage", "oracle", "trained", "blended"])
    assert found["retriever"] == "bm25" and found["alpha"] == chosen and [row["depth"] for row in found["depths"]] == [10] and str(10) in found["milliseconds"]
    ours, theirs = (of_system(read_ledger(folder / "ledger.parquet"), "trained") for folder in (tmp_path / "pair", reranker.folder))
    assert ours.equals(theirs)
    for name in ("ledger.parquet", "queries.parquet", "scores.parquet", "examples.json"): assert (tmp_path / "pair" / name).stat().st_size > 0
    assert "reranked" in repr(together) and "At depth 10 the reranker" in repr(together) and "ms a query" in repr(together)
    evaluate(make(EvaluateConfig, dict(run=str(reranker.folder), out=str(tmp_path / "again"), precision="fp32")))
    same_figures(read_json(tmp_path / "again" / "metrics.json"), reranker, ["first_stage", "oracle", "trained", "blended"])


def test_a_pair_with_an_encoder(reranker, tmp_path, pairs):
    cfg = make(PipelineConfig, dict(retriever="minilm", reranker=str(reranker.folder), data=str(pairs), out=str(tmp_path / "pair"), depth=12, precision="fp32", max_queries=10))
    pipeline(cfg)
    found = read_json(tmp_path / "pair" / "metrics.json")
    assert set(found["systems"]) == {"first_stage", "oracle", "bm25", "trained", "blended"} and found["systems"]["trained"]["mrr"]["n"] == 10
    assert [row["depth"] for row in found["depths"]] == [10, 12] and found["alpha"] == 0.7


def test_a_run_behind_static_vectors_is_measured_again_the_same(pairs, tmp_path):
    run = fit(**SMALL | dict(data=str(pairs), out=str(tmp_path / "run"), loss="bce", retriever="static", max_queries=None))
    pipeline(make(PipelineConfig, dict(retriever="static", reranker=str(run.folder), out=str(tmp_path / "pair"), depth=10, precision="fp32")))
    same_figures(read_json(tmp_path / "pair" / "metrics.json"), run, ["first_stage", "oracle", "trained", "blended"])
    query = load_data(str(pairs)).test.query_texts[0]
    assert len(rank(run.folder, query, top_k=3)) == 3


def test_a_query_is_ranked_by_both_stages(reranker, pairs):
    store = load_data(str(pairs), seed=3).test
    query, cfg = store.query_texts[0], reranker.facts["config"]
    found = rank(reranker.folder, query, top_k=5)
    systems = read_json(reranker / "metrics.json")["systems"]
    better = systems["blended"]["ndcg@10"]["value"] > systems["trained"]["ndcg@10"]["value"]
    model, ids = CrossEncoder.load(reranker.folder), store.documents["doc_id"].to_pylist()
    candidates = Candidates([query], store.document_texts, BM25(), cfg["depth"])
    scores, _ = candidates.scored(model)
    values = blend(candidates.base, scores, reranker.facts["alpha"]["chosen"]) if better else scores
    order = [j for j in np.argsort(-np.nan_to_num(values[0], nan=-np.inf), kind="stable") if candidates.columns[0, j] >= 0]
    assert found.ids == [ids[candidates.columns[0, j]] for j in order][:5] and (np.diff(found.scores) <= 0).all()
    other = rank(reranker.folder, query, data=str(pairs), top_k=5)
    assert 1 <= len(other) <= 5 and (0 <= other.scores).all() and (other.scores <= 1).all()


def test_a_dual_encoder_is_no_reranker(pairs, reranker, tmp_path):
    dual = fit(config(pairs, tmp_path / "dual", max_steps=2))
    for folder in (dual.folder, dual / "model"):
        with pytest.raises(ConfigError, match="is a dual encoder") as error: pipeline(make(PipelineConfig, dict(retriever="bm25", reranker=str(folder), data=str(pairs))))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is a run of task cross") as error: pipeline(make(PipelineConfig, dict(retriever=str(reranker.folder), reranker=str(reranker.folder))))
    assert "\n" not in str(error.value)
    pipeline(make(PipelineConfig, dict(retriever=str(dual.folder), reranker=str(reranker.folder), out=str(tmp_path / "pair"), depth=5)))  # a run is a first stage
    assert read_json(tmp_path / "pair" / "metrics.json")["retriever"] == str(dual.folder)


def test_a_bench_trains_apart_and_goes_on_with_what_is_finished(pairs, tmp_path):
    values = dict(data=str(pairs), losses=["bce", "cross_entropy"], seeds=1, model="tiny", retriever="bm25", out=str(tmp_path / "bench"), max_pairs=40, max_queries=10, depth=8,
                  lr=1e-3, max_length=40, precision="fp32")
    cfg = make(BenchLossesConfig, values)
    bench = bench_losses(cfg)
    assert {row["loss"] for row in bench} == {"bce", "softmax", "first_stage"} and bench.facts["reference"] == "softmax" and bench.facts["queries"] == 10
    for row in bench:
        if row["loss"] == "first_stage": continue
        run = Run.open(tmp_path / "bench" / f"{row['loss']}-seed-0")
        assert run.status == "finished" and row["peak_mib"] > 100 and row["seconds"] > 0
        assert row["ndcg@10"]["value"] == pytest.approx(read_json(run / "metrics.json")["systems"]["trained"]["ndcg@10"]["value"])
    softmax, bce = (next(row for row in bench if row["loss"] == name) for name in ("softmax", "bce"))
    assert bce["difference"]["value"] == pytest.approx(bce["ndcg@10"]["value"] - softmax["ndcg@10"]["value"]) and "difference" not in softmax
    files = [path for path in (tmp_path / "bench").rglob("*") if path.is_file() and path.name != "bench.json"]
    was, stamps, text = {path: sha256_file(path) for path in files}, {path: path.stat().st_mtime_ns for path in files}, (tmp_path / "bench" / "bench.json").read_text()
    again = bench_losses(cfg)
    assert (tmp_path / "bench" / "bench.json").read_text() == text and repr(again) == repr(bench)
    assert {path: sha256_file(path) for path in files} == was and {path: path.stat().st_mtime_ns for path in files} == stamps
    with pytest.raises(ProjError, match="lr") as error: bench_losses(make(BenchLossesConfig, values | dict(lr=1e-5)))  # not the figures of another bench
    assert "\n" not in str(error.value)


def test_a_bench_names_what_cannot_be_fed(pairs, tmp_path):
    with pytest.raises(ConfigError, match="no teacher_scores") as error: bench_losses(make(BenchLossesConfig, dict(data=str(pairs), losses="margin_mse", out=str(tmp_path / "bench"), retriever="bm25")))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="unknown loss 'nope'"): bench_losses(make(BenchLossesConfig, dict(data=str(pairs), losses="bce,nope", out=str(tmp_path / "bench"))))
