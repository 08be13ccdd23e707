"Cross-encoders: every loss against its formula and through a whole run, scores against the library's, teachers, adapters, going on, what is refused."
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from proj.config import MineConfig, TrainConfig, from_arguments, from_environment, make, merged
from proj.core import ConfigError, DataError, ProjError, read_json, sha256_file
from proj.losses.contrast import LOSSES, loss_named, make_loss
from proj.mining import Mining
from proj.models.cross import CrossEncoder, load_cross, log_odds
from proj.replay import replay
from proj.run import history
from proj.tasks.cross import CrossTraining
from proj.train import fit

from test_train import NOUNS, VERBS, rows

CROSS = LOSSES["cross"]


# ---- formulas

class Told:
    "Made a CrossEncoder of the library below: its logits are told, one row a pair."
    def __init__(self, logits: dict):
        torch.nn.Module.__init__(self)
        self.place = {pair: i for i, pair in enumerate(logits)}
        self.table = torch.nn.Parameter(torch.tensor(np.array(list(logits.values()), np.float32)))
    device = property(lambda self: torch.device("cpu"))
    num_labels = property(lambda self: self.table.shape[1])
    def preprocess(self, pairs, **kw): return {"rows": torch.tensor([self.place[tuple(pair)] for pair in pairs])}
    def forward(self, features, **kw): return {"scores": self.table[features["rows"]]}


@pytest.fixture(scope="module")
def told():
    from sentence_transformers import CrossEncoder as Library
    return type("ToldCrossEncoder", (Told, Library), {})


def numbers(*shape, seed=0): return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64) * 2
def sigmoid(x): return 1 / (1 + math.exp(-x))
def softmax(x): return [math.exp(a) / sum(math.exp(b) for b in x) for a in x]


def by_prediction(scores, grades):
    "(score, gain, rank) of each document in the predicted order; gain over the best possible DCG."
    best = sum((2 ** g - 1) / math.log2(1 + i) for i, g in enumerate(sorted(grades, reverse=True), 1))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [(scores[i], (2 ** grades[i] - 1) / best, grades[i], rank) for rank, i in enumerate(order, 1)]


def lambda_pairs(scores, grades, mu=10):
    "NDCG-Loss2++ (Wang et al. 2018): log2 of the probability of each rightly ordered pair, weighed by what a swap costs."
    def inverse(rank): return 1 / math.log2(1 + rank)
    found = by_prediction(scores, grades)
    for s, gain, grade, i in found:
        for t, other, less, j in found:
            if grade <= less: continue
            swap, distance = abs(inverse(i) - inverse(j)), abs(inverse(abs(i - j)) - inverse(abs(i - j) + 1))
            yield (swap + mu * distance) * abs(gain - other) * math.log2(1 + math.exp(t - s))


def ranknet_pairs(scores, grades):
    "RankNet (Burges et al. 2005), in bits."
    return [math.log2(1 + math.exp(t - s)) for s, a in zip(scores, grades) for t, b in zip(scores, grades) if a > b]


def plackett_luce(scores): return [scores[i] - math.log(sum(math.exp(s) for s in scores[i:])) for i in range(len(scores))]


def adr_terms(scores, grades):
    "Squared error of soft ranks, discounted by the true rank; equal grades share the mean of their ranks."
    for i, (s, grade) in enumerate(zip(scores, grades)):
        true = sum(g > grade for g in grades) + (sum(g == grade for g in grades) + 1) / 2
        soft = 1 + sum(sigmoid(t - s) for j, t in enumerate(scores) if j != i)
        yield (true - soft) ** 2 / math.log2(true + 1)


def p_list(scores):
    "Position-aware ListMLE (Lan et al. 2014): the first places weigh exponentially more."
    weights = [2 ** (len(scores) - i) - 1 for i in range(1, len(scores) + 1)]
    return -sum(w * p for w, p in zip(weights, plackett_luce(scores))) / sum(weights)


