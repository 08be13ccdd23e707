"Hard negatives: nothing that answers the query, the same ones whatever computes them, and a ledger that says why."
import ast
import hashlib
import os
import subprocess
import sys
from functools import partial
from itertools import islice

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proj.mine
from proj.audit import Audit, apply, read_labels
from proj.batches import column_keys
from proj.candidates import Dense
from proj.config import NegativesSpec, make
from proj.core import ConfigError, DataError
from proj.data.guard import label_conflicts
from proj.data.read import read_rows
from proj.data.split import normalise
from proj.data.store import from_pairs, from_tables, render
from proj.embeddings import EmbeddingCache
from proj.mine import Mined, Miner, mine
from proj.models.cross import CrossEncoder
from proj.models.dual import DualEncoder
from proj.models.encoder import load_encoder, resolve
from proj.negatives import Rounds
from proj.trainer import mask_labels

WORDS = "river stone cloud amber violet harbour lantern meadow copper thunder willow ember falcon glacier orchid pebble quartz ridge saffron timber".split()


def spec(**values): return make(NegativesSpec, {"candidates": "dense", **values})


@pytest.fixture(scope="module")
def encoder(): return DualEncoder(load_encoder("static", texts=WORDS), precision="fp32")


def toy(n=60, extra=(), seed=0):
    "n queries of three words, each with an answer of eight that shares two; no two texts are near-duplicates."
    draw = np.random.default_rng(seed)
    pick = lambda k: [WORDS[i] for i in draw.integers(len(WORDS), size=k)]
    rows = [{"query": " ".join((words := pick(3)) + [f"q{i}"]), "positive": " ".join(words[:2] + pick(6) + [f"d{i}"])} for i in range(n)]
    return from_pairs([*rows, *extra])


def vectors_of(encoder, store): return encoder.encode(store.query_texts, "query"), encoder.encode(store.document_texts)


def kept(mined): return [(r["query_id"], r["doc_id"]) for r in mined.ledger.filter(pc.equal(mined.ledger["decision"], "kept")).to_pylist()]


# ---- real data

@pytest.fixture(scope="module")
def pymined(data_dir):
    "7,000 pairs of the public set, a static encoder, its vectors."
    store = from_pairs(row for _, row in islice(read_rows(data_dir / "pymined" / "train.jsonl"), 7_000))
    encoder = DualEncoder(load_encoder("static", texts=store.document_texts), precision="fp32")
    return store, encoder, vectors_of(encoder, store)


def shingles(text):
    words = normalise(text).split()
    words = list(normalise(text)) if len(words) < 8 else words
    return {tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))}


def test_no_known_positive_and_no_near_duplicate_among_20_000_mined_negatives(pymined):
    store, encoder, vectors = pymined
    mined = mine(store, spec(k=3, rank_max=20, relative_margin=None, strategy="top"), encoder=encoder, vectors=vectors)
    texts, answers, checked = store.document_texts, {}, 0
    for q, d, grade in zip(store.query_rows, store.document_rows, store.grades):
        if grade > 0: answers.setdefault(normalise(store.query_texts[q]), []).append(texts[d])
    for q, row in enumerate(mined.negatives):
        known = answers[normalise(store.query_texts[q])]
        near, equal = [shingles(text) for text in known], {normalise(text) for text in known}
        for d in row[row >= 0]:
            mine_ = shingles(texts[d])
            assert normalise(texts[d]) not in equal
            assert all(len(mine_ & other) < 0.8 * len(mine_ | other) for other in near)
            checked += 1
    assert checked > 20_000
    dropped = mined.shares()
    assert dropped["known positive"] > 0 and dropped["near-duplicate"] > 0


def copied(code: str, query: str) -> str:
    "The function as it stands elsewhere: other names of its variables, no comments, another layout, and the docstring that the query was taken from."
    tree = ast.parse(code)
    names = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    new = {name: f"v{i}" for i, name in enumerate(sorted(names - {"self", "cls"}))}
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): n.id = new.get(n.id, n.id)
        elif isinstance(n, ast.arg): n.arg = new.get(n.arg, n.arg)
    tree.body[0].body.insert(0, ast.Expr(ast.Constant(query)))
    return ast.unparse(ast.fix_missing_locations(tree))


