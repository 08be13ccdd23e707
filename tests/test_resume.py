"Going on from a torn or damaged checkpoint, after a full disk; what is refused; a run that is run again."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kills import LAST

from proj.checkpoint import checkpoints, newest_good
from proj.compare import earliest_within
from proj.config import TrainConfig, make
from proj.core import ConfigError, DataError, GateError, read_json, sha256_file, write_json
from proj.models.dual import DualEncoder
from proj.manifest import MANIFEST, faults, files_in, write_manifest
from proj.replay import compared, replay, verify
from proj.run import Run, history
from proj.tasks.dual import DualTraining
from proj.train import fit

from test_train import config, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    "A run that has been trained and not yet evaluated, with its checkpoints 2, 4 and 6."
    training = DualTraining(config(pairs, tmp_path_factory.mktemp("trained") / "run", eval_every=2, keep="earliest", dropout=0.1))
    training.train()
    return training.run


@pytest.fixture
def copy(trained, tmp_path):
    "The run as it was before it was trained to its end."
    shutil.copytree(trained.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    shutil.rmtree(run / "model")
    write_json(run / "run.json", {name: value for name, value in run.facts.items() if name not in ("weights", "best")})
    return run


FILES = ["metrics.jsonl", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "validation.json", MANIFEST]


def damage(path: Path, how: str):
    raw = bytearray(path.read_bytes())
    if how == "gone": path.unlink()
    elif how == "halved": path.write_bytes(raw[:len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["gone", "halved", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_moved_aside_and_named(copy, caplog, name, how):
    assert set(FILES) == {*files_in(copy / "checkpoints" / "checkpoint-6"), MANIFEST}
    damage(copy / "checkpoints" / "checkpoint-6" / name, how)
    found = newest_good(copy / "checkpoints")
    assert found == copy / "checkpoints" / "checkpoint-4" and (copy / "checkpoints" / "torn-checkpoint-6").is_dir()
    assert name in caplog.text and "moved aside" in caplog.text and len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


def test_a_checkpoint_cut_after_each_file_is_torn(copy):
    whole, names = copy / "checkpoints" / "checkpoint-6", sorted(files_in(copy / "checkpoints" / "checkpoint-6"))
    for count in range(len(names)):
        for name in files_in(whole): (whole / name).unlink()
        (whole / MANIFEST).unlink(missing_ok=True)
        for name in names[:count]:
            (whole / name).parent.mkdir(exist_ok=True)
            shutil.copy(copy / "checkpoints" / "checkpoint-4" / name, whole / name)
        assert faults(whole)


def test_from_a_damaged_checkpoint_the_run_goes_back_and_ends_the_same(copy, trained, pairs):
    damage(copy / "checkpoints" / "checkpoint-6" / "optimizer.pt", "flipped")
    damage(copy / "checkpoints" / "checkpoint-4" / "model.safetensors", "halved")
    DualTraining(make(TrainConfig, dict(out=str(copy.folder), resume="auto"))).train()
    assert copy.facts["resumed"] == [2] and (copy / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert copy.facts["weights"] == trained.facts["weights"]
    for name in LAST: assert sha256_file(copy / "checkpoints/checkpoint-6" / name) == sha256_file(trained / "checkpoints/checkpoint-6" / name), name


def test_when_no_checkpoint_is_good_the_run_begins_anew(copy, trained):
    for checkpoint in checkpoints(copy / "checkpoints"): (checkpoint / MANIFEST).unlink()
    DualTraining(make(TrainConfig, dict(out=str(copy.folder), resume="auto"))).train()
    assert copy.facts["resumed"] == [0] and copy.facts["weights"] == trained.facts["weights"]
    assert (copy / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_the_earliest_checkpoint_within_the_interval_of_the_best(trained):
    values = {int(c.name.split("-")[1]): np.array(read_json(c / "validation.json")["mrr"]) for c in checkpoints(trained / "checkpoints")}
    assert sorted(values) == [2, 4, 6] and trained.facts["best"]["step"] == earliest_within(values)
    assert trained.facts["best"]["mrr"] == pytest.approx(values[trained.facts["best"]["step"]].mean(), abs=1e-6)


@pytest.mark.parametrize("values, says", [(dict(lr=1e-3), "parameter 'lr' is 0.001"), (dict(loss="triplet"), "parameter 'loss' is triplet"), (dict(max_steps=600), "began with 6")])
def test_a_run_goes_on_as_it_began(copy, values, says):
    before = (copy / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=says): fit(make(TrainConfig, dict(out=str(copy.folder), resume="auto") | values))
    assert (copy / "run.json").read_bytes() == before and len(checkpoints(copy / "checkpoints")) == 3


def test_other_data_under_the_same_name_is_refused(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    DualTraining(config(data, tmp_path / "run"))
    Run(tmp_path / "run").release()
    write_pairs(data, n=90)
    with pytest.raises(DataError, match="part is not what"): fit(out=str(tmp_path / "run"), resume="auto")


def test_resume_needs_a_folder_and_begins_where_there_is_none(pairs, tmp_path):
    with pytest.raises(ConfigError, match="out is not given"): fit(resume="auto")
    run = fit(config(pairs, tmp_path / "run", resume="auto"))
    assert run.status == "finished" and "resumed" not in run.facts and not (run / "checkpoints").exists()
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    fit(config(pairs, tmp_path / "run", resume="auto"))
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_run_that_died_after_training_is_only_evaluated(pairs, tmp_path):
    whole = fit(config(pairs, tmp_path / "whole"))
    DualTraining(config(pairs, tmp_path / "run")).train()
    run = Run(tmp_path / "run")
    run.release()
    shutil.move(run.folder, tmp_path / "moved")  # and the folder may have another name by now
    fit(out=str(tmp_path / "moved"), resume="auto")
    moved = Run(tmp_path / "moved")
    assert moved.status == "finished" and "resumed" not in moved.facts
    for name in ("metrics.json", "metrics.jsonl", "examples.json"): assert sha256_file(moved / name) == sha256_file(whole / name), name


def test_two_processes_do_not_train_into_one_folder(pairs, tmp_path, proj_cli):
    training = DualTraining(config(pairs, tmp_path / "run"))
    done = proj_cli("train", "--out", tmp_path / "run", "--resume", "auto")
    assert done.returncode == 2 and f"another process (pid {os.getpid()}) works on this run" in done.stderr and "Traceback" not in done.stderr
    assert "running" in proj_cli("list", "runs", cwd=tmp_path.parent).stdout or training.run.status == "running"


# the second checkpoint does not fit; in a name space of its own, so that no right to mount is needed
FULL = """
mount -t tmpfs -o size=45m none {disk} || exit 99
run() {{ {python} -m proj.cli train --data {pairs} --out {disk}/run --resume auto --model tiny --max_steps 8 --eval_every 2 --batch_size 8 --max_length 32 --precision fp32 --dropout 0.1; }}
run; echo "first: $?"
mount -o remount,size=500m {disk}
run; echo "second: $?"
cp -r {disk}/run {kept}
"""


def test_a_full_disk_loses_nothing(pairs, tmp_path):
    (tmp_path / "disk").mkdir()
    script = FULL.format(disk=tmp_path / "disk", python=sys.executable, pairs=pairs, kept=tmp_path / "kept")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr: pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    assert "first: 3" in done.stdout and "second: 0" in done.stdout, done.stdout + done.stderr
    line = next(line for line in done.stderr.splitlines() if "bytes needed" in line)
    assert line.startswith(f"proj: {tmp_path / 'disk'}/run/checkpoints/checkpoint-") and " free; make room and go on with resume=auto" in line and "Traceback" not in done.stderr
    whole = fit(config(pairs, tmp_path / "whole", max_steps=8, eval_every=2, dropout=0.1))
    for name in ("model/model.safetensors", "metrics.json", "metrics.jsonl"): assert sha256_file(tmp_path / "kept" / name) == sha256_file(whole / name), name


def test_a_folder_that_cannot_be_written(pairs, proj_cli):
    done = proj_cli("train", "--data", pairs, "--out", "/proc/run", "--model", "tiny")
    assert done.returncode == 3 and done.stderr.startswith("proj: /proc/run: ") and len(done.stderr.splitlines()) == 1


def test_a_replay_gives_the_same_figures_and_sees_when_they_differ(pairs, tmp_path):
    run = fit(config(pairs, tmp_path / "run", dropout=0.1))
    page = replay(run.folder, tmp_path / "again")
    assert "same machine and versions, weights compared too" in str(page) and "all the same" in str(page)
    figures = read_json(run / "metrics.json")
    figures["systems"]["trained"]["mrr"]["value"] += 1e-9
    write_json(run / "metrics.json", figures)
    with pytest.raises(GateError, match="1 of .* figures differ, first metrics.json: systems.trained.mrr.value"): compared(run, Run(tmp_path / "again"))
    with pytest.raises(GateError, match="metrics.json: sha256 differs|metrics.json: has"): verify(run.folder)
    other = fit(config(pairs, tmp_path / "other", dropout=0.1, seed=1))
    with pytest.raises(GateError, match="does not repeat"): compared(run, other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    write_pairs(pairs.with_name("changed.jsonl"), n=80)
    facts = run.facts
    write_json(run / "run.json", facts | dict(config=facts["config"] | dict(data=str(pairs.with_name("changed.jsonl")))))
    with pytest.raises(DataError, match="part is not what"): replay(run.folder, tmp_path / "third")
    assert len(lines) == len(history(other))


def test_a_manifest_that_is_not_one_is_no_proof(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    write_manifest(tmp_path)
    for text in ("", "{}", "[]", '{"files": []}', '{"files": {"a.txt": {}}}', '{"files": {"../x": {"size": 1, "sha256": ""}}}', "{torn"):
        (tmp_path / MANIFEST).write_text(text)
        assert len(faults(tmp_path)) >= 1 and all("\n" not in fault for fault in faults(tmp_path)), text


TOGETHER = """
import sys
from proj.core import show_log
from proj.train import fit
show_log()
fit(data=sys.argv[1], out=sys.argv[2], model="tiny", max_steps=8, eval_every=4, batch_size=8, max_length=32, precision="fp32", dropout=0.0, lr=1e-3)
"""


def test_two_processes_train_what_one_trains(pairs, tmp_path):
    from safetensors.numpy import load_file
    (tmp_path / "together.py").write_text(TOGETHER)
    def start(out, *launcher):
        done = subprocess.run([sys.executable, *launcher, str(tmp_path / "together.py"), str(pairs), str(tmp_path / out)], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(tmp_path / out / "model" / "model.safetensors")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    two, again, one = start("two", *torchrun), start("again", *torchrun), start("one")
    for name in one:
        assert np.array_equal(two[name], again[name]), name
        apart = np.abs(two[name] - one[name])
        if name.endswith("in_proj_bias"):  # softmax does not see the keys' bias: its gradient is rounding noise, which Adam scales up
            apart = np.delete(apart, np.s_[len(apart) // 3:2 * len(apart) // 3])
        assert apart.max() <= 1e-6, name
    queries, documents = ["how to sort one list safely", "how to read one file"], ["def sort_list(list): return list.sort(3)", "def read_file(file): return 1"]
    scores = [DualEncoder.load(tmp_path / out, precision="fp32").score(queries, documents) for out in ("two", "one")]
    assert np.abs(scores[0] - scores[1]).max() <= 1e-6
    losses = [[line["loss"] for line in history(Run(tmp_path / out)) if "loss" in line] for out in ("two", "one")]
    assert np.abs(np.subtract(*losses)).max() <= 1e-5 and Run(tmp_path / "two").facts["processes"] == 2
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["systems"].keys() == {"bm25", "zero_shot", "trained"}
