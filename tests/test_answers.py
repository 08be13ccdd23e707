"Vectors of language models from their answers: rows, triplets, sets, losses, networks, training by transformers, saving and loading."
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proj.config import FinetuningSpec
from proj.core import ConfigError, DataError
from proj.manifest import write_manifest
from proj.models.answer_sets import ANSWER_MODELS, AttentionAnswers, SetBatches, load_answer_model, scalars, supervised_contrast
from proj.models.answers import (CAUSES, FAMILIES, SIZES, Answers, FinetunableAnswers, FrozenAnswers, Triplets, answers_from, kl_to_unit, pair_vectors, simulated_answers,
                                 triplet_terms)
from proj.models.dual import DualEncoder
from proj.models.encoder import load_encoder
from proj.models.tune import merge, tune

ANSWERS = simulated_answers(60, models=["terse-s", "terse-l", "lister-s", "friend-m"], seed=5)


def tiny(): return DualEncoder(load_encoder("tiny", texts=[*ANSWERS.prompts, *ANSWERS.responses], dropout=0))


@pytest.fixture(scope="module")
def encoder(): return tiny()


@pytest.fixture(scope="module")
def frozen(encoder): return FrozenAnswers(encoder, hidden=32, dim=16).eval()


@pytest.fixture(scope="module")
def attention(encoder): return AttentionAnswers(encoder, width=32, dim=16).eval()


@pytest.fixture(scope="module")
def inputs(attention): return attention.inputs(ANSWERS)


# ---- rows

@pytest.mark.parametrize("change, line", [
    (dict(prompts=[]), "there are no answers; pass one or more"),
    (dict(prompts="Why?"), "prompts is one text; put it in a list"),
    (dict(responses=["x"]), "2 prompts but response has 1; pass one a prompt"),
    (dict(responses="xy"), "2 prompts but response has one text; pass one a prompt"),
    (dict(won=[True]), "2 prompts but won has 1; pass one a prompt"),
    (dict(prompts=["a", " \n"]), "answer 1: prompt: expected a non-blank string, got ' \\n'"),
    (dict(prompts=["a", None]), "answer 1: prompt: expected a non-blank string, got None"),
    (dict(responses=["x", float("nan")]), "answer 1: response: expected a string, got nan"),
    (dict(responses=["x", "\ud800"]), "answer 1: response: holds a lone surrogate, '\\ud800' at character 1"),
    (dict(models=["one", ""]), "answer 1: model: expected a non-blank string, got ''"),
    (dict(models=["one", 7]), "answer 1: model: expected a non-blank string, got 7"),
    (dict(won=[True, 1]), "answer 1: won: expected True or False, got 1"),
    (dict(won=np.array([1.0, np.nan])), "answer 0: won: expected True or False, got 1.0"),
])
def test_bad_rows_are_named(change, line):
    with pytest.raises(DataError) as e: Answers(**{**dict(prompts=["a", "b"], responses=["x", "y"], models=["one", "two"], won=[True, False]), **change})
    assert str(e.value) == line


@pytest.mark.parametrize("change, line", [
    (dict(labels=[1, 2]), "comparison 1: labels: expected 1, -1 or 0, got 2"),
    (dict(labels=[1, float("nan")]), "comparison 1: labels: expected 1, -1 or 0, got nan"),
    (dict(labels=[1]), "2 prompts but 1 labels; pass one for each comparison"),
    (dict(models=[["one", "two"], ["one"]]), "comparison 1: models: expected a pair, got ['one']"),
    (dict(models=["ab", ["one", "two"]]), "comparison 0: models: expected a pair, got 'ab'"),
    (dict(responses=[["x", "y"], None]), "comparison 1: responses: expected a pair, got None"),
])
def test_bad_comparisons_are_named(change, line):
    with pytest.raises(DataError) as e: answers_from(**{**dict(prompts=["a", "b"], responses=[["x", "y"]] * 2, models=[["one", "two"]] * 2, labels=[1, -1]), **change})
    assert str(e.value) == line


