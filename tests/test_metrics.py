"Metrics against trec_eval, a naive sort, and themselves in another order."
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError
from proj.metrics import (DEFAULT, Ranks, compute, ledger, ledger_values, of_system, parse_metric, ranks_in_matrix, ranks_in_run, read_ledger,
                          write_ledger)

TREC = {"mrr": "recip_rank", "ndcg": "ndcg", "ndcg@5": "ndcg_cut_5", "ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@5": "recall_5",
        "recall@10": "recall_10", "recall@100": "recall_100", "map": "map", "map@5": "map_cut_5", "p@1": "P_1", "p@10": "P_10", "hit@1": "success_1",
        "hit@10": "success_10"}


def pessimistic(scores, judged):
    "Documents in order: score down; on equal scores irrelevant before relevant, low grades before high ones."
    return sorted(scores, key=lambda doc: (-scores[doc], max(judged.get(doc, 0), 0), doc))


def trec_eval(run, qrels):
    "Per query: trec_eval's figures for the pessimistic order, handed over as strictly falling scores; zeros for a query without an answer."
    import pytrec_eval
    ordered = {q: {doc: float(len(scores) - i) for i, doc in enumerate(pessimistic(scores, qrels.get(q, {})))} for q, scores in run.items() if scores}
    measures = {"recip_rank", "ndcg", "ndcg_cut.5,10", "recall.1,5,10,100", "map", "map_cut.5", "P.1,10", "success.1,10"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(ordered)
    return {q: {name: found[q][trec] if q in found else 0.0 for name, trec in TREC.items()} for q in qrels}


def random_run(generator):
    "A run and its judgements: graded or not, with ties, missing queries, empty queries, documents judged but not retrieved, queries not judged."
    n, pool, levels = generator.integers(1, 7), generator.integers(1, 140), generator.choice([1, 2, 5, 1000])
    docs = [f"d{i}" for i in range(pool)]
    qrels, run = {}, {}
    for i in range(n):
        judged = generator.choice(docs, generator.integers(1, min(pool, 30) + 1), replace=False)
        grades = generator.integers(-1, 4 if generator.random() < 0.5 else 2, len(judged))
        grades[0] = max(grades[0], 1)
        qrels[f"q{i}"] = {str(doc): int(grade) for doc, grade in zip(judged, grades)}
        if generator.random() < 0.1: continue
        picked = generator.choice(docs, generator.integers(0, pool + 1), replace=False)
        run[f"q{i}"] = {str(doc): float(generator.integers(levels)) / 7 for doc in picked}
    if run and generator.random() < 0.2: run["not judged"] = {"d0": 1.0}
    if generator.random() < 0.02: run = {}
    if list(run) == ["not judged"]: run = {}
    return run, qrels


def as_columns(run):
    "The columnar form of a run, short rows padded."
    k = max([len(scores) for scores in run.values()] + [0])
    ids = [list(scores) + [None] * (k - len(scores)) for scores in run.values()]
    scores = [list(scores.values()) + [-np.inf] * (k - len(scores)) for scores in run.values()]
    return list(run), np.array(ids, object).reshape(len(run), k), np.array(scores, float).reshape(len(run), k)


def test_equal_to_trec_eval_on_1000_random_runs():
    generator, worst = np.random.default_rng(0), 0.0
    seen = dict(ties=0, missing=0, empty_query=0, empty_run=0, graded=0, lost=0)
    for _ in range(1000):
        run, qrels = random_run(generator)
        expected = trec_eval(run, qrels)
        for form in [run, as_columns(run)]:
            ranks = ranks_in_run(form, qrels)
            assert ranks.query_ids == sorted(qrels)
            for name, values in compute(ranks, list(TREC)).items():
                worst = max(worst, np.abs(values - [expected[q][name] for q in ranks.query_ids]).max())
        seen["ties"] += any(len(set(s.values())) < len(s) for s in run.values())
        seen["missing"] += any(q not in run for q in qrels)
        seen["empty_query"] += any(not s for s in run.values())
        seen["empty_run"] += not run
        seen["graded"] += any(g > 1 for j in qrels.values() for g in j.values())
        seen["lost"] += (ranks.rank == 0).any()
    assert worst < 1e-9
    assert min(seen.values()) >= 10, seen


def test_mrr_with_a_cut_is_trec_evals_on_the_first_k():
    generator = np.random.default_rng(1)
    for _ in range(50):
        run, qrels = random_run(generator)
        cut = {q: {doc: s[doc] for doc in pessimistic(s, qrels.get(q, {}))[:10]} for q, s in run.items()}
        ranks, expected = ranks_in_run(run, qrels), trec_eval(cut, qrels)
        assert compute(ranks, ["mrr@10"])["mrr@10"] == pytest.approx([expected[q]["mrr"] for q in ranks.query_ids], abs=1e-9)


def test_equal_to_the_library_evaluator_on_binary_runs_without_ties():
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    generator = np.random.default_rng(2)
    docs = [f"d{i}" for i in range(60)]
    run = {f"q{i}": dict(zip(generator.permutation(docs).tolist(), generator.random(60).tolist())) for i in range(40)}
    qrels = {q: {str(doc): 1 for doc in generator.choice(docs, 3, replace=False)} for q in run}
    library = InformationRetrievalEvaluator({q: q for q in run}, {doc: doc for doc in docs}, {q: set(judged) for q, judged in qrels.items()})
    theirs = library.compute_metrics([[{"corpus_id": doc, "score": s} for doc, s in run[q].items()] for q in library.queries_ids])
    ours = {name: values.mean() for name, values in compute(ranks_in_run(run, qrels), ["mrr@10", "ndcg@10", "hit@1", "p@5", "recall@10"]).items()}
    assert ours == pytest.approx({"mrr@10": theirs["mrr@k"][10], "ndcg@10": theirs["ndcg@k"][10], "hit@1": theirs["accuracy@k"][1],
                                  "p@5": theirs["precision@k"][5], "recall@10": theirs["recall@k"][10]}, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_no_result_depends_on_the_order_of_the_input(seed, data):
    run, qrels = random_run(np.random.default_rng(seed))
    def shuffled(table): return {q: dict(data.draw(st.permutations(list(row.items())))) for q, row in data.draw(st.permutations(list(table.items())))}
    first, other_run, other_qrels = compute(ranks_in_run(run, qrels)), shuffled(run), shuffled(qrels)
    for form in [other_run, as_columns(other_run)]:
        second = compute(ranks_in_run(form, other_qrels))
        assert all(np.array_equal(first[name], second[name]) for name in DEFAULT)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_dense_in_any_blocks_and_any_document_order_equals_sparse(seed, data):
    generator = np.random.default_rng(seed)
    n, pool = generator.integers(1, 9), generator.integers(1, 40)
    scores = generator.integers(0, generator.choice([1, 3, 1000]), (n, pool)).astype(np.float32)
    grades = generator.integers(0, 3, (n, pool)) * (generator.random((n, pool)) < 0.3)
    grades[np.arange(n), generator.integers(0, pool, n)] = 1
    row, col = np.nonzero(grades)
    expected = compute(ranks_in_run({i: {j: float(s) for j, s in enumerate(scores[i])} for i in range(n)},
                                    {i: {int(j): int(grades[i, j]) for j in np.flatnonzero(grades[i])} for i in range(n)}))
    order, rows = generator.permutation(pool), generator.permutation(len(row))
    place = np.argsort(order)
    cuts = sorted(data.draw(st.lists(st.integers(0, int(n)), max_size=3)))
    blocks = [part for part in np.split(scores[:, order], cuts)]
    found = ranks_in_matrix(iter(blocks), row[rows], place[col[rows]], grades[row, col][rows])
    assert found.pool == pool
    assert all(np.array_equal(values, expected[name]) for name, values in compute(found).items())


def test_exclude_equals_taking_the_column_away():
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 4, (20, 20)).astype(np.float32)
    target = (np.arange(20) + generator.integers(1, 20, 20)) % 20
    found = ranks_in_matrix(scores, range(20), target, np.ones(20), exclude=range(20))
    for i in range(20):
        others = np.delete(np.arange(20), i)
        alone = ranks_in_matrix(scores[i:i + 1, others], [0], [np.flatnonzero(others == target[i])[0]], [1])
        assert found.rank[i] == alone.rank[0]
    part = ranks_in_matrix(scores, range(20), target, np.ones(20), exclude=np.where(np.arange(20) < 10, np.arange(20), -1))
    assert (part.rank[:10] == found.rank[:10]).all() and (part.rank[10:] >= found.rank[10:]).all()
    with pytest.raises(DataError, match="no relevant document"): ranks_in_matrix(scores, range(20), range(20), np.ones(20), exclude=range(20))


@pytest.mark.parametrize("position", [0, 4, 9])
def test_a_constant_scorer_gets_the_worst_figure_in_any_order(position):
    dense = ranks_in_matrix(np.full((1, 10), 0.7, np.float32), [0], [position], [1])
    sparse = ranks_in_run({"q": {f"d{i}": 0.7 for i in range(10)}}, {"q": {f"d{position}": 1}})
    assert dense.rank.tolist() == sparse.rank.tolist() == [10]
    assert compute(dense, ["mrr", "hit@1"])["mrr"].tolist() == [0.1]


def test_of_two_equal_scores_the_lower_grade_comes_first():
    for grades in itertools.permutations([1, 2, 3]):
        ranks = ranks_in_matrix(np.zeros((1, 3), np.float32), [0, 0, 0], [0, 1, 2], grades)
        assert ranks.grade.tolist() == [1, 2, 3] and ranks.rank.tolist() == [1, 2, 3]


def test_smallest_cases():
    one = ranks_in_run({"q": {"d": 0.0}}, {"q": {"d": 1}})
    assert all(values.tolist() == [1] for values in compute(one).values())
    assert compute(one, ["p@10"])["p@10"].tolist() == [0.1]  # the pool is smaller than k; k stays the denominator
    for empty in [{}, {"q": {}}, ([], np.zeros((0, 0)), np.zeros((0, 0))), (["q"], np.zeros((1, 0)), np.zeros((1, 0)))]:
        assert all(values.tolist() == [0] for values in compute(ranks_in_run(empty, {"q": {"d": 1}})).values())
    assert ranks_in_matrix(np.zeros((1, 1)), [0, 0], [0, -1], [1, 1]).rank.tolist() == [1, 0]  # judged, but not in the pool
    assert ranks_in_matrix(np.array([[-np.inf, 1.0]]), [0], [0], [1]).rank.tolist() == [0]  # masked out
    assert ranks_in_matrix(np.array([[1, 3, 2]]), [0], [2], [1]).rank.tolist() == [2]  # whole numbers


def test_queries_without_a_relevant_document():
    "By default they are no queries at all; asking for one is refused."
    qrels = {"q1": {"d": 1}, "q2": {"d": 0}, "q3": {"d": -1}, "q4": {}}
    assert ranks_in_run({"q1": {"d": 1.0}, "q2": {"d": 1.0}}, qrels).query_ids == ["q1"]
    with pytest.raises(DataError, match="'q2' has no relevant document"): ranks_in_run({"q1": {"d": 1.0}}, qrels, ["q1", "q2"])
    with pytest.raises(DataError, match="'9' has no relevant document"): ranks_in_run({}, qrels, ["q1", 9])


def test_columns_take_queries_in_any_order_and_ignore_others():
    run = ["q3", "q1", "q9"], np.array([[1, 2], [2, 1], [1, 2]]), np.array([[0.9, 0.1], [0.9, 0.1], [0.5, 0.4]])
    ranks = ranks_in_run(run, {"q1": {1: 1}, "q2": {1: 1}, "q3": {1: 1}})
    assert ranks.rank.tolist() == [2, 0, 1]


@pytest.mark.parametrize("run, qrels, message", [
    ({"q1": {"d": float("nan")}}, {"q1": {"d": 1}}, "'q1' has a score that is not a number"),
    ({"q1": {"d": 1.0, "e": float("nan")}}, {"q1": {"d": 1}}, "'q1' has a score that is not a number"),
    ((["q1"], [["d", "e"]], [[1, float("nan")]]), {"q1": {"d": 1}}, "'q1' has a score that is not a number"),
    ((["q1"], [["d", "d"]], [[1, 0.5]]), {"q1": {"e": 1}}, "'q1' has the same document twice"),
    ((["q1"], [[7, 7]], [[1, 0.5]]), {"q1": {5: 1}}, "'q1' has the same document twice"),
    ((["q1", "q1"], [["d"], ["d"]], [[1], [1]]), {"q1": {"d": 1}}, "'q1' stands in the run twice"),
    ((["q1"], [["d"]], [[1], [1]]), {"q1": {"d": 1}}, "expected .n,., .n, k., .n, k."),
    ((["q1"], [["d"]], [1]), {"q1": {"d": 1}}, "expected a matrix"),
    ((["q1"], [["d"]], [[1]]), {"q1": {1: 1}}, "all strings or all integers"),
    ((["q1"], [[1]], [[1]]), {"q1": {"d": 1}}, "all strings or all integers"),
    ({"Q1": {"d": 1.0}}, {"q1": {"d": 1}}, "none of the 1 queries of the run is judged, for example 'Q1'"),
    ({"q1": {"d": 1.0}}, {"q1": {"d": float("nan")}}, "'q1' has a grade that is not finite"),
])
def test_bad_runs_are_refused_in_one_line(run, qrels, message):
    with pytest.raises(DataError, match=message) as error: ranks_in_run(run, qrels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(scores=np.array([[1.0, np.nan], [0, 0]])), "query 'a' has a score that is not a number"),
    (dict(doc_cols=[0, 2]), "document column 2 is judged or excluded, but there are 2 documents"),
    (dict(exclude=[0, 5]), "document column 5 is judged or excluded"),
    (dict(exclude=[0]), "do not fit; pass one of each per query"),
    (dict(query_rows=[0, 2]), "do not fit; pass one of each per query"),
    (dict(query_rows=[0, -1]), "negative query row"),
    (dict(query_rows=[0]), "pass one of each per judgement"),
    (dict(query_rows=[0, 0, 1], doc_cols=[1, 1, 0], grades=[1, 2, 1]), "query row 0 judges document column 1 twice"),
    (dict(grades=[1, np.nan]), "judgement 1 has no finite grade"),
    (dict(query_rows=[0, 0]), "query 'b' has no relevant document"),
    (dict(scores=np.zeros((3, 2))), "rows or more for 2 queries"),
    (dict(scores=np.zeros((1, 2))), "rows or more for 2 queries"),
    (dict(scores=iter([])), "the scores have 0 rows"),
    (dict(scores=np.zeros((2, 0))), "but there are 0 documents"),
    (dict(scores=np.zeros(2)), "expected a matrix"),
])
def test_bad_matrices_are_refused_in_one_line(change, message):
    good = dict(scores=np.eye(2), query_rows=[0, 1], doc_cols=[0, 1], grades=[1, 1], query_ids=["a", "b"])
    assert ranks_in_matrix(**good).rank.tolist() == [1, 1]
    with pytest.raises(DataError, match=message) as error: ranks_in_matrix(**good | change)
    assert "\n" not in str(error.value)


