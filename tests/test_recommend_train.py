"Training of a recommender: phases, resuming, what is measured, new models and new data sets, folds, reports, bad input."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from proj.config import EvaluateConfig, TrainConfig, make
from proj.core import ConfigError, DataError, GateError, read_json
from proj.data.zoo import DatasetTokens, TrueScores, save_tokens
from proj.local_zoo import local_zoo, save_zoo
from proj.losses.rank import TemperatureSchedule
from proj.manifest import check_manifest
from proj.recommend_parts import cut, folds, load_recommend, relatives
from proj.recommender import Together, load_recommender, normal_scores, plausible_ranks
from proj.recommending import spearman
from proj.report import Report
from proj.run import history
from proj.tasks.recommend import Episodes, recommend
from proj.train import training

SMALL = dict(task="recommend", epochs=3, test_share=0.2, batch_size=16, device="cpu", precision="fp32")
SPEC = dict(networks=8, new_models=0.25, code=16, coding=6, episodes=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A zoo of 8 networks, made once."
    folder = tmp_path_factory.mktemp("zoo")
    local_zoo(0, 8, folder)
    return folder


def config(cache, out, **change):
    return make(TrainConfig, {**SMALL, **change, "out": str(out), "recommend": {**SPEC, "cache": str(cache), **change.get("recommend", {})}})


def made(cfg):
    this = training(cfg)
    this.baselines()
    this.train()
    this.evaluate()
    return this


@pytest.fixture(scope="module")
def this(cache, tmp_path_factory):
    this = made(config(cache, tmp_path_factory.mktemp("recommend") / "run", recommend=dict(folds=2)))
    this.report()
    return this


@pytest.fixture(scope="module")
def run(this): return this.run


def test_a_run_has_everything(run):
    figures = read_json(run / "metrics.json")
    assert {"trained", "popularity", "from_descriptions", "kriged", "nearest", "size", "random", "h_score", "log_me", "knn", "oracle_neighbour"} == set(figures["systems"])
    for system in figures["systems"].values():
        for metric in ("spearman", "kendall", "weighted_tau", "ndcg", "top@1in5", "regret@1", "regret@3", "regret@5"): assert system[metric]["n"] == 4
    assert figures["folds"]["systems"]["trained"]["spearman"]["n"] == 21 and set(figures["measured"]) == {"0", "1", "3", "5"}
    assert "trained beats popularity" in figures["verdict"] and 0 <= figures["coverage"]["inside"] <= 1
    facts = run.facts
    assert facts["status"] == "finished" and set(facts["phases"]) == {"weights", "fold-0", "fold-1"} and facts["monitor"] == "weighted_tau" and len(facts["data"]["new_models"]) == 2
    assert (run / "report.html").stat().st_size > 50_000 and sorted(p.name for p in (run / "model").iterdir() if p.is_dir()) == ["autoencoder", "ranker"]
    check_manifest(run.folder)
    phases = [line.get("phase") for line in history(run)]
    assert phases == sorted(phases, key=["weights", "fold-0", "fold-1", None].index)


def test_popularity_and_regret_are_what_they_say(this):
    "From the table, by hand."
    parts = this.parts
    name, visible = parts.test[0], parts.visible([*parts.train, *parts.validation])
    true = parts.visible([name])[0]
    known = np.isfinite(true)
    filled = np.where(np.isfinite(visible), visible, np.nanmean(visible, 1, keepdims=True) + np.nanmean(visible - np.nanmean(visible, 1, keepdims=True), 0))
    from scipy.stats import rankdata
    mean = np.mean([rankdata(-row) for row in filled], 0)
    values = this.evaluation.values["popularity"]
    assert values["spearman"][0] == pytest.approx(spearman(true[known], -mean[known]), abs=1e-9)
    assert values["regret@1"][0] == pytest.approx(true[known].max() - true[known][mean[known] == mean[known].min()].min(), abs=1e-9)  # of equal ones the worst


def test_the_saved_model_says_the_same(run, this, tmp_path):
    from proj.use import evaluate
    again = evaluate(make(EvaluateConfig, dict(run=str(run.folder), out=str(tmp_path / "again"), device="cpu"))).metrics()
    assert again["systems"] == read_json(run / "metrics.json")["systems"]
    with pytest.raises(DataError, match="manifest|differs|size"):
        import shutil
        shutil.copytree(run / "model", tmp_path / "model")
        with open(tmp_path / "model" / "memory.safetensors", "r+b") as f:
            f.seek(-1, 2), f.write(b"\x7f")
        load_recommender(tmp_path / "model")


def test_a_run_goes_on_in_either_phase(this, cache, tmp_path, halt):
    "Stopped in the first phase, in a fold, and in the last; the weights and the history are those of the run that was not."
    for stop in ("weights", "fold-1", None):
        new = training(config(cache, tmp_path / "run", resume="auto", recommend=dict(folds=2)))
        halt(new, stop)
        with pytest.raises(KeyboardInterrupt): new.train()
        new.run.release()
    new = training(config(cache, tmp_path / "run", resume="auto", recommend=dict(folds=2)))
    new.train()
    for part in ("model", "embedder"):
        there, here = (getattr(getattr(t.encoder, part), "autoencoder", getattr(t.encoder, part)).state_dict() for t in (this, new))
        assert all(torch.equal(there[name], here[name]) for name in there)
    assert np.array_equal(this.encoder.vectors, new.encoder.vectors) and np.array_equal(this.encoder.errors, new.encoder.errors, equal_nan=True)
    drop = lambda line: {k: v for k, v in line.items() if k != "epoch"}
    assert list(map(drop, history(new.run))) == list(map(drop, history(this.run)))


def test_training_rows_hide_what_is_asked(this):
    "The target's own scores are nowhere in what the ranker is told, measured ones excepted, and neither are those of models that are hidden."
    r, parts = this.encoder, this.parts
    names = list(parts.train)
    fresh = this.fresh_recommender(parts.train, r.embedder)
    items = Episodes(fresh, {n: parts.tokens[n] for n in names}, {n: [n] for n in names}, 4, .3, 0)
    changed = fresh.scores.copy()
    changed[2] = np.where(np.isfinite(changed[2]), np.random.default_rng(0).random(changed.shape[1]), np.nan)
    other = this.fresh_recommender(parts.train, r.embedder)
    other.scores = changed
    again = Episodes(other, {n: parts.tokens[n] for n in names}, {n: [n] for n in names}, 4, .3, 0)
    hiding = 0
    for e, ((one, shown), (two, _)) in enumerate(zip(items.bank[2], again.bank[2])):
        if not shown.any(): assert np.array_equal(one.extras, two.extras) and np.array_equal(one.base, two.base)
        hiding += (one.extras[:, -3] == 0).sum()
    assert hiding > 0 and not np.array_equal(items.bank[0][0][0].extras, again.bank[0][0][0].extras)
    row = items[2]
    assert abs(np.nanmean(row["true_scores"])) < 1e-6 and len(row["base"]) == len(row["model_names"]) == len(row["true_scores"])


def test_the_order_of_models_changes_nothing(this):
    "Neither their place in the table nor that of the data sets: lists are often sorted, best first."
    r = this.encoder
    order = np.random.default_rng(0).permutation(len(r.models))
    import copy
    other = copy.copy(r)
    other.models, other.scores, other.vectors = [r.models[i] for i in order], r.scores[:, order], r.vectors[order]
    name = this.parts.test[0]
    one, two = (x.predict(this.parts.tokens[name], x.table(this.parts.outlines[name])) for x in (r, other))
    assert np.allclose(one[order], two, atol=1e-5)


def test_before_training_it_is_the_base():
    from proj.models.recommend import make_ranker
    for kind in ("cross_attention", "custom_similarity", "similarity"):
        torch.manual_seed(0)
        model = Together(make_ranker(kind, dataset_dim=3, model_dim=4, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)).eval()
        tokens, models, base = torch.randn(2, 5, 3), torch.randn(2, 6, 4), torch.randn(2, 6)
        assert torch.equal(model(tokens, models, base).argsort(), base.argsort())
        loss = -model(tokens, models, base).log_softmax(-1)[:, 0].mean()
        loss.backward()
        assert model.gain.grad.abs() > 0


@pytest.mark.parametrize("change", [dict(loss=name) for name in ("listnet", "softmax", "mnr", "margin_ranking")] + [dict(recommend=dict(ranker=name)) for name in ("custom_similarity", "similarity")] + [dict(recommend=dict(base="none", profile=False))])
def test_every_loss_and_ranker_trains(tmp_path, change):
    new = training(make(TrainConfig, {**SMALL, "data": str(with_tokens(tmp_path / "data")), "out": str(tmp_path / "run"), "max_steps": 4, **change}))
    new.train()
    lines = [line for line in history(new.run) if "phase" not in line and "loss" in line]
    assert lines and all(np.isfinite(line["loss"]) for line in lines)


def test_the_temperature_goes_from_three_to_one_and_is_kept(this, tmp_path):
    steps = [line["step"] for line in history(this.run) if "phase" not in line and "share" in line]
    schedule = TemperatureSchedule(steps=steps[-1])
    assert float(schedule()) == pytest.approx(3) and this.run.facts["steps"] == steps[-1]
    with pytest.raises(ConfigError, match="has no temperature"): training(make(TrainConfig, dict(task="recommend", loss="margin_ranking", temperature=2.0, data=str(with_tokens(tmp_path / "data")), out=str(tmp_path / "run"))))


def test_recommendations(run, this, tmp_path):
    name, parts = this.parts.test[0], this.parts
    found = recommend(run.folder, name, top_k=3)
    assert len(found) == 3 and all(row["low"] <= row["high"] and 0 <= row["p_best"] <= 1 for row in found.rows) and [r["score"] for r in found.rows] == sorted((r["score"] for r in found.rows), reverse=True)
    save_tokens(parts.tokens[name], tmp_path / "shards", per_shard=3)
    assert [r["score"] for r in recommend(run.folder, tmp_path / "shards", top_k=3).rows] == pytest.approx([r["score"] for r in found.rows], abs=1e-5)
    assert "learnt by heart" in repr(recommend(run.folder, parts.train[0]))
    new = parts.new_models[0]
    assert recommend(run.folder, name, {new: parts.zoo.states[new], parts.models[0]: None}).ids != [] and len(recommend(run.folder, name, parts.models[:2])) == 2
    sure = recommend(run.folder, name, measured={parts.models[0]: .9, parts.models[1]: .1}, top_k=None)
    assert len(sure) == len(parts.models)
    for bad, said in ((dict(models=["nobody"]), "unknown model 'nobody'"), (dict(top_k=0), "top_k is 0"), (dict(dataset="digitz"), "digits")):
        with pytest.raises((ConfigError, DataError), match=said): recommend(run.folder, **dict(dataset=name) | bad)


def test_a_shard_of_another_width_is_refused(run, this, tmp_path):
    tokens = this.parts.tokens[this.parts.test[0]]
    save_tokens(DatasetTokens(tokens.features[:, :, :60]), tmp_path / "narrow")
    with pytest.raises(DataError, match="width 60; expected 64"): recommend(run.folder, tmp_path / "narrow")
    with pytest.raises(DataError, match="shard-"): (tmp_path / "empty").mkdir(), recommend(run.folder, tmp_path / "empty")


def test_the_report_shows_every_page(run):
    report = Report(run)
    assert type(report).__name__ == "RecommendReport"
    names = [name for _, name, _ in report.pages()]
    assert {"all_folds", "folds_measured", "new_models", "new_both", "weights", "coding", "heat"} <= set(names)
    for name in names:
        page = getattr(report, name)()
        assert hasattr(page, "figure") or len(repr(page)) > 20, name
    assert "networks" not in repr(report.what()) and "4 data sets over" in repr(report.verdict())


def test_the_command_line(run, this, capsys):
    from proj.cli import main
    assert main(["recommend", str(run.folder), this.parts.test[0], "--top_k", "2", "--measured", f"{this.parts.models[0]}=0.7"]) == 0
    assert "P(best)" in (said := capsys.readouterr().out) and len(said.strip().splitlines()) == 3
    for arguments, said in ((["recommend", run.folder, "nothing"], "unknown data set"), (["recommend", run.folder, "digits", "--measured", "a"], "expected MODEL=SCORE"), (["rank", run.folder, "digits", "--data", "x"], "does nothing for a recommender")):
        assert main(list(map(str, arguments))) == 2
        assert said in (error := capsys.readouterr().err) and "Traceback" not in error


# ---- data

def folder_of(path, scores=None, models=None, datasets=None):
    names, sets = [f"m{i}" for i in range(9)], [f"set{'abcdefgh'[i]} x" for i in range(8)]
    draw = np.random.default_rng(0)
    rows = dict(scores=scores if scores is not None else [dict(dataset=d, model=m, score=float(draw.random())) for d in sets for m in names],
                models=models or [dict(model=m, arch=("ViT-B-16", "RN50")[i % 2], pretrained="laion" if i % 3 else "openai", params_m=1.0 + i, flops_b=2.0 + i) for i, m in enumerate(names)],
                datasets=datasets or [dict(dataset=d, text=f"pictures of {d}") for d in sets])
    path.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items(): (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def with_tokens(path, change=lambda i, x: x):
    draw, sets = np.random.default_rng(0), [f"set{'abcdefgh'[i]} x" for i in range(8)]
    for i, d in enumerate(sets): save_tokens(DatasetTokens(change(i, draw.normal(size=(2, 3 + i % 2, 6)))), path / f"tokens/{i}")
    return folder_of(path, datasets=[dict(dataset=d, tokens=f"tokens/{i}") for i, d in enumerate(sets)])


def test_a_folder_with_metadata_and_tokens(tmp_path):
    new = made(make(TrainConfig, {**SMALL, "data": str(with_tokens(tmp_path / "data")), "out": str(tmp_path / "run"), "recommend": dict(new_models=.2, episodes=2)}))
    assert new.encoder.embedder.metadata is not None and "weights" not in new.run.facts.get("phases", {}) and "h_score" not in new.evaluation.values
    new.report()
    found = recommend(new.run.folder, new.parts.tokens[new.parts.test[0]].features, {"new one": dict(arch="ViT-L", pretrained="laion", params_m=3, flops_b=9), "m1": None})
    assert sorted(found.ids) == ["m1", "new one"]
    with pytest.raises(DataError, match="there is no flops_b"): recommend(new.run.folder, new.parts.test[0], {"new one": dict(arch="ViT-L", pretrained="laion", params_m=3)})


def test_the_order_on_imagenet_stands_beside_the_others_wherever_it_can(tmp_path):
    "Leaving out every data set in turn, ImageNet too, where popularity has to answer."
    names, sets, draw = [f"m{i}" for i in range(9)], ["ImageNet 1k", *(f"set{c} x" for c in "abcdefg")], np.random.default_rng(0)
    rows = [dict(dataset=d, model=m, score=float(draw.random())) for d in sets for m in names]
    path = folder_of(tmp_path / "data", scores=rows, datasets=[dict(dataset=d, text=f"pictures of {d}") for d in sets])
    new = made(make(TrainConfig, {**SMALL, "data": str(path), "out": str(tmp_path / "run"), "recommend": dict(folds=8, episodes=2)}))
    found = new.evaluation.facts["folds"]["systems"]
    assert found["imagenet"]["spearman"]["n"] == found["popularity"]["spearman"]["n"] == 8 and found["imagenet"]["spearman"] != found["popularity"]["spearman"]
    (r, _), = [fold for fold in new.folds if fold[1] == ["ImageNet 1k"]]
    own = new.systems.said(r, "ImageNet 1k", r.models, {}, {})
    assert np.array_equal(own["imagenet"], own["popularity"])
    r = new.folds[0][0] if "ImageNet 1k" not in new.folds[0][1] else new.folds[1][0]
    other = new.systems.said(r, "seta x", r.models, {}, {}, ["seta x"])
    assert np.array_equal(other["imagenet"], [next(row["score"] for row in rows if row["dataset"] == "ImageNet 1k" and row["model"] == m) for m in r.models])
    hidden = new.systems.said(r, "seta x", r.models, {}, {}, ["seta x", "ImageNet 1k"])
    assert np.array_equal(hidden["imagenet"], hidden["popularity"])


def test_a_folder_of_weights_and_a_saved_zoo(cache, tmp_path):
    from safetensors.torch import save_file
    names = [f"m{i}" for i in range(9)]
    for m in names: save_file({"a.weight": torch.randn(5, 4), "a.bias": torch.randn(5)}, (with_tokens(tmp_path / "data") if m == "m0" else tmp_path / "data") / f"{m}.safetensors")
    (tmp_path / "data" / "models.jsonl").write_text("".join(json.dumps(dict(model=m, weights=f"{m}.safetensors")) + "\n" for m in names))
    parts = load_recommend(make(TrainConfig, dict(task="recommend", data=str(tmp_path / "data"))))
    assert parts.weights.shape == (9, 8192) and parts.sizes().tolist() == [25] * 9
    save_zoo(local_zoo(0, 8, cache), tmp_path / "zoo")
    assert load_recommend(make(TrainConfig, dict(task="recommend", data=str(tmp_path / "zoo")))).zoo is not None


@pytest.mark.parametrize("scores, said", [
    ([dict(dataset="a", model="m0", score=1.0)], "one model only"), ([dict(dataset="a", model="m0", score=1.0), dict(dataset="a", model="m1", score=1.0)], "same score"),
    ([dict(dataset="a", model="m0", score=float("nan"))], "NaN"), ([dict(dataset="a", model="m0", score=1.0), dict(dataset="a", model="M0", score=2.0)], "spelled 'm0' before"),
    ([dict(dataset="a-b", model="m0", score=1.0), dict(dataset="a_b", model="m1", score=2.0)], "spelled 'a-b' before"), ([dict(dataset="a", model="m0", score=1.0)] * 2, "second time"),
    ([dict(dataset="a", model="m0", score=1.0), dict(dataset="a", model="stranger", score=2.0)], "no 'stranger'")])
def test_bad_scores_end_in_one_line(tmp_path, scores, said):
    with pytest.raises(DataError) as e: load_recommend(make(TrainConfig, dict(task="recommend", data=str(folder_of(tmp_path / "data", scores)))))
    assert said in str(e.value) and len(str(e.value).splitlines()[0]) < 400


def test_bad_models_data_sets_and_shares(tmp_path):
    def refused(match, path=None, **kw):
        with pytest.raises((ConfigError, DataError), match=match): load_recommend(make(TrainConfig, {**dict(task="recommend", data=str(path or tmp_path / "data")), **kw}))
    good = with_tokens(tmp_path / "good")
    refused("m0", folder_of(tmp_path / "twice", models=[dict(model="m0", arch="a", pretrained="b", params_m=1 + i, flops_b=1) for i in range(2)]))
    refused("above 0", folder_of(tmp_path / "zero", models=[dict(model=f"m{i}", arch="a", pretrained="b", params_m=0, flops_b=1) for i in range(9)]))
    refused("width 5; expected 6", with_tokens(tmp_path / "narrow", lambda i, x: x[:, :, :5] if i == 3 else x))
    refused("models are left", good, recommend=dict(new_models=.9))
    refused("expected scores.jsonl|no scores.jsonl", (tmp_path / "good" / "tokens"))
    refused("is not for this task", data="stdlib")
    with pytest.raises(ConfigError, match="recommend.folds is 50"): training(make(TrainConfig, {**SMALL, "data": str(good), "out": str(tmp_path / "run"), "recommend": dict(folds=50)})).train()
    with pytest.raises(ConfigError, match="is of task recommend only"): make(TrainConfig, dict(recommend=dict(folds=3)))
    with pytest.raises(ConfigError, match="unknown model 'minilm'"): training(make(TrainConfig, {**SMALL, "data": str(good), "out": str(tmp_path / "other"), "model": "minilm"}))


def test_a_data_set_under_two_names_is_a_leak(tmp_path):
    path = with_tokens(tmp_path / "data", lambda i, x: np.ones((2, 3, 6)) * (1 if i < 5 else i))
    with pytest.raises(GateError, match="has the tokens or the scores of a training data set"): training(make(TrainConfig, {**SMALL, "data": str(path), "out": str(tmp_path / "run")}))


def test_relatives_leave_together(cache):
    cfg = make(TrainConfig, dict(task="recommend", recommend=SPEC | dict(cache=str(cache), groups=True)))
    parts = load_recommend(cfg)
    kinds = [{parts.groups[n] for n in names} for _, names in parts.parts()]
    assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]
    assert relatives("ImageNet-A") == relatives("ImageNet 1k") == "imagenet" and relatives("PatchCamelyon") == relatives("Camelyon17")
    with pytest.raises(DataError, match="in 3 groups"): cut("abc", dict(zip("abc", "abc")), dict(test=.3, validation=.1))
    assert [len(f) for f in folds(list("abcdef"), dict(zip("abcdef", "aabbcc")), 3)] == [2, 2, 2]


def test_intervals_hold_what_they_say():
    "Errors as they were: about 95 % of true ranks lie inside."
    draw, inside = np.random.default_rng(0), []
    def pair():
        true = draw.normal(size=40)
        return true, true + .5 * draw.normal(size=40)
    errors = np.array([normal_scores(t[None])[0] - normal_scores(p[None])[0] for t, p in (pair() for _ in range(20))])
    for seed in range(20):
        true, said = pair()
        from proj.recommending import rank_intervals, ranks_in_rows
        found, ranks = rank_intervals(plausible_ranks(said, errors, seed)), ranks_in_rows(true[None])[0]
        inside.append(((ranks >= found["low"]) & (ranks <= found["high"])).mean())
    assert .9 < np.mean(inside) < .995


def test_types_are_not_mixed_up(this):
    scores = this.parts.scores
    assert isinstance(scores, TrueScores)
    with pytest.raises(DataError, match="expected TrueScores"):
        from proj.data.zoo import build_combined_similarity_loader
        build_combined_similarity_loader(scores.ranks(), {}, {})


def test_probe_on_pairs(tmp_path, proj_cli):
    rows = [dict(query=f"how to {verb} a {noun} with {tool}", positive=f"def {verb}_{noun}(): use {tool} to {verb} the {noun}") for verb in ("open", "close", "sort", "parse", "send") for noun in ("file", "list", "date", "mail") for tool in ("lock", "key", "regex", "socket")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = proj_cli("recommend", tmp_path / "pairs.jsonl", "--probe", "--encoders", "static,tiny", "--pairs", "60", "--max_length", "24", "--out", tmp_path / "probe", "--device", "cpu")
    if "not here" in done.stderr or "MiniLM" in done.stderr: pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0 and "was predicted to be the best" in done.stdout, done.stderr
    found = read_json(Path(tmp_path, "probe", "probe.json"))
    assert set(found["before"]) == {"static", "tiny"} and {"zero_shot", "h_score", "log_me", "knn", "separation"} == set(found["agreement"]) and found["after"]["tiny"]["n"] > 5
    done = proj_cli("recommend", tmp_path / "pairs.jsonl", "--probe", "--encoders", "static")
    assert done.returncode == 2 and "encoders" in done.stderr


# ---- the stacked base

def test_weights_of_the_stacked_base_are_those_of_a_loop():
    "Every training data set left out with its relatives, once with all models and four times with a fifth of them hidden; then ridge regression by its formula."
    from scipy.stats import norm, rankdata
    from proj.core import rng
    from proj.recommender import fit_stack, popular
    from proj.recommending_baselines import from_descriptions
    draw = np.random.default_rng(4)
    scores, vectors, outlines, told = draw.normal(size=(6, 10)), draw.normal(size=(10, 2)), draw.normal(size=(6, 3)), draw.normal(size=(6, 10, 2))
    scores[1, 3], told[2, 5, 0], groups = np.nan, np.nan, ["a", "a", "b", "c", "d", "e"]
    rows = {False: [], True: []}
    for d in range(6):
        for e in range(5):
            seen, hidden = scores.copy(), [] if e == 0 else list(rng(7, "hidden models", d, e).permutation(10)[:2])
            seen[:, hidden] = np.nan
            for other in range(6):
                if groups[other] == groups[d]: seen[other] = np.nan
            parts = [popular(seen, d, vectors), from_descriptions(seen, d, vectors, outlines), told[d, :, 0], told[d, :, 1]]
            parts = [[0 if np.isnan(v) else (v - np.nanmean(p)) / np.nanstd(p) for v in p] for p in parts]
            known = [n for n in range(10) if np.isfinite(scores[d, n])]
            place = dict(zip(known, rankdata([-scores[d, n] for n in known])))
            for n in hidden if e else known:
                if n in place: rows[bool(e)].append(([p[n] for p in parts], norm.ppf(1 - (place[n] - .5) / len(known))))
    for found, kind in zip(fit_stack(scores, vectors, outlines, told, groups, seed=7), (False, True)):
        x, y = map(np.array, zip(*rows[kind]))
        assert found == pytest.approx(np.linalg.solve(x.T @ x + 10 * np.eye(4), x.T @ y), abs=1e-9)


def test_what_the_models_make_of_the_examples_is_told(run, this):
    "A new model is judged by it, on the run's data sets and on anybody's; examples that cannot tell are said, and do without."
    r, name = this.encoder, this.parts.test[0]
    assert r.stack.shape == (2, 5) and set(this.run.facts["stack"]["new"]) == {"popularity", "descriptions", "h_score", "log_me", "knn"}
    tokens, table = this.parts.tokens[name], r.table(this.parts.outlines[name], without=[name])
    blind, told = r.predict(tokens, table), this.systems.predicted(r, name, table)
    assert not np.allclose(blind, told) and np.allclose(told, load_recommender(run / "model").predict(tokens, table, told=this.systems.told(name, table[0])), atol=1e-5)
    assert np.array_equal(this.systems.told(tokens, r.models), this.systems.told(name, r.models))


def test_examples_of_one_class_tell_nothing(run, this, caplog):
    one = this.parts.tokens[this.parts.test[0]].features[:, :1]
    with caplog.at_level("WARNING", "proj"): found = recommend(run.folder, one, top_k=None)
    assert "cannot be tried on the data set: 1 classes" in caplog.text and len(found) == len(this.parts.models)
