"The log miner: the rules written a second time, any order and division of the log, kills, what must not get out, broken lines."
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError, ProjError
from proj.data.logs import COUNTS, REASONS, REJECTS, ROWS, RULES, STATE, append, log_store, same
from proj.data.sources import load_data
from proj.data.split import near_duplicate_keys, normalise


def write(path: Path, rows) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def files(folder) -> dict[str, bytes]: return {name: Path(folder, name).read_bytes() for name in (STATE, ROWS, COUNTS)}


def rows_of(folder) -> list[dict]: return [json.loads(line) for line in Path(folder, ROWS).read_text(encoding="utf-8").split("\n")[:-1]]


def mined(folder: Path, rows) -> list[dict]:
    append(folder / "out", [write(folder / "log.jsonl", rows)])
    return rows_of(folder / "out")


# ---- the rules, a second time: slowly, from the raw events

@lru_cache(maxsize=None)
def alike(a: str, b: str) -> bool: return len(set(near_duplicate_keys([a, b]))) == 1


def text_in(item): return item.get("text") if (item.get("text") or "").strip() else None


def naive(events: list[dict]) -> tuple[list[dict], Counter]:
    "Rows and what became of each query, one query after another, without a thought for speed."
    queries, rows, fate = {}, [], Counter()
    undated = float("-inf")
    ts = lambda event: undated if event.get("ts") is None else event["ts"]
    for event in events:
        if "signal" in event: continue
        known = queries.get(event["event_id"])
        if known is None or ts(event) > ts(known): queries[event["event_id"]] = event
    for name in sorted(queries):
        event, shown = queries[name], []
        for item in event.get("retrieval") or []:
            if item["doc_id"] not in [i["doc_id"] for i in shown]: shown.append(item)
        order = [item["doc_id"] for item in shown]
        refs = [ref if isinstance(ref, dict) else {"doc_id": ref} for ref in event.get("ground_truth_refs") or []]
        truth = [ref["doc_id"] for ref in refs]
        def text_of(doc):
            for item in shown + refs:
                if item["doc_id"] == doc and text_in(item): return item["text"]
        opinions = []  # (time, what, document)
        for said in events:
            if said.get("event_id") != name or "signal" not in said: continue
            kind, doc = said["signal"], said.get("doc_id")
            if kind == "click": opinions.append((ts(said), "click", doc))
            elif kind in ("thumbsup", "star3", "star4", "star5"): opinions.append((ts(said), "up", doc or (order[0] if order else None)))
            elif kind in ("thumbsdown", "star1", "star2"): opinions.append((ts(said), "down", doc or (order[0] if order else None)))
        def rejected(doc):
            if doc in truth: return False
            about = [(when, what) for when, what, which in opinions if which == doc]
            if not about: return False
            latest = max(when for when, _ in about)
            return (latest, "down") in about
        found = []
        clicked = [(when, order.index(doc) if doc in order else 99, doc) for when, what, doc in opinions if what == "click"]
        for _, _, doc in sorted(clicked, key=lambda c: c[:2]): found.append(("click", doc))
        for item in shown:
            if item.get("clicked"): found.append(("clicked flag", item["doc_id"]))
        flag = event.get("clicked")
        if flag is True: found.append(("clicked flag", None))
        elif isinstance(flag, str): found.append(("clicked flag", flag))
        elif flag is not None and flag is not False:
            listed = [item["doc_id"] for item in event.get("retrieval") or []]
            found.append(("clicked flag", listed[flag] if flag < len(listed) else None))
        for doc in truth: found.append(("ground truth", doc))
        for doc in order:
            if any(what == "up" and which == doc for _, what, which in opinions): found.append(("thumbs-up", doc))
        for _, what, doc in opinions:
            if what == "up" and doc not in order: found.append(("thumbs-up", doc))
        standing = [(rule, doc) for rule, doc in found if not rejected(doc)]
        usable = [(rule, doc) for rule, doc in standing if text_of(doc)]
        if not usable:
            if standing: fate["no text"] += 1
            elif found: fate["taken back"] += 1
            elif any(what == "down" and doc not in truth for _, what, doc in opinions): fate["only a thumbs-down"] += 1
            else: fate["nothing marked"] += 1
            continue
        rule, positive = usable[0]
        fate[rule] += 1
        right = [text_of(doc) for _, doc in usable]
        bad = [doc for doc in order if rejected(doc)]
        after = order[order.index(positive) + 1:] if positive in order else order
        negatives = []
        for doc in bad + after:
            text = text_of(doc)
            if text is None or any(doc == other for _, other in usable): continue
            if any(alike(text, other) for other in right): continue
            if any(normalise(text) == normalise(other) for other in negatives): continue
            if len(negatives) < 4: negatives.append(text)
        rows.append(dict(query=event.get("query_rewritten") or event["query_raw"], positive=text_of(positive), negatives=negatives, grade=1.0, event_id=name, rule=rule))
    return rows, fate