def test_comparisons_become_rows():
    found = answers_from(["a", "b", "c"], np.array([["1", "2"], ["3", "4"], ["5", "6"]]), [("m", "n")] * 3, np.array([1, -1, 0]))
    assert found.prompts.tolist() == list("aabbcc") and found.responses.tolist() == list("123456") and found.models.tolist() == ["m", "n"] * 3
    assert found.won.tolist() == [True, False, False, True, False, False] and not answers_from(["a"], [["1", "2"]], [["m", "n"]]).won.any()
    twice = found.take([0, 1, 0, 3, 1])
    assert twice.distinct().tolist() == [0, 1, 3] and Counter(twice.keys().tolist()) == {0: 2, 1: 2, 2: 1} and len(found.take(found.won)) == 2
    assert Answers(["a", "b"], ["", "x"], "new").names == ["new"]


def test_simulated_models_are_what_they_should_be():
    answers = simulated_answers(1_500, seed=4)
    assert repr(answers).startswith("3,000 answers of 15 models to 96 prompts, 1,500 won") and set(answers.names) == {f"{f}-{s}" for f in FAMILIES for s in SIZES}
    share = {name: answers.won[answers.models == name].mean() for name in answers.names}
    for of in FAMILIES: assert share[f"{of}-s"] < share[f"{of}-m"] < share[f"{of}-l"], "quality grows with size"
    lists = {of: np.mean([text.count("\n- ") > 0 for text, name in zip(answers.responses, answers.models) if name == f"{of}-l"]) for of in FAMILIES}
    assert lists["lister"] > .8 and max(lists[of] for of in FAMILIES if of != "lister") < .2
    with pytest.raises(ConfigError, match="1 models; a comparison needs 2 or more"): simulated_answers(models=["terse-s"])


# ---- triplets

@st.composite
def comparisons(draw):
    n, name = draw(st.integers(1, 25)), st.sampled_from("ABCD")
    rows = [(draw(st.sampled_from("pqr")), draw(st.lists(st.sampled_from("xyz"), min_size=2, max_size=2)), draw(st.lists(name, min_size=2, max_size=2)), draw(st.sampled_from([1, -1, 0])))
            for _ in range(n)]
    return answers_from(*zip(*rows))


