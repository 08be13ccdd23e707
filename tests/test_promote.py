"Promotion: a worse model, a better one, too few queries, an overlap with training; the pointer, the log, the way back, and a process that dies in between."
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # the processes that are killed import this file by name
from kills import lived, servant

from proj.compare import paired_difference
from proj.config import PromoteConfig, TrainConfig, make
from proj.core import ConfigError, DataError, GateError, MachineError, atomic, read_json, sha256_file, write_json
from proj.data.sources import load_data
from proj.evaluate import write_queries
from proj.manifest import faults, write_manifest
from proj.metrics import ledger, write_ledger
from proj.promote import NotPromoted, Overlap, append, current, locked, past, promote, read_log, rollback
from proj.run import Run, finish

N = 40  # held-out queries


def texts(seed, n, words=5):
    "Different texts of made-up words."
    draw, syllables = np.random.default_rng(seed), np.array("ka lo mi ru se ta vo ne pi du fa go".split())
    return [" ".join("".join(word) for word in draw.choice(syllables, (words, 3))) for _ in range(n)]


TRAIN, TEST = texts(1, 40), texts(2, N)


def write_data(folder, train=TRAIN, test=TEST):
    folder.mkdir(parents=True, exist_ok=True)
    for part, queries in dict(train=train, test=test).items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"query": q, "positive": " ".join(q.split()[::-1])}) + "\n" for q in queries))
    return folder


def write_run(folder, data, status="finished", config={}, facts={}, pool=N, **systems):
    "A run folder as training leaves it, with the values per query that are given; its model is a text."
    parts = load_data(str(data))
    run = Run.create(folder, make(TrainConfig, dict(data=str(data)) | config).model_dump(), "test")
    measure(folder, parts.test, data, pool, **systems)
    (run / "model").mkdir()
    (run / "model" / "weights.txt").write_text(Path(folder).name)
    write_manifest(run / "model")
    run.update(data=parts.facts(), guard=dict(leaks={}, allowed=False))
    write_manifest(run.folder, {"metrics.json", "ledger.parquet", "queries.parquet"})
    finish(run).update(status=status, **facts)
    return run.folder


def measure(folder, store, data, pool=N, **systems):
    "What an evaluation writes."
    ids = store.queries["query_id"].to_pylist()
    values = {name: np.broadcast_to(np.asarray(v, float), len(ids)) for name, v in systems.items()}
    write_ledger(folder / "ledger.parquet", pa.concat_tables([ledger(ids, {"mrr@10": v}, system=name) for name, v in values.items()]))
    with atomic(folder / "queries.parquet", "wb") as f: write_queries(f, store)
    write_json(folder / "metrics.json", {"data": str(data), "pool": pool, "systems": {name: {"mrr@10": {"value": v.mean()}} for name, v in values.items()}})


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_data(tmp_path_factory.mktemp("promote") / "data")


@pytest.fixture
def place(tmp_path, data):
    "runs/base with 0.5 on every query; the folder they lie in."
    write_run(tmp_path / "base", data, trained=0.5, bm25=0.3)
    return tmp_path


def ask(place, run, over="base", **values):
    "The config: over=None asks for the current release, or the run's own baselines."
    over = dict(over=str(place / over)) if over else {}
    return make(PromoteConfig, dict(run=str(place / run), releases=str(place / "models")) | over | values)


def decisions(place): return [record["decision"] for record in read_log(place / "models")]


def one_line(error): assert "\n" not in str(error.value) and len(str(error.value)) < 700


# ---- the decision