LISTWISE = {  # (scores, grades) of each list -> loss
    "lambda": lambda lists: np.mean([value for each in lists for value in lambda_pairs(*each)]),
    "ranknet": lambda lists: np.mean([value for each in lists for value in ranknet_pairs(*each)]),
    "listnet": lambda lists: np.mean([-sum(t * math.log(p) for t, p in zip(softmax(grades), softmax(scores))) for scores, grades in lists]),
    "listmle": lambda lists: np.mean([-sum(plackett_luce(scores)) for scores, _ in lists]),
    "plistmle": lambda lists: np.mean([p_list(scores) for scores, _ in lists]),
    "adr_mse": lambda lists: np.mean([value for each in lists for value in adr_terms(*each)]),
}


@pytest.mark.parametrize("name", LISTWISE)
def test_a_listwise_loss_equals_its_formula(name, told):
    "Lists of different lengths, best first as they are rendered, with equal grades among them."
    grades = [[3, 1, 1, 0], [2, 0], [3, 2, 1, 0, 0], [1, 0, 0]]
    values = numbers(sum(map(len, grades)))
    scores, lists = iter(values), []
    for g in grades: lists.append(([float(next(scores)) for _ in g], g))
    documents = [[f"d{i}" for i in range(len(g))] for g in grades]
    pairs = [(f"q{i}", d) for i, docs in enumerate(documents) for d in docs]
    loss = make_loss(name, told(dict(zip(pairs, values[:, None]))), task="cross")
    found = loss([[f"q{i}" for i in range(len(grades))], documents], [torch.tensor(g, dtype=torch.float) for g in grades])
    assert found.item() == pytest.approx(LISTWISE[name](lists), rel=1e-6)


def pairwise(told, columns, width=1, seed=0):
    "A model with random logits for every pair of the first column with any other text, and the logits."
    others = [text for column in columns[1:] for text in column]
    pairs = list(dict.fromkeys((q, d) for q in columns[0] for d in others))
    logits = dict(zip(pairs, numbers(len(pairs), width, seed=seed)))
    return told(logits), {pair: value if width > 1 else float(value[0]) for pair, value in logits.items()}


