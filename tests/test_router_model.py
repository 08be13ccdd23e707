"The router: naive formulas, one encoding a prompt, unknown models, routes by brute force, fine-tuning by hand-written lists, saving, damaged folders."
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from proj.config import FinetuningSpec
from proj.core import ConfigError, DataError, MachineError, ProjError
from proj.losses.rank import RANK_LOSSES, make_rank_loss
from proj.manifest import MANIFEST
from proj.models import encoder as enc
from proj.models.dual import encode_texts
from proj.models.router import Router, RouterModel
from proj.models.tune import check_round_trip, load_trained, merge, save_trained, trained_tensors, tune
from proj.routes import Routes, best_within, cost_matrix

TEXTS = ["sort a list of numbers", "read a file line by line", "join two words", "count the lines of a file", "sort", "a file of words"]
NAMES = ["large", "medium", "small"]
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(): return enc.load_encoder("tiny", texts=TEXTS, max_length=32, dropout=0.0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A BERT without a pooler, which sentence-transformers averages."
    from transformers import BertConfig, BertModel
    tokenizer, folder = enc.train_tokenizer(TEXTS, 300), tmp_path_factory.mktemp("bert")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, initializer_range=0.2),
              add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return enc.load_folder(folder)


def make(encoder, names=NAMES, **kw): return RouterModel(copy.deepcopy(encoder), names, **{"hidden_dims": [16, 8], "dim": 12, **kw}).eval()
def router(encoder, **kw): return Router(make(encoder, **kw), precision="fp32")
def both(names): return {f"{name}.{part}" for name in names for part in ("weight", "bias")}
def one_line(error): assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- the score

def naive(model, features=None):
    "Every prompt with every model through the whole head, one pair after the other."
    vectors = torch.from_numpy(encode_texts(model.encoder, TEXTS, precision="fp32"))
    grid = torch.zeros(len(TEXTS), len(model.names))
    for i, vector in enumerate(vectors):
        vector = vector * np.sqrt(44) / np.sqrt((vector**2).sum())  # as long as 44 features
        prompt = vector if features is None else torch.cat([vector, torch.from_numpy(features[i])])
        for j, m in enumerate(model.models.weight):
            if model.options["head"] == "concat": x = model.head.first(torch.cat([prompt, m]))
            else: x = model.head.first((prompt if isinstance(model.head.project, nn.Identity) else model.head.project(prompt)) * m)
            for layer in list(model.head.rest)[2::3]: x = layer(torch.where(x > 0, x, 0.1 * x))
            grid[i, j] = model.base[0, j] + x[0]
    return grid


@pytest.mark.parametrize("head, hidden, dim, features", [("concat", [16, 8], 12, 0), ("concat", [5], 12, 4), ("concat", [9, 7, 3], 1, 4), ("product", [16, 8], 12, 0), ("product", [6], 132, 4), ("product", [6], 128, 0)])
def test_the_score_is_the_naive_formula(head, hidden, dim, features, tiny):
    r = router(tiny, head=head, hidden_dims=hidden, dim=dim, features=features, base=[1.0, -2.0, 0.5])
    given = FEATURES if features else None
    with torch.no_grad(): expected = naive(r.model, given).numpy()
    assert np.abs(r.logits(TEXTS, features=given) - expected).max() < 1e-5
    assert np.abs(r.score(TEXTS, features=given) - np.tanh(expected)).max() < 1e-5
    with torch.no_grad(): assert np.abs(r.model(r.model.collate(TEXTS, features=given)).numpy() - expected).max() < 1e-5
    assert isinstance(getattr(r.model.head, "project", None), nn.Identity) == (head == "product" and dim == 128 + features)


@pytest.mark.parametrize("head", ["concat", "product"])
def test_gradients_are_those_of_the_naive_formula(head, tiny):
    model = make(tiny, head=head, features=4)
    model.encoder.requires_grad_(False)
    own = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    fast = torch.autograd.grad((model(model.collate(TEXTS, features=FEATURES)) * weight).sum(), own)
    slow = torch.autograd.grad((naive(model, FEATURES) * weight).sum(), own)
    assert len(own) == (9 if head == "product" else 7) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fast, slow))


def test_parameters_are_counted_by_hand(tiny):
    count = lambda model: sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoder."))
    assert count(RouterModel(tiny, NAMES, features=44)) == 3 * 128 + (128 + 44 + 128) * 256 + 256 + 256 * 128 + 128 + 128 + 1
    assert count(RouterModel(tiny, NAMES, head="product", features=44)) == 3 * 128 + 172 * 128 + 128 + 128 * 256 + 256 + 256 * 128 + 128 + 128 + 1
    assert count(RouterModel(tiny, NAMES, vectors=np.eye(3))) == (128 + 3) * 256 + 256 + 256 * 128 + 128 + 128 + 1