@given(comparisons(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_triplets_are_legal(answers, seed):
    "By a naive look at all rows; models may meet themselves, answers repeat, the same answer may win here and lose there."
    row = list(zip(answers.prompts, answers.responses, answers.models, answers.won))
    try: drawn = Triplets(answers, dict, seed, rounds=3)
    except DataError as e:
        assert "pass comparisons" in str(e)
        return
    for i in range(len(drawn)):
        anchor, positive, negative = (row[at] for at in drawn[i])
        assert anchor[3] and not negative[3] and anchor[0] == negative[0] and anchor[2] != negative[2]
        assert positive[:3] != anchor[:3] and positive[:3] != negative[:3] and (positive[2] == anchor[2] or positive[3])
    rivals = [r for r in range(len(row)) if row[r][3] and any(not other[3] and other[0] == row[r][0] and other[2] != row[r][2] for other in row)]
    assert set(drawn.anchors) <= set(rivals)
    for r in set(rivals) - set(drawn.anchors):  # left out only where there may be no positive
        assert not any(other[:3] != row[r][:3] and other[2] == row[r][2] for other in row) and len({other[:3] for other in row if other[3]}) <= 2


def test_triplets_depend_on_seed_and_number_only():
    one, two, other = (Triplets(ANSWERS, dict, seed, rounds=2) for seed in (1, 1, 2))
    order = np.random.default_rng(0).permutation(len(one))
    shuffled = {int(i): one[int(i)].tolist() for i in order}
    assert all(shuffled[i] == two[i].tolist() for i in range(len(two))) and any(shuffled[i] != other[i].tolist() for i in range(len(two)))
    assert [t[0] for t in map(one.__getitem__, range(len(one.anchors)))] == one.anchors and len(one) == 2 * len(one.anchors)
    for bad in (-1, len(one)):
        with pytest.raises(IndexError): one[bad]
    for wrong, line in ((dict(rounds=0), "rounds is 0"), (dict(same=1.2), "same is 1.2")):
        with pytest.raises(ConfigError, match=line): Triplets(ANSWERS, dict, **wrong)
    own = Triplets(ANSWERS, dict, same=1.0)
    assert all(ANSWERS.models[own[i][0]] == ANSWERS.models[own[i][1]] for i in range(len(own)))


def test_triplets_of_real_comparisons(data_dir):
    "The structure of MT-bench's human judgements, which has ties and repeats; its answers are not in the file, so their text is made up."
    with open(data_dir / "mt_bench_human" / "human.jsonl") as file: rows = [json.loads(line) for line in file]
    pairs = [[row["model_a"], row["model_b"]] for row in rows]
    labels = [{"model_a": 1, "model_b": -1}.get(row["winner"], 0) for row in rows]
    answers = answers_from([row["prompt"] for row in rows], [[f"{name} on {row['prompt']}" for name in pair] for row, pair in zip(rows, pairs)], pairs, labels)
    drawn = Triplets(answers, dict)
    assert len(answers) == 2 * len(rows) and len(drawn) <= answers.won.sum() == sum(map(abs, labels)) and len(answers.distinct()) < len(answers)
    rows = np.stack([drawn[i] for i in range(0, len(drawn), 7)])
    assert (answers.prompts[rows[:, 0]] == answers.prompts[rows[:, 2]]).all() and (answers.models[rows[:, 0]] != answers.models[rows[:, 2]]).all()
    assert (answers.responses[rows[:, 0]] != answers.responses[rows[:, 1]]).all()
    assert .75 < (answers.models[rows[:, 0]] == answers.models[rows[:, 1]]).mean() < .95


# ---- sets

@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 5), st.integers(1, 9), st.integers(1, 18), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sets_are_disjoint_and_as_large_as_can_be(counts, sets, pairs, models, seed):
    names = [f"m{m:02}" for m, count in enumerate(counts) for _ in range(count)]
    answers = Answers(["p"] * len(names) * 2, [f"{i}" for i in range(len(names))] * 2, names * 2)  # every answer twice
    assume(sum(count > 1 for count in counts) > 1)
    batches = SetBatches(answers, torch.arange(len(answers))[:, None], seed, models=models, sets=sets, pairs=pairs)
    batch = batches.collate([batches[len(batches) - 1]])
    owners = Counter(batch["models"].tolist())
    assert len(owners) == min(models, sum(count > 1 for count in counts)) and batch["mask"].any(1).all()
    for owner, number in owners.items():
        rows, mask = batch["pairs"][batch["models"] == owner][..., 0], batch["mask"][batch["models"] == owner]
        found = rows[mask].numpy()
        name, = set(answers.models[found])
        have = counts[int(name[1:])]
        assert number == min(sets, have) and len(set(answers.responses[found])) == len(found) and set(mask.sum(1).tolist()) == {min(pairs, have // number)}
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(batches[0], batches[0]))


def test_sets_want_two_models_with_two_answers():
    same = Answers(["a"] * 4, ["x", "x", "y", "z"], ["one", "one", "two", "two"])
    with pytest.raises(DataError, match="^1 of 2 models have two different answers"): SetBatches(same, torch.zeros(4, 1))
    for wrong, line in ((dict(sets=1), "sets is 1; expected 2"), (dict(pairs=0), "pairs is 0"), (dict(models=2.5), "models is 2.5")):
        with pytest.raises(ConfigError, match=line): SetBatches(ANSWERS, torch.zeros(len(ANSWERS), 1), **wrong)


# ---- losses

def test_kl_and_triplets_by_hand():
    mean, log_var = torch.randn(4, 7, 5).double(), torch.randn(4, 7, 5).double()
    naive = np.mean([sum((m * m + math.exp(v) - 1 - v) / 2 for m, v in zip(ms, vs)) for ms, vs in zip(mean.flatten(0, 1).tolist(), log_var.flatten(0, 1).tolist())])
    assert math.isclose(kl_to_unit(mean, log_var), naive, rel_tol=1e-9)
    one = torch.tensor([[0.0, 0]])
    terms = triplet_terms(one, one + torch.tensor([3.0, 4]), one + torch.tensor([0.0, 5.1]))
    assert math.isclose(terms["triplet"], .1, abs_tol=1e-5) and terms["wrong"] == 0 and triplet_terms(one, one + 1, one + 1)["wrong"] == 1


@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=2, max_size=12), st.sampled_from([.07, .5, 1]))
@settings(max_examples=40, deadline=None)
def test_supervised_contrast_by_a_double_loop(seed, labels, temperature):
    assume(len(set(labels)) < len(labels))
    z = np.random.default_rng(seed).normal(size=(len(labels), 6))
    u, terms, hits = z / np.linalg.norm(z, axis=1, keepdims=True), [], []
    for i, label in enumerate(labels):
        positives = [p for p, other in enumerate(labels) if other == label and p != i]
        if not positives: continue
        below = sum(math.exp(u[i] @ u[a] / temperature) for a in range(len(labels)) if a != i)
        terms.append(-np.mean([math.log(math.exp(u[i] @ u[p] / temperature) / below) for p in positives]))
        hits.append(max((u[i] @ u[a], a) for a in range(len(labels)) if a != i)[1] in positives)
    found = supervised_contrast(torch.tensor(z), torch.tensor(labels), temperature)
    assert math.isclose(found["loss"], np.mean(terms), rel_tol=1e-4, abs_tol=1e-5) and math.isclose(found["nearest"], np.mean(hits), abs_tol=1e-6)