LONG = "the quick brown fox jumps over the lazy dog and runs away from the old bear"
TEXTS = [LONG, LONG + " now", "The quick, brown fox " + LONG[20:], "xs.sort()", "XS.sort( )", "if 12 < 17", "if 17 < 12", "max(xs)", "min(xs)", "len(xs)", "größe\u2028zwei", None, " "]
DOCS, TIMES = [f"d{at}" for at in range(7)], st.sampled_from([None, 1, 2, 3.5])
which = st.sampled_from(DOCS)
item = st.fixed_dictionaries({"doc_id": which, "text": st.sampled_from(TEXTS)}, optional={"clicked": st.sampled_from([False, False, False, False, None, True]), "score": st.floats(-1, 1)})
usual = st.permutations(TEXTS[1:11]).map(lambda texts: [{"doc_id": doc, "text": text} for doc, text in zip(DOCS, texts)])  # ids and texts each once
query = st.fixed_dictionaries(
    {"event_id": st.sampled_from("abc"), "query_raw": st.sampled_from(["sort", "find"]), "ts": TIMES, "retrieval": st.one_of(usual, st.lists(item, max_size=9))},
    optional={"query_rewritten": st.sampled_from(["sort a list", None]), "clicked": st.one_of(st.just(False), st.booleans(), st.integers(0, 9), which),
              "ground_truth_refs": st.lists(st.one_of(which, st.fixed_dictionaries({"doc_id": which, "text": st.sampled_from(TEXTS)})), max_size=2,
                                            unique_by=lambda ref: ref["doc_id"] if isinstance(ref, dict) else ref)})
SIGNALS = ["click", "click", "noclick", "note", "thumbsup", "thumbsdown", "thumbsdown", "star1", "star2", "star3", "star4", "star5"]
feedback = st.fixed_dictionaries({"event_id": st.sampled_from("abcd"), "signal": st.sampled_from(SIGNALS), "ts": TIMES, "doc_id": st.one_of(st.none(), which)})
few, many_said = st.lists(feedback, max_size=10), st.lists(feedback, min_size=5, max_size=12)
logs = st.tuples(st.lists(query, max_size=4, unique_by=lambda q: (q["event_id"], q["ts"])), st.one_of(few, many_said)).map(lambda both: both[0] + both[1])


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=logs, draw=st.randoms(use_true_random=False))
def test_the_rules_agree_with_a_second_writing_of_them_whatever_the_order(events, draw):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        got = mined(folder, events)
        rows, fate = naive(events)
        assert got == rows
        figures = json.loads((folder / "out" / COUNTS).read_text())
        assert +Counter(figures["rules"] | figures["dropped"]) == fate
        assert figures["kept"] == len(rows) and sum(figures["negatives"].values()) == len(rows)
        assert figures["unknown"] == len({json.dumps(e, sort_keys=True) for e in events if "signal" in e and not any(e["event_id"] == q["event_id"] for q in events if "signal" not in q)})
        # any order, any division into files and calls, with repetitions
        whole, pieces = files(folder / "out"), [draw.choice([[event], [event, event]]) for event in events]
        shuffled = draw.sample([event for piece in pieces for event in piece], sum(map(len, pieces)))
        at = sorted(draw.choices(range(len(shuffled) + 1), k=2))
        parts = [write(folder / f"{number}.jsonl", part) for number, part in enumerate([shuffled[:at[0]], shuffled[at[0]:at[1]], shuffled[at[1]:]])]
        append(folder / "again", draw.sample(parts[:2], 2))
        append(folder / "again", [parts[2], *draw.sample(parts, 1)])
        assert files(folder / "again") == whole