def test_scores_stay_inside_and_base_decides_an_idle_head(tiny):
    r = router(tiny, base={"small": 40.0, "large": -40.0, "medium": 0.25})
    with torch.no_grad(): r.model.head.rest[-1].weight.zero_(), r.model.head.rest[-1].bias.zero_()
    scores = r.score(TEXTS)
    assert scores.dtype == np.float32 and (np.abs(scores) < 1).all() and np.allclose(scores, np.tanh([[-40, 0.25, 40]]), atol=1e-6)
    assert r.rank("sort").ids == ["small", "medium", "large"]


def test_each_category_has_its_own_base(tiny, caplog):
    "One row a prompt, in logits, in a batch with some of the models, and in what is derived from them."
    strengths = {"maths": [3.0, 0, -3], "law": [0.0, 7, 0]}
    r, plain = router(tiny, base=[1.0, 1, 2], categories=strengths), router(tiny)
    kinds = ["law", None, "maths", "law", "maths", None]
    added = np.array([dict(strengths, **{"": [1.0, 1, 2]})[kind or ""] for kind in kinds])
    assert np.allclose(r.logits(TEXTS, categories=kinds), plain.logits(TEXTS) + added, atol=1e-5)
    assert np.allclose(r.logits(TEXTS, ["small", "large"], categories=kinds), (plain.logits(TEXTS) + added)[:, [2, 0]], atol=1e-5)
    assert np.allclose(r.logits(TEXTS[:1] * 3, categories=["law", "maths", "law"]), plain.logits(TEXTS[:1]) + [strengths[k] for k in ("law", "maths", "law")], atol=1e-5)
    rows = [["large", "small"], ["medium"], ["small", "medium"], ["small"], ["large"], ["medium", "large"]]
    batch = r.model.collate(TEXTS, models=rows, categories=kinds)
    with torch.no_grad(): some = r.model(batch).numpy()
    every = plain.logits(TEXTS) + added
    for i, row in enumerate(rows): assert np.allclose(some[i, :len(row)], [every[i, NAMES.index(name)] for name in row], atol=1e-5)
    assert r.route(["sort"], categories=["law"]).models == ["medium"] and r.route(["sort"], categories=["maths"]).models == ["large"]
    with caplog.at_level("WARNING", "proj"): assert np.allclose(r.logits(TEXTS, categories=["physics"] * 6), plain.logits(TEXTS) + [1, 1, 2], atol=1e-5)
    assert "category 'physics' was never seen in training" in caplog.text
    for call in (lambda: plain.logits(TEXTS, categories=kinds), lambda: r.logits(TEXTS, categories=kinds[:2]), lambda: r.model.collate(TEXTS, categories=kinds[:2])):
        with pytest.raises(ProjError, match="knows no categories|2 categories for 6 prompts|6 prompts but 2 rows of categories") as error: call()
        one_line(error)


def test_the_head_is_fp32_under_autocast(tiny):
    model = make(tiny)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): scores = model(model.collate(TEXTS))
    assert scores.dtype == torch.float32 and len(np.unique(scores.numpy())) == scores.numel()


def test_every_prompt_is_encoded_once(tiny):
    r, seen = router(tiny, features=4), []
    r.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]["input_ids"])))
    scores = r.score(TEXTS * 5, features=np.concatenate([FEATURES] * 5))
    assert sum(seen) == 6 and all(np.array_equal(scores[:6], scores[6 * k:6 * k + 6]) for k in range(5))
    seen.clear()
    shifted = np.concatenate([FEATURES, FEATURES + 1])
    scores = r.score(TEXTS * 2, features=shifted)
    assert sum(seen) == 6 and not np.isclose(scores[:6], scores[6:]).any()  # the same words in another context
    assert np.allclose(scores[6:], r.score(TEXTS, features=shifted[6:]), atol=1e-6)
    seen.clear()
    r.model(r.model.collate(TEXTS * 3, [["large", "small"]] * 18, features=np.concatenate([FEATURES] * 3)))
    assert seen == [6]


def test_batches_of_many_pairs_are_cut_without_a_trace(tiny, monkeypatch):
    names = [f"m{i}" for i in range(300)]
    r = router(tiny, names=names, hidden_dims=[1024, 2], dim=3)  # 3 prompts at a time
    with torch.no_grad(): assert np.abs(r.logits(TEXTS) - r.model(r.model.collate(TEXTS)).numpy()).max() < 1e-5


