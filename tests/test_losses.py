"Every loss against its formula, its library twin and the trainer it is used in."
import inspect
import json
import math
import subprocess
import sys
from importlib import import_module
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError
from proj.losses.contrast import LEFT_OUT, LOSSES, NEEDS, check_legal, loss_named, loss_table, make_loss

DUAL = LOSSES["dual"]
PARTS = ["pairs", "negatives", "grades", "teacher_scores"]
SUBSETS = [set(s) for s in chain.from_iterable(combinations(sorted(PARTS), n) for n in range(len(PARTS) + 1))]
WORDS = "sort list reverse string open file read line close socket parse json date number tree graph".split()
QUERIES = [f"{a} a {b}" for a, b in zip(WORDS, WORDS[3:] + WORDS[:3])]
POSITIVES = [f"def {a}_{b} ( x ) : return {a} ( {b} )" for a, b in zip(WORDS, WORDS[3:] + WORDS[:3])]
NEGATIVES = POSITIVES[5:] + POSITIVES[:5]


# ---- legality

@pytest.mark.parametrize("has", SUBSETS, ids=lambda has: "+".join(sorted(has)))
@pytest.mark.parametrize("name", DUAL)
def test_legal_exactly_when_some_shape_can_be_rendered(name, has):
    "The check agrees with the table for every loss and every kind of data; a refusal offers only losses that fit."
    possible = [shape for shape in DUAL[name].shapes if NEEDS[shape] <= has]
    if possible:
        assert check_legal("dual", name, has) == possible[0]
        return
    with pytest.raises(ConfigError) as error: check_legal("dual", name, has)
    message = str(error.value)
    assert "\n" not in message and name in message
    offered = message.split("choose a loss that fits: ")[1].split(", ") if "choose a loss" in message else []
    assert set(offered) == {n for n in DUAL if any(NEEDS[s] <= has for s in DUAL[n].shapes)}


def test_pairs_alone_feed_only_losses_that_take_negatives_from_the_batch():
    for name, spec in DUAL.items():
        try: check_legal("dual", name, {"pairs"})
        except ConfigError: assert not spec.in_batch, name
        else: assert spec.in_batch, name


def test_refused_before_anything_heavy_is_imported():
    script = ("import json, sys\nfrom proj.core import ConfigError\nfrom proj.losses.contrast import check_legal\n"
              "try: check_legal('dual', 'triplet', {'pairs'})\nexcept ConfigError as e: print(json.dumps([str(e), sorted(sys.modules)]))")
    message, modules = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert "negatives" in message and not {"torch", "transformers", "sentence_transformers", "datasets", "pyarrow"} & set(modules)


def test_every_class_of_the_library_is_offered_or_left_out_for_a_reason():
    library = import_module("sentence_transformers.sentence_transformer.losses")
    classes = {name for name in library.__all__ if name.endswith("Loss") or "LossIn" in name}
    offered = {alias for spec in DUAL.values() for alias in (spec.class_name, *spec.aliases)} - {"InfoNCE"}
    assert offered | set(LEFT_OUT) == classes and not offered & set(LEFT_OUT)
    for name in offered: assert loss_named(name)
    for name in LEFT_OUT:
        with pytest.raises(ConfigError, match="is not offered because"): loss_named(name)


def test_our_defaults_are_the_librarys():
    for spec in DUAL.values():
        module, cls = spec.path.rsplit(".", 1)
        parameters = inspect.signature(getattr(import_module(module), cls)).parameters
        has = {"scale", "temperature"} & set(parameters)
        assert bool(has) == (spec.temperature is not None), spec.name
        if has:
            default = parameters[has.pop()].default
            assert math.isclose(spec.temperature, 1 / default if spec.scale else default), spec.name
        assert ("guide" in parameters) == spec.guide and set(spec.options) <= set(parameters), spec.name


def test_table_names_every_loss():
    assert [row[0] for row in loss_table()] == list(DUAL)
    assert all(spec.shapes and set(spec.shapes) <= set(NEEDS) and spec.instead for spec in DUAL.values())