def test_every_rule_and_every_reason_occurs_in_the_generated_logs():
    "The comparison above is worth nothing for a rule that is never reached."
    seen, more = Counter(), Counter()
    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(events=logs)
    def count(events):
        rows, fate = naive(events)
        seen.update(fate)
        more.update(len(row["negatives"]) for row in rows)
    count()
    assert min(seen.values()) > 3 and min(more.values()) > 3
    assert set(seen) == {*RULES, *REASONS} and set(more) == {0, 1, 2, 3, 4}


conflicting = st.lists(query.map(lambda q: q | {"event_id": "a", "ts": 1}), min_size=2, max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=conflicting, draw=st.randoms(use_true_random=False))
def test_queries_with_one_id_at_one_time_are_settled_the_same_way_in_any_order(events, draw):
    with tempfile.TemporaryDirectory() as name:
        append(Path(name, "one"), [write(Path(name, "log.jsonl"), events)])
        for event in draw.sample(events, len(events)): append(Path(name, "two"), [write(Path(name, "piece.jsonl"), [event])])
        assert files(Path(name, "one")) == files(Path(name, "two"))


def test_times_that_are_equal_are_written_alike(tmp_path):
    for name, order in (("one", (0, 0.0, -0.0, "1970-01-01")), ("two", ("1970-01-01T00:00:00Z", -0.0, 0.0))):
        for ts in order: append(tmp_path / name, [write(tmp_path / "log.jsonl", [ASK | {"ts": ts}, said("click", "d1", ts)])])
    assert files(tmp_path / "one") == files(tmp_path / "two")


@settings(max_examples=150, deadline=None)
@given(a=st.lists(st.sampled_from("a b c dd".split()), min_size=1, max_size=14), b=st.lists(st.sampled_from("a b c dd".split()), min_size=1, max_size=14), cut=st.integers(0, 14))
@example(a="if 12 < 17".split(), b="if 17 < 12".split(), cut=0)
def test_same_is_the_jaccard_similarity_of_shingles(a, b, cut):
    a, b = " ".join(a), " ".join([*a[:cut], *b[cut:]])
    def shingles(text):
        words = text.split() if len(text.split()) >= 8 else list(text)
        words += [""] * (5 - len(words))
        return {tuple(words[at:at + 5]) for at in range(len(words) - 4)}
    one, two = shingles(normalise(a)), shingles(normalise(b))
    assert same([a, b], np.array([0]), np.array([1]))[0] == (len(one & two) >= 0.8 * len(one | two) - 1e-12)


# ---- examples by hand

SHOWN = [{"doc_id": f"d{at}", "score": 1 / (1 + at), "text": text} for at, text in enumerate(["pop(xs)", "sorted(xs)", "xs.reverse()", "max(xs)", "len(xs)", "sum(xs)", "all(ys)"])]
ASK = {"event_id": "e1", "ts": "2024-05-01T10:00:00Z", "query_raw": "sort", "retrieval": SHOWN}
def said(what, doc=None, ts=None): return {"event_id": "e1", "signal": what, "doc_id": doc, "ts": ts}