def test_minilm_is_pooled_as_it_says():
    if not (enc.cached_minilm() or enc.packaged_minilm()): pytest.skip("MiniLM is not here; pip install proj[offline]")
    encoder = enc.load_encoder("minilm", max_length=32)
    model = RouterModel(encoder, NAMES, features=4).eval()
    batch = model.collate(TEXTS + TEXTS[:2])
    with torch.no_grad(): assert np.abs(encoder({**batch["prompts"]})["sentence_embedding"].numpy() - encoder.encode(TEXTS)).max() < 1e-5
    layers, head = 6 * 16, {"models.weight", *both(["head.first", "head.rest.2", "head.rest.5"])}
    assert set(tune(model, FinetuningSpec(method="head")).names) == head
    tuned = tune(model, FinetuningSpec(method="last_layers", num_layers=2))
    assert len(tuned.names) == 2 * layers // 6 + 7 and not any("pooler" in n for n in tuned.names) and head <= set(tuned.names)


def test_encoders_with_a_prompt_of_their_own(tiny):
    model = make(tiny)
    model.encoder.prompts, plain = {"query": "sort sort "}, make(tiny)
    assert model.prompt == "sort sort "
    with torch.no_grad(): assert torch.allclose(model(model.collate(TEXTS)), plain(plain.collate(["sort sort " + t for t in TEXTS])), atol=1e-6)
    assert np.allclose(Router(model, precision="fp32").score(TEXTS), Router(plain, precision="fp32").score(["sort sort " + t for t in TEXTS]), atol=1e-6)


def test_seeds_decide_and_nothing_else(tiny):
    state = torch.get_rng_state()
    a, b, c = (RouterModel(tiny, NAMES, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.models.weight, b.models.weight) and torch.equal(a.head.first.weight, b.head.first.weight) and not torch.equal(a.head.first.weight, c.head.first.weight)


# ---- batches

def test_a_batch_by_hand(tiny):
    model = make(tiny, features=4)
    batch = model.collate([TEXTS[1], TEXTS[0], TEXTS[1]], [["small", "large"], [2, 1, 0], ["medium"]], [[0.5, 1], [0.1, math.nan, 0.3], [7]], FEATURES[:3])
    nan = math.nan
    assert batch["rows"].tolist() == [0, 1, 0] and batch["models"].tolist() == [[2, 0, -1], [2, 1, 0], [1, -1, -1]] and batch["mask"].sum(1).tolist() == [2, 3, 1]
    assert np.allclose(batch["targets"], [[0.5, 1, nan], [0.1, nan, 0.3], [7, nan, nan]], equal_nan=True) and torch.equal(batch["features"], torch.from_numpy(FEATURES[:3]))
    with torch.no_grad(): scores, every = model(batch), model({k: v for k, v in batch.items() if k != "models"})
    assert torch.allclose(scores[batch["mask"]], every.gather(1, batch["models"].clamp(min=0))[batch["mask"]], atol=1e-6)
    assert model.collate(TEXTS[:2], targets=[1, -1])["targets"].tolist() == [1, -1] and model.collate(TEXTS[:2], targets=np.ones((2, 3)))["targets"].shape == (2, 3)


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_every_loss_trains_it(name, tiny):
    truth = np.array([[0.9, 0.5, 0.1]] * 3 + [[0.1, 0.5, 0.9]] * 3)
    model, loss = make(tiny, dropout=0.0), make_rank_loss(name)
    model.encoder.requires_grad_(False)
    if RANK_LOSSES[name].eats == "pairs":
        rows = [(t, pair, np.sign(y[pair[0]] - y[pair[1]])) for t, y in zip(TEXTS, truth) for pair in itertools.combinations(range(3), 2)]
        batch = model.collate(*zip(*rows))
    else: batch = model.collate(TEXTS, [NAMES] * 6, truth)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=5e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(batch), batch["targets"], batch["mask"]).backward()
        optimizer.step()
    assert Router(model.eval(), precision="fp32").route(TEXTS).models == ["large"] * 3 + ["small"] * 3


@pytest.mark.parametrize("arguments, message", [
    (dict(prompts=[]), "no prompts"), (dict(prompts="sort"), "expected a list of texts"), (dict(prompts=[None]), "text 0 is NoneType"), (dict(prompts=["a"], models=[["smal"]]), "did you mean 'small'"),
    (dict(prompts=["a"], models=[[3]]), "model 3 of 3"), (dict(prompts=["a"], models=[[-1]]), "model -1 of 3"), (dict(prompts=["a", "b"], models=[[0, 1]]), "2 prompts but 1 rows of models"),
    (dict(prompts=["a"], models=[[0, 1]], targets=[[1.0]]), "row 0 has targets of shape (1,) for 2 models"), (dict(prompts=["a"], targets=[[1.0, 2.0]]), "for 3 models"),
    (dict(prompts=["a", "b"], targets=[1]), "2 prompts but 1 rows of targets"), (dict(prompts=["a"], features=[[1.0], [2.0]]), "1 prompts but 2 rows of features"),
    (dict(prompts=["a", "b"], models=[[0, 1]] * 2, targets=[[1, 2], 1]), "row 1 has targets of shape ()"),
])
def test_broken_rows_are_one_line(arguments, message, tiny):
    with pytest.raises(ProjError) as error: make(tiny).collate(**arguments)
    assert message in str(error.value)
    one_line(error)