# ---- models

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A two-layer BERT with random weights, its tokenizer trained on the toy texts."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed
    set_seed(0)
    path = str(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(QUERIES + POSITIVES, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                            model_max_length=32).save_pretrained(path)
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(config).save_pretrained(path)
    transformer = Transformer(path)
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu").save(path + "-st")
    return path + "-st"


@pytest.fixture
def model(folder):
    from sentence_transformers import SentenceTransformer
    return SentenceTransformer(folder, device="cpu")


def rows(shape):
    "The toy set in one of the shapes."
    n = len(QUERIES)
    if shape == "pairs": return {"anchor": QUERIES, "positive": POSITIVES}
    if shape == "triplets": return rows("pairs") | {"negative": NEGATIVES}
    if shape == "n-tuples": return rows("pairs") | {"negative_1": NEGATIVES, "negative_2": NEGATIVES[3:] + NEGATIVES[:3]}
    if shape == "scored triplets": return rows("triplets") | {"score": [[0.9, 0.1 + 0.02 * i] for i in range(n)]}
    both = {"anchor": QUERIES * 2, "text": POSITIVES + NEGATIVES}
    return both | ({"label": [1] * n + [0] * n} if shape == "labelled pairs" else {"score": [1.0] * n + [0.25, 0.0] * (n // 2)})


def tokenised(model, *columns): return [dict(model.preprocess(list(column))) for column in columns]


@pytest.mark.parametrize("name,shape", [(name, shape) for name, spec in DUAL.items() for shape in spec.shapes])
def test_trains(name, shape, model, tmp_path):
    "Through the library's own trainer, on every shape it eats: all steps are finite and the loss falls."
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    loss = make_loss(name, model)
    data = Dataset.from_dict(rows(shape))
    args = SentenceTransformerTrainingArguments(str(tmp_path), per_device_train_batch_size=len(data), max_steps=4, learning_rate=2e-3,
        lr_scheduler_type="constant", logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0)
    guide = loss.guide.state_dict() if hasattr(loss, "guide") else {}
    guide = {key: value.clone() for key, value in guide.items()}
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 4 and np.isfinite(history).all() and history[-1] < history[0], history
    for key, value in guide.items(): assert torch.equal(value, loss.guide.state_dict()[key])


def test_text_keys_reach_infonce_through_the_trainer(model, tmp_path):
    "A column of lists named label arrives as the (b, 1 + p) tensor, and masks: with one key for all nothing is left to learn."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    data = Dataset.from_dict(rows("pairs") | {"label": [[7, 7, -1]] * len(QUERIES)})
    args = SentenceTransformerTrainingArguments(str(tmp_path), per_device_train_batch_size=8, max_steps=1, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=make_loss("infonce", model))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0


def test_static_model_is_refused_in_one_line():
    "Losses that cut a batch in pieces cannot take a static model; the others can."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models
    model = SentenceTransformer(modules=[StaticEmbedding(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")), embedding_dim=4)], device="cpu")
    for name in ("cached_mnr", "cached_mnr_symmetric", "cached_gist", "gist", "mega_batch"):
        with pytest.raises(ConfigError, match=f"loss '{name}' does not fit this model") as error: make_loss(name, model)
        assert "\n" not in str(error.value)
    for name in ("infonce", "mnr", "triplet", "cosent", "margin_mse"): make_loss(name, model)


def test_temperature_and_guide_reach_the_class(model):
    assert make_loss("mnr", model, temperature=0.1).scale == pytest.approx(10)
    assert make_loss("gist", model, temperature=0.1).temperature == 0.1
    assert make_loss("gist", model, guide=model).guide is model
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ConfigError, match="above 0"): make_loss("mnr", model, temperature=temperature)
    with pytest.raises(ConfigError, match="no temperature"): make_loss("triplet", model, temperature=0.1)
    with pytest.raises(ConfigError, match="takes no guide"): make_loss("mnr", model, guide=model)


# ---- formulas

@pytest.fixture(scope="module")
def embeddings():
    import torch
    return list(torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double))  # query, positive, 3 negatives


def cosines(a, b): return (a @ b.T) / (np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1))


def reference(name, q, p, negatives, labels):
    "Each loss from its paper, in NumPy."
    rows, dot = range(len(q)), [q @ d.T for d in (p, *negatives)]
    if name in ("mnr", "infonce"):
        t = DUAL[name].temperature
        s, mined = cosines(q, p) / t, [cosines(q, n) / t for n in negatives]
        if name == "mnr": return np.mean([np.log(np.exp(np.r_[s[i], *[m[i] for m in mined]]).sum()) - s[i, i] for i in rows])
        forward = [np.log(np.exp(np.r_[s[i], [m[i, i] for m in mined]]).sum()) - s[i, i] for i in rows]
        backward = [np.log(np.exp(s[:, i]).sum()) - s[i, i] for i in rows]
        return (np.mean(forward) + np.mean(backward)) / 2
    if name == "triplet": return np.mean([max(0, np.linalg.norm(q[i] - p[i]) - np.linalg.norm(q[i] - negatives[0][i]) + 5) for i in rows])
    if name == "cosent":
        s = cosines(q, p).diagonal() / DUAL[name].temperature
        return np.log(1 + sum(np.exp(s[j] - s[i]) for i in rows for j in rows if labels[i] > labels[j]))
    if name == "margin_mse": return np.mean([(dot[0][i, i] - dot[1][i, i] - (labels[i, 0] - labels[i, 1])) ** 2 for i in rows])


@pytest.mark.parametrize("name,negatives", [("infonce", 0), ("infonce", 3), ("mnr", 0), ("mnr", 3), ("triplet", 1), ("cosent", 0), ("margin_mse", 1)])
def test_equals_its_formula(name, negatives, model, embeddings):
    import torch
    labels = {"cosent": torch.tensor([0.0, 1.0, 0.5, 0.5, 0.2, 0.9]), "margin_mse": torch.rand(6, 2, generator=torch.Generator().manual_seed(1))}.get(name)
    columns = embeddings[:2 + negatives]
    ours = make_loss(name, model).compute_loss_from_embeddings(columns, labels).item()
    q, p, *others = [c.numpy() for c in columns]
    assert ours == pytest.approx(reference(name, q, p, others, None if labels is None else labels.numpy()), rel=1e-6)


def test_infonce_is_the_librarys_symmetric_loss(model, embeddings):
    "Without mined negatives, at the same temperature, for cosine and for the dot product."
    import torch
    from sentence_transformers.util import dot_score
    assert torch.isclose(make_loss("infonce", model, temperature=0.05).compute_loss_from_embeddings(embeddings[:2]),
                         make_loss("mnr_symmetric", model).compute_loss_from_embeddings(embeddings[:2], None), rtol=1e-12)
    model.similarity_fn_name = "dot"
    theirs = make_loss("mnr_symmetric", model, temperature=1.0)
    theirs.similarity_fct = dot_score
    assert torch.isclose(make_loss("infonce", model, temperature=1.0).compute_loss_from_embeddings(embeddings[:2]),
                         theirs.compute_loss_from_embeddings(embeddings[:2], None), rtol=1e-12)


@pytest.mark.parametrize("plain", ["mnr", "mnr_symmetric", "gist"])
@pytest.mark.parametrize("shape", ["pairs", "triplets"])
def test_cached_gradients_equal_the_plain_ones(plain, shape, model):
    "A batch of 16 in pieces of 5; the guide has other weights than the model."
    import torch
    model = model.double()
    options = {}
    if DUAL[plain].guide:
        from proj.losses.contrast import frozen_copy
        options["guide"] = frozen_copy(model)
        with torch.no_grad(): options["guide"][0].model.embeddings.word_embeddings.weight.mul_(1.5)
    columns, found = tuple(rows(shape).values()), []
    for name in (plain, f"cached_{plain}"):
        loss = make_loss(name, model, **options)
        if name != plain: loss.mini_batch_size = 5
        model.zero_grad()
        value = loss(tokenised(model, *columns), None)
        value.backward()
        found.append((value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (a, plain_gradients), (b, cached_gradients) = found
    assert a == pytest.approx(b, abs=1e-6) and plain_gradients.keys() == cached_gradients.keys() and len(plain_gradients) > 20
    for name, gradient in plain_gradients.items(): assert torch.allclose(gradient, cached_gradients[name], atol=1e-6, rtol=0), name
    assert max(g.abs().max() for g in plain_gradients.values()) > 1e-3


# ---- masks

@st.composite
def batches(draw):
    "Text keys of a batch, few enough that they often meet."
    b, k, p = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    key = st.integers(0, 7)
    return k, [[draw(key), *[draw(key) for _ in range(k)], *[draw(st.one_of(st.just(-1), key)) for _ in range(p)]] for _ in range(b)]


def masked_by_hand(k, keys):
    known = [{row[0], *row[1 + k:]} - {-1} for row in keys]
    return ([[other[0] in known[i] for other in keys] for i in range(len(keys))], [[key in known[i] for key in row[1:1 + k]] for i, row in enumerate(keys)])


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 2**32 - 1))
def test_masks(batch, seed):
    "Equal to sets by hand; what is masked neither counts nor gets a gradient, everything else does; rows may come in any order."
    import torch

    from proj.losses.infonce import info_nce, positive_masks
    k, keys = batch
    generator, b, table = torch.Generator().manual_seed(seed), len(keys), torch.tensor(keys)
    mask, own = positive_masks(table, k)
    assert mask.shape == (b, b) and own.shape == (b, k) and (mask.tolist(), own.tolist()) == masked_by_hand(k, keys)
    scores = torch.randn(b, b, generator=generator, dtype=torch.double, requires_grad=True)
    mined = torch.randn(b, k, generator=generator, dtype=torch.double, requires_grad=True)
    value = info_nce(scores, mined, mask, own)
    assert value.isfinite() and value >= 0
    value.backward()
    off = ~torch.eye(b, dtype=torch.bool)
    assert (scores.grad[mask & off] == 0).all() and (scores.grad[~mask & off] > 0).all()
    assert (mined.grad[own] == 0).all() and (mined.grad[~own] > 0).all()
    noisy = scores.detach().masked_fill(mask & off, 1e6), mined.detach().masked_fill(own, 1e6)
    assert torch.isclose(info_nce(*noisy, mask, own), value, rtol=1e-12)
    order = torch.randperm(b, generator=generator)
    moved_mask, moved_own = positive_masks(table[order], k)
    assert torch.isclose(info_nce(scores[order][:, order], mined[order], moved_mask, moved_own), value, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_zeros_give_the_logarithm_of_the_candidates(b, k):
    import torch

    from proj.losses.infonce import info_nce
    assert info_nce(torch.zeros(b, b), torch.zeros(b, k)).item() == pytest.approx((math.log(b + k) + math.log(b)) / 2, abs=1e-5)
    assert info_nce(torch.zeros(b, b)).item() == pytest.approx(math.log(b), abs=1e-5)


def test_infonce_masks_what_the_model_embeds(model):
    "A batch in which two queries share their positive: with keys the loss is that of the entries that are left."
    import torch
    loss = make_loss("infonce", model)
    positives = [POSITIVES[0], POSITIVES[0], POSITIVES[1]]
    columns = tokenised(model, QUERIES[:3], positives)
    keys = torch.tensor([[0], [0], [1]])
    q, p = [model(dict(c))["sentence_embedding"].detach().double().numpy() for c in columns]
    s = cosines(q, p) / loss.temperature
    s[0, 1] = s[1, 0] = -np.inf
    expected = np.mean([np.log(np.exp(s[i]).sum()) - s[i, i] + np.log(np.exp(s[:, i]).sum()) - s[i, i] for i in range(3)]) / 2
    assert loss(columns, keys).item() == pytest.approx(expected, rel=1e-5)
    assert loss(columns, keys) < loss(columns)
