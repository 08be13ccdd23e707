"Training of a router: votes and scores, every loss, resuming, choosing with a promise, bad input."
import json

import numpy as np
import pytest
import torch

from proj.config import EvaluateConfig, TrainConfig, from_file, make
from proj.core import ConfigError, DataError, read_json
from proj.losses.contrast import LOSSES
from proj.manifest import check_manifest
from proj.metrics import read_ledger
from proj.report import Report
from proj.run import history
from proj.routed import RouterItems
from proj.tasks.router import Wish, load_run, rank_run, route_run
from proj.train import training
from proj.use import evaluate

TOPICS = dict(code=["sort", "parse", "compile", "loop", "function", "stack", "thread", "array"], food=["bake", "boil", "onion", "bread", "soup", "grill", "butter", "spice"])
GOOD = dict(coder=("code",), cook=("food",), sage=("code", "food"))
COST = dict(coder=1.0, cook=1.0, sage=8.0)


def outcomes(count, seed=0):
    "The coder is right on code, the cook on food, the sage on three of four of both."
    draw, rows = np.random.default_rng(seed), []
    for at in range(count):
        topic = ("code", "food")[at % 2]
        words = draw.choice(TOPICS[topic], 3, replace=False)
        scores = {name: float(topic in topics and (name != "sage" or draw.random() < 0.75)) for name, topics in GOOD.items()}
        rows.append(dict(prompt=f"{' '.join(words)} number {at}", scores=scores, costs=COST, category=topic))
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("routing") / "outcomes.jsonl", outcomes(240))


def config(data, out, **change):
    return make(TrainConfig, dict(task="router", data=str(data), out=str(out), model="tiny", max_length=16, lr=1e-3, epochs=3, batch_size=16, device="cpu", precision="fp32", loss="bradley_terry",
                                  optimizer=dict(lr_multipliers={"head": 3.0, "models": 3.0})) | change)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    this = training(config(data, tmp_path_factory.mktemp("router") / "run"))
    this.baselines()
    this.train()
    this.evaluate()
    return this.report()


def test_a_router_beats_every_single_model_where_topics_decide(run):
    systems = read_json(run / "metrics.json")["systems"]
    assert {"trained", "random", "cheapest", "best_single", "bradley_terry", "category_prior", "words_ridge", "oracle"} <= systems.keys()
    trained, best, oracle = (systems[name]["mean_score"] for name in ("trained", "best_single", "oracle"))
    assert trained["ci95"][0] > best["ci95"][1] and trained["value"] > 0.9 * oracle["value"] and trained["n"] > 50
    figures = read_json(run / "metrics.json")
    assert figures["pool"] == 3 and "beats best single" in figures["verdict"] and figures["differences"]["trained - best_single"]["mean_score"]["p"] < 0.01
    check_manifest(run.folder)


def test_the_ledger_gives_the_figures(run):
    from proj.metrics import ledger_values, of_system
    table = of_system(read_ledger(run / "ledger.parquet"), "trained")
    for metric in ("mean_score", "regret", "pairwise_accuracy"):
        assert np.mean(list(ledger_values(table, metric).values())) == pytest.approx(read_json(run / "metrics.json")["systems"]["trained"][metric]["value"], abs=1e-9)


def test_the_saved_router_measures_the_same(run):
    again = evaluate(make(EvaluateConfig, dict(run=str(run.folder), out=str(run.folder.parent / "again"), device="cpu", precision="fp32"))).metrics()
    was = read_json(run / "metrics.json")
    assert again["systems"]["trained"] == was["systems"]["trained"] and again["systems"].keys() == was["systems"].keys()


@pytest.mark.parametrize("loss", list(LOSSES["router"]))
def test_every_loss_learns(data, tmp_path, loss):
    "On scores; the loss falls, a parameter of the loss is trained with the model and stays out of what is saved."
    this = training(config(data, tmp_path / "run", loss=loss, epochs=2))
    this.train()
    losses = [line["loss"] for line in history(this.run) if "loss" in line]
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert not [name for name in load_run(this.run.folder, "cpu").model.state_dict() if "objective" in name]
    this.run.release()