@pytest.mark.parametrize("events,positive,negatives,rule", [
    ([said("click", "d1")], 1, [2, 3, 4, 5], "click"),
    ([said("click", "d4", 9), said("click", "d1", 10)], 4, [5, 6], "click"),            # the first in time
    ([said("click", "d4"), said("click", "d1")], 1, [2, 3, 5, 6], "click"),             # without times the higher ranked
    ([said("click", "d1"), said("thumbsdown")], 1, [0, 2, 3, 4], "click"),              # the top document
    ([said("click", "d1"), said("thumbsup")], 1, [2, 3, 4, 5], "click"),
    ([said("star3")], 0, [1, 2, 3, 4], "thumbs-up"),
    ([said("star2", ts=1), said("star5", ts=2)], 0, [1, 2, 3, 4], "thumbs-up"),         # the later opinion
    ([said("star2", ts="2024-05-02"), said("star5", ts="2024-05-02T00:00:01+01:00")], None, [], None),
    ([said("star5", ts=2), said("star2", ts=2)], None, [], None),                       # at the same time the worse
    ([said("click", "d1", 1), said("thumbsdown", "d1", 2), said("click", "d2", 3)], 2, [1, 3, 4, 5], "click"),
    ([said("noclick"), said("note", "d3")], None, [], None),
    ([said("click", "elsewhere")], None, [], None),
    ([said("click")], None, [], None),
])
def test_feedback(tmp_path, events, positive, negatives, rule):
    got = mined(tmp_path, [*events, ASK])
    text = lambda at: SHOWN[at]["text"]
    assert got == ([] if rule is None else [dict(query="sort", positive=text(positive), negatives=list(map(text, negatives)), grade=1.0, event_id="e1", rule=rule)])


@pytest.mark.parametrize("fields,positive,rule", [
    ({"clicked": "d3"}, 3, "clicked flag"), ({"clicked": 2}, 2, "clicked flag"), ({"clicked": True}, None, None), ({"clicked": False}, None, None),
    ({"clicked": 99, "ground_truth_refs": ["d5"]}, 5, "ground truth"), ({"ground_truth_refs": ["unknown", {"doc_id": "d2"}]}, 2, "ground truth"),
    ({"clicked": 5, "retrieval": [*SHOWN[:3], SHOWN[3] | {"clicked": True}, *SHOWN[4:]]}, 3, "clicked flag"),
    ({"clicked": 1, "ground_truth_refs": ["d5"]}, 1, "clicked flag"), ({"ground_truth_refs": ["d0"]}, 0, "ground truth"), ({"clicked": 0}, None, None)])
def test_marks_of_the_query_itself(tmp_path, fields, positive, rule):
    "All under a thumbs-down, which is above a flag and below ground truth."
    got = mined(tmp_path, [ASK | fields, said("thumbsdown")])
    assert [(row["positive"], row["rule"]) for row in got] == ([] if rule is None else [(SHOWN[positive]["text"], rule)])


def test_ground_truth_that_was_not_retrieved(tmp_path):
    row, = mined(tmp_path, [ASK | {"ground_truth_refs": [{"text": "xs.sort()"}]}, said("thumbsdown", "d2")])
    assert row["positive"] == "xs.sort()" and row["negatives"] == ["xs.reverse()", "pop(xs)", "sorted(xs)", "max(xs)"]


def test_a_comparison_turned_round_is_no_duplicate(tmp_path):
    shown = [{"doc_id": at, "text": text} for at, text in enumerate(["12 < 17", "12  <  17", "17 < 12", "12 > 17"])]
    row, = mined(tmp_path, [ASK | {"retrieval": shown, "clicked": 0}])
    assert row["negatives"] == ["17 < 12", "12 > 17"]


def test_feedback_that_comes_later_updates_its_row(tmp_path):
    out = tmp_path / "out"
    report = append(out, [write(tmp_path / "click.jsonl", [said("click", "d1", 5)])])
    assert report.figures["unknown"] == 1 and rows_of(out) == []  # its query is not here yet
    append(out, [write(tmp_path / "query.jsonl.gz", [ASK])])
    assert [row["positive"] for row in rows_of(out)] == ["sorted(xs)"]
    append(out, [write(tmp_path / "late.jsonl", [said("star1", "d1", 6), said("click", "d2", 7)])])
    row, = rows_of(out)
    assert row["positive"] == "xs.reverse()" and row["negatives"][0] == "sorted(xs)"
    report = append(out, [tmp_path / "query.jsonl.gz", tmp_path / "click.jsonl", tmp_path / "late.jsonl"])
    assert report.tally == {"repeated": 4} and "events repeated now" in repr(report)
    append(out, [write(tmp_path / "again.jsonl", [ASK | {"ts": "2024-05-02T10:00:00Z", "query_raw": "sort it"}])])  # the query, written again
    assert rows_of(out)[0]["query"] == "sort it"
    append(out, [tmp_path / "query.jsonl.gz"])
    assert rows_of(out)[0]["query"] == "sort it"


