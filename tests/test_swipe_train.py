"Training of a swipe model: phases, resuming, what is measured, the decoder on other keyboards, bad input."
import json
import re

import numpy as np
import pytest
import torch

from proj.config import make, TrainConfig
from proj.core import ConfigError, DataError, GateError, read_json
from proj.data.keyboards import layout, swapped
from proj.data.strokes import synthetic_swipes
from proj.decoding import Decoder, Elsewhere
from proj.losses.swipe import GroupLoss
from proj.manifest import check_manifest
from proj.models.swipe import SwipeScorer
from proj.report import Report
from proj.run import Run, history
from proj.tasks.swipe import Reranked, SwipeItems, behind, choose_blend
from proj.templates import TemplateIndex, reciprocal
from proj.train import training

SMALL = dict(task="swipe", model="mini", epochs=2, max_queries=24, depth=8, swipe=dict(synthetic=160, points=16, pretraining=2), negatives=dict(k=3), batch_size=16, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "A lexicon of 300 words."
    from proj.swipe_parts import reference_lexicon
    lexicon, path = reference_lexicon(), tmp_path_factory.mktemp("words") / "vocab.tsv"
    path.write_text("word\tzipf\n" + "".join(f"{w}\t{z:.3f}\n" for w, z in list(zip(lexicon.words, lexicon.zipf))[:300]))
    return path


def config(words, out, **change):
    return make(TrainConfig, {**SMALL, **change, "out": str(out), "swipe": {**SMALL["swipe"], "lexicon": str(words), **change.get("swipe", {})}})


def second_stage(words, out, first):
    values = config(words, out).model_dump(include={*SMALL, "out"})
    return make(TrainConfig, {**{name: value for name, value in values.items() if name != "model"}, "init_from": str(first)})


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("swipe") / "run"
    this = training(config(words, out))
    this.baselines()
    this.train()
    this.evaluate()
    return this.report()


def test_a_run_has_everything(run):
    figures = read_json(run / "metrics.json")
    assert list(figures["systems"]) == ["trained", "reranked", "template_frequency", "template"] and figures["pool"] == 300
    for system in figures["systems"].values():
        for metric in ("top@1", "top@3", "top@4", "top@5", "mrr"): assert system[metric]["n"] == 24 and len(system[metric]["ci95"]) == 2
    assert {"trained - template", "trained - template_frequency"} <= figures["differences"].keys() and len(figures["robustness"]) == 8
    facts = run.facts
    assert facts["status"] == "finished" and facts["phases"]["pretraining"]["best"]["loss"] > 0 and facts["monitor"] == "mrr"
    assert (run / "negatives.parquet").is_file() and (run / "report.html").stat().st_size > 50_000
    check_manifest(run.folder)
    phases = [line.get("phase") for line in history(run)]
    assert "pretraining" in phases and phases.index(None) == phases.count("pretraining")  # one after the other, in one file


def test_the_parts_of_the_first_loss_are_in_the_history(run):
    lines = [line for line in history(run) if line.get("phase") == "pretraining" and "character" in line]
    for line in lines: assert line["loss"] == pytest.approx(line["character"] + line["point"] + 0.1 * line["length"] + 0.1 * line["view"], rel=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_saved_model_scores_as_measured(run, words):
    "Evaluated once more from its folder, with another batch layout of the same pairs."
    from proj.config import EvaluateConfig
    from proj.use import evaluate
    again = evaluate(make(EvaluateConfig, dict(run=str(run.folder), out=str(run.folder.parent / "again"), device="cpu", precision="fp32"))).metrics()
    assert again["systems"] == {name: figures for name, figures in read_json(run / "metrics.json")["systems"].items()}


def test_a_run_goes_on_in_either_phase(run, words, tmp_path, halt):
    "Stopped in the first phase, and again in the second; the weights and the history are those of the run that was not."
    for stop in ("pretraining", None):
        this = training(config(words, tmp_path / "run", resume="auto"))
        halt(this, stop)
        with pytest.raises(KeyboardInterrupt): this.train()
        this.run.release()
    this = training(config(words, tmp_path / "run", resume="auto"))
    this.train()
    there, here = SwipeScorer.load(run / "model", device="cpu").model.state_dict(), this.encoder.model.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)
    drop = lambda line: {k: v for k, v in line.items() if k != "epoch"}
    assert list(map(drop, history(this.run))) == list(map(drop, history(run)))


def test_a_second_stage_begins_with_the_first_one_s_weights(run, words, tmp_path):
    this = training(second_stage(words, tmp_path / "second", run.folder))
    assert this.encoder.weights_hash() == run.facts["weights"]


def test_the_loss_is_the_cross_entropy_of_the_first_of_each_group():
    torch.manual_seed(0)
    for sizes in ([3, 1, 5], [2, 2], [1]):
        scores, group = torch.randn(sum(sizes)), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        naive = np.mean([np.log(np.exp(10 / (1 + np.exp(-s))).sum()) - 10 / (1 + np.exp(-s[0])) for s in np.split(scores.double().numpy(), np.cumsum(sizes)[:-1])])
        assert GroupLoss()(scores, group).item() == pytest.approx(naive, abs=1e-5)


def test_wrong_words_depend_on_seed_word_and_epoch_only(words):
    from proj.confusions import build_pool
    from proj.data.swipes import read_lexicon
    from proj.models.processor import SwipeProcessor
    lexicon, keyboard = read_lexicon(words), layout()
    pool, swipes = build_pool(lexicon, keyboard), synthetic_swipes(keyboard, lexicon.words[:12])
    one, two = (SwipeItems(swipes, SwipeProcessor(6, 16, 24), pool, 4, seed=1) for _ in range(2))
    two.set_epoch(3), two.set_epoch(0)
    assert [one[i] for i in range(12)] == [two[i] for i in reversed(range(12))][::-1]
    two.set_epoch(1)
    assert [one[i] for i in range(12)] != [two[i] for i in range(12)]
    batch = one.groups([one[0], one[5]])
    assert batch["group"].tolist() == [0] * 5 + [1] * 5 and batch["path_values"].shape[0] == 10
    one.in_batch = True
    more = one.groups([one[0], one[5]])
    assert len(more["group"]) in (11, 12)  # each path gets the other's word, unless it has it already


def test_three_words_and_sixteen_wanted_ends_at_once(tmp_path, proj_cli):
    (tmp_path / "few.tsv").write_text("word\tzipf\ncat\t4\ndog\t4\nbird\t4\n")
    done = proj_cli("train", "--task", "swipe", "--model", "mini", "--swipe.lexicon", tmp_path / "few.tsv", "--swipe.synthetic", "40", "--negatives.k", "16", "--out", tmp_path / "run", timeout=120)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    if done.returncode: assert len(done.stderr.strip().splitlines()[-1]) < 300


def test_words_beyond_the_depth_keep_their_order():
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]])
    found = behind(scores, np.array([[0, 1]]), np.array([[-7.0, 9.0]]))
    assert np.argsort(-found[0]).tolist() == [1, 0, 2, 3, 4]