def test_rao_kupper_learns_how_wide_ties_are(data, tmp_path):
    this = training(config(data, tmp_path / "run", loss="rao_kupper", epochs=1))
    made = this.trainer()
    before = {name: p.detach().clone() for name, p in this.encoder.model.named_parameters() if name.startswith("objective")}
    made.train()
    assert before and all(not torch.equal(p, before[name]) for name, p in this.encoder.model.named_parameters() if name in before)
    this.run.release()


def test_votes_train_too_and_a_router_goes_on(tmp_path, halt):
    "Killed after a checkpoint, it ends with the bits of the run that was not."
    rows = [dict(prompt=r["prompt"], model_a="coder", model_b="cook", winner="model_a" if r["scores"]["coder"] else "model_b", judge="x") for r in outcomes(120)]
    votes = write(tmp_path / "votes.jsonl", rows)
    plain = training(config(votes, tmp_path / "plain", loss="margin_ranking", dropout=0.1))
    assert plain.shape == "votes" and plain.monitor == "pairwise_accuracy"
    plain.train()
    halted = training(config(votes, tmp_path / "halted", loss="margin_ranking", dropout=0.1, resume="auto"))
    halt(halted)
    with pytest.raises(KeyboardInterrupt): halted.train()
    halted.run.release()
    again = training(config(votes, tmp_path / "halted", loss="margin_ranking", dropout=0.1, resume="auto"))
    again.train()
    assert again.encoder.weights_hash() == plain.encoder.weights_hash() and again.run.facts["resumed"][-1] > 0
    for this in (plain, again):
        this.baselines()
        this.evaluate()
    assert {"pairwise_accuracy"} == set(read_json(plain.run / "metrics.json")["systems"]["trained"]) and plain.report()


def test_rare_models_are_drawn_as_often(data):
    from proj.data.comparisons import from_votes
    from proj.data.votes import Vote
    votes = from_votes([Vote(f"p {i}", "big", "small", 1.0) for i in range(90)] + [Vote(f"q {i}", "big", "rare", 1.0) for i in range(10)])
    items = RouterItems(votes, balanced=True, seed=1)
    drawn = [items[i] for e in range(20) for i in (items.set_epoch(e), *range(len(items))) if i is not None]
    rare = np.mean([votes.models.index("rare") in models for _, models, _ in drawn])
    assert abs(rare - 0.5) < 0.05  # 10 rows of weight 1/10 against 90 of 1/90
    items.set_epoch(3)
    first = [items[i][0] for i in range(5)]
    items.set_epoch(4), items.set_epoch(3)
    assert first == [items[i][0] for i in range(5)]


def test_choosing_keeps_to_the_wish(run):
    prompts = [r["prompt"] for r in outcomes(60, seed=9)]
    free, _ = route_run(run.folder, prompts, device="cpu")
    cheap, _ = route_run(run.folder, prompts, Wish(budget=2.0), device="cpu")
    assert cheap.costs.mean() <= 2.0 and len(free) == 60
    few, promise = route_run(run.folder, prompts, Wish(share=0.25), device="cpu")
    assert promise.share <= 0.25 and set(few.models) <= {read_json(run / "calibration.json")[side] for side in ("strong", "weak")}
    _, promise = route_run(run.folder, prompts, Wish(max_loss=0.3), device="cpu")
    assert "0.3" in promise.guarantee or "30" in promise.guarantee
    with pytest.raises(ConfigError, match="give one of them"): route_run(run.folder, prompts, Wish(budget=2.0, share=0.5), device="cpu")
    ranking = rank_run(run.folder, "sort parse loop number 3", device="cpu")
    assert ranking.ids[0] in ("coder", "sage") and len(ranking.ids) == 3
    router = load_run(run.folder, "cpu")
    with pytest.raises(ConfigError, match="coder"): router.score(["sort"], ["codr"])