# ---- many events

def many(n: int, seed: int = 0) -> list[str]:
    "So many lines: half queries, half feedback, with what a real log holds besides."
    draw = random.Random(seed)
    words = [f"word{at}" for at in range(400)]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(1_500)]
    texts += [text + " more" for text in texts[:300]]
    lines, personal = [], {"client": {"ip": "192.0.2.77", "agent": "Mozilla/5.0"}, "session": "s3cr3t"}
    for at in range(n // 2):
        shown = [{"doc_id": f"d{doc}", "score": 0.5, "text": texts[doc], "cookie": "s3cr3t"} for doc in draw.sample(range(len(texts)), 7)]
        lines.append(json.dumps({"event_id": f"q{at}", "ts": at, "query_raw": " ".join(draw.choices(words, k=4)), "retrieval": shown, **personal}))
        lines.append(json.dumps({"event_id": f"q{draw.randrange(n // 2)}", "ts": at + draw.random(), "signal": draw.choice(SIGNALS),
                                 "doc_id": draw.choice([None, shown[0]["doc_id"]]), **personal}))
    draw.shuffle(lines)
    return lines


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    lines = many(60_000)
    append(folder / "out", [write(folder / "log.jsonl", lines)])
    return folder, lines


def test_60_000_events_mined_twice_give_the_same_store(large):
    folder, lines = large
    once, store = files(folder / "out"), log_store(folder / "out").sha256
    report = append(folder / "out", [folder / "log.jsonl"])
    assert sum(report.tally.values()) == report.tally["repeated"] == len(lines) == 60_000
    assert files(folder / "out") == once and log_store(folder / "out").sha256 == store
    assert report.figures["queries"] == 30_000 and report.figures["kept"] > 3_000
    assert not any(secret in content for secret in (b"192.0.2", b"Mozilla", b"s3cr3t", b"cookie", b"client") for content in once.values())


def test_the_output_trains(large):
    parts = load_data(str(large[0] / "out" / ROWS))
    assert all(len(store.queries) > 100 and store.has == {"pairs", "negatives", "grades"} for _, store in parts.parts())
    assert len(load_data(str(large[0] / "out")).train.queries) == len(parts.train.queries)  # the folder does as well


# ---- what must not get out

SECRETS = ["alice@example.org", "192.0.2.201", "2001:db8::77", "Mozilla/5.0 (X11)", "sess-4711-secret", "+49 170 5550123"]
deep = st.recursive(st.sampled_from(SECRETS), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*SECRETS, "ip", "text2", "user"]), inner, max_size=3)), max_leaves=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(planted=st.lists(st.tuples(st.sampled_from(["client_ip", "user_agent", "note", "cookies", "alice@example.org", "text", "query", "positive", "rule"]), deep), min_size=1, max_size=4), events=logs)
def test_fields_that_are_not_allowed_reach_no_file_and_no_message(planted, events):
    def tainted(event):
        extra = dict(planted)
        refs = [ref | {"who": extra} if isinstance(ref, dict) else ref for ref in event.get("ground_truth_refs") or []]
        event = extra | event
        if "retrieval" in event: event |= {"retrieval": [{"who": extra} | item for item in event["retrieval"]], "ground_truth_refs": refs}
        return event
    with tempfile.TemporaryDirectory() as name:
        folder, bad = Path(name), ['{"event_id": "a", "alice@example.org": NaN}', '"alice@example.org"', '{"client": "192.0.2.201', '{"x": {"alice@example.org": 1, "alice@example.org": 2}}']
        write(folder / "clean.jsonl", events)
        write(folder / "log.jsonl", [*map(tainted, events), *bad])
        with pytest.raises(DataError) as e: append(folder / "out", [folder / "log.jsonl"])
        append(folder / "out", [folder / "log.jsonl"], skip_bad=4)
        append(folder / "clean", [folder / "clean.jsonl"])
        assert files(folder / "out") == files(folder / "clean")
        out = [path.read_text(encoding="utf-8") for path in (folder / "out").iterdir()] + [str(e.value)]
        assert len(out) == 6 and not any(secret in text for secret in SECRETS for text in out)