# ---- networks

def test_frozen_agrees_with_a_second_implementation(frozen, encoder):
    w = {name: tensor.double().numpy() for name, tensor in frozen.state_dict().items()}
    sides = [encoder.encode(ANSWERS.prompts, "query"), encoder.encode(ANSWERS.responses)]
    x = np.concatenate([(v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5) for v in np.asarray(sides, np.float64)], 1)
    hidden = x @ w["trunk.0.weight"].T + w["trunk.0.bias"]
    mean = np.where(hidden > 0, hidden, .1 * hidden) @ w["mean.weight"].T + w["mean.bias"]
    assert np.abs(frozen.each(frozen.inputs(ANSWERS)) - mean).max() < 1e-5
    table = frozen.vectors(ANSWERS)
    assert list(table) == ANSWERS.names and all(np.abs(table[name] - mean[ANSWERS.models == name].mean(0)).max() < 1e-5 for name in table)
    doubled, order = ANSWERS.take(np.r_[np.arange(len(ANSWERS)), 0, 0, 1]), np.random.default_rng(0).permutation(len(ANSWERS))
    for other in (doubled, ANSWERS.take(order)): assert all(np.abs(frozen.vectors(other)[name] - table[name]).max() < 1e-5 for name in table)
    with pytest.raises(DataError, match="120 answers but 3 inputs"): frozen.vectors(ANSWERS, frozen.inputs(ANSWERS)[:3])


