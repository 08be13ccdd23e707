"Runs compared from the ledgers they left: what is refused, what is said, and that the figures are those of the queries."
import json
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from proj.compare import mean_interval, paired_difference
from proj.config import CompareConfig
from proj.core import ConfigError, DataError, read_json, write_json
from proj.data.sources import load_test
from proj.data.store import from_pairs
from proj.evaluate import Evaluation
from proj.measured import group_rows
from proj.metrics import ledger, of_system, read_ledger, write_ledger
from proj.models.lexical import BM25
from proj.versus import compare

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "compare.ipynb"
FAST = dict(metrics=["mrr", "recall@1"], n_resamples=500)
IDS = [f"q{i:03}" for i in range(60)]


def ranks(seed, n=60): return np.random.default_rng(seed).integers(1, 12, n)


def folder(path, rank, ids=None, order=None, system="trained", **facts):
    "A run folder as an evaluation leaves it, rows in any order."
    ids = list(ids or IDS[:len(rank)])
    table = ledger(ids, {"mrr": 1 / rank, "recall@1": rank == 1}, system=system)
    path.mkdir(parents=True, exist_ok=True)
    write_ledger(path / "ledger.parquet", table.take(np.random.default_rng(order).permutation(len(table))) if order else table)
    write_json(path / "metrics.json", {"data": "toy", "split": "test", "pool": 100, "exclude_self": False, **facts})
    return path


def with_queries(path, columns, ids=IDS):
    pq.write_table(pa.table({"query_id": list(ids), "text": [f"text of {q}" for q in ids], **columns}), path / "queries.parquet")
    return path


@pytest.fixture
def runs(tmp_path): return folder(tmp_path / "a", ranks(0)), folder(tmp_path / "b", ranks(1))


def one_line(error): assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---- figures

def test_figures_are_those_of_the_values(runs):
    found = compare(runs, metrics=["mrr", "recall@1"], n_resamples=2_000, seed=3)
    a, b = 1 / ranks(0), 1 / ranks(1)
    d, alone = found["differences"]["b - a"]["mrr"], paired_difference(b, a, seed=3, n_resamples=2_000)
    assert d["value"] == alone["value"] == pytest.approx(b.mean() - a.mean()) and d["p"] == alone["p"] == d["holm"]
    assert d["ci95"] == pytest.approx(alone["ci95"]) and (d["wins"], d["ties"], d["losses"]) == ((b > a).sum(), (b == a).sum(), (b < a).sum())
    assert found["systems"]["a"]["mrr"]["ci95"] == pytest.approx(mean_interval(a, seed=3, n_resamples=2_000)["ci95"])
    assert (found["queries"], found["pool"], found["warning"]) == (60, 100, "")
    assert found == compare(runs, metrics=["mrr", "recall@1"], n_resamples=2_000, seed=3)


def test_order_of_rows_is_irrelevant(runs, tmp_path):
    shuffled = folder(tmp_path / "other" / "a", ranks(0), order=4), folder(tmp_path / "other" / "b", ranks(1), order=5)
    one, two = compare(runs, **FAST), compare(shuffled, **FAST)
    for part in ("systems", "differences", "movers", "power"): assert one[part] == two[part]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20)), min_size=1, max_size=30), st.integers(0, 99))
def test_exchanging_runs_changes_signs_only_and_groups_add_up(tmp_path_factory, rows, seed):
    rank_a, rank_b, column = (np.array(x) for x in zip(*rows))
    home, n = tmp_path_factory.mktemp("pair"), len(rows)
    a, b = folder(home / "a", rank_a), folder(home / "b", rank_b, order=seed + 1)
    with_queries(a, {"column": column}, IDS[:n])
    one, two = compare([a, b], by="column", seed=seed, **FAST), compare([b, a], by="column", seed=seed, **FAST)
    def turned(d): return None if d["ci95"] is None else pytest.approx([-d["ci95"][1], -d["ci95"][0]], abs=1e-12)
    for metric, d in one["differences"]["b - a"].items():
        e = two["differences"]["a - b"][metric]
        assert (e["value"], e["p"], e["holm"], e["wins"], e["losses"]) == (-d["value"], d["p"], d["holm"], d["losses"], d["wins"])
        assert e["ci95"] == turned(d) and d["wins"] + d["ties"] + d["losses"] == d["n"] == n
        groups, others = one["groups"]["b - a"], two["groups"]["a - b"]
        assert list(groups) == list(others)
        assert sum(g[metric]["n"] for g in groups.values()) == n
        assert sum(g[metric]["n"] * g[metric]["value"] for g in groups.values()) / n == pytest.approx(d["value"], abs=1e-12)
        assert all((g[metric]["ci95"] is None) == (g[metric]["n"] == 1) for g in groups.values())
        assert all(others[label][metric]["ci95"] == turned(g[metric]) for label, g in groups.items())
    gained, lost = one["movers"]["b - a"]["gained"], two["movers"]["a - b"]["lost"]
    assert [m["query_id"] for m in gained] == [m["query_id"] for m in lost]