def test_the_report_and_the_command_line(run, proj_cli):
    report = Report(run)
    for heading, name, text in report.pages(): assert hasattr(page := getattr(report, name)(), "figure") or len(repr(page)) > 20, name
    done = proj_cli("route", run.folder, "sort parse loop", "bake bread soup", "--budget", "3")
    assert done.returncode == 0 and "lambda" in done.stdout and "bake bread soup" in done.stdout, done.stderr
    done = proj_cli("route", run.folder, "sort parse loop", "--share", "2")
    assert done.returncode == 2 and "share" in done.stderr and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()[-1]) < 300
    for wish, said in ((Wish(budget=0.1), "the cheapest models cost"), (Wish(share=0.5, budget=3.0), "give one of them"), (Wish(max_loss=-1.0), "above 0")):
        with pytest.raises(ConfigError, match=said): route_run(run.folder, ["sort parse loop"], wish, device="cpu")


@pytest.mark.parametrize("rows, said", [
    ([dict(prompt=f"p {i}", model_a="a", model_b="b", winner="tie") for i in range(8)], "ties"),
    ([dict(prompt="p", model_a="a", model_b="b", winner="both")], "winner"),
    ([dict(prompt=" ", model_a="a", model_b="b", winner="model_a") for i in range(4)], "empty prompt"),
    ([dict(prompt=f"p {i}", model_a="a", model_b="b", winner="model_a") for i in range(4)], "min_model_comparisons"),
])
def test_bad_votes_end_in_one_line(tmp_path, rows, said):
    spec = dict(ties="drop", min_model_comparisons=50 if said == "min_model_comparisons" else 0)
    with pytest.raises(DataError) as error: training(config(write(tmp_path / "votes.jsonl", rows), tmp_path / "run", router=spec))
    assert said.replace("_", " ") in str(error.value).replace("_", " ") and "Traceback" not in str(error.value)


def test_specs_are_checked_and_spelled_both_ways(tmp_path, data):
    (tmp_path / "spec.json").write_text(json.dumps(dict(task="router", data=str(data), finetuning=dict(method="last_layers", num_unfrozen_layers=1), embedding=dict(load_embedding_model_from="there"))))
    cfg = make(TrainConfig, from_file(TrainConfig, tmp_path / "spec.json"))
    assert cfg.finetuning.num_layers == 1 and cfg.embedding.load_from == "there" and cfg.loss == "margin_ranking"
    assert make(TrainConfig, dict(task="router", finetuning=dict(method="last_layers", num_layers=1))).finetuning.num_layers == 1
    for bad, said in ((dict(router=dict(heads="concat")), "unknown parameter 'router.heads'"), (dict(embedding=dict(knd="id")), "unknown parameter 'embedding.knd'"), (dict(loss="bradly_terry"), "did you mean")):
        with pytest.raises(ConfigError, match=said): training(config(data, tmp_path / "run", **bad))
    with pytest.raises(ConfigError, match="names 'gpt'"): training(config(data, tmp_path / "other", router=dict(costs=dict(gpt=1))))
    with pytest.raises(ConfigError, match="router only"): make(TrainConfig, dict(router=dict(balanced=True)))


def answered(count):
    "Votes with the answers of four models, two of which write much alike."
    draw, style = np.random.default_rng(5), dict(terse="{}.", blunt="{}!", wordy="to begin with, one might say that {} and so on, at length", florid="let us first consider that {} and so forth, in detail")
    rows = []
    for at in range(count):
        a, b = draw.permutation(list(style))[:2]
        words = " ".join(draw.choice(TOPICS["code"], 3))
        rows.append(dict(prompt=f"explain {words} {at}", model_a=a, model_b=b, winner="model_a" if a in ("terse", "wordy") else "model_b", response_a=style[a].format(words), response_b=style[b].format(words)))
    return rows