# ---- models that were never seen

def test_unknown_models(tiny, caplog):
    r = router(tiny, base=[1.0, 2.0, 6.0])
    known, weight = r.score(TEXTS), r.model.models.weight.detach().numpy()
    assert np.array_equal(r.score(TEXTS, ["small", "large"]), known[:, [2, 0]])
    with pytest.raises(ConfigError, match="did you mean 'medium'") as error: r.score(TEXTS, ["large", "medum"])
    one_line(error)
    with caplog.at_level("WARNING", "proj"): found = r.logits(TEXTS, ["new", "large", "other", "new"], unknown="mean")
    assert "new, other, new never seen in training; the mean of the 3 known models stands for each" in caplog.text
    with torch.no_grad():
        r.model.models.weight[0] = torch.from_numpy(weight.mean(0))
        r.model.base[0] = 3.0
    expected = r.logits(TEXTS, ["large"])
    assert np.allclose(found[:, [0]], expected, atol=1e-5) and np.allclose(found[:, [2, 3]], expected, atol=1e-5) and not np.allclose(found[:, [1]], expected, atol=1e-3)
    given = r.logits(TEXTS, ["a", "small", "b"], unknown=weight[[2, 1]])
    assert np.allclose(given[:, 1], r.logits(TEXTS, ["small"])[:, 0], atol=1e-5) and not np.allclose(given[:, 0], given[:, 2], atol=1e-3)
    for wrong, message in [(weight[:1], "expected 2 finite vectors of 12"), (weight[:2, :3], "expected 2 finite"), (weight[:2] * np.nan, "expected 2 finite"), ("avg", "unknown value of unknown 'avg'")]:
        with pytest.raises(ProjError, match=message) as error: r.score(TEXTS, ["a", "b"], unknown=wrong)
        one_line(error)


def test_given_vectors(tiny):
    vectors = rng.normal(size=(3, 7)).astype(np.float32)
    frozen, free = make(tiny, vectors=vectors), make(tiny, vectors=vectors, frozen=False)
    assert "models.weight" not in dict(frozen.named_parameters()) and "models.weight" in dict(frozen.named_buffers()) and "models.weight" in dict(free.named_parameters())
    for model in (frozen, free):
        assert np.array_equal(model.models.weight.detach().numpy(), vectors)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(model.collate(TEXTS)).sum().backward()
        optimizer.step()
        assert np.array_equal(model.models.weight.detach().numpy(), vectors) == (model is frozen)


# ---- ranking and routing

def test_predict_and_rank(tiny):
    r = router(tiny)
    scores = r.score(TEXTS)
    assert list(r.predict(TEXTS)) == NAMES and all(np.array_equal(column, scores[:, j]) and column.dtype == np.float32 for j, column in enumerate(r.predict(TEXTS).values()))
    ranking = r.rank(TEXTS[0], ["small", "large"], 1)
    assert len(ranking) == 1 and ranking.ids[0] == ("small" if scores[0, 2] > scores[0, 0] else "large")
    assert r.rank(TEXTS[0]).ids == [NAMES[j] for j in np.argsort(-scores[0])]
    assert r.score([]).shape == (0, 3) and r.score(TEXTS, []).shape == (6, 0) and r.route([]).models == [] and {k: v.shape for k, v in r.predict([]).items()} == dict.fromkeys(NAMES, (0,))


def test_routes(tiny):
    r = router(tiny)
    scores = r.score(TEXTS)
    best = r.route(TEXTS)
    assert best.models == [NAMES[j] for j in scores.argmax(1)] and np.array_equal(best.scores, scores.max(1)) and best.costs is None and best.weight is None
    ahead = scores[:, 0] - scores[:, 2]
    for threshold in (-3.0, float(np.median(ahead)), float(ahead[2]), 3.0):
        routes = r.route(TEXTS, threshold=threshold, strong="large", weak="small", cost=dict(large=9, small=1))
        assert routes.models == ["large" if a >= np.float32(threshold) else "small" for a in ahead] and routes.costs.tolist() == [9.0 if m == "large" else 1.0 for m in routes.models]
    spent = r.route(TEXTS, dict(large=9, medium=3, small=1), budget=4)
    assert spent.costs.mean() <= 4 and repr(spent).splitlines()[0].split() == ["model", "prompts", "share", "score", "cost"] and "lambda" in repr(spent) and len(spent) == 6
    assert r.route(TEXTS, dict(large=9, medium=3, small=1)).models == best.models
    assert set(r.route(TEXTS, models=["medium", "small"]).models) <= {"medium", "small"}