def test_holm_goes_over_the_runs_metric_by_metric(tmp_path):
    rank = ranks(0)
    paths = [folder(tmp_path / name, r) for name, r in [("a", rank), ("same", rank), ("better", np.maximum(1, rank - 3)), ("b", ranks(2))]]
    found = compare(paths, **FAST)["differences"]
    for metric in FAST["metrics"]:
        p = sorted((figures[metric]["p"], figures[metric]["holm"]) for figures in found.values())
        adjusted = np.minimum(1, np.maximum.accumulate([value * times for (value, _), times in zip(p, (3, 2, 1))]))
        assert [h for _, h in p] == pytest.approx(list(adjusted))
    assert found["same - a"]["mrr"]["holm"] == 1 and list(found) == ["same - a", "better - a", "b - a"]
    said = repr(compare(paths, **FAST).verdict())
    assert "better beats a: mrr +" in said and "same is not shown to differ from a" in said and "after Holm over 3 runs" in said


def test_movers_have_texts_and_ranks(runs):
    with_queries(runs[1], {})  # beside the second run only
    found = compare(runs, **FAST, k=5)
    moved, a, b = found["movers"]["b - a"], ranks(0), ranks(1)
    assert len(moved["gained"]) == len(moved["lost"]) == 5
    for m in moved["gained"] + moved["lost"]:
        i = IDS.index(m["query_id"])
        assert m["query"] == f"text of {m['query_id']}" and (m["rank_before"], m["rank_after"]) == (a[i], b[i]) and (m["before"], m["after"]) == (1 / a[i], 1 / b[i])
    gains = [m["after"] - m["before"] for m in moved["gained"]]
    assert gains == sorted(gains, reverse=True) and gains[0] == max(1 / b - 1 / a)
    assert "text of" in repr(found.moved())


def test_power_is_of_the_differences_and_shown(runs):
    found = compare(runs, **FAST, delta=0.02)
    needed = found["power"]["queries"]["b - a"]["mrr"]
    d = 1 / ranks(1) - 1 / ranks(0)
    assert found["power"]["delta"] == 0.02 and needed == pytest.approx((1.959964 + 0.841621)**2 * d.var(ddof=1) / 0.02**2 + 1.92, abs=1)
    assert f"{needed:,}" in repr(found.power_page(0.02)) and found.power(0.02) == found["power"]["queries"]


# ---- which runs, which system

def test_two_systems_of_one_run_and_a_ledger_file(tmp_path):
    path = folder(tmp_path / "a", ranks(0))
    write_ledger(path / "ledger.parquet", pa.concat_tables([read_ledger(path / "ledger.parquet"), ledger(IDS, {"mrr": 1 / ranks(1), "recall@1": ranks(1) == 1}, system="bm25")]))
    inside = compare([f"{path}:bm25", path], **FAST)
    assert list(inside["systems"]) == ["bm25", "trained"] and inside["runs"]["bm25"]["system"] == "bm25"
    assert inside["systems"]["bm25"]["mrr"]["value"] == np.mean(1 / ranks(1))
    plain = tmp_path / "plain.parquet"  # a ledger of its own, without systems and without a run
    write_ledger(plain, of_system(read_ledger(path / "ledger.parquet"), "bm25").drop_columns("system"))
    outside = compare([plain, f"{path / 'ledger.parquet'}:trained"], **FAST)
    assert outside["differences"]["a:trained - plain"] == inside["differences"]["trained - bm25"]
    with pytest.raises(DataError, match="has no column 'system'") as error: compare([f"{plain}:bm25", path], **FAST)
    one_line(error)
    with pytest.raises(ConfigError, match="unknown system 'tained'; did you mean 'trained'") as error: compare([path, f"{path}:tained"], **FAST)
    one_line(error)


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    a, b = folder(tmp_path / "x" / "run", ranks(0)), folder(tmp_path / "y" / "run", ranks(1))
    assert len(compare([a, b], **FAST)["systems"]) == 2
    with pytest.raises(ConfigError, match="named twice") as error: compare([a, a], **FAST)
    one_line(error)