def test_the_margin_removes_hidden_positives(pymined):
    "Every fifth answer gets a copy that nobody labelled, too different for the guard to know."
    store, encoder, _ = pymined
    store = store.take(np.arange(3_000), own_documents=True)
    plants = {}
    for row in range(0, 3_000, 5):
        try: plants[store.judgements["query_id"][row].as_py()] = copied(store.document_texts[store.document_rows[row]], store.query_texts[store.query_rows[row]])
        except SyntaxError: continue
    documents = [*zip(store.documents["doc_id"].to_pylist(), store.document_texts), *((f"plant {q}", text) for q, text in plants.items())]
    judged = zip(*(store.judgements[name].to_pylist() for name in ("query_id", "doc_id", "grade")))
    planted = from_tables(zip(store.queries["query_id"].to_pylist(), store.query_texts), documents, judged)
    vectors, found = vectors_of(encoder, planted), {}
    for margin in (None, 0.05):
        mined = mine(planted, spec(k=3, relative_margin=margin, strategy="top"), encoder=encoder, vectors=vectors)
        found[margin] = sum(doc == f"plant {query}" for query, doc in kept(mined))
    assert len(plants) > 550 and found[None] > 200
    assert found[0.05] <= 0.2 * found[None], found


# ---- the same negatives, whatever computes them

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_mine import WORDS, DualEncoder, digest, load_encoder, mine, proj, spec, toy
encoder, store = DualEncoder(load_encoder("static", texts=WORDS), precision="fp32"), toy()
proj.mine.BLOCK = 777
for options in (dict(seed=3), dict(seed=4), dict(seed=3, round=1)): print(digest(mine(store, spec(k=4, relative_margin=None), encoder=encoder, **options)))
"""


def digest(mined): return hashlib.sha256(mined.negatives.tobytes()).hexdigest()


def test_same_seed_same_negatives_in_any_process_block_size_and_number_of_threads(encoder, monkeypatch):
    store = toy()
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if os.environ["OMP_NUM_THREADS"] != "1" else "2", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, os.path.dirname(__file__)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert len(set(said)) == 3
    for batch_tokens, block in ((8, 60), (17, 2**21)):
        vectors = encoder.encode(store.query_texts, "query", batch_tokens=batch_tokens), encoder.encode(store.document_texts, batch_tokens=batch_tokens)
        monkeypatch.setattr(proj.mine, "BLOCK", block)
        assert digest(mine(store, spec(k=4, relative_margin=None), encoder=encoder, vectors=vectors, seed=3)) == said[0]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_real_vectors_in_blocks_of_any_size(encoder, similarity, monkeypatch):
    "The ledger too, to the last bit: where scores differ by less than a matrix product is right to."
    store, draw = toy(40), np.random.default_rng(1)
    base = draw.normal(size=(8, 48))
    vectors = tuple((base[np.arange(40) % 8] + 1e-7 * draw.normal(size=(40, 48))).astype(np.float32) for _ in range(2))
    monkeypatch.setattr(encoder.model, "similarity_fn_name", similarity, raising=False)
    found = []
    for block in (1, 130, 2**21):
        monkeypatch.setattr(proj.mine, "BLOCK", block)
        found.append(mine(store, spec(k=3, rank_max=7, strategy="top", relative_margin=None), encoder=encoder, vectors=vectors))
    assert found[0].ledger.equals(found[1].ledger) and found[0].ledger.equals(found[2].ledger)
    encoder.model.similarity_fn_name = "cosine"


def test_other_order_of_the_rows_gives_the_same_negatives(encoder):
    store = toy()
    turned = from_tables(reversed(list(zip(store.queries["query_id"].to_pylist(), store.query_texts))), reversed(list(zip(store.documents["doc_id"].to_pylist(), store.document_texts))),
                         reversed(list(zip(*(store.judgements[name].to_pylist() for name in ("query_id", "doc_id", "grade"))))))
    assert sorted(kept(mine(store, spec(k=3), encoder=encoder))) == sorted(kept(mine(turned, spec(k=3), encoder=encoder)))


# ---- against a double loop, and the library

small = st.integers(-3, 3).map(float)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), n=st.integers(1, 4), m=st.integers(1, 7), k=st.integers(1, 4), low=st.integers(1, 4), deep=st.integers(0, 6),
       margin=st.none() | small, relative=st.none() | st.sampled_from([0, .05, .5]), least=st.none() | small, most=st.none() | small)
def test_ranks_margins_and_reasons_are_those_of_a_double_loop(encoder, data, n, m, k, low, deep, margin, relative, least, most):
    q, d = (data.draw(st.lists(st.tuples(small, small), min_size=size, max_size=size)) for size in (n, m))
    right = [sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1, max_size=2))) for _ in range(n)]
    wrong = [set(data.draw(st.sets(st.integers(0, m - 1), max_size=2))) - set(r) for r in right]
    masked = [set(data.draw(st.sets(st.integers(0, m - 1), max_size=1))) - set(r) - w for r, w in zip(right, wrong)]
    names = data.draw(st.permutations([f"d{i}" for i in range(m)]))
    texts = [f"{WORDS[i]} {WORDS[-1 - i]} {i}" * 3 for i in range(m)]
    judged = [(f"q{i}", names[j], grade) for i in range(n) for grade, js in ((1, right[i]), (0, wrong[i]), (-1, masked[i])) for j in js]
    store = from_tables([(f"q{i}", f"{WORDS[i + 8]} {i} asks") for i in range(n)], zip(names, texts), judged)
    s = spec(k=k, rank_min=low, rank_max=low + deep, margin=margin, relative_margin=relative, min_score=least, max_score=most, strategy="top")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.model, "_similarity_fn_name", "dot", raising=False)
        encoder.model.similarity_fn_name = "dot"
        mined = mine(store, s, encoder=encoder, vectors=(np.float32(q), np.float32(d)))
        encoder.model.similarity_fn_name = "cosine"
    rows = {(r["query_id"], r["doc_id"]): r for r in mined.ledger.to_pylist()}
    for i in range(n):
        score, expected, rank = [float(np.dot(q[i], d[j])) for j in range(m)], [], 0
        positive = min(score[j] for j in right[i])
        for j in sorted(range(m), key=lambda j: (-score[j], names[j])):
            row = rows.pop((f"q{i}", names[j]), None)
            barred = "known positive" if j in right[i] else "known negative" if j in wrong[i] else "masked" if j in masked[i] else ""
            rank += not barred
            if rank + bool(barred) > low + deep:
                assert row is None or barred and row["source"] == "judged" and row["rank"] is None
                continue
            assert row["rank"] == rank + bool(barred) and row["score"] == score[j] and row["positive_score"] == positive
            reasons = {"rank window": rank < low, "max score": most is not None and score[j] > most, "min score": least is not None and score[j] < least,
                       "margin": margin is not None and score[j] > positive - margin,
                       "relative margin": relative is not None and score[j] > positive - relative * abs(positive)}
            reason = barred or next((name for name, holds in reasons.items() if holds), "")
            if not reason and len(expected) < k: expected.append(j)
            elif not reason: reason = "not drawn"
            assert (row["decision"], row["reason"]) == (("dropped", reason) if reason else ("kept", "top"))
        assert [j for j in mined.negatives[i] if j >= 0] == expected
    assert not rows


def test_the_library_mines_the_same_where_it_falls_into_no_trap(encoder):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    store = toy()
    theirs = mine_hard_negatives(Dataset.from_dict(render(store, "pairs")), encoder.model, range_max=59, num_negatives=3, relative_margin=0.05, output_format="labeled-list", verbose=False)
    ours = mine(store, spec(k=3, strategy="top"), encoder=encoder)
    texts = {store.query_texts[q]: [store.document_texts[d] for d in row if d >= 0] for q, row in enumerate(ours.negatives)}
    assert {row["anchor"]: row["positive"][1:] for row in theirs} == {query: found for query, found in texts.items() if found}
    assert len(theirs) > 20


# ---- the library's traps

def test_a_positive_with_one_more_space_is_mined_by_the_library_and_not_here(encoder):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    query, answer = "river stone cloud amber violet harbour", "river stone cloud amber violet harbour lantern"
    store = toy(extra=[{"query": query, "positive": answer}, {"query": "another thing", "positive": answer.replace(" ", "  ", 1)}])
    theirs = mine_hard_negatives(Dataset.from_dict(render(store, "pairs")), encoder.model, range_max=20, num_negatives=1, verbose=False)
    assert {"anchor": query, "positive": answer, "negative": answer.replace(" ", "  ", 1)} in list(theirs)
    ours = mine(store, spec(k=20, relative_margin=None, strategy="top"), encoder=encoder)
    asked = store.query_texts.index(query)
    assert not {normalise(store.document_texts[d]) for d in ours.negatives[asked] if d >= 0} & {answer}


def test_random_depends_on_the_seed_alone(encoder):
    import random
    store = toy()
    found = []
    for state in (0, 1):
        random.seed(state)
        np.random.seed(state)
        found.append(mine(store, spec(k=2), encoder=encoder).negatives)
    assert np.array_equal(*found) and not np.array_equal(found[0], mine(store, spec(k=2), encoder=encoder, seed=1).negatives)


def test_a_dot_product_model_is_mined_by_its_dot_product(encoder):
    store = from_tables([("q", "asks for something")], [(f"d{i}", f"{WORDS[i]} {WORDS[i + 5]} text {i}") for i in range(4)], [("q", "d0", 1)])
    vectors = np.float32([[1, 0]]), np.float32([[9, 0], [3, 4], [1, 0], [0, 1]])  # d1 is longer, d2 points the same way
    first = lambda: mine(store, spec(strategy="top", relative_margin=None), encoder=encoder, vectors=vectors).negatives[0, 0]
    assert first() == 2
    encoder.model.similarity_fn_name = "dot"
    assert first() == 1
    encoder.model.similarity_fn_name = "cosine"


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    "A tiny one of random weights, from a folder."
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
    folder = tmp_path_factory.mktemp("cross")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64, initializer_range=0.5)
    for part in (BertForSequenceClassification(BertConfig(**shape, num_labels=1)), tokenizer): part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("candidates", ["dense", "bm25", "union"])
def test_a_cross_encoder_scores_without_any_filter_and_is_named(encoder, cross_encoder, candidates):
    import torch
    from proj.core import sha256_weights
    store = toy(20, extra=[{"query": "river stone", "positive": "river stone and more of it", "negatives": ["willow ember falcon"]}])
    mined = mine(store, spec(candidates=candidates, k=2, relative_margin=None, cross_encoder=str(cross_encoder)), encoder=encoder)
    judge = CrossEncoder.load(cross_encoder, precision="fp32")
    assert mined.facts["scorer"] == "cross-encoder" and mined.facts["model_hash"] == sha256_weights(judge.model) != encoder.weights_hash()
    logits = partial(judge.model.predict, activation_fn=torch.nn.Identity())
    query, document = (dict(zip(table.column(0).to_pylist(), table["text"].to_pylist())) for table in (store.queries, store.documents))
    scored = [r for r in mined.ledger.to_pylist() if r["score"] is not None]
    assert np.allclose([r["score"] for r in scored], logits([(query[r["query_id"]], document[r["doc_id"]]) for r in scored]), atol=1e-6)
    columns = render(mined.store(store), "scored triplets")
    for place, name in enumerate(("positive", "negative")):
        assert np.allclose(np.array(columns["score"])[:, place], logits(list(zip(columns["anchor"], columns[name]))), atol=1e-6)


def test_the_cache_never_gives_the_negatives_of_other_weights(encoder, tmp_path):
    import torch
    store, cache = toy(), EmbeddingCache(tmp_path)
    weight = encoder.model[0].embedding.weight
    before = mine(store, spec(strategy="top"), encoder=encoder, cache=cache)
    saved = weight.detach().clone()
    with torch.no_grad(): weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    after = mine(store, spec(strategy="top"), encoder=encoder, cache=cache)
    fresh = mine(store, spec(strategy="top"), encoder=encoder)
    with torch.no_grad(): weight.copy_(saved)
    assert np.array_equal(after.negatives, fresh.negatives) and not np.array_equal(after.negatives, before.negatives)
    assert after.facts["model_hash"] != before.facts["model_hash"]
    hits = cache.hits
    assert np.array_equal(mine(store, spec(strategy="top"), encoder=encoder, cache=cache).negatives, before.negatives) and cache.hits == hits + 120


# ---- stores and rounds

def test_a_round_replaces_the_one_before_and_leaves_what_was_given(encoder):
    store = toy(extra=[{"query": "river stone", "positive": "river stone and more of it", "negatives": ["willow ember falcon glacier"]}])
    miner = Miner(store, spec(k=2, relative_margin=None), seed=1)
    ready = store
    for round in range(3):
        mined = miner.mine(encoder, round=round)
        ready = mined.store(ready)
        sources = ready.judgements["source"].to_pylist()
        assert sources.count("mined:dense") == int((mined.negatives >= 0).sum()) and sources.count("given") == len(store.judgements)
        assert mine(ready, miner.spec, encoder=encoder, seed=1, round=round).ledger.equals(mined.ledger)  # its own negatives are no known ones
    given = ("willow ember falcon glacier", "known negative")
    text = dict(zip(store.documents["doc_id"].to_pylist(), store.document_texts))
    assert given in {(text[r["doc_id"]], r["reason"]) for r in mined.ledger.to_pylist()}


def test_the_margin_is_below_the_lowest_positive(encoder):
    texts = [f"{WORDS[i]} {WORDS[i + 5]} text {i}" for i in range(4)]
    store = from_tables([("q", "asks for something")], [(f"d{i}", text) for i, text in enumerate(texts)], [("q", "d0", 1), ("q", "d1", 2)])
    angles = np.float32([0.0, 0.9, 0.6, 1.2])
    vectors = np.float32([[1, 0]]), np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert kept(mine(store, spec(k=4), encoder=encoder, vectors=vectors)) == [("q", "d3")]


def test_other_queries_that_ask_the_same_share_their_answers(encoder):
    store = toy(extra=[{"query": "river stone cloud", "positive": "river stone cloud amber one"}, {"query": "River, stone: cloud!", "positive": "ember falcon glacier orchid two"}])
    mined = mine(store, spec(k=50, relative_margin=None, strategy="top"), encoder=encoder)
    pairs = {(store.query_texts[q], store.document_texts[d]) for q, row in enumerate(mined.negatives) for d in row if d >= 0}
    assert ("river stone cloud", "ember falcon glacier orchid two") not in pairs and ("River, stone: cloud!", "river stone cloud amber one") not in pairs


def test_labels_of_an_audit_hold_when_the_store_is_mined_again(encoder, tmp_path):
    store = toy()
    mined = mine(store, spec(k=2, relative_margin=None), encoder=encoder)
    audit = Audit(mined, store, tmp_path / "labels.jsonl", n=8)
    box = audit.widget()
    for i in range(8): box.children[1].children[i % 4].click()
    labels = read_labels(tmp_path / "labels.jsonl")
    assert list(labels.values()) == ["keep", "drop", "mask", "promote"] * 2
    mended = apply(mined.store(store), labels)
    again = mine(mended, spec(k=59, relative_margin=None, strategy="top"), encoder=encoder)
    assert not set(kept(again)) & {pair for pair, label in labels.items() if label != "keep"}
    assert (mended.grades > 0).sum() == 62 and mended.answers.sum() == 64


def test_what_a_person_masked_or_dropped_is_no_negative_in_training(encoder):
    names = [f"d{i}" for i in range(6)]
    store = from_tables([(f"q{i}", f"{WORDS[i]} question") for i in range(3)], [(name, f"{WORDS[10 + i]} answer {name}") for i, name in enumerate(names)],
                        [("q0", "d0", 1), ("q1", "d1", 1), ("q2", "d2", 1)])
    store = store.judge([("q0", "d1", -1, None, "audit:mask", None), ("q0", "d2", -1, None, "audit:drop", None)])
    rounds = Rounds(store, encoder, spec(k=2))
    key, (zero, one) = rounds.document_keys, (np.array([0]), np.array([1]))
    assert set(rounds.labels(zero, zero, np.array([[3, 4]]))[0][3:]) == {key[0], key[1]}, "the masked one counts as an answer, the dropped one may meet the query in a batch"
    assert {int(d) for batch in range(200) for d in rounds.choose(zero, zero, batch)[0]} == {3, 4, 5}, "drawn to fill up: neither answers, nor what was dropped"
    assert {int(d) for batch in range(200) for d in rounds.choose(one, one, batch)[0]} == {0, 2, 3, 4, 5}, "another's answer is free"
    pairs = render(store, "pairs")
    first = mask_labels(store, pairs, column_keys(pairs))[pairs["anchor"].index(f"{WORDS[0]} question")]
    assert len(set(first[1:]) - {-1}) == 2, "its answer, and what is masked"
    assert label_conflicts(store) == []


# ---- bad input

def test_more_negatives_than_documents(encoder):
    mined = mine(toy(5), spec(k=50, rank_min=1, rank_max=10_000, relative_margin=None), encoder=encoder)
    assert [(row >= 0).sum() for row in mined.negatives] == [4] * 5 and mined.short == 5 and mined.without == 0


@pytest.mark.parametrize("options", [dict(rank_min=60, rank_max=99), dict(min_score=2), dict(max_score=-2), dict(margin=9)])
def test_windows_that_hold_nothing_leave_every_query_without(encoder, options):
    mined = mine(toy(20), spec(**options), encoder=encoder)
    assert mined.without == 20 and "20 queries without a negative" in repr(mined)
    with pytest.raises(DataError, match="no query has a negative left.*\n?") as error: mined.store(toy(20))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("candidates", ["dense", "bm25", "union"])
def test_a_store_of_one_document(encoder, candidates):
    alone = from_pairs([{"query": "river stone", "positive": "river stone cloud"}])
    assert mine(alone, spec(candidates=candidates), encoder=encoder).negatives.tolist() == [[-1]]


def test_scores_that_are_no_numbers_are_refused(encoder, cross_encoder):
    import torch
    store = toy(10)
    good = vectors_of(encoder, store)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="hold NaN or infinity"): mine(store, spec(), encoder=encoder, vectors=(np.full_like(good[0], bad), good[1]))
    encoder.model.similarity_fn_name = "dot"
    with pytest.raises(DataError, match="too large"): mine(store, spec(), encoder=encoder, vectors=tuple(np.float32(1e30) * v for v in good))
    encoder.model.similarity_fn_name = "cosine"

    broken = CrossEncoder.load(cross_encoder)
    with torch.no_grad(): next(broken.model.parameters()).fill_(np.nan)
    with pytest.raises(DataError, match="cross-encoder gives NaN"): mine(store, spec(), encoder=encoder, cross_encoder=broken)


def test_what_cannot_be_mined_is_one_line(encoder, tmp_path):
    store = toy(10)
    with pytest.raises(ConfigError, match="candidates is none"): mine(store, NegativesSpec())
    with pytest.raises(ConfigError, match="needs an encoder"): mine(store, spec())
    with pytest.raises(DataError, match="one a row"): mine(store, spec(), encoder=encoder, vectors=(np.zeros((10, 4), np.float32), np.zeros((9, 4), np.float32)))
    with pytest.raises(ConfigError, match="nothing in it scores pairs"): mine(store, spec(cross_encoder="minilm"), encoder=encoder)
    (tmp_path / "ledger.parquet").write_text("no table")
    with pytest.raises(DataError, match="cannot be read as a mining ledger"): Mined.load(tmp_path / "ledger.parquet", store)


def test_a_model_that_has_collapsed_is_mined_in_bounds(encoder):
    store = toy(300)
    mined = mine(store, spec(k=2, rank_max=5, relative_margin=None, strategy="top"), encoder=encoder, vectors=(np.ones((300, 4), np.float32),) * 2)
    ids = np.array(store.documents["doc_id"].to_pylist())
    assert len(mined.ledger) <= 300 * 7
    for q, row in enumerate(mined.negatives): assert list(ids[row]) == sorted(set(ids) - {ids[store.document_rows[q]]})[:2]


def test_exact_scores_are_the_librarys(encoder):
    store = toy(30)
    q, d = vectors_of(encoder, store)
    i, j = np.indices((30, 30)).reshape(2, -1)
    assert np.allclose(Dense(encoder, q, d).pairs(i, j).reshape(30, 30), encoder.model.similarity(q, d).numpy(), atol=1e-6)


# ---- the notebook

def test_the_mine_notebook_is_the_report_of_a_round(tmp_path):
    import nbformat
    import papermill
    from proj.config import MineConfig
    from proj.core import read_json
    from proj.data.sources import read_store
    from proj.mining import write_rows
    notebook = os.path.join(os.path.dirname(os.path.dirname(__file__)), "nbs", "mine.ipynb")
    assert list(papermill.inspect_notebook(notebook)) == list(MineConfig.model_fields)
    write_rows(tmp_path / "pairs.jsonl", toy(80))
    options = [part for name, value in dict(data="pairs.jsonl", model="static", out="mined", negatives="{k: 2, strategy: top}", max_queries="40").items() for part in ("-p", name, value)]
    done = subprocess.run([sys.executable, "-m", "papermill", notebook, "out.ipynb", "-k", "python3", "--no-progress-bar", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = read_json(tmp_path / "mined" / "mining.json")
    assert facts["queries"] == 40 and facts["spec"]["candidates"] == "dense" and facts["spec"]["k"] == 2
    store = read_store(tmp_path / "mined" / "train.jsonl")
    assert len(store.queries) == 40 and (store.grades == 0).sum() == facts["kept"] > 40
    shown = [output["data"] for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 2 and any("application/vnd.jupyter.widget-view+json" in data for data in shown)
    assert any("share of the candidates" in data.get("text/plain", "") for data in shown)