class Knows:
    "Gives a point to the right words, for tests of what is done with scores."
    def __init__(self, right): self.right = right
    def batch_predict(self, paths, words): return np.array([float(word in self.right) for word in words], np.float32)


def test_the_blend_finds_a_reranker_that_knows(words):
    from proj.data.swipes import read_lexicon
    lexicon, keyboard = read_lexicon(words), layout()
    swipes = synthetic_swipes(keyboard, lexicon.words[20:60])
    index = TemplateIndex(lexicon, keyboard)
    for right, better in (({s.word for s in swipes}, True), (set(lexicon.words) - {s.word for s in swipes}, False)):
        reranked = Reranked(index, swipes, Knows(right), 20, 0.0)
        frequency, said, tried = choose_blend(reranked)
        assert (said > 0) == better and reciprocal(reranked.places(1.0, frequency, said)).mean() == pytest.approx(max(tried.values()), abs=1e-6)
    plain = Decoder(index).decode(swipes[0].path, 5)
    assert reranked.places()[0] == 1 + plain.ids.index(swipes[0].word) if swipes[0].word in plain.ids else True


def test_a_swapped_layout_is_another_spelling(run, words):
    from proj.data.swipes import read_lexicon
    scorer, keyboard = SwipeScorer.load(run / "model", device="cpu"), layout()
    other = Elsewhere(scorer, keyboard, swapped(keyboard, "y", "z"))
    path = synthetic_swipes(keyboard, ["may"])[0].path
    assert np.allclose(other.predict(path, ["maz", "many"]), scorer.predict(path, ["may", "manz"]), atol=1e-6)
    assert len(read_lexicon(words)) == 300


def test_the_report_shows_every_page(run):
    report = Report(run)
    assert type(report).__name__ == "SwipeReport"
    for heading, name, text in report.pages():
        page = getattr(report, name)()
        assert hasattr(page, "figure") or len(repr(page)) > 20, name
    assert re.search(r"24 paths over 300 words", repr(report.verdict()))


def test_the_command_line_decodes(run, proj_cli):
    keyboard = layout()
    path = synthetic_swipes(keyboard, ["statement"], seed=4)[0].path.round(4).tolist()
    done = proj_cli("rank", run.folder, json.dumps(path), "--top_k", "3")
    assert done.returncode == 0 and len(done.stdout.strip().splitlines()) >= 3
    for bad, said in (("statement", "expected points in JSON"), ("[]", "has 0 points"), ("[[0,0,0]]", "has 1 point"), ("[[0,0,5],[0.1,0,2]]", "time goes backwards"), ("[[0,0,0],[NaN,0,9]]", "expected [x, y, t]")):
        done = proj_cli("rank", run.folder, bad)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("row, said", [
    ({"word": "cat", "path": []}, "has 0 points"), ({"word": "cat", "path": [[0.1, 0.1, 0]]}, "has 1 point"), ({"word": "cat", "path": [[0.1, 0.1, 0], [0.2, float("nan"), 9]]}, "NaN"),
    ({"word": "cat", "path": [[0.1, 0.1, 9], [0.2, 0.1, 0]]}, "time goes backwards"), ({"word": "naïve", "path": [[0.1, 0.1, 0], [0.2, 0.1, 9]]}, "not on the keyboard"),
    ({"word": "cat", "L": [[0.1, 0.1, 0]], "R": [[0.5, 0.1, 5]]}, "two fingers")])