def test_frozen_draws_while_it_trains_only(frozen):
    rows = frozen.dataset(ANSWERS)
    batch = rows.collate([rows[i] for i in range(20)])
    assert frozen.loss(batch) == frozen(**batch)["loss"] and batch["anchor"].shape == (20, 256)
    model = FrozenAnswers(frozen.encoder, hidden=32, dim=16, kl=2.0, seed=1)
    torch.manual_seed(0)
    first, second = model(**batch), model(**batch)
    assert first["triplet"] != second["triplet"] and first["kl"] == second["kl"] and torch.isclose(first["loss"], first["triplet"] + 2 * first["kl"])
    (first["loss"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    mean, log_var = model.gaussian(torch.stack([batch["anchor"], batch["positive"], batch["negative"]]))
    assert torch.isclose(first["kl"], kl_to_unit(mean, log_var) / 16)
    torch.manual_seed(0)
    drawn = mean + torch.randn_like(mean) * log_var.exp().sqrt()
    assert torch.isclose(first["triplet"], F.triplet_margin_loss(*drawn, margin=.2))


def test_finetunable_is_the_encoder_and_a_head():
    model = FinetunableAnswers(tiny(), dim=16).eval()
    texts = [f"{p} <eos> {r}" for p, r in zip(ANSWERS.prompts, ANSWERS.responses)]
    with torch.no_grad(): plain = torch.tanh(model.head(torch.tensor(model.encoder.encode(texts)))).numpy()
    assert np.abs(model.each(model.inputs(ANSWERS)) - plain).max() < 1e-5 and np.abs(plain).max() < 1
    rows = model.dataset(ANSWERS)
    triplets = [rows[i] for i in range(6)]
    a, p, n = (torch.tensor(plain[[t[side] for t in triplets]]) for side in range(3))
    assert torch.isclose(model.loss(rows.collate(triplets)), F.triplet_margin_loss(a, p, n, margin=.2), atol=1e-5)


def test_a_long_prompt_leaves_room_for_the_answer():
    model = FinetunableAnswers(tiny(), dim=16).eval()
    model.encoder.max_seq_length = 64
    long = Answers(["why so? " * 500] * 2, ["I may be wrong.", "Great question!"], ["one", "two"])
    found = model.vectors(long)
    assert np.abs(found["one"] - found["two"]).max() > 1e-4 and model.inputs(long)[1].endswith("<eos> Great question!")
    assert 28 <= len(model.encoder.tokenizer(model.inputs(long)[0].split(" <eos>")[0], add_special_tokens=False)["input_ids"]) <= 32
    model.encoder.max_seq_length = 256
    assert model.inputs(ANSWERS)[0].startswith(ANSWERS.prompts[0] + " <eos> ")


def test_attention_agrees_with_a_second_implementation(attention):
    "One set, head by head, with nothing but matrix products."
    some = ANSWERS.take(ANSWERS.models == "friend-m")
    w = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    pairs = pair_vectors(attention.encoder, some).double()
    p, r = (F.layer_norm(v, v.shape[-1:]) for v in pairs.chunk(2, 1))
    numbers = torch.tensor([[(math.log(1 + len(a)) - 6) / 2, (math.log(1 + len(b)) - 6) / 2, math.log((1 + len(b)) / (1 + len(a))) / 2] for a, b in zip(some.prompts, some.responses)]).double()
    cosine = (pairs[:, :128] * pairs[:, 128:]).sum(1) / pairs[:, :128].norm(dim=1) / pairs[:, 128:].norm(dim=1)
    x = F.gelu(torch.cat([p, r, r - p, r * p, numbers, cosine[:, None]], 1) @ w["pair.0.weight"].T + w["pair.0.bias"]) @ w["pair.3.weight"].T + w["pair.3.bias"]
    x = F.layer_norm(x, (32,), w["pair.4.weight"], w["pair.4.bias"])
    key, value = x @ w["keys.weight"].T + w["keys.bias"], x @ w["values.weight"].T + w["values.bias"]
    heads = [(key[:, 8 * h:8 * h + 8] @ w["queries"][h, 0] / 8**.5).softmax(0) @ value[:, 8 * h:8 * h + 8] for h in range(4)]
    plain = F.layer_norm(w["out.weight"] @ torch.cat(heads) + w["out.bias"], (16,), w["norm.weight"], w["norm.bias"])
    assert np.abs(attention.embed(some) - plain.numpy()).max() < 1e-5 and scalars(some, pairs.float()).shape == (len(some), 4)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_order_padding_and_company_have_no_say(attention, inputs, seed, size, padding):
    draw = np.random.default_rng(seed)
    own = np.flatnonzero(ANSWERS.models == "lister-s")[:size]
    alone = attention.embed(ANSWERS.take(own), inputs[own])
    order = draw.permutation(own)
    assert np.abs(attention.embed(ANSWERS.take(order), inputs[order]) - alone).max() <= 1e-5
    others = torch.tensor(draw.integers(0, len(ANSWERS), (3, size + padding)))
    pairs, mask = inputs[others].clone(), torch.ones(3, size + padding, dtype=torch.bool)
    pairs[1], mask[1] = torch.tensor(draw.normal(0, 10.0**draw.integers(-3, 9), pairs[1].shape)), False
    places = torch.tensor(draw.permutation(size + padding)[:size])
    pairs[1, places], mask[1, places] = inputs[order], True
    with torch.no_grad(): found = attention.pool(attention.encode(pairs), mask)[1].numpy()
    assert np.abs(found - alone).max() <= 1e-5


def test_padding_of_any_kind_leaves_loss_and_gradients(attention):
    batches = attention.dataset(ANSWERS, pairs=3)
    batch = batches.collate([batches[0]])
    model = AttentionAnswers(attention.encoder, width=32, dim=16, dropout=0)
    model.load_state_dict(attention.state_dict())
    model.loss(batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    padded = dict(pairs=F.pad(batch["pairs"], (0, 0, 0, 2), value=float("nan")), mask=F.pad(batch["mask"], (0, 2)), models=batch["models"])
    model.loss(padded).backward()
    assert all(torch.allclose(p.grad, expected[name], atol=1e-4) for name, p in model.named_parameters()) and torch.isfinite(model.loss(padded))


def test_embedding_is_for_one_model_and_repeats_do_not_count(attention):
    own = ANSWERS.take(ANSWERS.models == "terse-l")
    one = attention.embed(own)
    assert np.abs(attention.embed(own.take(np.r_[np.arange(len(own)), 0, 0, 0])) - one).max() <= 1e-5 and np.abs(attention.vectors(ANSWERS)["terse-l"] - one).max() <= 1e-5
    assert np.abs(attention.embed(Answers(own.prompts, [""] * len(own), "mute")) - one).max() > .1
    with pytest.raises(DataError, match="^answers of 4 models .friend-m, lister-s, terse-l.; embed takes one model's, vectors takes all$"): attention.embed(ANSWERS)


@pytest.mark.parametrize("make, line", [(lambda e: FrozenAnswers(e, hidden=0), "hidden is 0"), (lambda e: AttentionAnswers(e, width=30), "width is 30, not a multiple of heads, 4"),
                                        (lambda e: FinetunableAnswers(e, dim=-1), "dim is -1")])
def test_bad_shapes_are_named(encoder, make, line):
    with pytest.raises(ConfigError, match=line): make(encoder)


# ---- training

@pytest.mark.parametrize("spec", ANSWER_MODELS)
def test_transformers_trains_each(spec, tmp_path):
    from transformers import Trainer, TrainingArguments
    encoder = tiny()
    before = encoder.weights_hash()
    model = ANSWER_MODELS[spec](encoder, dim=16)
    few = ANSWERS.take(slice(0, 60))
    rows = model.dataset(few, rounds=4)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1 if spec == "attention" else 8, learning_rate=1e-3, report_to="none", use_cpu=True,
                                  logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0)
    state = {name: tensor.clone() for name, tensor in model.own().items()}
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=rows.collate)
    trainer.train()
    trained, losses = model.own(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(not torch.equal(state[name], trained[name]) for name in state) and len(losses) == 4 and np.isfinite(losses).all()
    assert (encoder.weights_hash() == before) == (spec != "finetunable"), "a frozen encoder stays as it is, the other is trained"
    assert all(np.isfinite(v).all() and v.shape == (16,) for v in model.eval().vectors(few).values())


@pytest.mark.parametrize("spec", ANSWER_MODELS)
def test_batches_work_under_bf16(spec, encoder):
    model = ANSWER_MODELS[spec](encoder, dim=16).eval()
    rows = model.dataset(ANSWERS)
    batch = rows.collate([rows[i] for i in range(1 if spec == "attention" else 8)])
    with torch.autocast("cpu", torch.bfloat16): found = model(**batch)
    assert found["loss"].dtype == torch.float32 and abs(found["loss"] - model.loss(batch)) < .1 and all(value.ndim == 0 for value in found.values())


@pytest.mark.parametrize("spec", [FinetuningSpec(), FinetuningSpec(method="head"), FinetuningSpec(method="last_layers", num_layers=1), FinetuningSpec(method="bitfit"),
                                  FinetuningSpec(method="lora", rank=4)], ids=lambda spec: spec.method)
def test_finetuning_specs(spec, tmp_path):
    "What is trained is exact, moves, and is there again after saving; nothing else moves."
    model = FinetunableAnswers(tiny(), dim=16)
    tuned = tune(model, spec)
    of_encoder = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    chosen = {"full": lambda name: True, "head": lambda name: False, "last_layers": lambda name: ".transformer.layers.1." in name or name.startswith("encoder.0.norm."),
              "bitfit": lambda name: "bias" in name, "lora": lambda name: "lora_" in name}[spec.method]
    assert set(tuned.names) == {name for name in of_encoder if chosen(name)} | {"head.weight", "head.bias"}
    before, rows = {name: p.detach().clone() for name, p in model.named_parameters()}, model.dataset(ANSWERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(2):  # the second lora matrix starts at zero, so the first moves only at the second step
        optimizer.zero_grad()
        model.train().loss(rows.collate([rows[i] for i in range(6)])).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(tuned.names) and {"head.weight"} <= moved and len(moved) > .8 * len(tuned.names)
    expected = merge(model.eval()).vectors(ANSWERS)
    model.save(tmp_path / "answers")
    found = load_answer_model(tmp_path / "answers").vectors(ANSWERS)
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1e-6


def test_a_new_model_lands_beside_its_family():
    "Another seed and another choice of held-out models than in the notebook."
    static = DualEncoder(load_encoder("static"))
    held_out, subjects = ["terse-l", "lister-m", "doubter-l", "friend-s", "lecturer-m"], list(CAUSES)
    everyone, unseen = (simulated_answers(700, subjects=some, seed=11 + i) for i, some in enumerate((subjects[:16], subjects[16:])))
    train, new = everyone.take(~np.isin(everyone.models, held_out)), unseen.take(np.isin(unseen.models, held_out))
    model = AttentionAnswers(static, width=128)
    batches = model.dataset(train, rounds=30, pairs=8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    torch.manual_seed(0)
    for step in range(25):
        optimizer.zero_grad()
        model.loss(batches.collate([batches[step]])).backward()
        optimizer.step()
    table, found = model.eval().vectors(train), model.vectors(new)
    unit = lambda v: v / np.linalg.norm(v)
    assert sorted(found) == sorted(held_out) and not set(found) & set(table)
    assert all(max(table, key=lambda name: unit(table[name]) @ unit(found[of])).split("-")[0] == of.split("-")[0] for of in held_out)


# ---- saving and loading

def test_round_trip_and_refusals(frozen, attention, encoder, tmp_path):
    for model in (frozen, attention):
        folder = tmp_path / model.spec
        model.save(folder)
        model.save(folder)  # over itself
        assert sorted(p.name for p in folder.iterdir()) == ["COMMIT.json", "config.json", "model.safetensors"]
        found, expected = load_answer_model(folder, encoder).vectors(ANSWERS), model.vectors(ANSWERS)
        assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1e-6
        with pytest.raises(ConfigError, match="pass encoder=, the DualEncoder of training"): load_answer_model(folder)
        with pytest.raises(ConfigError, match="was learned over another encoder .128 dimensions"):
            load_answer_model(folder, DualEncoder(load_encoder("tiny", texts=["other texts"], dropout=0)))
    with pytest.raises(ConfigError, match="holds the spec frozen; load it with its own class, not with AttentionAnswers"): AttentionAnswers.load(tmp_path / "frozen", encoder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files than a model"): frozen.save(tmp_path / "notes")


@pytest.mark.parametrize("change, line", [
    (lambda c: c.update(spec="forzen"), "unknown spec of answers 'forzen'; did you mean 'frozen'"),
    (lambda c: c.update(kind="swipe"), "holds no model of answers"),
    (lambda c: c["shape"].update(hidden=33), "log_var.weight is .16, 32., config.json makes it .16, 33."),
    (lambda c: c["shape"].update(depth=3), "describes no model .*depth"),
    (lambda c: c.pop("shape"), "describes no model"),
    (lambda c: c.pop("encoder"), "describes no model"),
])
def test_folders_that_do_not_fit_are_refused(frozen, encoder, tmp_path, change, line):
    frozen.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    change(config)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises((DataError, ConfigError), match="COMMIT.json says|sha256 differs|unknown spec"): load_answer_model(tmp_path / "m", encoder)
    write_manifest(tmp_path / "m")  # as if it had been written so
    with pytest.raises((DataError, ConfigError), match=line) as e: load_answer_model(tmp_path / "m", encoder)
    assert "\n" not in str(e.value)


def test_damage_is_found(frozen, encoder, tmp_path):
    frozen.save(tmp_path / "m")
    raw = bytearray((tmp_path / "m" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="sha256 differs"): load_answer_model(tmp_path / "m", encoder)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="no config.json; expected a folder"): load_answer_model(missing, encoder)
