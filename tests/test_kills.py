"A run that is killed at any time goes on to the same bytes."
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the processes that are killed import `kills` by name
from kills import CASES, LAST, Bench

from proj.checkpoint import checkpoints
from proj.core import sha256_file

from test_train import write_pairs


@pytest.fixture(scope="module", params=CASES)
def bench(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return Bench(write_pairs(folder / "pairs.jsonl"), folder, request.param)


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(bench):
    assert bench.writes > 20
    thorough = bench.case == "adamw"
    steps = range(1, bench.writes + 1, 4) if thorough else range(3, bench.writes + 1, bench.writes // 4)  # checkpoints write the same files, so most kinds of step come by in one of them
    with ThreadPoolExecutor(2) as pool: assert sum(pool.map(bench.at_write_step, steps)) == len(steps)
    wanted = 20 if thorough else 4
    assert bench.random_kills(wanted) >= wanted


def test_one_step_more_is_another_state(bench):
    "The comparison above would see a run that went on from the wrong step."
    late, early = checkpoints(bench.folder / "whole" / "checkpoints")[:2]
    assert [name for name in LAST if sha256_file(early / name) == sha256_file(late / name)] in ([], ["validation.json"])  # ranks may stay as they are