def test_bad_rows_end_in_one_line(tmp_path, words, row, said):
    (tmp_path / "swipes.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="swipes.jsonl:1") as error: training(config(words, tmp_path / "run", data=str(tmp_path / "swipes.jsonl")))
    assert said in str(error.value).splitlines()[0] and "1 bad row, skip_bad allows 0" in str(error.value)


def test_a_keyboard_without_a_key_and_a_leak_are_refused(tmp_path, words):
    keys = {k: [x, y] for k, (x, y) in zip(layout().keys, layout().centres.tolist()) if k != "q"}
    (tmp_path / "keyboard.json").write_text(json.dumps(dict(keys=keys)))
    with pytest.raises(DataError, match="'q' missing"): training(config(words, tmp_path / "a", swipe=dict(keyboard=str(tmp_path / "keyboard.json"))))
    rows = [json.dumps(dict(word=s.word, path=s.path.tolist())) for s in synthetic_swipes(layout(), ["cat", "dog", "bird", "house"])]
    (tmp_path / "data").mkdir()
    for part in ("train", "validation", "test"): (tmp_path / "data" / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(GateError, match="4 paths of validation are training paths too"): training(config(words, tmp_path / "b", data=str(tmp_path / "data")))
    with pytest.raises(ConfigError, match="is of task swipe only"): make(TrainConfig, dict(swipe=dict(points=16)))


def test_init_from_without_a_model_is_refused(tmp_path, words):
    Run.create(tmp_path / "empty", config(words, tmp_path / "empty").model_dump(), "test")
    with pytest.raises(DataError, match="config.json"): training(second_stage(words, tmp_path / "c", tmp_path / "empty"))


def test_a_run_is_taken_up_without_saying_its_task(run):
    "The folder knows it; a task that is said and is another one is refused."
    again = make(TrainConfig, dict(out=str(run.folder), resume="auto"))
    assert type(training(again)).__name__ == "SwipeTraining"
    Run(run.folder).release()
    with pytest.raises(ConfigError, match="parameter 'task' is dual"): training(make(TrainConfig, dict(out=str(run.folder), resume="auto", task="dual")))


def test_learning_rates_of_parts_and_their_schedules(words, tmp_path):
    this = training(config(words, tmp_path / "run", swipe=dict(pretraining=0), optimizer=dict(schedule="step", factor=0.5, drops=3, lr_multipliers={"base": 0.25}), lr=1e-3))
    made = this.trainer()
    made.create_optimizer_and_scheduler(100)
    rates = {group["lr"] for group in made.optimizer.param_groups}
    assert rates == {1e-3, 2.5e-4} and {name.split(".")[0] for group in made.optimizer.param_groups if group["lr"] == 2.5e-4 for name in group["param_names"]} == {"base"}
    seen = []
    for _ in range(100):
        seen.append(max(made.lr_scheduler.get_last_lr()))
        made.optimizer.step()
        made.lr_scheduler.step()
    assert [seen[at] for at in (0, 24, 26, 51, 76, 99)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4])
    this.run.release()


def test_a_choice_among_numbers_comes_from_the_command_line():
    from proj.config import from_arguments
    cfg = from_arguments(TrainConfig, ["--task", "swipe", "--swipe.channels", "6"], "proj train")
    assert cfg.swipe.channels == 6 and from_arguments(TrainConfig, ["--finetuning.method", "qlora", "--finetuning.bits", "8"], "proj train").finetuning.bits == 8
    with pytest.raises(ConfigError, match="should be 3, 6 or 8"): from_arguments(TrainConfig, ["--task", "swipe", "--swipe.channels", "5"], "proj train")


def test_letters_begin_at_their_keys():
    from proj.data.swipes import SYMBOL_ID
    from proj.models.processor import SwipeProcessor
    from proj.models.swipe import SwipeCrossEncoder, place_letters, swipe_config
    for name in ("qwerty", "azerty"):
        keyboard = layout(name)
        model = place_letters(SwipeCrossEncoder(swipe_config("mini", SwipeProcessor(3, 16, 24))), keyboard)
        letters = model.base.embeddings.symbols.weight[[SYMBOL_ID[key] for key in keyboard.keys]].detach().double()
        far = np.hypot(*(keyboard.centres[:, None] - keyboard.centres).transpose(2, 0, 1))[np.triu_indices(26, 1)]
        assert np.corrcoef(far, torch.cdist(letters, letters).numpy()[np.triu_indices(26, 1)])[0, 1] > 0.95