def test_whatever_differs_but_the_systems_is_said(tmp_path, caplog):
    a, b = folder(tmp_path / "a", ranks(0)), folder(tmp_path / "b", ranks(1), pool=250, exclude_self=True)
    for path, sha256 in [(a, "a1" * 32), (b, "b2" * 32)]: write_json(path / "run.json", {"status": "finished", "data": {"test": {"sha256": sha256}}})
    found = compare([a, b], **FAST)
    assert found["warning"] in caplog.text and found["warning"] in repr(found) and found["pool"] is None
    for part in ["pool (a: 100, b: 250)", "exclude_self (a: False, b: True)", "test data (a: a1a1a1a1a1a1, b: b2b2b2b2b2b2)"]: assert part in found["warning"]
    caplog.clear()
    assert compare([a, folder(tmp_path / "c", ranks(1))], **FAST)["warning"] == "" and not caplog.text


# ---- what is refused

def test_different_queries_are_refused_and_named(tmp_path):
    a, b = folder(tmp_path / "a", ranks(0)), folder(tmp_path / "b", ranks(1, 55))
    c = folder(tmp_path / "c", ranks(2), ids=[*IDS[:-1], "q999"])
    with pytest.raises(DataError) as error: compare([a, b], **FAST)
    assert "b lacks 5 of 60 queries ('q055', 'q056', 'q057', ...)" in str(error.value) and "a lacks" not in str(error.value)
    one_line(error)
    with pytest.raises(DataError) as error: compare([a, b, c], **FAST)
    assert "a lacks 1 of 61 queries ('q999'); b lacks 6 of 61" in str(error.value) and "c lacks 1 of 61 queries ('q059')" in str(error.value)
    one_line(error)


def rewritten(path, change):
    write_ledger(path / "ledger.parquet", change(read_ledger(path / "ledger.parquet")))


def column(table, name, values): return table.set_column(table.column_names.index(name), name, values)


def edited(name, row, value): return lambda table: column(table, name, pa.array([*table[name].to_pylist()[:row], value, *table[name].to_pylist()[row + 1:]], table[name].type))


@pytest.mark.parametrize("change, says", [
    (edited("value", 3, float("nan")), "'mrr' of query 'q003' is not a finite number"),
    (edited("value", 63, float("inf")), "'recall@1' of query 'q003' is not a finite number"),
    (edited("value", 3, None), "'mrr' of query 'q003' is not a finite number"),
    (edited("query_id", 3, "q004"), "query 'q004' has several values of 'mrr'"),
    (edited("query_id", 3, None), "1 rows have no query_id"),
    (lambda table: pa.concat_tables([table, table]), "query 'q000' has several values of 'mrr' \\(one of 60"),
    (lambda table: table.slice(0, 0), "the ledger is empty"),
    (lambda table: table.slice(0, 119), "recall@1 lacks 1 of 60 queries \\('q059'\\)"),
    (lambda table: table.slice(0, 60), "unknown metric 'recall@1'"),
    (lambda table: table.drop_columns("value"), "has no column 'value'"),
    (lambda table: column(table, "value", pa.array(["high"] * len(table))), "not a ledger"),
    (lambda table: column(table, "system", pa.array(["bm25"] * len(table))), "unknown system 'trained' \\(choose from bm25\\)"),
])
def test_damaged_ledgers_are_named(runs, change, says):
    rewritten(runs[1], change)
    with pytest.raises((DataError, ConfigError), match=says) as error: compare(runs, **FAST)
    assert str(runs[1]) in str(error.value)
    one_line(error)


def test_missing_and_torn_files_are_named(runs, tmp_path):
    a, b = runs
    torn = b / "ledger.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(DataError, match="b/ledger.parquet: cannot be read as a ledger") as error: compare(runs, **FAST)
    one_line(error)
    torn.unlink()
    with pytest.raises(DataError, match="no run folder") as error: compare(runs, **FAST)
    one_line(error)
    write_json(b / "run.json", {"status": "interrupted"})
    with pytest.raises(DataError, match="no ledger.parquet, its status is 'interrupted'") as error: compare(runs, **FAST)
    one_line(error)
    for gone in [tmp_path / "gone", tmp_path / "gone.parquet"]:
        with pytest.raises(DataError, match="gone") as error: compare([a, gone], **FAST)
        one_line(error)
    for wrong in [[a], [], str(a)]:
        with pytest.raises(ConfigError, match="two or more runs") as error: compare(wrong, **FAST)
        one_line(error)


def test_numbers_as_query_ids_are_the_same_queries(runs):
    for path in runs: rewritten(path, lambda table: column(table, "query_id", pa.array([int(q[1:]) for q in table["query_id"].to_pylist()])))
    assert compare(runs, **FAST)["queries"] == 60


