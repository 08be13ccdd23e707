"The whole run: from a file of pairs to a run folder, twice the same, interrupted, broken on purpose."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from proj.config import TrainConfig, make
from proj.core import ConfigError, GateError, read_json, sha256_file
from proj.data.sources import load_data
from proj.losses.contrast import LOSSES
from proj.manifest import write_manifest
from proj.metrics import read_ledger
from proj.models.dual import DualEncoder
from proj.run import Run, history
from proj.tasks.dual import DualTraining
from proj.train import fit
from proj.trainer import history_callback

VERBS = "sort read drop merge split count open close parse write".split()
NOUNS = "list file row table string number date tree graph queue".split()


def rows(n=100):
    "Pairs that a model can learn in seconds, each with two negatives and a grade."
    for i in range(n):
        verb, noun, other = VERBS[i % 10], NOUNS[i // 10 % 10], NOUNS[(i // 10 + 3) % 10]
        yield {"query": f"how to {verb} one {noun} safely", "code": f"def {verb}_{noun}({noun}):\n    return {noun}.{verb}({i})", "grade": 1 + i % 2,
               "negatives": [f"def {verb}_{other}({other}):\n    return {other}.{verb}()", f"def {VERBS[(i + 1) % 10]}_{noun}({noun}):\n    return None"]}


def write_pairs(path, n=100):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(n)))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def config(pairs, folder, **values):
    return make(TrainConfig, dict(data=str(pairs), out=str(folder), model="tiny", max_steps=6, batch_size=8, max_length=32, precision="fp32") | values)


@pytest.mark.parametrize("loss", [name for name in LOSSES["dual"] if name not in ("margin_mse", "distill_kl")])
def test_every_loss_trains_to_a_finished_run(pairs, tmp_path, loss):
    run = fit(config(pairs, tmp_path / "run", loss=loss))
    assert run.facts["status"] == "finished" and run.facts["config"]["loss"] == loss
    lines = history(run)
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line) and sum("mrr" in line for line in lines) >= 2
    metrics = read_json(run / "metrics.json")
    assert set(metrics["systems"]) == {"bm25", "zero_shot", "trained"} and metrics["pool"] == len(load_data(str(pairs)).test.documents)
    assert metrics["differences"]["trained - zero_shot"]["mrr"]["n"] == metrics["systems"]["trained"]["mrr"]["n"]
    for name in ("report.html", "report.ipynb", "model/modules.json", "pool.parquet", "figures/curve.png"): assert (run / name).stat().st_size > 0
    assert not (run / "checkpoints").exists()


def test_training_improves_what_it_is_trained_for(pairs, tmp_path):
    run = fit(config(pairs, tmp_path / "run", loss="infonce", max_steps=60, lr=1e-3))
    lines = [line for line in history(run) if "loss" in line]
    assert np.mean([line["loss"] for line in lines[-5:]]) < np.mean([line["loss"] for line in lines[:5]])
    validation = [line["mrr"] for line in history(run) if "mrr" in line]
    assert run.facts["best"]["mrr"] == pytest.approx(max(validation), abs=1e-6)


def test_the_saved_model_is_the_measured_one(pairs, tmp_path):
    training = DualTraining(config(pairs, tmp_path / "run"))
    training.baselines()
    training.train()
    training.evaluate()
    loaded, test = DualEncoder.load(tmp_path / "run" / "model", precision="fp32"), training.parts.test
    ours = training.encoder.score(test.query_texts, test.document_texts)
    assert np.abs(loaded.score(test.query_texts, test.document_texts) - ours).max() <= 1e-6
    assert loaded.weights_hash() == training.run.facts["weights"]
    training.report()
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]