def test_a_large_block_is_ranked_in_little_more_than_its_own_memory():
    scores = np.random.default_rng(4).permuted(np.tile(np.arange(100_000, dtype=np.float32), (64, 1)), axis=1)  # 25.6 MB, no ties
    tracemalloc.start()
    ranks = ranks_in_matrix(scores, np.arange(64).repeat(3), np.arange(192), np.ones(192))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < scores.nbytes / 2
    order = np.argsort(-scores, axis=1)
    assert all(ranks.rank[3 * i:3 * i + 3].tolist() == sorted(np.flatnonzero(np.isin(order[i], range(3 * i, 3 * i + 3))) + 1) for i in range(64))


@pytest.mark.parametrize("name, message", [("ndgc@10", "did you mean 'ndcg'"), ("MRR", "did you mean 'mrr'"), ("recall", "needs a cut"), ("p", "needs a cut"),
                                           ("mrr@0", "whole number above 0"), ("mrr@-1", "whole number"), ("mrr@", "whole number"), ("ndcg@1.5", "whole number"),
                                           ("ndcg@²", "whole number"), ("", "unknown metric")])
def test_unknown_metrics_are_refused(name, message):
    with pytest.raises(ConfigError, match=message): parse_metric(name)


def test_ledger_keeps_every_value_and_the_same_bytes(tmp_path):
    values = compute(Ranks([0, 1], [2, 0], [1, 1], ["q1", "q2"]), ["mrr", "map"])
    table = pa.concat_tables([ledger(["q1", "q2"], values, system="trained"), ledger(["q1", "q2"], {"mrr": [1, 0]}, system="bm25")])
    for name in ["one.parquet", "two.parquet"]: write_ledger(tmp_path / name, table)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    back = read_ledger(tmp_path / "one.parquet")
    assert back.equals(table) and back.num_rows == 6 and back.column_names == ["query_id", "metric", "value", "system"]
    assert ledger_values(of_system(back, "trained"), "mrr") == {"q1": 0.5, "q2": 0}
    with pytest.raises(DataError, match="several values"): ledger_values(back, "mrr")
    with pytest.raises(ConfigError, match="did you mean 'bm25'"): of_system(back, "bm2")
    with pytest.raises(ConfigError, match="did you mean 'mrr'"): ledger_values(back, "mr")


def test_bad_ledgers_are_refused(tmp_path):
    with pytest.raises(DataError, match="'mrr' is not finite for query 'q2'"): ledger(["q1", "q2"], {"mrr": [1, np.nan]})
    with pytest.raises(DataError, match="1 values for 2 queries"): ledger(["q1", "q2"], {"mrr": [1]})
    with pytest.raises(DataError, match="a query id twice"): ledger(["q1", "q1"], {"mrr": [1, 1]})
    with pytest.raises(DataError, match="cannot be read as a ledger"): read_ledger(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("query_id,metric,value")
    with pytest.raises(DataError, match="cannot be read as a ledger"): read_ledger(tmp_path / "text.parquet")
    write_ledger(tmp_path / "other.parquet", pa.table({"query_id": ["a"], "value": [1.0]}))
    with pytest.raises(DataError, match="has no column 'metric'"): read_ledger(tmp_path / "other.parquet")


def test_import_is_light():
    code = "import sys, proj.compare; print([m for m in ('torch', 'pyarrow', 'scipy', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
