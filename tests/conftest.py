"What every test shares: a quiet, offline, reproducible environment, the public data, the command line."
import os
import subprocess
import sys
from pathlib import Path

# before anything imports torch, transformers or matplotlib; child processes inherit it
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    if "PYTEST_XDIST_WORKER" in os.environ: os.environ[_name] = "1"  # workers share the cores; what they inherit was set for one process
    else: os.environ.setdefault(_name, str(min(2, os.cpu_count() or 1)))
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"): os.environ[_name] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, threads that spin while they wait double the time a small model trains
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "JUPYTER_PREFER_ENV_PATH": "1"}
for _name in [n for n in os.environ if n.startswith("PROJ_") and n != "PROJ_DATA"]: del os.environ[_name]  # someone's own defaults

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def same_threads():
    "A test that sets torch's threads sets them for itself: sums in another order have other last digits."
    import torch
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "The folder of public data sets, $PROJ_DATA; the test is skipped where there is none."
    folder = os.environ.get("PROJ_DATA")
    if not folder: pytest.skip("PROJ_DATA is not set; it should name the folder that holds the public data sets")
    if not Path(folder).is_dir(): pytest.skip(f"PROJ_DATA is '{folder}', which is no folder")
    return Path(folder).resolve()


@pytest.fixture
def proj_cli(tmp_path):
    "Run `proj` in a fresh process and an empty folder: proj_cli('train', '--loss', 'mnr').returncode, .stdout, .stderr"
    def run(*arguments, cwd=tmp_path, env=None, timeout=600) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "proj.cli", *map(str, arguments)], cwd=cwd, env={**os.environ, **(env or {})},
                              capture_output=True, text=True, timeout=timeout)
    return run


@pytest.fixture
def halt():
    "Interrupt a training one step after a checkpoint: halt(training), or halt(training, 'pretraining') in a phase before the model's own."
    def halt(training, phase=None):
        from transformers import TrainerCallback
        before = training._run

        class Halt(TrainerCallback):
            def on_step_end(self, args, state, control, **kw):
                if state.global_step == args.save_steps + 1: raise KeyboardInterrupt

        def halted(made, now=None):
            if now == phase: made.add_callback(Halt())
            return before(made, now)
        training._run = halted
    return halt
