"The command line and papermill, as a user meets them."
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from proj.cli import VERBS, main
from proj.config import BenchLossesConfig, CompareConfig, EvaluateConfig, MineConfig, Spec, TrainConfig
from proj.core import read_json
from proj.run import Run

from test_train import rows

NBS = Path(__file__).parent.parent / "nbs"
SMALL = dict(model="tiny", max_steps=4, batch_size=8, max_length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def run_papermill(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "papermill", str(NBS / "train.ipynb"), "out.ipynb", "-k", "python3", "--no-progress-bar", *map(str, arguments)],
                          cwd=folder, capture_output=True, text=True, timeout=600)


def flat(values, flag): return [part for name, value in values.items() for part in (flag, name, str(value))]


@pytest.mark.parametrize("name, cls", [("train", TrainConfig), ("evaluate", EvaluateConfig), ("compare", CompareConfig), ("mine", MineConfig),
                                       ("bench_losses", BenchLossesConfig)])
def test_a_notebook_declares_exactly_the_fields_of_its_config(name, cls):
    declared = papermill.inspect_notebook(str(NBS / f"{name}.ipynb"))
    assert list(declared) == list(cls.model_fields)
    for field, parameter in declared.items():
        info = cls.model_fields[field]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        written = eval(parameter["default"])
        assert written == default or (written == {} and isinstance(default, Spec)), field