QUERIES, DOCUMENTS = [f"q{i}" for i in range(6)], [f"d{i}" for i in range(6)]


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_equals_its_formula(told, classes):
    model, logits = pairwise(told, [QUERIES, DOCUMENTS], classes)
    labels = [i % classes for i in range(6)]
    expected = np.mean([-math.log(softmax(logits[pair])[label]) for *pair, label in ((q, d, y) for q, d, y in zip(QUERIES, DOCUMENTS, labels)) for pair in [tuple(pair)]])
    assert make_loss("softmax", model, task="cross")([QUERIES, DOCUMENTS], torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight", [None, 1.0, 3.5])
def test_bce_equals_its_formula(told, weight):
    model, logits = pairwise(told, [QUERIES, DOCUMENTS])
    labels = [1, 0, 0, 1, 0, 0]
    expected = np.mean([-(weight or 1) * math.log(sigmoid(logits[q, d])) if y else -math.log(1 - sigmoid(logits[q, d])) for q, d, y in zip(QUERIES, DOCUMENTS, labels)])
    loss = make_loss("bce", model, task="cross", pos_weight=weight)
    assert loss([QUERIES, DOCUMENTS], torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-6)


def test_mse_equals_its_formula(told):
    model, logits = pairwise(told, [QUERIES, DOCUMENTS])
    labels = numbers(6, seed=3)
    expected = np.mean([(logits[q, d] - y) ** 2 for q, d, y in zip(QUERIES, DOCUMENTS, labels)])
    assert make_loss("mse", model, task="cross")([QUERIES, DOCUMENTS], torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse_equals_its_formula(told, negatives):
    columns = [QUERIES, DOCUMENTS, *([f"n{j}-{i}" for i in range(6)] for j in range(negatives))]
    model, logits = pairwise(told, columns)
    teacher = numbers(6, 1 + negatives, seed=3)
    expected = np.mean([(logits[row[0], row[1]] - logits[row[0], row[1 + j]] - (t[0] - t[j])) ** 2 for row, t in zip(zip(*columns), teacher) for j in range(1, 1 + negatives)])
    labels = [torch.tensor(t) for t in teacher]
    assert make_loss("margin_mse", model, task="cross")([list(c) for c in columns], labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["mnr", "cached_mnr"])
@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("negatives, b", [(0, 5), (1, 3)])  # four others a row: as many as are drawn, so all of them
def test_mnr_equals_its_formula(told, name, negatives, b, temperature):
    columns = [QUERIES[:b], DOCUMENTS[:b], *([f"n{j}-{i}" for i in range(b)] for j in range(negatives))]
    model, logits = pairwise(told, columns)
    def scaled(q, d): return sigmoid(logits[q, d]) / (temperature or 0.1)
    every = [d for column in columns[1:] for d in column]
    expected = np.mean([math.log(sum(math.exp(scaled(q, d)) for d in every)) - scaled(q, columns[1][i]) for i, q in enumerate(columns[0])])
    loss = make_loss(name, model, temperature, task="cross")([list(c) for c in columns], None)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_loss_has_its_formula_here():
    assert set(CROSS) == {*LISTWISE, "softmax", "bce", "mse", "margin_mse", "mnr", "cached_mnr"}


# ---- models

SAMPLE = list(rows(24))
TEXTS = [text for row in SAMPLE for text in (row["query"], row["code"], *row["negatives"])]


def tiny(outputs=1):
    "Not trained, but with a steeper head, so that its scores differ."
    model = load_cross("tiny", outputs=outputs, texts=TEXTS, dropout=0.0, max_length=48)
    with torch.no_grad(): model[0].model.classifier.weight.mul_(100)
    return model


def test_the_gradients_of_cached_mnr_are_those_of_mnr():
    "A batch of 12 with a negative each, in pieces of 5; the same negatives are drawn."
    model = tiny().double()
    model.set_keep_in_fp32_modules([])  # a head in fp32 would round what is compared here
    columns, found = [[row["query"] for row in SAMPLE[:12]], [row["code"] for row in SAMPLE[:12]], [row["negatives"][0] for row in SAMPLE[:12]]], []
    for name in ("mnr", "cached_mnr"):
        loss = make_loss(name, model, task="cross")
        if name == "cached_mnr": loss.mini_batch_size = 5
        model.zero_grad()
        torch.manual_seed(0)
        value = loss([list(c) for c in columns], None)
        value.backward()
        found.append((value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (a, plain), (b, cached) = found
    assert a == pytest.approx(b, abs=1e-9) and plain.keys() == cached.keys() and len(plain) > 20
    for name, gradient in plain.items(): assert torch.allclose(gradient, cached[name], atol=1e-9, rtol=0), name
    assert max(g.abs().max() for g in plain.values()) > 1e-3


PAIRS = [(row["query"], row["code"] * (1 + i % 4)) for i, row in enumerate(SAMPLE)] + [("", SAMPLE[0]["code"]), (SAMPLE[0]["query"], ""), ("ünï çödé", "日本語")]


def test_scores_are_the_librarys():
    model = tiny()
    theirs, ours = model.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False), CrossEncoder(model, "fp32")
    assert np.abs(ours.score_pairs(PAIRS) - theirs).max() <= 1e-5 and np.ptp(theirs) > 1e-2
    order = np.random.default_rng(0).permutation(len(PAIRS))
    assert np.abs(ours.score_pairs([PAIRS[i] for i in order], batch_tokens=100) - theirs[order]).max() <= 1e-5
    assert ours.score_pairs([]).shape == (0,) and ours.score([], ["a"]).shape == (0, 1) and ours.score(["a"], []).shape == (1, 0)
    queries, documents = zip(*PAIRS[:4])
    square = ours.score(queries, documents)
    for i, q in enumerate(queries):
        assert np.abs(square[i] - model.predict([(q, d) for d in documents], activation_fn=torch.nn.Identity(), show_progress_bar=False)).max() <= 1e-5
    ranking = ours.rank(queries[0], {f"d{i}": d for i, d in enumerate(documents)})
    assert ranking.ids == [f"d{i}" for i in np.argsort(-square[0])]


def test_equal_pairs_are_scored_once():
    model, seen = tiny(), []
    hook = model.register_forward_hook(lambda module, given, output: seen.append(len(output["scores"])))
    scores = CrossEncoder(model, "fp32").score_pairs([*PAIRS, *PAIRS[::-1], list(PAIRS[0])])
    hook.remove()
    assert sum(seen) == len(set(PAIRS)) and (scores[:len(PAIRS)] == scores[len(PAIRS):-1][::-1]).all() and scores[-1] == scores[0]


@pytest.mark.parametrize("pair, says", [(("a", None), "NoneType"), ((1, "b"), "int"), (("a", "\ud800"), "surrogate")])
def test_a_pair_that_is_no_text_is_one_line(pair, says):
    with pytest.raises(DataError, match=says) as error: CrossEncoder(tiny(), "fp32").score_pairs([("a", "b"), pair])
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line():
    model = tiny()
    with torch.no_grad(): model[0].model.classifier.bias.fill_(math.nan)
    with pytest.raises(DataError, match="NaN or infinity for 2 of 2 pairs") as error: CrossEncoder(model, "fp32").score_pairs([("a", "b"), ("a", "c")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("outputs", [2, 3])
def test_classes_rank_by_the_probability_of_being_relevant(outputs):
    model = tiny(outputs)
    logits = model.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False, convert_to_tensor=True)
    relevant = torch.softmax(logits.double(), 1)[:, 1:].sum(1).numpy()
    ours = CrossEncoder(model, "fp32").score_pairs(PAIRS)
    assert np.abs(1 / (1 + np.exp(-ours.astype(np.float64))) - relevant).max() <= 1e-6 and np.ptp(relevant) > 1e-3
    assert (np.diff(relevant[np.argsort(ours)]) > -1e-6).all() and np.argmax(ours) == np.argmax(relevant) and np.argmin(ours) == np.argmin(relevant)
    assert CrossEncoder(model).outputs == outputs


def test_saturated_probabilities_do_not_tie():
    for steep in (np.array([[0, 40.0], [0, 41], [0, 42]]), np.array([[0, 39.0, 20], [0, 40, 20], [0, 41, 20]])):
        steep = steep.astype(np.float32)
        assert len(np.unique(torch.softmax(torch.tensor(steep), 1)[:, 1:].sum(1).numpy().round(6))) == 1
        assert (np.diff(log_odds(steep)) > 0.9).all() and (np.diff(log_odds(steep[:, 1::-1])) < -0.9).all()
    values = numbers(50, 4) * 3
    expected = [math.log(1 - softmax(row)[0]) - math.log(softmax(row)[0]) for row in values.tolist()]
    assert np.abs(log_odds(values) - expected).max() < 1e-5
    assert (log_odds(values[:, :1]) == values[:, 0].astype(np.float32)).all()


# ---- whole runs

def learnable(n=100):
    "Pairs whose answers can be told by one word, not by their length: batches of like length would hold one label each."
    for i in range(n):
        verb, noun, other, word = VERBS[i % 10], NOUNS[i // 10 % 10], NOUNS[(i // 10 + 3) % 10], ("good", "best")[i % 2]
        yield {"query": f"how to {verb} one {noun} safely", "code": f"def {verb}_{noun}(): return {noun}.{verb}() # {word} {i}", "grade": 1 + i % 2,
               "negatives": [f"def {verb}_{other}(): return {other}.{verb}() # poor {i}", f"def {VERBS[(i + 1) % 10]}_{noun}(): return {noun}.{verb}() # poor {i}"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("data"), list(learnable())
    kinds = {"pairs": found, "taught": [row | {"score": 2.0 * row["grade"], "negative_scores": [-2 - i % 2, -3]} for i, row in enumerate(found)]}
    for name, lines in kinds.items(): (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: str(folder / f"{name}.jsonl") for name in kinds}


SMALL = dict(task="cross", model="tiny", retriever="bm25", depth=10, batch_size=8, max_steps=8, max_length=40, lr=1e-3, precision="fp32", max_queries=12, eval_every=4)


def small(files, folder, **values):
    if "init_from" in values: values = {"model": None} | values
    return make(TrainConfig, {name: value for name, value in (SMALL | dict(data=files["pairs"], out=str(folder)) | values).items() if value is not None})


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    "Finished runs by loss, each made when it is first asked for; bce for longer, because it teaches."
    made, folder = {}, tmp_path_factory.mktemp("runs")
    def get(loss):
        if loss not in made: made[loss] = fit(small(data, folder / loss, loss=loss, epochs=4 if loss == "bce" else 2, max_steps=None, eval_every=None, data=data["taught" if loss == "margin_mse" else "pairs"]))
        return made[loss]
    return get


@pytest.mark.parametrize("loss", CROSS)
def test_every_loss_trains_to_a_finished_run(runs, loss):
    run = runs(loss)
    lines = [line["loss"] for line in history(run) if "loss" in line]
    epoch = int(run.facts["steps"] / run.facts["config"]["epochs"])
    assert run.status == "finished" and len(lines) == run.facts["steps"] >= 16 and np.isfinite(lines).all() and np.mean(lines[-epoch:]) < np.mean(lines[:epoch])
    metrics = read_json(run / "metrics.json")
    assert run.facts["config"]["loss"] == metrics["loss"] == loss and run.facts["loss_class"] == CROSS[loss].path
    assert all(line["objective"] == loss for line in history(run))
    assert (run / f"model__loss-{loss}").resolve() == (run / "model").resolve()
    card = (run / "model" / "README.md").read_text()
    assert f"`{loss}`" in card and f"`{CROSS[loss].path}`" in card
    assert set(metrics["systems"]) == {"first_stage", "oracle", "trained", "blended"} and 0 <= metrics["collapsed"]["trained"] <= 1
    assert run.facts["outputs"] == (3 if loss == "softmax" else 1)  # grades 0, 1, 2
    assert CrossEncoder.load(run.folder).weights_hash() == run.facts["weights"] != run.facts["weights_at_start"]


def test_labels_are_counted_and_balanced(runs):
    softmax, bce = runs("softmax").facts["labels"], runs("bce").facts["labels"]
    assert set(softmax) == {"0", "1", "2"} and softmax["0"] == bce["0"] and softmax["1"] + softmax["2"] == bce["1"]
    assert runs("bce").facts["pos_weight"] == pytest.approx(bce["0"] / bce["1"])


def test_without_a_teacher_margin_mse_says_how_to_make_one_and_that_works(data, runs, tmp_path):
    with pytest.raises(ConfigError) as error: fit(small(data, tmp_path / "run", loss="margin_mse"))
    said = str(error.value)
    command = re.search(r"`proj mine (.*?)`", said)
    assert error.value.exit_code == 2 and "\n" not in said and "no teacher_scores" in said and "--negatives.cross_encoder RUN" in command[1] and "MINED/train.jsonl" in said
    named = {"DATA": data["pairs"], "RUN": str(runs("bce").folder), "MINED": str(tmp_path / "mined")}
    cfg = from_arguments(MineConfig, [named.get(word, word) for word in command[1].split()] + ["--model", "static"], "proj mine")
    mining = Mining(cfg)
    mined = mining.run()
    assert set(mined.ledger["scorer"].to_pylist()) == {"cross-encoder"} and set(mined.ledger["model_hash"].to_pylist()) == {runs("bce").facts["weights"]}
    lines = [json.loads(line) for line in (tmp_path / "mined" / "train.jsonl").read_text().splitlines()]
    teacher, scored = CrossEncoder.load(runs("bce").folder, precision="fp32"), [line for line in lines if line.get("negative_scores")]
    assert len(scored) > len(lines) / 2
    for line in scored[:5]:
        expected = teacher.score([line["query"]], [line["positive"], *line["negatives"]])[0]
        assert np.abs(expected - [line["score"], *line["negative_scores"]]).max() < 1e-4
    run = fit(small(data, tmp_path / "run2", loss="margin_mse", data=str(tmp_path / "mined" / "train.jsonl")))
    assert run.status == "finished" and run.facts["shape"] == "taught n-tuples"


# ---- what is trained

@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    "A BERT without a head, as a pretrained encoder is."
    from transformers import AutoTokenizer, BertModel
    from proj.models.cross import build_cross
    folder = tmp_path_factory.mktemp("models")
    build_cross("tiny", TEXTS, folder / "cross")
    BertModel.from_pretrained(folder / "cross").save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(folder / "cross").save_pretrained(folder / "bert")
    return folder / "bert"


def weights(folder):
    from safetensors.torch import load_file
    return {name.removeprefix("bert."): value for name, value in load_file(str(Path(folder, "model.safetensors"))).items()}


def test_adapters_are_trained_folded_and_saved(data, encoder_folder, tmp_path):
    "From an encoder whose head is new: the head is trained too, the rest is what it was."
    from sentence_transformers import CrossEncoder as Library
    training = CrossTraining(small(data, tmp_path / "run", loss="bce", model=str(encoder_folder), dropout=0.0, finetuning=dict(method="lora", rank=4)))
    started = {name.split(".")[-2]: p.detach().clone() for name, p in training.encoder.model.named_parameters() if "classifier" in name and name.endswith("weight")}
    assert started
    training.baselines(), training.train(), training.evaluate()
    run = training.report()
    before, after = weights(encoder_folder), weights(run / "model")
    linear = {f"encoder.layer.{i}.{part}.weight" for i in (0, 1) for part in
              ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")} | {"pooler.dense.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= linear and len(changed) >= 12 and set(after) == {*before, "classifier.weight", "classifier.bias"}
    assert all((value - after["classifier.weight"]).abs().max() > 1e-6 for value in started.values())
    pairs = [(row["query"], row["code"]) for row in SAMPLE]
    theirs = Library(str(run / "model")).predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert np.abs(theirs - CrossEncoder(training.encoder.model, "fp32").score_pairs(pairs)).max() <= 1e-6
    assert np.abs(CrossEncoder.load(run.folder, precision="fp32").score_pairs(pairs) - theirs).max() <= 1e-6
    adapters = sum(4 * sum(before[name].shape) for name in changed)
    assert run.facts["trainable"] == adapters + 128 + 1 < run.facts["parameters"] / 5


def test_what_is_trained_stands_in_run_json(data, encoder_folder, tmp_path):
    shapes = {name: value.numel() for name, value in weights(encoder_folder).items()}
    def count(*parts): return 129 + sum(n for name, n in shapes.items() if any(re.search(part, name) for part in parts))
    expected = {"head": count(), "bitfit": count(r"bias$"), "last_layers": count(r"^encoder\.layer\.1\.", r"^pooler"), "full": count("")}
    for method, n in expected.items():
        more = dict(num_layers=1) if method == "last_layers" else {}
        facts = CrossTraining(small(data, tmp_path / method, loss="bce", model=str(encoder_folder), finetuning=dict(method=method, **more))).run.facts
        assert (facts["trainable"], facts["parameters"]) == (n, 129 + sum(shapes.values())), method


def test_a_second_stage_begins_with_the_first_ones_weights(data, runs, tmp_path):
    first = runs("bce")
    training = CrossTraining(small(data, tmp_path / "run", loss="mse", init_from=str(first.folder)))
    assert training.run.facts["weights_at_start"] == first.facts["weights"] and training.fresh() == []
    training.baselines()
    figures = training.evaluation.metrics()["systems"]
    assert "start" in figures or "zero_shot" in figures
    with pytest.raises(ConfigError, match="the model has 1 output, the loss needs 3") as error: CrossTraining(small(data, tmp_path / "other", loss="softmax", init_from=str(first.folder)))
    assert "\n" not in str(error.value)


# ---- going on

def test_a_run_that_died_goes_on_to_the_same_bytes_and_can_be_replayed(data, tmp_path):
    from transformers import TrainerCallback

    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 7: raise RuntimeError("died")  # between two checkpoints

    class Mortal(CrossTraining):
        def trainer(self):
            made = super().trainer()
            made.add_callback(Dies())
            return made

    values = dict(loss="mnr", dropout=0.1, epochs=3, max_steps=10, eval_every=3, resume="auto", negatives=dict(candidates="bm25", k=2))  # mined and drawn by chance
    whole = fit(small(data, tmp_path / "whole", **values))
    dying = Mortal(small(data, tmp_path / "run", **values))
    dying.baselines()
    with pytest.raises(RuntimeError, match="died"): dying.train()
    assert dying.run.status == "failed" and list((tmp_path / "run" / "checkpoints").glob("checkpoint-6/COMMIT.json"))
    again = fit(small(data, tmp_path / "run", **values))
    assert again.facts["resumed"] == [6] and again.facts["weights"] == whole.facts["weights"] != whole.facts["weights_at_start"]
    for name in ("metrics.jsonl", "metrics.json", "model/model.safetensors"): assert sha256_file(again / name) == sha256_file(whole / name), name
    assert "all the same" in str(replay(whole.folder, tmp_path / "replayed"))


def test_a_run_goes_on_without_saying_again_what_it_mines(data, tmp_path):
    "Only what is given must be what the run began with."
    CrossTraining(small(data, tmp_path / "run", loss="bce", negatives=dict(k=2)))
    going_on = CrossTraining(small(data, tmp_path / "run", loss="bce", resume="auto"))
    assert going_on.cfg.negatives.k == 2


def test_flags_leave_the_negatives_of_the_environment(monkeypatch):
    monkeypatch.setenv("PROJ_NEGATIVES__K", "2")
    assert from_arguments(TrainConfig, ["--task", "cross"], "proj train").negatives.k == 2
    assert from_arguments(TrainConfig, ["--task", "cross", "--negatives.k", "3"], "proj train").negatives.k == 3


# ---- what is refused

@pytest.mark.parametrize("alias, name", [("cross_entropy", "softmax"), ("SoftmaxLoss", "softmax"), ("CrossEntropyLoss", "softmax"), ("binary_cross_entropy", "bce"),
                                         ("BinaryClassificationLoss", "bce"), ("BinaryCrossEntropyLoss", "bce"), ("LambdaLoss", "lambda"), ("PListMLELoss", "plistmle"),
                                         ("CachedMultipleNegativesRankingLoss", "cached_mnr"), ("MNR", "mnr")])
def test_a_loss_answers_to_other_names(alias, name): assert loss_named(alias, "cross").name == name


def test_an_alias_trains_under_its_real_name(data, tmp_path):
    training = CrossTraining(small(data, tmp_path / "run", loss="BinaryClassificationLoss"))
    assert training.spec.name == "bce" and training.run.facts["loss_class"].endswith(".BinaryCrossEntropyLoss")


@pytest.mark.parametrize("values, says", [
    (dict(loss="lambada"), "did you mean 'lambda'"), (dict(loss="infonce"), "choose from softmax, bce"), (dict(loss="bce", temperature=0.1), "has no temperature"),
    (dict(retriever="tiny"), "has learned nothing"), (dict(negatives=dict(refresh_every=3)), "refresh_every"), (dict(negatives=dict(reuse=True)), "reuse"),
    (dict(negatives=dict(candidates="dense")), "needs a retriever that is an encoder"), (dict(model="static"), "no attention"), (dict(max_length=4096), "positions"),
    (dict(retriever="minilmm"), "minilm"), (dict(depth=1), "depth"), (dict(alpha=1.5), "alpha"), (dict(alpha="test"), "alpha"),
    (dict(task="dual", loss="mnr", retriever="minilm"), "parameter 'depth' is of task cross and swipe only"), (dict(task="dual", loss="mnr", depth=50), "parameter 'retriever' is of task cross only"),
])
def test_wrong_values_are_refused_in_one_line(data, tmp_path, values, says):
    with pytest.raises(ProjError) as error: CrossTraining(small(data, tmp_path / "run", **values))
    assert says in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_reranker_is_no_first_stage(data, runs, tmp_path):
    for folder in (runs("bce").folder, runs("bce") / "model"):
        with pytest.raises(ProjError) as error: CrossTraining(small(data, tmp_path / folder.name, retriever=str(folder)))
        assert "\n" not in str(error.value) and str(folder) in str(error.value) and error.value.exit_code == 2


def test_a_reranker_is_no_cross_encoder_without_a_head(encoder_folder):
    with pytest.raises(ConfigError, match="has no weights for classifier") as error: CrossEncoder.load(encoder_folder)
    assert "\n" not in str(error.value)


def test_the_loss_can_come_from_the_environment(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJ_LOSS", "bce")
    assert from_arguments(TrainConfig, ["--task", "cross"], "proj train").loss == "bce"
    cfg = make(TrainConfig, merged(from_environment(TrainConfig), {name: v for name, v in SMALL.items()} | dict(data=data["pairs"], out=str(tmp_path / "run"))))
    assert CrossTraining(cfg).spec.name == "bce"
    monkeypatch.delenv("PROJ_LOSS")
    assert from_arguments(TrainConfig, ["--task", "cross"], "proj train").loss == "softmax"