small_matrices = st.integers(1, 5).flatmap(lambda n: st.integers(1, 3).flatmap(lambda m: st.tuples(
    st.lists(st.lists(st.sampled_from([-0.9, -0.5, 0.0, 0.25, 0.3, 0.9]), min_size=m, max_size=m), min_size=n, max_size=n),
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.0]), min_size=m, max_size=m), min_size=n, max_size=n))))


@settings(max_examples=150, deadline=None)
@given(matrices=small_matrices, share=st.floats(0, 1.2))
def test_a_budget_is_kept_and_well_spent(matrices, share):
    scores, costs = np.array(matrices[0], np.float32), np.array(matrices[1])
    n, at = len(scores), np.arange(len(scores))
    budget = costs.min(1).mean() + share * (costs.max(1).mean() - costs.min(1).mean())
    chosen, weight = best_within(scores, costs, budget)
    mine, paid = scores[at, chosen].astype(float).sum(), costs[at, chosen].sum()
    assert paid / n <= budget and weight >= 0
    every = [(scores[at, list(c)].astype(float).sum(), costs[at, list(c)].sum()) for c in itertools.product(range(scores.shape[1]), repeat=n)]
    assert mine >= max(score for score, cost in every if cost <= paid) - 1e-6            # nothing of this cost is better
    if weight: assert mine + weight * (budget * n - paid) >= max(score for score, cost in every if cost / n <= budget) - 1e-6  # the bound of the Lagrangian
    else: assert mine >= max(score for score, _ in every) - 1e-6


def test_equal_scores_go_to_the_cheaper():
    scores, costs = np.zeros((4, 3), np.float32), np.array([[3.0, 1.0, 2.0]] * 4)
    for budget in (1, 2, 100): assert best_within(scores, costs, budget)[0].tolist() == [1] * 4
    with pytest.raises(ConfigError, match="the cheapest models cost 1; raise it"): best_within(scores, costs, 0.99)
    with pytest.raises(ConfigError, match="budget is nan"): best_within(scores, costs, math.nan)
    assert best_within(np.array([[0.1, 0.9]]), np.array([[1e-9, 3e-9]]), 1e-9)[0].tolist() == [0]  # small units
    assert best_within(np.array([[0.1, 0.9]]), np.array([[1e9, 3e9]]), 3e9)[0].tolist() == [1]


@pytest.mark.parametrize("options, message", [
    (dict(budget=1), "a budget needs the cost"), (dict(threshold=0.1), "pass strong= and weak="), (dict(threshold=0.1, strong="large"), "pass strong= and weak="), (dict(strong="large"), "go with a threshold"),
    (dict(threshold=math.nan, strong="large", weak="small"), "threshold is nan"), (dict(threshold=0.1, strong="lage", weak="small"), "did you mean 'large'"),
    (dict(threshold=0.1, strong="large", weak="small", budget=1, cost={}), "leave budget and models out"), (dict(cost=dict(large=1, small=1)), "unknown model in cost 'medium'"),
    (dict(cost=dict(large=-1, medium=1, small=1)), "negative"), (dict(cost=dict(large=math.nan, medium=1, small=1)), "negative, NaN"), (dict(cost=[1, 2, 3]), "expected a mapping"),
    (dict(cost=dict(large=[1, 2], medium=1, small=1)), "the costs do not go with 6 prompts"), (dict(models="large"), "unknown model 'a'"), (dict(budget=0.5, cost=dict(large=3, medium=2, small=1)), "raise it"),
])
def test_wrong_routes_are_one_line(options, message, tiny):
    with pytest.raises(ProjError) as error: router(tiny).route(TEXTS, **options)
    assert message in str(error.value)
    one_line(error)


def test_costs_may_differ_by_prompt():
    assert cost_matrix(dict(a=np.arange(3), b=1), ["b", "a"], 3).tolist() == [[1, 0], [1, 1], [1, 2]]
    assert repr(Routes([], np.zeros(0))).split() == ["model", "prompts", "share", "score", "cost"]


# ---- features