def test_what_people_type_is_not_scrubbed_but_counted(tmp_path, caplog):
    texts = ["mail bob@example.org", "who is 192.0.2.1", "call 0170 555-0123", "sort 12 < 17 in version 3.11.2", "top 10 of 2024"]
    with caplog.at_level("WARNING", "proj"): got = mined(tmp_path, [ASK | {"event_id": at, "query_raw": text, "clicked": 0} for at, text in enumerate(texts)])
    assert [row["query"] for row in got] == texts and json.loads((tmp_path / "out" / COUNTS).read_text())["personal"] == 3
    assert "3 queries hold what looks like an address" in caplog.text


# ---- broken lines

@pytest.mark.parametrize("line,where,reason", [
    ('{"event_id": "a", "query_raw": ', "2: query_raw", "not valid JSON"), ("[]", "2: row", "expected a JSON object"), ('{"query_raw": "a"}', "2: event_id", "missing"),
    ('{"event_id": "a"}', "2: query_raw", "blank or missing"), ('{"event_id": true, "query_raw": "a"}', "2: event_id", "whole number"),
    ('{"event_id": "a", "signal": "star0"}', "2: signal", "star5"), ('{"event_id": "a", "signal": "click", "doc_id": [1]}', "2: doc_id", "non-blank"),
    ('{"event_id": "a", "query_raw": "a", "ts": "noon"}', "2: ts", "ISO 8601"), ('{"event_id": "a", "query_raw": "a", "ts": 1e999}', "2: ts", "finite"),
    ('{"event_id": "a", "query_raw": "a", "retrieval": {}}', "2: retrieval", "a list"), ('{"event_id": "a", "query_raw": "a", "retrieval": ["d"]}', "2: retrieval[0]", "an object"),
    ('{"event_id": "a", "query_raw": "a", "retrieval": [{"doc_id": 1, "text": 2}]}', "2: retrieval[0].text", "a string"),
    ('{"event_id": "a", "query_raw": "a", "retrieval": [{"doc_id": 1}, {"doc_id": 1, "score": "high"}]}', "2: retrieval[1].score", "finite"),
    ('{"event_id": "a", "query_raw": "a", "ground_truth_refs": [{}]}', "2: ground_truth_refs[0]", "doc_id"),
    ('{"event_id": "a", "query_raw": "a", "event_id": "b"}', "2: event_id", "appears twice"), ('{"event_id": "a", "query_raw": "\\ud800"}', "2: query_raw", "surrogate")])
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, where, reason):
    path = write(tmp_path / "log.jsonl", [ASK, line, said("click", "d1")])
    with pytest.raises(DataError) as e: append(tmp_path / "out", [path])
    first = str(e.value).splitlines()[0]
    assert e.value.exit_code == 2 and first.startswith(f"{path}:{where}: ") and reason in first and not (tmp_path / "out").exists()
    append(tmp_path / "out", [path], skip_bad=1)
    assert len(rows_of(tmp_path / "out")) == 1
    rejected, = map(json.loads, (tmp_path / "out" / REJECTS).read_text().splitlines())
    assert rejected["line"] == 2 and rejected["raw"] == ""
    with pytest.raises(DataError, match="2 bad rows, skip_bad allows 1"): append(tmp_path / "out", [path, path], skip_bad=1)


@pytest.mark.parametrize("name,content,message", [
    ("cut.jsonl.gz", gzip.compress(json.dumps(ASK).encode())[:-25], "gzip data is damaged"), ("zipped.jsonl", gzip.compress(b"{}"), "add .gz"), ("log.jsonl", b"PAR1rest", "Parquet")])