@pytest.mark.parametrize("kind", ["frozen", "finetunable", "attention"])
def test_vectors_of_models_from_their_answers(tmp_path, kind):
    "The first phase is trained, kept, and can be loaded in the place of another one."
    votes = write(tmp_path / "votes.jsonl", answered(120))
    one = training(config(votes, tmp_path / "one", epochs=1, embedding=dict(kind=kind, epochs=2)))
    one.train()
    phase = one.run.facts["phases"]["embedding"]
    assert phase["best"]["step"] >= 0 and (one.run / "phases" / "embedding" / "config.json").is_file() and [line for line in history(one.run) if line.get("phase") == "embedding"]
    table = load_run(one.run.folder, "cpu").model.models.weight
    assert table.shape == (4, 128) and torch.cdist(table, table).fill_diagonal_(9).min() > 0
    two = training(config(votes, tmp_path / "two", epochs=1, embedding=dict(kind=kind, load_from=str(one.run / "phases" / "embedding"))))
    assert torch.allclose(two.encoder.model.models.weight.cpu(), table, atol=1e-5) and "phases" not in two.run.facts
    one.run.release(), two.run.release()


def test_answers_are_needed_for_vectors_from_answers(data, tmp_path):
    with pytest.raises(ConfigError, match="needs the models' answers"): training(config(data, tmp_path / "run", embedding=dict(kind="frozen")))


def test_muon_moves_the_encoder_s_matrices(data, tmp_path):
    this = training(config(data, tmp_path / "run", epochs=1, optimizer=dict(method="muon", lr_multipliers={"head": 3.0})))
    made = this.trainer()
    made.create_optimizer()
    by = {by: [name for g in made.optimizer.param_groups if g["by"] == by for name in g["param_names"]] for by in ("muon", "adamw")}
    assert by["muon"] and all(name.startswith("encoder.") for name in by["muon"]) and any(name.startswith("head.") for name in by["adamw"])
    this.run.release()


def test_prompts_without_a_category_are_evaluated_without_it(run, tmp_path):
    rows = [{name: value for name, value in row.items() if name != "category"} for row in outcomes(40, seed=3)]
    found = evaluate(make(EvaluateConfig, dict(run=str(run.folder), data=str(write(tmp_path / "other.jsonl", rows)), out=str(tmp_path / "out"), device="cpu", precision="fp32"))).metrics()
    assert "category_prior" not in found["systems"] and found["systems"]["trained"]["mean_score"]["n"] == 40 and (tmp_path / "out" / "ledger.parquet").is_file()


def test_a_router_begins_with_the_strength_in_the_category(tmp_path, proj_cli):
    "Prompts that do not say what they are about, and categories that do: only a router that is told them is right, and it goes on being told when it is used."
    rows = [row | dict(prompt=f"request {at * 7919 % 1000003} of many") for at, row in enumerate(outcomes(240))]
    data, figures = write(tmp_path / "blind.jsonl", rows), {}
    for base in ("bradley_terry", "category"):
        this = training(config(data, tmp_path / base, router=dict(base=base)))
        this.baselines(), this.train(), this.evaluate(), this.report()
        figures[base] = read_json(tmp_path / base / "metrics.json")["systems"]
    best = figures["category"]["best_single"]["mean_score"]["ci95"][1]
    assert figures["category"]["trained"]["mean_score"]["value"] > 0.95 > best > figures["bradley_terry"]["trained"]["mean_score"]["value"]
    evaluate(EvaluateConfig(run=str(tmp_path / "category"), out=str(tmp_path / "again"), device="cpu", precision="fp32"))
    assert read_json(tmp_path / "again" / "metrics.json")["systems"]["trained"] == figures["category"]["trained"]
    assert [route_run(tmp_path / "category", ["request 5"], category=name)[0].models for name in ("code", "food")] == [["coder"], ["cook"]]
    assert [line.split()[0] for line in proj_cli("route", tmp_path / "category", "request 5", "--category", "food").stdout.splitlines() if "request 5" in line] == ["cook"]
    refused = proj_cli("route", tmp_path / "bradley_terry", "request 5", "--category", "food")
    assert refused.returncode == 2 and "knows no categories" in refused.stderr and "Traceback" not in refused.stderr
    with pytest.raises(ConfigError, match="needs rows with a category"):
        training(config(write(tmp_path / "none.jsonl", [{k: v for k, v in row.items() if k != "category"} for row in rows]), tmp_path / "none", router=dict(base="category"))).train()