def test_features_and_who_makes_them(tiny):
    r = router(tiny, features=4)
    with pytest.raises(ConfigError, match="wants 4 features a prompt") as error: r.score(TEXTS)
    one_line(error)
    r.featurise = lambda prompts: FEATURES[[TEXTS.index(p) for p in prompts]]
    assert np.array_equal(r.score(TEXTS), r.score(TEXTS, features=FEATURES)) and r.route(TEXTS).models == r.route(TEXTS, features=FEATURES).models
    assert len(r.rank(TEXTS[3])) == 3 and not np.allclose(r.score(TEXTS), r.score(TEXTS, features=0 * FEATURES), atol=1e-4)
    for wrong, message in [(FEATURES[:5], "features are (5, 4)"), (FEATURES[:, :3], "features are (6, 3)"), (FEATURES * np.nan, "NaN")]:
        with pytest.raises(DataError) as error: r.score(TEXTS, features=wrong)
        assert message in str(error.value)
        one_line(error)
    with pytest.raises(DataError, match=r"features are \(6, 4\)"): router(tiny).score(TEXTS, features=FEATURES)
    with pytest.raises(DataError, match="got 0 features a prompt, the router was made for 4"): r.model(r.model.collate(TEXTS))


# ---- fine-tuning

HEAD = {"models.weight", *both(["head.first", "head.rest.2", "head.rest.5"])}
LINEARS = [f"attention.self.{n}" for n in ("query", "key", "value")] + ["attention.output.dense", "intermediate.dense", "output.dense"]
NORMS = ["attention.output.LayerNorm", "output.LayerNorm"]
POOLER = both(["encoder.0.model.pooler.dense"])  # nobody reads it: part of all, but without a gradient
SPECS = [FinetuningSpec(method="full"), FinetuningSpec(method="head"), FinetuningSpec(method="last_layers", num_layers=1), FinetuningSpec(method="bitfit"), FinetuningSpec(method="lora", rank=4)]


def expected(kind: str, method: str) -> set:
    "The trained parameters of the encoder, written down by hand."
    if kind == "tiny":
        layer = lambda i: {f"encoder.0.transformer.layers.{i}.self_attn.in_proj_{n}" for n in ("weight", "bias")} | both(
            f"encoder.0.transformer.layers.{i}.{n}" for n in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"))
        every, linear = layer(0) | layer(1) | both(["encoder.0.norm"]) | {"encoder.0.transformer.tokens.weight", "encoder.0.transformer.positions.weight"}, [f"encoder.0.transformer.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        last = layer(1) | both(["encoder.0.norm"])
    else:
        base = "encoder.0.model"
        layer = lambda i: both(f"{base}.encoder.layer.{i}.{n}" for n in LINEARS + NORMS)
        every = layer(0) | layer(1) | layer(2) | both([f"{base}.embeddings.LayerNorm"]) | {f"{base}.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")} | POOLER
        linear, last = [f"{base}.encoder.layer.{i}.{n}" for i in range(3) for n in LINEARS], layer(2)
    return {"full": every, "head": set(), "last_layers": last, "bitfit": {n for n in every - POOLER if n.endswith("bias")},
            "lora": {f"{n}.lora_{side}.default.weight" for n in linear for side in "AB"}}[method]


def train(model, steps=3):
    "A few steps of AdamW; the names that had a gradient."
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batch, loss = model.collate(TEXTS, [["large", "small"]] * 6, [1, -1, 0, 1, -1, 1], FEATURES), make_rank_loss("bradley_terry")
    with_gradient = set()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(batch), batch["targets"], batch["mask"]).backward()
        with_gradient |= {n for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    model.zero_grad()
    model.eval()
    return with_gradient


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.method)
@pytest.mark.parametrize("kind", ["tiny", "bert"])
def test_exactly_the_right_parameters_train(kind, spec, tiny, bert, tmp_path):
    base = make(dict(tiny=tiny, bert=bert)[kind], features=4)
    model, before = copy.deepcopy(base), Router(base, precision="fp32").score(TEXTS, features=FEATURES)
    tuned = tune(model, spec)
    assert set(tuned.names) == HEAD | expected(kind, spec.method) and set(tuned.head) == HEAD
    assert tuned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert np.abs(Router(model, precision="fp32").score(TEXTS, features=FEATURES) - before).max() < 1e-6
    start = {n: t.clone() for n, t in model.state_dict().items()}
    assert train(model) == set(tuned.names) - POOLER
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
    may = set(tuned.names) - POOLER
    assert moved <= may and HEAD <= moved and all(n.endswith("bias") for n in may - moved)  # those of keys have no effect on attention, and a bias of 0 does not decay

    score = lambda m: Router(m, precision="fp32").score(TEXTS, features=FEATURES)
    trained, other = score(model), copy.deepcopy(base)
    assert np.abs(trained - before).max() > 1e-2
    save_trained(model, tmp_path / "trained.safetensors")  # a checkpoint over the same base
    tune(other, spec, seed=9)
    assert np.array_equal(score(load_trained(other, tmp_path / "trained.safetensors")), trained)
    assert set(trained_tensors(model)) == set(tuned.names) | {"base"} | {n for n in trained_tensors(model) if "running" in n}

    if spec.method == "lora":
        with pytest.raises(ConfigError, match="merge") as error: Router(model).save(tmp_path / "early")
        one_line(error)
        assert not (tmp_path / "early").exists()
    merge(model)
    assert list(model.state_dict()) == list(base.state_dict()) and np.abs(score(model) - trained).max() <= 2e-6
    lost = check_round_trip(model, lambda m: Router(m).save(tmp_path / "router"), lambda: Router.load(tmp_path / "router", device="cpu").model, score)
    assert lost <= 1e-6 and not list((tmp_path / "router").rglob("*adapter*"))