def test_a_better_model_is_promoted(place, data):
    "On half of the queries 1 instead of .5: the gain is .25, its standard error .25 / sqrt(40) = .0395, the lower end about .25 - 2 x .0395 = .17."
    write_run(place / "new", data, trained=np.tile([1, 0.5], N // 2))
    found = promote(ask(place, "new", min_gain=0.15))
    gain = found["differences"]["new - base"]["mrr@10"]
    assert gain["value"] == pytest.approx(0.25) and 0.16 < gain["ci95"][0] < 0.18 and gain["p"] < 0.01 and gain["n"] == N
    assert {name: v["mrr@10"]["value"] for name, v in found["systems"].items()} == {"new": pytest.approx(0.75), "base": 0.5}
    assert found["decision"] == "promoted" and found["previous"] is None
    assert current(place / "models") == found["current"] and (place / "models/current/model/weights.txt").read_text() == "new"
    shown = str(found)
    for part in ("40 queries, pool of 40", "0.750 [", "0.500 [", "+0.250 [+0.1", "reaches the gate of +0.1500", "there is none to go back to"): assert part in shown, part
    assert "<table>" in found._repr_html_()


def test_the_interval_must_clear_the_gate_not_the_mean(place, data):
    "The same model as above, and a gate between the lower end of .17 and the mean of .25."
    write_run(place / "new", data, trained=np.tile([1, 0.5], N // 2))
    with pytest.raises(NotPromoted) as error: promote(ask(place, "new", min_gain=0.2))
    one_line(error)
    assert error.value.exit_code == 4 and error.value.promotion.gain["value"] == pytest.approx(0.25)
    for part in ("0.750 [", "0.500 [", "+0.250 [+0.17", "n = 40", "the lower end +0.17", "gate of +0.2000", "stays unset"): assert part in str(error.value), part
    assert current(place / "models") is None and decisions(place) == ["not promoted"] and not list((place / "models").glob("releases/*"))


def test_a_worse_model_is_not(place, data):
    write_run(place / "new", data, trained=0.45)
    with pytest.raises(NotPromoted, match=r"gain -0\.050 \[-0\.050, -0\.050\]") as error: promote(ask(place, "new", min_gain=0))
    assert error.value.exit_code == 4 and isinstance(error.value, GateError) and current(place / "models") is None


@pytest.mark.parametrize("value, passes", [(0.3, True), (0.2999, False), (0.3001, True)])
def test_a_gain_of_exactly_the_gate_counts(place, data, value, passes):
    assert 0.3 - 0.28 < 0.02  # in floating point
    write_run(place / "new", data, trained=value)
    write_run(place / "old", data, trained=0.28)
    if passes: promote(ask(place, "new", over="old"))
    else:
        with pytest.raises(NotPromoted): promote(ask(place, "new", over="old"))


def test_too_few_queries_decide_nothing(place, data):
    write_run(place / "new", data, trained=1)
    with pytest.raises(DataError, match=r"40 held-out queries.*fewer than 41 \(min_n\)") as error: promote(ask(place, "new", min_n=41))
    one_line(error)
    assert error.value.exit_code == 2 and decisions(place) == [] and current(place / "models") is None
    assert promote(ask(place, "new", min_n=40))["queries"] == 40


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.floats(-0.1, 0.4), st.floats(0, 0.3), st.floats(0, 0.3), st.integers(N - 1, N + 1))
def test_promoted_if_and_only_if_the_lower_end_and_n_reach_the_gate(data, tmp_path_factory, seed, shift, spread, min_gain, min_n):
    place, draw = tmp_path_factory.mktemp("any"), np.random.default_rng(seed)
    old = draw.uniform(0.2, 0.5, N)
    new = old + shift + spread * draw.uniform(-1, 1, N)
    write_run(place / "old", data, trained=old), write_run(place / "new", data, trained=new)
    try: promoted = bool(promote(ask(place, "new", over="old", min_gain=min_gain, min_n=min_n, seed=seed)))
    except (NotPromoted, DataError): promoted = False
    order = np.argsort(load_data(str(data)).test.queries["query_id"].to_pylist())  # the resamples depend on the order
    low = paired_difference(new[order], old[order], seed=seed)["ci95"][0]
    assert promoted == (low >= min_gain - 1e-12 and N >= min_n) == (current(place / "models") is not None)


# ---- what must be beaten

def test_the_first_one_must_beat_its_best_baseline_but_never_the_oracle(place, data):
    write_run(place / "new", data, trained=0.6, bm25=0.2, zero_shot=0.4, first_stage=0.5, oracle=0.9, blend=0.8)
    found = promote(ask(place, "new", over=None))
    assert found["over"].endswith("new:first_stage") and found.gain["value"] == pytest.approx(0.1)
    write_run(place / "weak", data, trained=0.6, bm25=0.7)
    with pytest.raises(NotPromoted, match="trained over bm25"): promote(ask(place, "weak", over=None, releases=str(place / "others")))
    write_run(place / "alone", data, trained=0.6, oracle=0.7)
    with pytest.raises(ConfigError, match="has none of bm25, zero_shot"): promote(ask(place, "alone", over=None, releases=str(place / "others")))


def test_later_ones_must_beat_the_current_release(place, data):
    promote(ask(place, "base", over=None))
    write_run(place / "new", data, trained=0.55, bm25=0.9)  # the baseline does not matter any more
    with pytest.raises(NotPromoted, match=f"over {current(place / 'models')}"): promote(ask(place, "new", over=None, min_gain=0.06))
    found = promote(ask(place, "new", over=None, min_gain=0.04))
    assert found["previous"].startswith("base-2") and "proj promote --rollback --releases" in str(found) and found["previous"] in str(found)


def test_a_named_system_of_a_run(place, data):
    assert promote(ask(place, "base", over="base:bm25"))["over"] == f"{place / 'base'}:bm25"
    with pytest.raises(ConfigError, match="named twice"): promote(ask(place, "base", over="base"))
    for system in ("bm25", "oracle"):
        with pytest.raises(ConfigError, match=f"system '{system}'"):
            promote(ask(place, write_run(place / f"with-{system}", data, trained=1, **{system: 1}).name, system=system))


def test_evaluations_on_other_data_are_compared_with_each_other(place, data):
    "A new model is trained on other data than the current one; both are measured on a third set, as `proj evaluate` does."
    promote(ask(place, "base", over=None))
    write_run(place / "new", write_data(place / "newer", texts(3, 40), texts(4, N)), trained=0.9)
    with pytest.raises(DataError, match=r"lacks 40 of 80 queries.*proj evaluate RUN"): promote(ask(place, "new", over=None))
    third = load_data(str(write_data(place / "third", texts(5, 5), texts(6, N)))).test
    measure(place / "new" / "evaluations" / "third", third, place / "third", trained=0.8)
    with pytest.raises(DataError, match="was never measured on the queries of"): promote(ask(place, "new/evaluations/third", over=None))
    measure(place / "models" / "current" / "evaluations" / "third", third, place / "third", trained=0.7)
    found = promote(ask(place, "new/evaluations/third", over=None))
    assert found.gain["value"] == pytest.approx(0.1) and found["current"].startswith("new-")
    assert (place / "models/current/evaluations/third/ledger.parquet").is_file()  # the next one can be compared with it
    measure(place / "elsewhere", third, place / "third", trained=1)
    with pytest.raises(DataError, match="lies in no run"): promote(ask(place, "elsewhere", over="base"))


@pytest.mark.parametrize("change, says", [
    (dict(pool=99), "differ in pool"), (dict(status="interrupted"), "status is 'interrupted'"), (dict(facts=dict(guard=None)), "what the leak guard found"),
])
def test_runs_that_cannot_be_compared_are_refused(place, data, change, says):
    write_run(place / "new", data, trained=1, **change)
    with pytest.raises(DataError, match=says) as error: promote(ask(place, "new"))
    one_line(error)
    assert decisions(place) == []


def test_bad_names_are_answered(place):
    for values, says in [(dict(run="bas"), "did you mean 'base'"), (dict(over="bse"), "did you mean 'base'"), (dict(metric="mrr@1"), "did you mean 'mrr@10'"),
                         (dict(system="trainde"), "did you mean 'trained'")]:
        with pytest.raises((ConfigError, DataError), match=says) as error: promote(ask(place, **dict(run="base", over="base:bm25") | values))
        one_line(error)


def test_another_task_needs_another_folder(place, data):
    promote(ask(place, "base", over=None))
    write_run(place / "cross", data, trained=1, config=dict(task="cross"))
    with pytest.raises(ConfigError, match="task 'cross'.*task 'dual'"): promote(ask(place, "cross", over=None))


# ---- disjoint from training

@pytest.mark.parametrize("text, kind", [(TEST[3], "exact"), (TEST[3].upper() + " ?", "normalised"), (TEST[3] + "x", "near-duplicate")])
def test_a_held_out_query_in_the_training_data_is_refused(place, data, text, kind):
    write_run(place / "new", write_data(place / "planted", [*TRAIN, text]), trained=1)
    with pytest.raises(Overlap, match=rf"nothing decided: 1 of 40 held-out queries stand in the training data of .*/new.*\({kind}, .*train.jsonl:41\)") as error:
        promote(ask(place, "new"))
    one_line(error)
    assert error.value.exit_code == 4 and not isinstance(error.value, NotPromoted)
    assert decisions(place) == ["overlap"] and "1 of 40" in read_log(place / "models")[0]["reason"] and current(place / "models") is None


def test_of_the_other_run_too(place, data):
    write_run(place / "new", data, trained=1)
    write_run(place / "old", write_data(place / "planted", [*TRAIN, TEST[0], TEST[1]]), trained=0.1)
    with pytest.raises(Overlap, match="2 of 40 held-out queries stand in the training data of .*/old"): promote(ask(place, "new", over="old"))


def test_and_of_the_runs_that_it_began_with(place, data, caplog):
    write_run(place / "first", write_data(place / "planted", [*TRAIN, TEST[0]]), trained=0.5, facts=dict(weights="w1"))
    write_run(place / "clean", data, trained=0.5, facts=dict(weights="w1"))
    for start, name in [("first", "a"), ("clean", "b"), ("clean/model", "c")]:
        write_run(place / name, data, trained=1, config=dict(init_from=str(place / start)), facts=dict(weights_at_start="w1", weights="w2"))
    with pytest.raises(Overlap, match="training data of .*/first"): promote(ask(place, "a"))
    for name in "bc": promote(ask(place, name))
    write_run(place / "d", data, trained=1, config=dict(init_from=str(place / "gone")))
    with pytest.raises(DataError, match="began with '.*gone', which is not there"): promote(ask(place, "d"))
    write_run(place / "e", data, trained=1, config=dict(model=str(place / "gone")))
    with pytest.raises(DataError, match="began with '.*gone', which is not there"): promote(ask(place, "e"))
    write_run(place / "f", data, trained=1, config=dict(model="owner/name"))
    with caplog.at_level("WARNING", "proj"): promote(ask(place, "f"))
    assert "'owner/name' is no folder here and is taken for a model of the hub" in caplog.text


def test_and_of_the_retriever_that_a_reranker_sits_behind(place, data):
    write_run(place / "first", write_data(place / "planted", [*TRAIN, TEST[0]]), trained=0.5)
    for name, retriever in [("a", str(place / "first")), ("b", "bm25"), ("c", str(place / "gone"))]:
        write_run(place / name, data, trained=1, first_stage=0.5, config=dict(task="cross", retriever=retriever))
    with pytest.raises(Overlap, match="training data of .*/first"): promote(ask(place, "a", over=None))
    assert promote(ask(place, "b", over=None))["over"].endswith("first_stage")
    with pytest.raises(DataError, match="began with '.*gone', which is not there"): promote(ask(place, "c", over=None))


def test_a_run_that_began_with_what_was_current_then(place, data):
    "`current` moves on, to that very run; what it began with is found by its weights."
    write_run(place / "first", write_data(place / "planted", [*TRAIN, TEST[0]], texts(7, N)), trained=0.5, bm25=0.1, facts=dict(weights="w1"))
    promote(ask(place, "first", over=None))
    write_run(place / "second", data, trained=1, config=dict(init_from=str(place / "models" / "current")), facts=dict(weights_at_start="w1", weights="w1"))
    write_run(place / "third", data, trained=1, bm25=0, facts=dict(weights="w3"))
    promote(ask(place, "third", over="third:bm25"))
    with pytest.raises(Overlap, match="training data of .*/releases/first-"): promote(ask(place, "second"))
    write_run(place / "fourth", data, trained=1, config=dict(init_from=str(place / "models" / "current" / "model")), facts=dict(weights_at_start="w0"))
    with pytest.raises(DataError, match="began with '.*current/model', which has moved on") as error: promote(ask(place, "fourth"))
    one_line(error)


def test_a_run_that_was_trained_in_spite_of_leaks_is_refused(place, data):
    write_run(place / "new", data, trained=1, facts=dict(guard=dict(leaks={"exact document": 3}, allowed=True)))
    with pytest.raises(Overlap, match="trained in spite of leaks into its own test data .3 exact document.") as error: promote(ask(place, "new"))
    one_line(error)


def test_training_data_that_is_gone_or_changed_cannot_be_checked(place, data):
    moved = write_data(place / "moved")
    write_run(place / "new", moved, trained=1)
    (moved / "train.jsonl").write_text((moved / "train.jsonl").read_text().replace(TRAIN[0], "another text than it was"))
    with pytest.raises(DataError, match="is not what it was trained with.*put the data back"): promote(ask(place, "new"))
    for file in moved.iterdir(): file.unlink()
    moved.rmdir()
    with pytest.raises(DataError, match="training data cannot be read.*put the data back") as error: promote(ask(place, "new"))
    one_line(error)


# ---- the release, the log, the way back

def test_a_release_is_a_whole_copy(place):
    found = promote(ask(place, "base", over=None))
    release = place / "models" / "releases" / found["current"]
    assert os.readlink(place / "models" / "current") == f"releases/{found['current']}" and faults(release) == [] and faults(release / "model") == []
    for name in ("run.json", "metrics.json", "ledger.parquet", "queries.parquet", "model/weights.txt", "model/COMMIT.json"):
        assert sha256_file(release / name) == sha256_file(place / "base" / name)
    assert read_json(release / "promotion.json") == read_log(place / "models")[0] == dict(found)
    (place / "models").rename(place / "elsewhere")
    assert (place / "elsewhere" / "current" / "model" / "weights.txt").read_text() == "base"


def test_a_damaged_run_is_not_promoted(place):
    (place / "base" / "model" / "weights.txt").write_text("bass")
    with pytest.raises(DataError, match="sha256 differs"): promote(ask(place, "base", over=None))
    assert not list((place / "models").glob("releases/*"))


def three(place, data):
    "The names of three releases, one after the other."
    names = [promote(ask(place, "base", over=None))["current"]]
    for name, value in [("b", 0.6), ("c", 0.7)]:
        write_run(place / name, data, trained=value)
        names.append(promote(ask(place, name, over=None))["current"])
    return names


def test_back_and_back_until_there_is_none(place, data):
    a, b, c = three(place, data)
    models = place / "models"
    assert str(rollback(models)) == f"{models}/current is {b} again; it was {c}" and current(models) == b
    with pytest.raises(NotPromoted): promote(ask(place, "b", over=None))
    d = promote(ask(place, "c", over=None))
    assert d["previous"] == b and past(read_log(models)) == [a, b, d["current"]] and len({a, b, c, d["current"]}) == 4
    assert rollback(models).current == b and rollback(models).current == a
    with pytest.raises(ConfigError, match=f"no release before {a}") as error: rollback(models)
    one_line(error)
    assert decisions(place) == [*["promoted"] * 3, "rolled back", "not promoted", "promoted", "rolled back", "rolled back"] and current(models) == a


def test_a_damaged_release_is_refused(place, data):
    a, b, c = three(place, data)
    models = place / "models"
    (models / "releases" / b / "model" / "weights.txt").write_text("B")
    with pytest.raises(DataError, match=f"weights.txt: sha256 differs.*{c} stays current.*ln -sfn") as error: rollback(models)
    one_line(error)
    assert current(models) == c
    (models / "current").unlink()
    (models / "current").symlink_to(f"releases/{a}")  # what the message says
    with pytest.raises(ConfigError, match=f"no release before {a}"): rollback(models)
    assert decisions(place)[-1] == "found"


def test_nothing_to_roll_back_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="nothing was promoted there yet"): rollback(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_what_is_not_ours_is_left_alone(place):
    models = place / "models"
    (models / "current").mkdir(parents=True)
    with pytest.raises(ConfigError, match="should be a link to one of releases/"): promote(ask(place, "base", over=None))
    (models / "current").rmdir()
    (models / "current").symlink_to(place / "base")
    with pytest.raises(ConfigError, match="should be a link to one of releases/"): promote(ask(place, "base", over=None))
    (models / "current").unlink()
    (place / "file").write_text("")
    with pytest.raises(MachineError, match="file"): promote(ask(place, "base", over=None, releases=str(place / "file" / "models")))


def test_one_promotion_at_a_time(place):
    with locked(place / "models"):
        for attempt in (lambda: promote(ask(place, "base", over=None)), lambda: rollback(place / "models")):
            append(place / "models", dict(decision="found", current=None))  # so that there is something to roll back
            with pytest.raises(ConfigError, match="another process") as error: attempt()
            assert error.value.exit_code == 2
    assert promote(ask(place, "base", over=None))


def test_a_log_that_is_cut_off_or_damaged(place, data):
    a, b, c = three(place, data)
    models, path = place / "models", place / "models" / "promotions.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"decision": "promo\N{GREEK SMALL LETTER MU}'[:-1])
    assert len(read_log(models)) == 3 and rollback(models).current == b
    assert path.read_text().startswith(whole) and decisions(place)[3:] == ["rolled back"]
    path.write_text(whole + "[]\n")
    with pytest.raises(DataError, match=r"promotions.jsonl:4: not a decision"): rollback(models)


# ---- a process that dies

def child(place: str, action: str, die_at: int):
    "Promote the run b over the release a, or take b back; die at a write step."
    os.environ["_PROJ_DIE_AT"] = str(die_at)
    from proj import core
    core.WRITES = 0
    if action == "promote": promote(ask(Path(place), "b", over=None))
    else: rollback(Path(place, "models"))
    Path(place, "writes").write_text(str(core.WRITES))


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_kill_9_at_any_step_leaves_a_whole_release(place, data, action):
    models = place / "models"
    def state():
        name = current(models)
        assert faults(models / "releases" / name) == []
        with locked(models): pass  # settles
        assert [release for release in (models / "releases").iterdir() if faults(release)] == []  # what has the name of a release is one
        assert past(read_log(models))[-1] == name and not list(models.glob("releases/.*")) and not (models / ".current.part").exists()
        return name.split("-")[0]
    write_run(place / "b", data, trained=0.6)
    promote(ask(place, "base", over=None))
    if action == "rollback": promote(ask(place, "b", over=None))
    start, step, seen, context = current(models), 1, [], servant()
    while True:
        process = lived(context.Process(target=child, args=(str(place), action, step)))
        if process.exitcode == 0: break
        assert process.exitcode == -signal.SIGKILL
        seen.append(state())
        if current(models) != start:  # it got to the switch: back to where it began, by hand
            (models / "current").unlink()
            (models / "current").symlink_to(f"releases/{start}")
        step += 1
    assert step - 1 == int((place / "writes").read_text()) >= (9 if action == "promote" else 3)
    before, after = ("base", "b") if action == "promote" else ("b", "base")
    at = seen.index(after)
    assert seen == [before] * at + [after] * (len(seen) - at) and 0 < at < len(seen) and state() == after


# ---- real runs

def test_a_trained_model_is_promoted_and_used(tmp_path):
    from proj.models.dual import DualEncoder
    from proj.train import fit
    from proj.use import rank
    from test_train import config, write_pairs
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    good = fit(config(pairs, tmp_path / "good", loss="infonce", max_steps=60, lr=1e-3))
    fit(config(pairs, tmp_path / "bad", max_steps=1, lr=1e-9))
    n = good.facts["data"]["test"]["queries"]
    found = promote(ask(tmp_path, "good", over="good:zero_shot", min_n=n))
    assert found.gain["ci95"][0] >= 0.02 and found["queries"] == n
    with pytest.raises(NotPromoted): promote(ask(tmp_path, "bad", over=None, min_n=n))
    link = tmp_path / "models" / "current"
    assert DualEncoder.load(link).weights_hash() == DualEncoder.load(link / "model").weights_hash() == good.facts["weights"]
    assert rank(link, "how to sort one list safely", top_k=3).ids == rank(good.folder, "how to sort one list safely", top_k=3).ids