def test_one_query(tmp_path):
    found = compare([folder(tmp_path / "a", np.array([4])), folder(tmp_path / "b", np.array([2]))], **FAST)
    d = found["differences"]["b - a"]["mrr"]
    assert (d["value"], d["ci95"], d["p"], d["n"], d["wins"]) == (0.25, None, 1, 1, 1) and found["power"]["queries"]["b - a"] == {"mrr": None, "recall@1": None}
    assert "is not shown to differ" in repr(found.verdict()) and "[no interval]" in repr(found) and "unknown" in repr(found.power_page(0.01))
    found.forest(), found.change()


# ---- groups

def test_groups_of_a_column(runs):
    rng = np.random.default_rng(6)
    columns = dict(words=rng.integers(1, 30, 60), source=["docs", "forum", "mail"] * 20, rare=[f"t{i}" for i in range(30)] * 2, flag=[True, False] * 30,
                   share=[None if i < 5 else i / 7 for i in range(60)], tags=[["x"], ["y"]] * 30)
    with_queries(runs[0], columns)
    def sizes(by): return {label: found["mrr"]["n"] for label, found in compare(runs, by=by, **FAST)["groups"]["b - a"].items()}
    assert sizes("source") == {"docs": 20, "forum": 20, "mail": 20} and sizes("flag") == {"False": 30, "True": 30} and len(sizes("tags")) == 2
    assert len(sizes("words")) == 4 and all(10 <= n <= 20 for n in sizes("words").values())
    assert len(sizes("rare")) == 12 and sizes("rare")["19 others"] == 38
    assert sizes("share")["unknown"] == 5 and sum(sizes("share").values()) == 60 and len(sizes("share")) == 5
    found = compare(runs, by="source", **FAST)
    forum = np.arange(60) % 3 == 1
    assert found["groups"]["b - a"]["forum"]["mrr"]["value"] == pytest.approx(np.mean((1 / ranks(1) - 1 / ranks(0))[forum]))
    assert "b - a by source" in repr(found) and "<th>b - a by source</th>" in found._repr_html_()
    with pytest.raises(ConfigError, match="unknown column of queries.parquet 'sorce'; did you mean 'source'") as error: compare(runs, by="sorce", **FAST)
    one_line(error)


def test_groups_need_queries_that_can_be_read(runs):
    with pytest.raises(DataError, match="by 'words' needs a queries.parquet") as error: compare(runs, by="words", **FAST)
    one_line(error)
    (runs[0] / "queries.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="queries.parquet: cannot be read") as error: compare(runs, by="words", **FAST)
    one_line(error)
    pq.write_table(pa.table({"text": ["x"]}), runs[0] / "queries.parquet")
    with pytest.raises(DataError, match="query_id") as error: compare(runs, **FAST)
    one_line(error)
    with_queries(runs[0], {"words": range(50)}, IDS[:50])  # ten queries of the ledger are not among them
    assert compare(runs, by="words", **FAST)["groups"]["b - a"]["unknown"]["mrr"]["n"] == 10


@given(st.lists(st.one_of(st.none(), st.floats(), st.integers(-10**6, 10**6).map(float)), min_size=1, max_size=60) | st.lists(st.none() | st.text(max_size=2), min_size=1, max_size=60))
def test_every_query_is_in_exactly_one_group(values):
    groups = group_rows(pa.array(values, pa.float64() if any(isinstance(v, float) for v in values) else pa.string()))
    assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(values))) and len(groups) <= 13


@given(st.lists(st.integers(0, 10**6), min_size=40, max_size=200, unique=True))
def test_quarters_are_of_nearly_equal_size(values):
    sizes = [len(rows) for rows in group_rows(pa.array(values)).values()]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 3


# ---- saved and shown