def test_frozen_vectors_stay_out_of_every_method(tiny):
    for spec in SPECS:
        model = make(tiny, vectors=np.eye(3), features=4)
        assert {n for n in tune(model, spec).names if not n.startswith("encoder.")} == HEAD - {"models.weight"}
        train(model, 1)
        assert torch.equal(model.models.weight, torch.eye(3))


def test_muon_moves_the_encoders_matrices_only(bert):
    from proj.models.tune import encoders
    from proj.optim import make_optimizer
    model = make(bert, features=4)
    optimizer = make_optimizer(model, "muon", 1e-3, encoder=encoders(model), lr_multipliers={"encoder": 0.1})
    muon = {n for g in optimizer.param_groups if g["by"] == "muon" for n in g["param_names"]}
    assert muon == {f"encoder.0.model.encoder.layer.{i}.{n}.weight" for i in range(3) for n in LINEARS} | {"encoder.0.model.pooler.dense.weight"}
    assert all(math.isclose(g["lr"], 1e-4 if n.startswith("encoder.") else 1e-3) for g in optimizer.param_groups for n in g["param_names"])


# ---- saved and loaded

@pytest.mark.parametrize("options", [dict(), dict(head="product", features=4, base=[1, 2, 3]), dict(base=[1, 2, 3], categories={"law": [3, 2, 1]}), dict(vectors=np.eye(3)), dict(vectors=np.eye(3), frozen=False, hidden_dims=[3], features=4)])
def test_saved_and_loaded(options, bert, tmp_path):
    model = make(bert, **options)
    first = Router(model, {"columns": [{"mean": 0.5, "kind": "log"}]}, precision="fp32")
    first.save(tmp_path / "router", card="# Router")
    again = Router.load(tmp_path / "router", device="cpu", precision="fp32")
    given = dict(features=FEATURES) if options.get("features") else {}
    assert np.abs(first.score(TEXTS, **given) - again.score(TEXTS, **given)).max() <= 1e-6
    assert again.names == NAMES and again.transform == first.transform and again.weights_hash() == first.weights_hash() and again.model.options == model.options
    assert {n for n, _ in again.model.named_parameters()} == {n for n, _ in model.named_parameters()} and not again.model.training
    files = {p.relative_to(tmp_path / "router").as_posix() for p in (tmp_path / "router").rglob("*") if p.is_file()}
    assert {MANIFEST, "router.json", "router.safetensors", "README.md", "encoder/modules.json", "encoder/model.safetensors"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl", ".npy"))] and not list(tmp_path.glob(".*"))


def test_a_router_is_replaced_and_nothing_else_is(tiny, tmp_path):
    one, two = router(tiny), router(tiny, seed=3)
    one.save(tmp_path / "r")
    two.save(tmp_path / "r")
    assert np.array_equal(Router.load(tmp_path / "r", device="cpu", precision="fp32").score(TEXTS), two.score(TEXTS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes.txt"): one.save(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError, match="is a file"): one.save(tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "r").rename(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert Router.load(tmp_path / "run", device="cpu").names == NAMES
    bad = Router(one.model, {"mean": math.nan})
    with pytest.raises(DataError, match="cannot be written as JSON"): bad.save(tmp_path / "nan")
    assert not (tmp_path / "nan").exists() and not list(tmp_path.glob(".*"))


def edit(path, **change):
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not ...}))


