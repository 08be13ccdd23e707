"Scores, ranks and orders, tokens, batches, openclip, the local zoo: broken input, naive loops, properties, real data."
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from proj.core import ConfigError, DataError
from proj.data.openclip import MetadataEncoder, family, read_openclip, tag_words
from proj.data.zoo import (DatasetTokens, Order, Ranks, TrueScores, build_combined_similarity_loader, draw_tokens, expect, load_tokens, read_scores, save_tokens,
                           scores_of)
from proj.local_zoo import data_sets, episodes, hidden, load_zoo, local_zoo, recipe, save_zoo, train_network


def names(kind, n): return [f"{kind} {i}" for i in range(n)]


@st.composite
def tables(draw, least=0):
    "Scores with ties and gaps."
    d, n = draw(st.integers(1, 5)), draw(st.integers(max(1, least), 7))
    values = np.array(draw(st.lists(st.sampled_from([0.0, .25, .5, 1.0, -3.0, np.nan]), min_size=d * n, max_size=d * n))).reshape(d, n)
    for row in values: row[:least] = np.where(np.isnan(row[:least]), .1, row[:least])
    return TrueScores(names("set", d), names("model", n), values)


# ---- scores, ranks, order

@given(tables())
@settings(max_examples=150, deadline=None)
def test_ranks_and_orders_against_scipy(scores):
    ranks, order = scores.ranks(), scores.order()
    for row, rank, best in zip(scores.values, ranks.values, order.values):
        known = ~np.isnan(row)
        assert rank[known].tolist() == rankdata(-row[known], method="ordinal").tolist() and np.isnan(rank[~known]).all()
        count = known.sum()
        assert best[:count].tolist() == sorted(np.flatnonzero(known), key=lambda n: (-row[n], n)) and (best[count:] == -1).all()
    assert np.array_equal(order.ranks().values, ranks.values, equal_nan=True) and np.array_equal(ranks.order().values, order.values)
    assert np.array_equal(ranks.known, scores.known)


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_rows_give_the_table_back(scores, random):
    sets, models = random.sample(scores.datasets, len(scores.datasets)), random.sample(scores.models, len(scores.models))
    taken = scores.take(sets, models)
    assert np.array_equal(taken.take(scores.datasets, scores.models).values, scores.values, equal_nan=True)
    try: again = scores_of(taken.rows())
    except DataError: return  # a row with nothing to rank
    assert again.rows() == taken.take(again.datasets, again.models).rows()


def test_no_kind_passes_for_another():
    scores = TrueScores(["a"], ["m", "n"], [[.1, .2]])
    given = {TrueScores: scores, Ranks: scores.ranks(), Order: scores.order(), np.ndarray: scores.values, list: [[1, 2]]}
    for wanted in (TrueScores, Ranks, Order):
        for kind, value in given.items():
            if kind is wanted: assert expect(wanted, value) is value
            else:
                with pytest.raises(DataError, match=f"true_ranks is {kind.__name__}.*; expected {wanted.__name__} \\({wanted.says}\\)") as e: expect(wanted, value, "true_ranks")
                assert "\n" not in str(e.value)
    for kind in (Ranks, Order, np.ndarray):
        with pytest.raises(DataError, match="expected TrueScores"): build_combined_similarity_loader(given[kind], {}, {})


@pytest.mark.parametrize("kind, values, reason", [
    (TrueScores, [[.1, np.inf]], "infinity"), (TrueScores, [[.1, .2, .3]], "expected numbers (1, 2)"), (TrueScores, [["a", "b"]], "expected numbers"), (TrueScores, [.1, .2], "expected numbers"),
    (TrueScores, [[True, False]], "expected numbers"), (Ranks, [[0, 1]], "no ranking"), (Ranks, [[1, 1]], "no ranking"), (Ranks, [[1, 3]], "no ranking"), (Ranks, [[.5, .7]], "no ranking"),
    (Order, [[1, 2]], "no order"), (Order, [[0, 0]], "no order"), (Order, [[-1, 0]], "no order"), (Order, [[0, -2]], "no order"), (Order, [[.3, .4]], "no order")])