def test_saved_comparison_is_json_and_holds_everything(runs, tmp_path):
    with_queries(runs[0], {"words": range(60)})
    found = compare(runs, by="words", out=tmp_path / "out", **FAST)
    assert read_json(tmp_path / "out" / "comparison.json") == found == json.loads(json.dumps(found, allow_nan=False))
    assert list(found["differences"]["b - a"]["mrr"]) == ["value", "ci95", "p", "n", "holm", "wins", "ties", "losses"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["comparison.json"]


def test_names_are_escaped_and_figures_drawn(tmp_path):
    found = compare([with_queries(folder(tmp_path / "<b>", ranks(0)), {"words": range(60)}), folder(tmp_path / "c", ranks(1))], by="words", **FAST)
    for page in (found, found.verdict(), found.moved(), found.power_page(0.01)): assert "<b>" not in page._repr_html_().replace("<p><b>", "")
    assert [t.get_text() for t in found.forest().get_yticklabels()] == ["recall@1", "mrr"]
    assert [t.get_text() for t in found.forest(groups=True).get_yticklabels()][::-1] == [f"{label} (n = 15)" for label in found["groups"]["c - <b>"]]
    d = found["differences"]["c - <b>"]["mrr"]
    assert f"{d['wins']:,} better, {d['ties']:,} equal, {d['losses']:,} worse" in found.change().get_title()
    with pytest.raises(ConfigError, match="unknown run"): found.change("d")


def test_an_evaluation_leaves_what_a_comparison_needs(tmp_path):
    class Backwards:
        def blocks(self, queries, candidates): yield slice(0, len(queries)), -np.array([[float(len(c))] * len(queries) for c in candidates], np.float32).T
    rows = [{"query": f"word{i} " + "and so on " * (i % 4), "code": f"def f{i}(): word{i}", "package": f"p{i % 3}"} for i in range(30)]
    rows += [{"query": rows[0]["query"], "code": "def again(): word0", "package": "p0"}]
    store = from_pairs(rows, group="package", source="mined")
    for name, scorer in [("one", BM25()), ("two", Backwards())]: Evaluation(store, data="toy").add("trained", scorer).save(tmp_path / name)
    asked = pq.read_table(tmp_path / "one" / "queries.parquet").to_pylist()
    assert [row["query_id"] for row in asked] == store.queries["query_id"].to_pylist() and [row["text"] for row in asked] == store.query_texts
    assert [row["words"] for row in asked] == [len(text.split()) for text in store.query_texts]
    assert [row["positives"] for row in asked] == [2] + [1] * 29 and {row["source"] for row in asked} == {"mined"} and asked[1]["group"] == "p1"
    found = compare([tmp_path / "two", tmp_path / "one"], by="group", n_resamples=500)
    assert found["differences"]["one - two"]["mrr"]["value"] > 0 and set(found["groups"]["one - two"]) == {"p0", "p1", "p2"} and found["pool"] == 31
    figures = read_json(tmp_path / "one" / "metrics.json")["systems"]["trained"]
    assert found["systems"]["one"]["mrr"]["value"] == figures["mrr"]["value"]
    assert list(compare([tmp_path / "two", tmp_path / "one"], by="positives", n_resamples=500)["groups"]["one - two"]) == ["1", "2"]


def test_bm25_on_real_queries_and_on_their_first_words(tmp_path, data_dir):
    "SciFact: cutting each query to its first four words hurts, long queries most."
    class FirstWords(BM25):
        def blocks(self, queries, candidates): return super().blocks([" ".join(q.split()[:4]) for q in queries], candidates)
    store = load_test("scifact")
    for name, scorer in [("full", BM25()), ("cut", FirstWords())]: Evaluation(store, data="scifact").add("trained", scorer).save(tmp_path / name)
    found = compare([tmp_path / "full", tmp_path / "cut"], by="words", n_resamples=2_000)
    d = found["differences"]["cut - full"]["ndcg@10"]
    assert d["n"] == len(store.query_texts) and d["ci95"][1] < 0 and d["p"] < 0.001 and "cut is worse than full" in repr(found.verdict())
    groups = list(found["groups"]["cut - full"].values())
    assert len(groups) == 4 and groups[-1]["ndcg@10"]["value"] < groups[0]["ndcg@10"]["value"]
    assert found["power"]["queries"]["cut - full"]["ndcg@10"] > d["n"]


# ---- the notebook

def test_the_notebook_declares_the_fields_of_its_config():
    declared = papermill.inspect_notebook(str(NOTEBOOK))
    assert list(declared) == list(CompareConfig.model_fields)
    for field, parameter in declared.items():
        info = CompareConfig.model_fields[field]
        assert eval(parameter["default"]) == (None if info.is_required() else info.get_default(call_default_factory=True)), field


@pytest.mark.parametrize("given", ["[{}, {}]", "{},{}"])
def test_the_notebook_is_the_report_of_a_comparison(runs, tmp_path, given):
    with_queries(runs[0], {"words": range(60)})
    papermill.execute_notebook(str(NOTEBOOK), str(tmp_path / "out.ipynb"), dict(runs=given.format(*runs), metrics="mrr, recall@1", by="words", out=str(tmp_path / "out")),
                               progress_bar=False, kernel_name="python3")
    shown = [o["data"] for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 3 and any("b - a by words" in data.get("text/plain", "") for data in shown)
    assert read_json(tmp_path / "out" / "comparison.json")["by"] == "words"