def test_same_config_in_fresh_processes_gives_the_same_bits(pairs, tmp_path):
    script = "import sys; from proj.train import fit; fit(data=sys.argv[1], out=sys.argv[2], model='minilm', max_steps=4, batch_size=8, max_length=32, dropout=0.1, loss='infonce')"
    for name in ("a", "b"): subprocess.run([sys.executable, "-c", script, pairs, tmp_path / name], check=True, capture_output=True)
    a, b = Run.open(tmp_path / "a"), Run.open(tmp_path / "b")
    assert a.facts["weights"] == b.facts["weights"] != a.facts["weights_at_start"]
    for name in ("metrics.json", "metrics.jsonl", "model/model.safetensors", "examples.json"): assert sha256_file(a / name) == sha256_file(b / name), name
    assert read_ledger(a / "ledger.parquet").equals(read_ledger(b / "ledger.parquet"))
    subprocess.run([sys.executable, "-c", script.replace("loss=", "seed=1, loss="), pairs, tmp_path / "c"], check=True, capture_output=True)
    assert Run.open(tmp_path / "c").facts["weights"] != a.facts["weights"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_what_it_has(pairs, tmp_path, sign):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "proj.cli", "train", "--data", pairs, "--out", out, "--model", "tiny", "--epochs", "1000", "--eval_every", "5",
                                "--batch_size", "8", "--max_length", "32"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell that works in the background ignores it
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and '"mrr"' in (out / "metrics.jsonl").read_text() and list(out.glob("checkpoints/*/COMMIT.json"))):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "proj: interrupted" and "Traceback" not in errors
    run = Run.open(out)
    assert run.facts["status"] == "interrupted" and run.facts["during"] == "training" and history(run)
    assert len(DualEncoder.load(out / "model").encode(["sort a list"])) == 1


def test_a_best_checkpoint_that_vanished_is_an_error(pairs, tmp_path):
    from transformers import TrainerCallback

    class Thief(TrainerCallback):
        def on_save(self, args, state, control, **kw):
            for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"): path.rename(tmp_path / f"stolen-{path.name}")

    class Robbed(DualTraining):
        def trainer(self):
            made = super().trainer()
            made.add_callback(Thief())
            return made

    training = Robbed(config(pairs, tmp_path / "run"))
    with pytest.raises(GateError, match="best checkpoint is gone"): training.train()
    assert training.run.facts["status"] == "failed" and history(training.run)


def test_a_restored_model_that_measures_differently_is_an_error(pairs, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback

    class Vandal(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kw):
            weights = Path(args.output_dir, f"checkpoint-{state.best_global_step}", "model.safetensors")
            save_file({name: torch.randn_like(value) for name, value in load_file(weights).items()}, weights)
            write_manifest(weights.parent)  # so that no hash tells

    class Damaged(DualTraining):
        def trainer(self):
            made = super().trainer()
            made.add_callback(Vandal())
            return made

    training = Damaged(config(pairs, tmp_path / "run", max_steps=40, lr=1e-3))
    with pytest.raises(GateError, match="was logged"): training.train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments
    run = Run.create(tmp_path / "run", {}, "")
    state = TrainerState(global_step=3, max_steps=10)
    with pytest.raises(ConfigError, match="not finite at step 3"):
        history_callback(run).on_log(TrainingArguments(output_dir=str(tmp_path), report_to="none"), state, TrainerControl(), logs={"loss": float("nan")})
    assert history(run) == [{"step": 3, "epoch": 0, "loss": None}]


@pytest.mark.parametrize("values, says", [
    (dict(loss="margin_mse"), "no teacher_scores"), (dict(loss="triplet", temperature=0.1), "has no temperature"), (dict(loss="mrn"), "did you mean 'mnr'"),
    (dict(model="minilmm"), "did you mean 'minilm'"), (dict(data="stdlb"), "did you mean 'stdlib'"), (dict(out="."), "already holds a run"),
    (dict(report_to="tensorbord"), "did you mean 'tensorboard'"), (dict(max_length=4096, model="minilm"), "512 positions"),
])
def test_wrong_values_are_refused_in_one_line(pairs, tmp_path, monkeypatch, values, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(Exception) as error: fit(config(pairs, tmp_path / "run", **values))
    assert says in str(error.value) and "\n" not in str(error.value) and hasattr(error.value, "exit_code")


def test_early_stopping_stops(pairs, tmp_path):
    run = fit(config(pairs, tmp_path / "run", max_steps=60, eval_every=2, early_stopping=2, lr=1e-9))
    assert run.facts["best"]["of"] < 60


def test_in_batch_losses_never_see_a_text_twice(tmp_path):
    path = tmp_path / "pairs.jsonl"
    doubled = [row | {"query": row["query"] + " "} if i % 2 else row for i, row in enumerate(r for r in rows(40) for _ in (0, 1))]
    path.write_text("".join(json.dumps({"query": r["query"], "code": r["code"]}) + "\n" for r in doubled))
    training = DualTraining(config(path, tmp_path / "run"))
    made = training.trainer()
    for batch in made.get_train_dataloader().batch_sampler:
        texts = [" ".join(made.train_dataset[i]["anchor"].split()) for i in batch]
        assert len(set(texts)) == len(texts)