def test_numbers_that_are_no_such_table(kind, values, reason):
    with pytest.raises(DataError, match=re.escape(reason)): kind(["a"], ["m", "n"], values)


def test_names_and_values_stay():
    with pytest.raises(DataError, match="model 'm' is named twice"): TrueScores(["a"], ["m", "m"], [[1., 2]])
    values = np.array([[1., 2]])
    scores = TrueScores(["a"], ["m", "n"], values)
    values[0, 0] = 9
    assert scores.values[0, 0] == 1
    with pytest.raises(ValueError): scores.values[0, 0] = 3
    with pytest.raises(ConfigError, match="unknown model 'nn'; did you mean 'n'"): scores.take(models=["nn"])


# ---- reading

GOOD = [dict(dataset="pets", model="ViT-B", score=.9), dict(dataset="pets", model="RN50", score=.8)]
BROKEN = {
    "twice": (dict(dataset="pets", model="RN50", score=.8), "model: 'RN50' is listed a second time for data set 'pets'"),
    "twice, another score": (dict(dataset="pets", model="RN50", score=.1), "model: 'RN50' is listed a second time"),
    "case": (dict(dataset="pets", model="rn50", score=.1), "model: 'rn50' was spelled 'RN50' before"),
    "underscore": (dict(dataset="pets", model="ViT_B", score=.1), "model: 'ViT_B' was spelled 'ViT-B' before"),
    "case of the data set": (dict(dataset="Pets", model="c", score=.1), "dataset: 'Pets' was spelled 'pets' before"),
    "text": (dict(dataset="pets", model="c", score="0.5"), "score: expected a finite number"),
    "true": (dict(dataset="pets", model="c", score=True), "score: expected a finite number"),
    "no score": (dict(dataset="pets", model="c"), "score: missing"),
    "blank": (dict(dataset="pets", model=" ", score=.1), "model: expected a non-blank string"),
    "NaN": ('{"dataset": "pets", "model": "c", "score": NaN}', "NaN is not a finite number"),
}