def resave(path, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "router.json").unlink(), "no router.json"), (lambda f: (f / "router.safetensors").unlink(), "no router.safetensors"),
    (lambda f: edit(f / "router.json", kind="else"), "not a router's"), (lambda f: (f / "router.json").write_text("[]"), "not a router's"), (lambda f: (f / "router.json").write_text("{"), "not valid JSON"),
    (lambda f: edit(f / "router.json", models=["a", "b"]), "do not belong together"), (lambda f: edit(f / "router.json", models=...), "router.json"), (lambda f: edit(f / "router.json", models=["a", "a", "b"]), "twice"),
    (lambda f: edit(f / "router.json", hidden_dims=[16, 9]), "do not belong together"), (lambda f: edit(f / "router.json", hidden_dims=...), "router.json"), (lambda f: edit(f / "router.json", hidden_dims=[10**6, 10**6, 10**6]), "do not belong together"),
    (lambda f: edit(f / "router.json", hidden_dims=[-1]), "router.json"), (lambda f: edit(f / "router.json", hidden_dims=[]), "router.json"), (lambda f: edit(f / "router.json", head="sum"), "unknown head 'sum'"),
    (lambda f: edit(f / "router.json", features=7), "do not belong together"), (lambda f: edit(f / "router.json", frozen="yes", dropout="x"), "router.json"),
    (lambda f: resave(f / "router.safetensors", lambda t: t.pop("head.first.bias")), "head.first.bias is missing"), (lambda f: resave(f / "router.safetensors", lambda t: t.update(extra=torch.ones(1))), "superfluous"),
    (lambda f: resave(f / "router.safetensors", lambda t: t.pop("models.weight")), "no vectors of models"), (lambda f: (f / "router.safetensors").write_bytes(b"nothing"), "not a whole safetensors file"),
    (lambda f: (f / "encoder" / "model.safetensors").unlink(), "encoder"), (lambda f: (f / "encoder" / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}'), "never done"),
])
def test_damaged_folders_are_one_line(damage, message, bert, tmp_path):
    router(bert).save(tmp_path / "r")
    damage(tmp_path / "r")
    with pytest.raises(ProjError) as error: Router.load(tmp_path / "r", device="cpu")
    assert str(tmp_path / "r") in str(error.value)  # whether the manifest sees it
    one_line(error)
    (tmp_path / "r" / MANIFEST).unlink()
    with pytest.raises(ProjError) as error: Router.load(tmp_path / "r", device="cpu")
    assert message in str(error.value)  # or what reads it
    one_line(error)


def test_a_flipped_bit_is_seen(tiny, tmp_path):
    router(tiny).save(tmp_path / "r")
    for name in ("router.safetensors", "encoder/model.safetensors"):
        path = tmp_path / "r" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        with pytest.raises(DataError, match="sha256 differs"): Router.load(tmp_path / "r", device="cpu")
        path.write_bytes(whole)
    with pytest.raises(DataError, match="no router.json"): Router.load(tmp_path / "nowhere")


# ---- broken input

@pytest.mark.parametrize("options, message", [
    (dict(names=[]), "names is '[]'"), (dict(names="large"), "names is 'large'"), (dict(names=["a", "a"]), "'a' twice"), (dict(names=["a", ""]), "names is"), (dict(names=["a", 3]), "names is"),
    (dict(head="sum"), "unknown head 'sum'"), (dict(hidden_dims=[]), "hidden_dims is []"), (dict(hidden_dims=[0]), "hidden_dims is [0]"), (dict(dropout=1), "dropout is 1"),
    (dict(vectors=np.eye(4)), "vectors are (4, 4)"), (dict(vectors=np.full((3, 2), np.nan)), "NaN"), (dict(base=[1, 2]), "base is (2,)"), (dict(base=[1, 2, np.inf]), "3 finite scores"),
    (dict(base=dict(large=1, small=2)), "unknown model in base 'medium'"), (dict(categories=dict(law=[1, 2])), "category 'law' is (2,)"), (dict(categories=dict(law=[1, 2, np.nan])), "3 finite scores"),
])
def test_wrong_options_are_one_line(options, message, tiny):
    with pytest.raises(ProjError) as error: make(tiny, **options)
    assert message in str(error.value)
    one_line(error)


@pytest.mark.parametrize("prompts, message", [("sort", "expected a list of texts"), ([1], "text 0 is int"), (["a", "\ud800"], "surrogate"), (["a", None], "text 1 is NoneType")])
def test_wrong_prompts_are_one_line(prompts, message, tiny):
    for call in (router(tiny).score, router(tiny).route):
        with pytest.raises(DataError, match=message) as error: call(prompts)
        one_line(error)


def test_odd_prompts_have_scores(tiny):
    odd = ["", " ", "\n", "naïve 漢字 🙂", "word " * 3000, "a\x00b"]
    assert np.isfinite(router(tiny).score(odd)).all()


def test_damaged_weights_are_said(tiny):
    r = router(tiny)
    with torch.no_grad(): r.model.head.first.weight[0, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinity for 6 of 6 prompts"): r.score(TEXTS)
    r = router(tiny, base=[1, 2, 3], categories={"law": [1, 2, 3]})
    r.model.base[1, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinity for 1 of 6 prompts"): r.score(TEXTS, categories=["law", *[None] * 5])
