"""Kill a training run again and again, go on with it, and compare it with one that was left alone.

    python tests/kills.py 200          # so many random kills, for every case
"""
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from proj.core import sha256_file

# what can be killed: further tasks, optimizers and fine-tuning specs add theirs
CASES = {
    "adamw": dict(model="tiny", epochs=2.5, eval_every=3, batch_size=8, max_length=32, precision="fp32", dropout=0.1),
    "cached_mnr": dict(model="tiny", loss="cached_mnr", max_steps=8, eval_every=3, batch_size=8, max_length=32, precision="fp32", dropout=0.1),
    "refresh": dict(model="tiny", loss="infonce", epochs=2, eval_every=3, batch_size=8, max_length=32, precision="fp32", dropout=0.1,
                    negatives=dict(candidates="union", k=2, refresh_every=5)),
    "reuse": dict(model="tiny", loss="cached_mnr", epochs=2, eval_every=3, batch_size=8, max_length=32, precision="fp32", dropout=0.1,
                  negatives=dict(candidates="dense", refresh_every=3, reuse=True)),
}
LAST = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "validation.json")  # of the last checkpoint


def train(data: str, out: str, values: dict, die_at: int = 0):
    "What a child process does: the run from loading to model/, or the part of it up to a write step."
    import torch
    torch.set_num_threads(1)
    os.environ["_PROJ_DIE_AT"] = str(die_at)
    from proj import core
    from proj.config import TrainConfig, make
    from proj.train import training
    training(make(TrainConfig, dict(data=data, out=out, resume="auto") | values)).train()
    Path(out, "writes").write_text(str(core.WRITES))


def servant() -> multiprocessing.context.BaseContext:
    "Processes that begin with everything imported: importing takes longer than a tiny run."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proj.train", "proj.report", "sentence_transformers.sentence_transformer.trainer", "datasets", "accelerate", "kills"])
    return context


LOCK = threading.Lock()  # starting one process polls all others: two threads that read one exit code get the wrong one, 255


def lived(process: multiprocessing.Process, kill_after: float | None = None) -> multiprocessing.Process:
    "Start a process, kill it after some seconds if asked to, wait for its end."
    with LOCK: process.start()
    end = math.inf if kill_after is None else time.monotonic() + kill_after
    while True:
        with LOCK: alive = process.is_alive()
        if not alive: return process
        if time.monotonic() >= end:
            end = math.inf
            with suppress(ProcessLookupError): os.kill(process.pid, signal.SIGKILL)  # it may have ended just now
        time.sleep(0.005)


class Bench:
    "One case: its reference run, and runs that are killed."
    def __init__(self, data, folder, case: str):
        self.data, self.folder, self.case, self.values, self.context = str(data), Path(folder), case, CASES[case], servant()
        start = time.monotonic()
        assert self.child("whole").exitcode == 0, "the run that is left alone must end well"
        self.seconds = time.monotonic() - start
        self.writes = int((self.folder / "whole" / "writes").read_text())
        self.expected = self.outcome("whole")

    def child(self, name: str, die_at: int = 0, kill_after: float | None = None) -> multiprocessing.Process:
        "Start or go on with a run; kill it after some seconds if asked to. Returns the dead process."
        return lived(self.context.Process(target=train, args=(self.data, str(self.folder / name), self.values, die_at)), kill_after)

    def outcome(self, name: str) -> dict[str, str]:
        "Hashes of all that must be the same to the byte."
        run = self.folder / name
        last = max(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        files = [run / "metrics.jsonl", run / "model" / "model.safetensors", *(last / file for file in LAST)]
        return {f"{last.name}: {file.name}": sha256_file(file) for file in files}

    def check(self, name: str):
        "Go on to the end, compare, clean up."
        child = self.child(name)
        assert child.exitcode == 0, f"{name} could not go on (exit code {child.exitcode})"
        assert self.outcome(name) == self.expected, name
        shutil.rmtree(self.folder / name)

    def at_write_step(self, step: int) -> int:
        "Die at a write step, go on, compare."
        child = self.child(f"step-{step}", die_at=step)
        assert child.exitcode == -signal.SIGKILL, f"the run did not die at write step {step}"
        self.check(f"step-{step}")
        return 1

    def at_random(self, seed: int) -> int:
        "Kill once to three times at random moments, go on, compare; returns the number of kills."
        draw, kills = random.Random(seed), 0
        for _ in range(draw.randint(1, 3)):
            kills += self.child(f"random-{seed}", kill_after=draw.uniform(0, 1.2 * self.seconds)).exitcode == -signal.SIGKILL
        self.check(f"random-{seed}")
        return kills

    def random_kills(self, wanted: int) -> int:
        "At least so many."
        kills, seed = 0, 0
        with ThreadPoolExecutor(2) as pool:
            while kills < wanted:
                kills += sum(pool.map(self.at_random, range(seed, seed + 4)))
                seed += 4
        return kills


def main(wanted: int):
    sys.path.insert(0, str(Path(__file__).parent))
    from test_train import write_pairs
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder, "pairs.jsonl"))
        for case in CASES:
            bench = Bench(data, Path(folder, case), case)
            print(f"{case}: {bench.random_kills(wanted)} random kills and {sum(map(bench.at_write_step, range(1, bench.writes + 1)))} at write steps, "
                  "every run went on to the same bytes")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