def write(path, rows):
    path.write_text("\n".join(row if type(row) is str else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named(tmp_path, name):
    row, reason = BROKEN[name]
    with pytest.raises(DataError, match=re.escape(reason)) as e: read_scores(write(tmp_path / "a.jsonl", [*GOOD, row]))
    assert "a.jsonl:3: " in str(e.value)
    assert len(read_scores(tmp_path / "a.jsonl", skip_bad=1).models) == 2
    if type(row) is dict:
        with pytest.raises(DataError, match="^row 2: " + re.escape(reason)): scores_of([*GOOD, row])


@pytest.mark.parametrize("rows, reason", [
    ([], "no rows"), (GOOD[:1], "data set 'pets' has one model only"), ([*GOOD, dict(dataset="cars", model="RN50", score=.1)], "data set 'cars' has one model only"),
    ([dict(row, score=.5) for row in GOOD], "data set 'pets' has 2 models with the same score, 0.5")])
def test_sets_with_nothing_to_rank(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason): scores_of(rows)
    with pytest.raises(DataError, match=f"a.jsonl.*({reason}|holds no usable row)"): read_scores(write(tmp_path / "a.jsonl", rows))


def test_a_table_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("dataset,model,score\npets,a,0.5\npets,b,0.25\ncars,b,1e-1\ncars,a,3\n")
    assert read_scores(tmp_path / "a.csv").values.tolist() == [[.5, .25], [3, .1]]


# ---- tokens

@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_draws_hold_each_example_at_most_once(labels, draws, seed):
    rows = np.arange(len(labels), dtype=float)[:, None] + 1  # an example is its number
    tokens = draw_tokens(rows, labels, draws, seed)
    classes, counts = np.unique(labels, return_counts=True)
    assert tokens.features.shape == (min(draws, counts.max()), len(classes), 1) and tokens.class_ids.tolist() == classes.tolist()
    assert tokens.mask.sum(0).tolist() == np.minimum(counts, draws).tolist() and not tokens.features[~tokens.mask].any()
    for k, c in enumerate(classes):
        seen = tokens.features[tokens.mask[:, k], k, 0]
        assert len(set(seen)) == len(seen) and all(labels[int(i) - 1] == c for i in seen)
    assert np.array_equal(tokens.features, draw_tokens(rows, labels, draws, seed).features)


@pytest.mark.parametrize("break_it, reason", [
    (dict(features=np.zeros((2, 3, 5), np.float32)), "features have width 5; expected 4"),
    (dict(features=np.full((2, 3, 4), np.nan)), "NaN or infinity"), (dict(features=np.zeros((2, 3), np.float32)), "expected floats (S, K, D)"),
    (dict(features=np.zeros((2, 3, 4), int)), "expected floats"), (dict(class_ids=np.arange(2)), "class_ids is (2,)"), (dict(class_ids=np.arange(3) + 1), "other classes"),
    (dict(class_names=np.array([{}, "b", "c"], object)), "cannot be read (ValueError)"), (dict(mask=np.zeros((2, 3), bool)), "an example in each draw"), (None, "cannot be read"), ("class_ids", "no class_ids")])
def test_a_broken_shard_is_named(tmp_path, break_it, reason):
    tokens = draw_tokens(np.random.default_rng(0).normal(size=(12, 4)), np.arange(12) % 3, 4)
    save_tokens(tokens, tmp_path, per_shard=2)
    assert np.array_equal(load_tokens(tmp_path, width=4).features, tokens.features)
    last = tmp_path / "shard-00001.npz"
    held = dict(np.load(last))
    if break_it is None: last.write_bytes(last.read_bytes()[:-60])
    elif type(break_it) is str: np.savez(last, **{name: value for name, value in held.items() if name != break_it})
    else: np.savez(last, **{**held, **break_it})
    with pytest.raises(DataError, match=re.escape(reason)) as e: load_tokens(tmp_path)
    assert str(last) in str(e.value) and "\n" not in str(e.value)


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match="no shard-"): load_tokens(tmp_path)
    np.savez(tmp_path / "shard-00000.npz", features=np.ones((1, 2, 3), np.float32), class_ids=[4, 7], class_names=["a", "b"])  # written elsewhere, without a mask
    assert load_tokens(tmp_path).mask.all() and load_tokens(tmp_path).class_names.tolist() == ["a", "b"]
    with pytest.raises(DataError, match="width 3; expected 512"): load_tokens(tmp_path, width=512)


# ---- batches

def parts_of(scores, seed, width=3):
    "Tokens that tell whom they belong to: a model's start with its number, a data set's with its own, the draw's and the class's."
    draw = np.random.default_rng(seed)
    models = {name: [n, *draw.normal(size=width - 1)] for n, name in enumerate(scores.models)}
    sets = {name: np.array([[[d, s, k] for k in range(1 + (d + seed) % 4)] for s in range(1 + d % 2)], float) for d, name in enumerate(scores.datasets)}
    return models, sets


@given(tables(least=2), st.integers(0, 50), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_names_stay_with_tokens_scores_and_ranks(scores, seed, batch_size, shuffle):
    models, sets = parts_of(scores, seed)
    loader = build_combined_similarity_loader(scores, models, sets, batch_size=batch_size, shuffle=shuffle, seed=seed)
    ranks, seen = scores.ranks().values, []
    for batch in loader:
        assert batch["batch_size"] == len(batch["dataset_names"]) == len(batch["model_tokens"]) and set(batch["dataset_splits"]) == {"train"}
        for row in range(batch["batch_size"]):
            tokens, d = batch["dataset_tokens"][row][batch["dataset_mask"][row]], scores.datasets.index(batch["dataset_names"][row])
            draw = int(tokens[0, 1])
            assert (tokens[:, 0] == d).all() and (tokens[:, 1] == draw).all() and sorted(tokens[:, 2].tolist()) == list(range(len(sets[scores.datasets[d]][draw])))
            seen.append((d, draw))
            n = int(batch["model_mask"][row].sum())
            assert batch["model_mask"][row, :n].all() and len(batch["model_names"][row]) == n and sorted(batch["model_names"][row]) == sorted(np.array(scores.models)[scores.known[d]])
            for place, name in enumerate(batch["model_names"][row]):
                at = scores.models.index(name)
                assert batch["model_indices"][row, place] == at == batch["model_tokens"][row, place, 0] and np.isclose(batch["true_scores"][row, place], scores.values[d, at])
                assert batch["true_ranks"][row, place] == ranks[d, at]
            for name, fill in (("model_tokens", 0), ("true_scores", 0), ("true_ranks", 0), ("model_indices", -1)): assert (batch[name][row, n:] == fill).all()
    assert sorted(seen) == [(d, s) for d, name in enumerate(scores.datasets) for s in range(len(sets[name]))]


def test_order_depends_on_seed_and_epoch_only():
    scores = TrueScores(names("set", 9), names("model", 6), np.random.default_rng(0).normal(size=(9, 6)))
    models, sets = parts_of(scores, 0)
    def listed(loader, epoch, skip=0):
        loader.batch_sampler.set_epoch(epoch)
        batches = [loader.collate_fn([loader.dataset[key] for key in keys]) for keys in list(loader.batch_sampler)[skip:]]  # what is skipped at a resume is never built
        return [(batch["dataset_names"], batch["model_names"], batch["dataset_tokens"].tolist()) for batch in batches]
    def make(seed=1): return build_combined_similarity_loader(scores, models, sets, batch_size=4, seed=seed)
    first, again = make(), make()
    whole = listed(first, 3)
    listed(again, 0)
    assert listed(again, 3) == whole and listed(make(), 3, skip=2) == whole[2:] and listed(first, 4) != whole and listed(make(2), 3) != whole
    assert len(first) == 4 == len(whole)
    first.batch_sampler.set_epoch(3)
    assert [(batch["dataset_names"], batch["model_names"], batch["dataset_tokens"].tolist()) for batch in first] == whole


def test_what_a_loader_refuses():
    scores = TrueScores(["a", "b"], ["m", "n", "o"], [[.1, .2, np.nan], [.3, .1, .2]])
    models, sets = {name: np.ones(3) for name in scores.models}, {name: np.ones((2, 4)) for name in scores.datasets}
    def refused(error, reason, **change):
        with pytest.raises(error, match=reason): build_combined_similarity_loader(**{**dict(true_scores=scores, model_tokens=models, dataset_tokens=sets), **change})
    refused(DataError, "no tokens for model 'o'", model_tokens={"m": [1], "n": [2]})
    refused(DataError, "model 'n' has tokens of width 4, 'm' of 3", model_tokens=models | {"n": np.ones(4)})
    refused(DataError, "not finite", model_tokens=models | {"n": np.full(3, np.nan)})
    refused(DataError, "data set 'b' has tokens of width 5, 'a' of 4", dataset_tokens=sets | {"b": np.ones((2, 5))})
    refused(DataError, "data set 'b': features hold NaN", dataset_tokens=sets | {"b": np.full(4, np.nan)})
    refused(DataError, "data set 'a' is in the parts train and test", parts={"train": ["a"], "test": ["b", "a"]})
    refused(ConfigError, "unknown split 'tset'; did you mean 'test'", parts={"train": ["a"], "test": ["b"]}, splits=("tset",))
    refused(ConfigError, "unknown data set 'c'", parts={"train": ["a", "c"]})
    refused(DataError, "data set 'a' has scores of fewer than two models", models=["n", "o"])
    refused(ConfigError, "batch_size is 0", batch_size=0)
    unequal = build_combined_similarity_loader(scores, models, sets, pad=False, batch_size=2)
    with pytest.raises(DataError, match="2 to 3 model tokens; without a mask"): next(iter(unequal))
    equal = next(iter(build_combined_similarity_loader(scores, models, sets, models=["n", "m"], pad=False)))
    assert "model_mask" not in equal and equal["model_tokens"].shape == (2, 2, 3)


# ---- openclip

def test_openclip_and_its_popularity(data_dir):
    "The figures in the data's README: each data set by the mean rank elsewhere."
    clip = read_openclip(data_dir / "openclip")
    assert clip.scores.values.shape == (38, 121) and clip.scores.known.all() and [row["model"] for row in clip.models] == list(clip.scores.models)
    ranks, found = clip.scores.ranks().values, []
    for d, row in enumerate(clip.scores.values):
        guess = np.delete(ranks, d, 0).mean(0)
        best = guess.argmin()
        found.append([spearmanr(-guess, row)[0], (row > row[best]).sum() < 5, row.max() - row[best]])
    assert np.allclose(np.mean(found, 0), [.784, .47, .035], atol=[.0006, .006, .0006])


def test_metadata_of_openclip(data_dir):
    clip = read_openclip(data_dir / "openclip")
    assert {family(row["arch"]) for row in clip.models} == {"nllb", "coca", "roberta", "eva", "resnet", "convnext", "siglip", "clipa", "vit"}
    assert tag_words("laion2b_s34b_b82k_augreg_soup") == {"laion2b", "augreg", "soup"} and tag_words("commonpool_m_clip_s128m_b4k") == {"commonpool", "m", "clip"} and tag_words("laion400m_e32") == {"laion400m"}
    train, rest = clip.models[:80], clip.models[80:]
    encoder = MetadataEncoder.fit(train)
    vectors = encoder(clip.models)
    assert vectors.shape == (121, len(encoder.columns)) and np.allclose(vectors[:80, -2:].mean(0), 0, atol=1e-5) and np.allclose(vectors[:80, -2:].std(0), 1, atol=1e-5)
    assert np.abs(vectors[80:, -2:].mean(0)).min() > .1 and np.array_equal(encoder(rest), vectors[80:])  # the rest is not standardised by itself
    assert (vectors[:80, :len(encoder.families)].sum(1) == 1).all()
    assert np.array_equal(MetadataEncoder(**json.loads(json.dumps(vars(encoder))))(rest), vectors[80:])
    texts = dict(zip(clip.scores.datasets, np.random.default_rng(0).normal(size=(38, 16))))
    parts = {"train": clip.scores.datasets[:30], "test": clip.scores.datasets[30:]}
    batch = next(iter(build_combined_similarity_loader(clip.scores, dict(zip(clip.scores.models, vectors)), texts, ("test",), parts)))
    assert batch["model_tokens"].shape == (8, 121, vectors.shape[1]) and batch["dataset_tokens"].shape == (8, 1, 16)


# ---- the local zoo

@pytest.fixture(scope="module")
def zoo(): return local_zoo(seed=5, networks=4)


def test_the_zoo_is_the_same_at_every_call(zoo, tmp_path):
    again, other = local_zoo(seed=5, networks=4, cache=tmp_path), local_zoo(seed=6, networks=3)
    for same in (again, local_zoo(seed=5, networks=4, cache=tmp_path)):
        assert np.array_equal(same.scores.values, zoo.scores.values, equal_nan=True) and same.scores.models == zoo.scores.models
        assert all(np.array_equal(value, same.states[name][part]) for name, state in zoo.states.items() for part, value in state.items())
        assert all(np.array_equal(tokens.features, same.tokens[name].features) for name, tokens in zoo.tokens.items())
    assert len(list(tmp_path.iterdir())) == 1 and not np.array_equal(other.states[other.scores.models[0]]["layers.0.weight"], zoo.states[zoo.scores.models[0]]["layers.0.weight"])
    folder = next(tmp_path.iterdir())
    raw = bytearray((folder / "weights.safetensors").read_bytes())
    raw[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="weights.safetensors: sha256 differs"): load_zoo(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"): save_zoo(zoo, tmp_path / "mine")
    with pytest.raises(DataError, match="no COMMIT.json"): load_zoo(tmp_path / "mine")


def test_scores_are_those_of_plain_code(zoo):
    "Another way to every number: torch runs the network, scikit-learn's usual objects judge it."
    sets, model = data_sets(5), zoo.scores.models[3]
    made, state = zoo.facts["networks"][model], {name: torch.from_numpy(value) for name, value in zoo.states[model].items()}
    layers = [torch.nn.Linear(*reversed(state[f"layers.{i}.weight"].shape)) for i in range(made["depth"] + 1)]
    for i, layer in enumerate(layers): layer.load_state_dict({part: state[f"layers.{i}.{part}"] for part in ("weight", "bias")})
    def features(x):
        with torch.no_grad():
            for layer in layers[:-1]: x = getattr(torch, made["activation"])(layer(torch.as_tensor(x)))
        return x.numpy()
    for name in ("digits-247", "wine", "cancer"):
        train, test = (sets[name][part] for part in ("train", "test"))
        assert np.allclose(features(train.x), hidden(zoo.states[model], made["activation"], train.x), atol=1e-4)
        scaler, found = StandardScaler().fit(features(train.x)), []
        for rows in episodes(train, 5, name):
            assert np.unique(train.y[rows], return_counts=True)[1].tolist() == [10] * len(np.unique(train.y)) and len(set(rows)) == len(rows)
            found.append(balanced_accuracy_score(test.y, LogisticRegression(C=.1).fit(scaler.transform(features(train.x[rows])), train.y[rows]).predict(scaler.transform(features(test.x)))))
        assert np.isclose(zoo.scores.take([name], [model]).values[0, 0], np.mean(found), atol=.01)


def test_test_rows_are_seen_by_nobody(zoo):
    sets = data_sets(5)
    def keys(x): return {row.tobytes() for row in np.ascontiguousarray(x, np.float32)}
    tests, trains = (set().union(*(keys(parts[part].x) for parts in sets.values())) for part in ("test", "train"))
    assert len(tests & trains) <= 2  # iris and wine hold rows that occur twice
    for name, tokens in zoo.tokens.items():
        train = sets[name]["train"]
        for k, c in enumerate(tokens.class_ids): assert keys(tokens.features[tokens.mask[:, k], k]) <= keys(train.x[train.y == c])


def test_a_network_is_not_scored_on_its_own_data(zoo):
    unknown = [(zoo.scores.datasets[d], zoo.facts["networks"][zoo.scores.models[n]]["trained_on"]) for d, n in np.argwhere(~zoo.scores.known)]
    assert len(unknown) == 4 and all(a == b for a, b in unknown)
    assert all(fact["source"] == name.split("-")[0] for name, fact in zoo.facts["datasets"].items())


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_state_dict_is_the_network(number):
    sets = data_sets(0)
    made = recipe(number, list(sets))
    part, test = (sets[made["trained_on"]][name] for name in ("train", "test"))
    with threadpool_limits(1):
        state = train_network(made, part)
        network = MLPClassifier((made["width"],) * made["depth"], activation=made["activation"], max_iter=made["epochs"], batch_size=32, learning_rate_init=3e-3,
                                random_state=made["seed"], n_iter_no_change=10**6).fit(part.x, part.y)
    last = len(state) // 2 - 1
    logits = hidden(state, made["activation"], test.x) @ state[f"layers.{last}.weight"].T + state[f"layers.{last}.bias"]
    p = softmax(logits, 1) if logits.shape[1] > 1 else np.hstack([1 - expit(logits), expit(logits)])
    assert np.allclose(p, network.predict_proba(test.x), atol=1e-4) and list(state) == [f"layers.{i}.{part}" for i in range(last + 1) for part in ("weight", "bias")]


def test_subsets_and_sources():
    sets = data_sets(2)
    assert len(sets) == 21
    for name, parts in sets.items():
        source, *classes = name.split("-")
        whole = sets[source]
        for part in ("train", "test"):
            rows = np.isin(whole[part].y, [int(c) for c in classes[0]]) if classes else slice(None)
            assert np.array_equal(parts[part].x, whole[part].x[rows]) and np.array_equal(parts[part].y, whole[part].y[rows]) and parts[part].x.shape[1] == 64
    assert isinstance(draw_tokens(*sets["wine"]["train"]), DatasetTokens)