def test_a_file_that_cannot_be_read_is_an_error_that_skipping_does_not_help(tmp_path, name, content, message):
    append(tmp_path / "out", [write(tmp_path / "good.jsonl", [ASK])])
    before = files(tmp_path / "out")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message): append(tmp_path / "out", [tmp_path / "good.jsonl", tmp_path / name], skip_bad=9)
    assert files(tmp_path / "out") == before


def test_wrong_arguments(tmp_path):
    log = write(tmp_path / "log.jsonl", [ASK])
    with pytest.raises(DataError, match=r"no such file; did you mean 'log.jsonl'\?"): append(tmp_path / "out", [tmp_path / "lag.jsonl"])
    with pytest.raises(DataError, match="is a folder"): append(tmp_path / "out", [tmp_path])
    with pytest.raises(ConfigError, match="skip_bad"): append(tmp_path / "out", [log], skip_bad=-1)
    write(tmp_path / ROWS, [{"query": "mine", "positive": "own"}])
    with pytest.raises(ConfigError, match="does not come from logs"): append(tmp_path, [log])
    assert len(rows_of(tmp_path)) == 1 and not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_a_state_that_was_damaged_is_refused_and_left_as_it_is(tmp_path_factory, at, bit, cut):
    folder = tmp_path_factory.mktemp("state")
    log = write(folder / "log.jsonl", [ASK, said("click", "d1")])
    append(folder / "out", [log])
    good = bytearray((folder / "out" / STATE).read_bytes())
    at %= len(good)
    damaged = bytes(good[:at] if cut else good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:])
    (folder / "out" / STATE).write_bytes(damaged)
    with pytest.raises(ProjError, match="not as it was written"): append(folder / "out", [log])
    assert (folder / "out" / STATE).read_bytes() == damaged


# ---- kills

KILLED = """
import os, sys
from proj.data.logs import append
for step in range(1, int(sys.argv[3]) + 1):
    if os.fork() == 0:
        os.environ["_PROJ_DIE_AT"] = str(step)
        append(f"{sys.argv[1]}-{step}", [sys.argv[2]])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_killed_at_any_write_step_every_file_is_whole_and_the_next_call_mends_the_rest(tmp_path):
    first, second = write(tmp_path / "one.jsonl", [ASK, said("click", "d1", 1)]), write(tmp_path / "two.jsonl", [said("star1", "d1", 2), said("click", "d3", 3)])
    steps = 7  # two for each of three files, and one that does not come
    for step in range(1, steps + 1): append(tmp_path / f"out-{step}", [first])
    old = files(tmp_path / "out-1")
    append(tmp_path / "whole", [first, second])
    new, empty = files(tmp_path / "whole"), write(tmp_path / "night.jsonl", [])
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out", second, str(steps)], capture_output=True, text=True, check=True,
                          env={k: v for k, v in os.environ.items() if k != "_PROJ_DIE_AT"})
    assert list(map(int, done.stdout.split())) == [-signal.SIGKILL] * 6 + [0]
    for step in range(1, steps + 1):
        out = tmp_path / f"out-{step}"
        now = files(out)
        assert [now[name] == new[name] for name in (STATE, ROWS, COUNTS)] == [step > 1, step > 3, step > 5]
        assert all(now[name] in (old[name], new[name]) for name in now)
        append(out, [empty])  # even a log that knows nothing of it
        assert files(out) == (new if step > 1 else old)
        append(out, [second])
        assert files(out) == new


def test_two_at_once_lose_nothing(tmp_path):
    logs = [write(tmp_path / f"{at}.jsonl", [ASK | {"event_id": f"{at}-{n}", "clicked": n % 7} for n in range(20)]) for at in range(4)]
    script = "import sys\nfrom proj.data.logs import append\nappend(sys.argv[1], sys.argv[2:])"
    running = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "out", log]) for log in logs]
    assert [process.wait() for process in running] == [0] * 4
    append(tmp_path / "one", logs)
    assert files(tmp_path / "out") == files(tmp_path / "one") and len(rows_of(tmp_path / "out")) == 80