def test_the_train_notebook_runs_and_is_its_own_report(folder):
    done = run_papermill(folder, *flat(SMALL | dict(loss="mnr", data="pairs.jsonl", lr="1e-3", out="runs/note"), "-p"))
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run.open(folder / "runs" / "note")
    assert run.facts["status"] == "finished" and run.facts["config"]["lr"] == 1e-3
    notebook = nbformat.read(folder / "out.ipynb", 4)
    shown = [o["data"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 5
    assert any("The trained model" in data.get("text/plain", "") for data in shown)


def test_a_preset_file_is_a_papermill_file(folder):
    done = run_papermill(folder, "-f", NBS / "presets" / "baseline.yaml", *flat(SMALL | dict(data="pairs.jsonl", out="runs/preset"), "-p"))
    assert done.returncode == 0, done.stderr[-2000:]
    config = Run.open(folder / "runs" / "preset").facts["config"]
    assert (config["loss"], config["temperature"], config["warmup"], config["max_steps"], config["precision"]) == ("infonce", 0.07, 1000, 4, "bf16")


@pytest.mark.parametrize("arguments, says", [
    (["-p", "los", "mnr"], "did you mean 'loss'?"), (["-p", "bf16", "false"], "here it is called 'precision'"), (["-p", "lr", "nan"], "finite"), (["-p", "lr", "fast"], "number"),
])
def test_papermill_with_a_wrong_parameter_fails_with_our_line(folder, arguments, says):
    done = run_papermill(folder, *arguments)
    assert done.returncode != 0 and says in done.stderr


def test_proj_run_through_papermill(folder, proj_cli):
    done = proj_cli("run", "train", *flat(SMALL | dict(data="pairs.jsonl", out="runs/cli", lr="1e-3"), "-p"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/cli/report.ipynb").exists() and (folder / "runs/cli/report.html").exists()
    assert "training" in read_json(folder / "runs/cli/run.json")["seconds"]
    notebook = nbformat.read(folder / "runs/cli/report.ipynb", 4)
    assert any("injected-parameters" in c.metadata.get("tags", []) for c in notebook.cells)


@pytest.mark.parametrize("arguments, code, says", [
    (["trian"], 2, "unknown verb 'trian'; did you mean 'train'?"),
    (["train", "--los", "mnr"], 2, "unknown parameter 'los'; did you mean 'loss'?"),
    (["train", "--lr", "nan"], 2, "parameter 'lr' should be a finite number"),
    (["train", "--max_steps", "1.5"], 2, "parameter 'max_steps'"),
    (["train", "--lr"], 2, "expected one argument"),
    (["train", "stray"], 2, "unrecognized arguments: stray"),
    (["train", "--config", "none.yaml"], 2, "none.yaml: cannot be read"),
    (["train", "--loss", "BatchHardTripletLoss"], 2, "class labels"),
    (["train", "--device", "mps"], 3, "not available here"),
    (["train", "--data", "nowhere.jsonl"], 2, "no data 'nowhere.jsonl'"),
    (["run", "train", "-p", "loss=1;import os", "x"], 2, "is not an identifier"),
    (["run", "train", "-p", "los", "mnr"], 2, "did you mean 'loss'?"),
    (["run", "trian"], 2, "did you mean 'train'?"),
    (["run", "nowhere.ipynb"], 2, "no such notebook"),
    (["rank", "runs/none", "query"], 2, "no run folder"),
    (["rank", "runs/none", " "], 2, "blank"),
    (["evaluate", "runs/none"], 2, "no run folder"),
    (["inspect", "runs/none"], 2, "no run folder"),
    (["list", "lossse"], 2, "invalid choice"),
    (["compare", "runs/none", "runs/other"], 2, "no run folder"),
    (["compare", "runs/none"], 2, "two or more runs"),
    (["compare"], 2, "parameter 'runs'"),
    (["replay", "runs/none"], 2, "no run folder"),
    (["replay", "runs/none", "--tolerance", "-1"], 2, "should be 0 or more"),
    (["diff", "runs/none", "runs/none"], 2, "no run folder"),
    (["verify", "runs/none"], 2, "no COMMIT.json"),
    (["train", "--resume", "auto"], 2, "out is not given"),
    (["train", "--resume", "yes", "--out", "runs/x"], 2, "parameter 'resume' should be 'auto'"),
])
def test_mistakes_get_one_line_and_an_exit_code(proj_cli, arguments, code, says):
    done = proj_cli(*arguments)
    assert (done.returncode, done.stdout) == (code, "") and says in done.stderr
    assert done.stderr.startswith("proj: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_traceback_comes_with_v_only(proj_cli):
    assert "Traceback" in proj_cli("train", "--los", "mnr", "-v").stderr


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_nothing_heavy(verb):
    script = ("import sys; from proj.cli import main\ncode = main([a for a in [sys.argv[1], '--help'] if a])\n"
              "print(sorted({'torch', 'transformers', 'sentence_transformers', 'datasets', 'IPython', 'matplotlib', 'scipy'} & set(sys.modules)), file=sys.stderr); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script, verb], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]" and len(done.stdout) > 100, done.stderr


def test_environment_and_file_and_flags_are_layered(proj_cli, folder):
    (folder / "spec.yaml").write_text("loss: infonce\nlr: 1e-4\nseed: 5\n")
    flags = [f"--{name}={value}" for name, value in (SMALL | dict(data="pairs.jsonl", out="runs/layers")).items()]
    done = proj_cli("train", "--config", "spec.yaml", "--seed", "7", *flags, cwd=folder, env={"PROJ_LR": "2e-4", "PROJ_SEED": "6"})
    assert done.returncode == 0, done.stderr
    config = Run.open(folder / "runs/layers").facts["config"]
    assert (config["loss"], config["lr"], config["seed"]) == ("infonce", 2e-4, 7)
    again = proj_cli("train", "--data", "pairs.jsonl", cwd=folder, env={"PROJ_LOS": "mnr"})
    assert again.returncode == 2 and "environment variable PROJ_LOS: unknown parameter 'los'; did you mean 'loss'?" in again.stderr


def test_a_run_can_be_ranked_inspected_listed_and_evaluated(proj_cli, folder):
    if not (folder / "runs/layers").exists(): test_environment_and_file_and_flags_are_layered(proj_cli, folder)
    ranked = proj_cli("rank", "runs/layers", "sort a list", "-k", "3", cwd=folder)
    assert ranked.returncode == 0 and len(ranked.stdout.splitlines()) == 4, ranked.stderr
    assert "MRR" in proj_cli("inspect", "runs/layers", cwd=folder).stdout
    assert "finished" in proj_cli("list", "runs", cwd=folder).stdout
    measured = proj_cli("evaluate", "runs/layers", "--out", "again", cwd=folder)
    assert measured.returncode == 0, measured.stderr
    ours, again = read_json(folder / "runs/layers/metrics.json"), read_json(folder / "again/metrics.json")
    assert again["pool"] == ours["pool"]
    for metric, figure in ours["systems"]["trained"].items():
        assert again["systems"]["trained"][metric]["value"] == figure["value"]
        assert again["systems"]["trained"][metric]["ci95"] == pytest.approx(figure["ci95"], abs=1e-9)  # the bootstrap's matrix product is as wide as there are systems
    other = proj_cli("evaluate", "runs/layers", "--data", "pairs.jsonl", cwd=folder)
    assert other.returncode == 0 and read_json(folder / "runs/layers/evaluations/pairs/metrics.json")["systems"]["bm25"]["mrr"]["n"] == 100


@pytest.fixture(scope="module")
def two(folder):
    "Two runs that differ in their learning rate."
    from proj.config import make
    from proj.train import fit
    for name, lr in [("slow", 1e-4), ("fast", 1e-3)]: fit(make(TrainConfig, SMALL | dict(data=str(folder / "pairs.jsonl"), out=str(folder / "two" / name), lr=lr)))
    return folder / "two"


def said(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_two_runs_are_compared(two, capsys):
    code, out, _ = said(capsys, "compare", two / "slow", two / "fast", "--metrics", "mrr,recall@10", "--by", "words", "--out", two / "compared")
    assert code == 0 and "30 queries, pool of 300" in out and "by words" in out and "to show 0.01" in out
    saved = read_json(two / "compared" / "comparison.json")
    difference = saved["differences"]["fast - slow"]["mrr"]
    values = [read_json(two / name / "metrics.json")["systems"]["trained"]["mrr"]["value"] for name in ("fast", "slow")]
    assert difference["value"] == pytest.approx(values[0] - values[1]) and difference["n"] == 30
    assert difference["wins"] + difference["ties"] + difference["losses"] == 30


def test_the_compare_notebook_runs(two):
    done = subprocess.run([sys.executable, "-m", "papermill", str(NBS / "compare.ipynb"), "compare.ipynb", "-k", "python3", "--no-progress-bar", "-p", "runs", f"[{two}/slow, {two}/fast]", "-p", "by", "words"],
                          cwd=two, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [o["data"] for c in nbformat.read(two / "compare.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 3


def test_what_two_runs_differ_in(two, capsys):
    code, out, _ = said(capsys, "diff", two / "slow", two / "fast")
    lines = out.splitlines()
    assert code == 0 and [line.split() for line in lines if line.startswith("config")] == [["config", "lr", "0.0001", "0.001"]]
    assert any(line.startswith("metrics") and "trained mrr" in line for line in lines) and not any(line.startswith(("data", "versions", "machine")) for line in lines)


def test_a_run_is_verified_and_accepted(two, capsys):
    assert said(capsys, "verify", two / "slow")[0] == 0
    card = two / "slow" / "model" / "config_sentence_transformers.json"
    card.write_text(card.read_text() + " ")
    code, out, error = said(capsys, "verify", two / "slow")
    assert code == 4 and out == "" and card.name in error and len(error.splitlines()) == 1
    code, _, error = said(capsys, "rank", two / "slow", "sort a list")
    assert code == 2 and f"proj verify {card.parent} --accept" in error and "Traceback" not in error
    assert said(capsys, "verify", two / "slow", "--accept")[0] == 0 and said(capsys, "verify", two / "slow")[0] == 0
    assert said(capsys, "rank", two / "slow", "sort a list")[0] == 0


def test_a_damaged_pool_is_not_searched(two, capsys):
    pool = two / "fast" / "pool.parquet"
    raw = bytearray(pool.read_bytes())
    raw[len(raw) // 2] ^= 1
    pool.write_bytes(raw)
    code, _, error = said(capsys, "rank", two / "fast", "sort a list")
    assert code == 2 and "pool.parquet: sha256 differs" in error


def test_a_replay_on_the_command_line(two, capsys):
    code, out, _ = said(capsys, "replay", two / "slow", "--out", two / "again")
    assert code == 0 and "all the same" in out
    (two / "fast" / "run.json").write_text((two / "fast" / "run.json").read_text().replace('"lr": 0.001', '"lr": 0.002'))
    code, out, error = said(capsys, "replay", two / "fast", "--out", two / "other")
    assert code == 4 and "figures differ, first metrics" in error and len(error.splitlines()[-1].replace(str(two), "")) < 300


def test_a_leak_stops_the_training(tmp_path, capsys):
    data, some = tmp_path / "leaky", list(rows())
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"query": r["query"], "code": r["code"]}) + "\n" for r in some[:60]))
    (data / "test.jsonl").write_text("".join(json.dumps({"query": r["query"].upper() + "!", "code": r["code"]}) + "\n" for r in some[59:]))
    arguments = ["train", "--data", data, "--out", tmp_path / "run", *[f"--{name}={value}" for name, value in SMALL.items()]]
    code, _, error = said(capsys, *arguments)
    assert code == 4 and f"{data}/train.jsonl:60" in error and f"{data}/test.jsonl:1" in error and "allow_leak=true" in error
    assert Run.open(tmp_path / "run").status == "failed" and (tmp_path / "run" / "leaks.jsonl").stat().st_size > 0
    code, _, error = said(capsys, *arguments[:4], tmp_path / "allowed", *arguments[5:], "--allow_leak", "true")
    assert code == 0 and Run.open(tmp_path / "allowed").facts["guard"]["leaking_queries"]["test"] >= 1
    assert "ALLOWED" in (tmp_path / "allowed" / "report.html").read_text()


# ---- hard negatives and code search

def test_hard_negatives_are_mined_trained_on_and_mined_again(folder, capsys):
    given = ["mine", "--data", folder / "pairs.jsonl", "--model", "static", "--negatives.k", 2, "--negatives.relative_margin", 0, "--out", folder / "mined"]
    assert main(list(map(str, given))) == 0
    said = capsys.readouterr().out
    assert "share of the candidates" in said and f"--labels {folder / 'mined' / 'labels.jsonl'}" in said
    mined = [json.loads(line) for line in (folder / "mined" / "train.jsonl").open()]
    texts = {text for row in rows() for text in [row["code"], *row["negatives"]]}
    assert any(len(row["negatives"]) > 2 for row in mined) and all(set(row["negatives"]) <= texts - {row["positive"]} for row in mined)
    assert main(list(map(str, ["train", "--data", folder / "mined" / "train.jsonl", *(part for name, value in SMALL.items() for part in (f"--{name}", value)), "--loss", "mnr", "--out", folder / "on_mined"]))) == 0
    assert main(list(map(str, [*given, "--labels", folder / "none.jsonl"]))) == 2
    assert "no such file; pass the labels.jsonl of an audit" in capsys.readouterr().err


def test_code_is_indexed_searched_and_brought_up_to_date(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = tmp_path / "code"
    code.mkdir()
    for what in ("window", "door", "calendar"): (code / f"{what}.py").write_text(f'def open_{what}(x):\n    "Open the {what}."\n    return x.{what}.open()\n')
    assert main(["index", "build", "--source-dir", str(code), "--encoder", "static", "--out", str(tmp_path / "index")]) == 0
    said = capsys.readouterr()
    assert said.out.count("3 chunks: 3 added") == 1 and "3 chunks: 3 added" not in said.err
    assert main(["search", str(tmp_path / "index"), "calendar", "-k", "1"]) == 0
    assert "calendar.py:1-3" in capsys.readouterr().out
    (code / "roof.py").write_text("def open_roof(x): return x\n")
    assert main(["index", "refresh", str(tmp_path / "index")]) == 0
    assert "1 new" in capsys.readouterr().out
    assert main(["index", "build", "--source-dir", str(code), "--encoder", "static", "--kind", "hnsw", "--out", str(tmp_path / "graph")]) == 0
    assert "recall@10" in capsys.readouterr().out
    for arguments, says in [(["search", str(tmp_path / "index"), "roof", "-k", "0"], "parameter 'top_k' should be at least 1, got 0"), (["search", str(tmp_path / "none"), "roof"], "missing"),
                            (["index", "build", "--source-dir", str(tmp_path / "none"), "--out", str(tmp_path / "x")], "no such folder"), (["index"], "see 'proj index --help'")]:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and "\n" not in error
