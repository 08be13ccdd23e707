"The routing problem made on the spot: ranks against the metrics of retrieval, counts of work by hand, the same twice, errors."
import numpy as np
import pytest

from proj.core import ConfigError, MachineError
from proj.data.sources import load_test
from proj.data.store import from_pairs, from_tables
from proj.metrics import ranks_in_matrix, reciprocal_rank
from proj.models.dual import DualEncoder
from proj.models.lexical import BM25
from proj.retrievers import MODELS, dense_work, lexical_work, milliseconds, outcomes_of, reciprocal_ranks, retriever_outcomes


@pytest.fixture(scope="module")
def few(): return retriever_outcomes(seed=1, max_queries=40)


def test_ranks_are_those_of_the_retrieval_metrics():
    draw = np.random.default_rng(0)
    scores, right = draw.integers(0, 4, (40, 15)) / 4, draw.random((40, 15)) < .2
    right[np.arange(40), draw.integers(0, 15, 40)] = True
    rows, columns = np.nonzero(right)
    assert np.array_equal(reciprocal_ranks(scores, right), reciprocal_rank(ranks_in_matrix(scores, rows, columns, np.ones(len(rows)))))
    assert reciprocal_ranks(scores[:2], np.zeros((2, 15), bool)).tolist() == [0, 0]


@pytest.fixture(scope="module")
def store(few):
    "The same queries, found by their texts."
    everything, wanted = load_test("stdlib"), set(few.prompts)
    return everything.take(np.array([i for i, text in enumerate(everything.query_texts) if text in wanted]), own_documents=True)


def test_outcomes_are_those_of_the_scorers(few, store):
    assert few.prompts == store.query_texts and few.models == MODELS and few.facts["pool"] == len(store.documents)
    assert few.group.tolist() == store.queries["group"].to_pylist() and len(set(few.group)) > 5
    for column, scorer in zip(few.quality.T, (BM25(), DualEncoder.load("static", texts=store.document_texts), DualEncoder.load("minilm"))):
        ranks = ranks_in_matrix(scorer.score(store.query_texts, store.document_texts), store.query_rows, store.document_rows, store.grades)
        assert column == pytest.approx(reciprocal_rank(ranks), abs=.05) and np.mean(column == reciprocal_rank(ranks)) > .95  # batches round
    assert few.facts["mrr"]["minilm"] == pytest.approx(few.quality[:, 2].mean(), abs=1e-4) and few.facts["hit_at_1"]["bm25"] == pytest.approx((few.quality[:, 0] == 1).mean(), abs=1e-4)
    assert repr(few).startswith(f"40 queries over {few.facts['pool']} documents")


def test_the_same_figures_again_but_for_the_clock(few, store):
    again = outcomes_of(store, timed=3)
    assert again.prompts == few.prompts and np.array_equal(again.quality, few.quality) and np.array_equal(again.cost, few.cost)
    assert {**again.facts, "milliseconds": 0} == {**few.facts, "milliseconds": 0} and min(again.facts["milliseconds"].values()) > 0


def test_work_is_counted_as_by_hand():
    assert lexical_work(["open file", "close"], ["open the file", "a file", "close_file(open)"]) == (2 + 3 + 1) / 2  # close_file counts for close and for file
    static, minilm = DualEncoder.load("static"), DualEncoder.load("minilm")
    tokens = len(minilm.model.tokenizer("sort a list")["input_ids"])
    assert tokens == 5 and dense_work(static, ["sort a list"], 10) == 3 * 384 + 10 * 384
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384 * (minilm.model[0].auto_model.pooler is not None)
    assert dense_work(minilm, ["sort a list"], 10) == tokens * weights + 2 * 6 * tokens**2 * 384 + 10 * 384


def test_the_clock_leaves_out_the_first():
    import time
    asked = []
    def answer(query):
        asked.append(query)
        time.sleep(.05 if len(asked) == 1 else .001)
    assert 1 <= milliseconds(answer, list("abcd")) and asked == list("abcd")


def test_queries_with_several_right_documents():
    store = from_tables([("q1", "sort a list of numbers"), ("q2", "weather in spring")], [("a", "sorting numbers in a list"), ("b", "spring weather is mild"), ("c", "weather report of spring")],
                        [("q1", "a", 1, None, ""), ("q2", "b", 1, None, ""), ("q2", "c", 1, None, "")])
    assert (outcomes_of(store, timed=1).quality == 1).all()


def test_errors(monkeypatch):
    with pytest.raises(ConfigError, match="max_queries is 1; expected 2 or more"): retriever_outcomes(max_queries=1)
    import proj.models.encoder as encoder
    monkeypatch.setattr(encoder, "cached_minilm", lambda: None)
    monkeypatch.setattr(encoder, "packaged_minilm", lambda: None)  # as on a machine without the extra, offline
    with pytest.raises(MachineError, match=r"run pip install proj\[offline\]"): outcomes_of(from_pairs([dict(query="a b", code="c d"), dict(query="e f", code="g h")]))
