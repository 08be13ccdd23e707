"Votes and outcome tables: broken rows, other formats, naive loops, splits as properties, the real files."
import csv
import gzip
import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError
from proj.data.comparisons import (agreement, balanced_weights, filter_comparisons, from_scored, from_votes, prompt_groups, read_comparisons, read_outcomes,
                                   split_comparisons, vote_pairs)
from proj.data.split import near_duplicate_keys
from proj.data.votes import Scored, Vote, as_vote, asked, last_turn

VOTE = {"prompt": "Why is the sky blue?", "model_a": "auk", "model_b": "gull", "winner": "model_a"}
TABLE = {"prompt": "Why is the sky blue?", "scores": {"auk": 1, "gull": 0.5, "tern": None}, "costs": {"auk": 2, "gull": None}}


def write(path, rows):
    path.write_text("".join(row if type(row) is str else json.dumps(row) + "\n" for row in rows))
    return path


def talk(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles[:1] + roles[1:] * 9 if first == "system" else roles * 9, contents)]


def told(data):
    "Every comparison in words, as it stands."
    return [(data.history[p], data.prompts[p], data.models[a], data.models[b], float(y), bool(bad), judge, tuple(said), data.category[p])
            for p, a, b, y, bad, judge, said in zip(data.prompt, data.first, data.second, data.label, data.both_bad, data.judge, data.responses)]


# ---- reading

def arena(**kw): return {name: value for name, value in VOTE.items() if name != "prompt"} | kw


BROKEN = {
    "winner": (VOTE | {"winner": "auk"}, "winner", "expected one of model_a, model_b, tie, both_bad, tie (bothbad), got 'auk'"),
    "winner is a number": (VOTE | {"winner": 1}, "winner", "expected one of"),
    "no winner": ({k: v for k, v in VOTE.items() if k != "winner"}, "winner", "missing; expected 'winner' or 'scores'"),
    "both kinds": (VOTE | {"scores": {"auk": 1}}, "scores", "given beside 'winner'"),
    "no prompt": (arena(), "prompt", "missing; expected 'prompt' or 'conversation' or 'conversation_a'"),
    "null prompt": (VOTE | {"prompt": None}, "prompt", "missing"),
    "prompt is a list": (VOTE | {"prompt": ["a"]}, "prompt", "expected a string"),
    "one model": ({k: v for k, v in VOTE.items() if k != "model_b"}, "model_b", "missing; a comparison has two sides"),
    "blank model": (VOTE | {"model_a": " "}, "model_a", "expected a non-blank string"),
    "itself": (VOTE | {"model_b": "auk"}, "model_b", "'auk' is model_a too"),
    "history": (VOTE | {"history": [{"role": "nobody", "content": "a"}]}, "history", "expected a text, or a list of turns"),
    "judge": (VOTE | {"judge": 7}, "judge", "expected a non-blank string"),
    "question": (VOTE | {"question_id": 1.5}, "question_id", "whole number"),
    "one side": (arena(conversation_a=talk("a", "b")), "conversation_b", "missing"),
    "other question": (arena(conversation_a=talk("a", "b"), conversation_b=talk("c", "d")), "conversation_b", "its last question is not that of conversation_a"),
    "nobody asks": (arena(conversation=[{"role": "assistant", "content": "a"}]), "conversation", "and one by the user"),
    "content": (arena(conversation=[{"role": "user", "content": 3}]), "conversation", "expected a list of turns"),
    "no content": (arena(conversation=[{"role": "user"}]), "conversation", "expected a list of turns"),
    "whose answer": (arena(conversation=talk("a", "b")), "conversation", "ends with an answer"),
    "history twice": (arena(conversation=talk("a"), history="b"), "history", "given beside a conversation"),
    "scores are texts": (TABLE | {"scores": {"auk": "1"}}, "scores", "expected an object {model: number or null}"),
    "scores are a list": (TABLE | {"scores": [1, 2]}, "scores", "expected an object"),
    "no scores": (TABLE | {"scores": {}}, "scores", "one of them known"),
    "unknown scores": (TABLE | {"scores": {"auk": None}}, "scores", "one of them known"),
    "true": (TABLE | {"scores": {"auk": True}}, "scores", "expected an object"),
    "NaN": ('{"prompt": "a", "scores": {"auk": NaN}}\n', "scores", "NaN is not a finite number"),
    "negative cost": (TABLE | {"costs": {"auk": -1}}, "costs", "number of 0 or more"),
    "cost of another": (TABLE | {"costs": {"owl": 1}}, "costs", "names 'owl', which has no score"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named(tmp_path, name):
    row, field, reason = BROKEN[name]
    file = write(tmp_path / "a.jsonl", [TABLE if "scores" in str(row) and "winner" not in str(row) else VOTE, "\n", row])
    with pytest.raises(DataError) as e: read_comparisons(file)
    first = str(e.value).split("\n")[0]
    assert first.startswith(f"{file}:3: {field}: ") and reason in first, first


def test_outcomes_of_votes_need_both_scores(tmp_path):
    for row, message in [(VOTE, "scores: missing; expected 'scores' or 'score_a'"), (VOTE | {"score_a": 1}, "score_b: missing"),
                         (VOTE | {"score_a": "1", "score_b": 0}, "score_a: expected a finite number"), (VOTE | {"score_a": 1, "score_b": 0, "cost_a": -1}, "cost_a: expected")]:
        with pytest.raises(DataError, match=message): read_outcomes(write(tmp_path / "a.jsonl", [row]))
    with pytest.raises(DataError, match="prompt of all 1 rows is empty"): read_outcomes(write(tmp_path / "a.jsonl", [TABLE | {"prompt": " "}]))
    with pytest.raises(DataError, match="1 rows have a winner and 1 have scores"): read_comparisons(write(tmp_path / "a.jsonl", [VOTE, TABLE]))


def test_indexes_lead_back_to_the_file(tmp_path):
    "Past bad rows, blank lines, filtered rows, and prompts of several lines."
    rows = [VOTE | {"prompt": f"question\nnumber {at}"} for at in range(6)]
    rows[1]["winner"], rows[2]["winner"], rows[4]["prompt"] = "nobody", "tie (bothbad)", " "
    lines = [*rows[:3], "\n", *rows[3:]]
    data = read_comparisons(write(tmp_path / "a.jsonl", lines), skip_bad=1)
    assert data.filtered_indexes.tolist() == [0, 4, 6] and [lines[at]["prompt"] for at in data.filtered_indexes] == data.prompts
    with open(tmp_path / "a.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(VOTE))
        table.writeheader()
        table.writerows(rows)
    data = read_comparisons(tmp_path / "a.csv", skip_bad=1)
    assert data.filtered_indexes.tolist() == [0, 3, 5] and [rows[at]["prompt"] for at in data.filtered_indexes] == data.prompts
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_comparisons(tmp_path / "a.parquet", skip_bad=1).filtered_indexes.tolist() == [0, 3, 5]


def test_formats_agree(tmp_path):
    rows = [VOTE, VOTE | {"winner": "tie", "category": "physics", "judge": "ann"}, arena(conversation_a=talk("Hi", "a", "Why?", "b"), conversation_b=talk("Hi", "c", "Why?", "d"))]
    tables = [TABLE, {"prompt": "Why?", "scores": {"auk": 3, "gull": 4}, "costs": {"gull": 4}, "history": "user: Hi"}, {"prompt": "How?", "scores": {"tern": 0}, "costs": {}}]
    for name, some, read in [("votes", rows, read_comparisons), ("outcomes", tables, read_outcomes)]:
        plain = read(write(tmp_path / f"{name}.jsonl", some))
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as f: f.write((tmp_path / f"{name}.jsonl").read_text())
        columns = sorted({key for row in some for key in row})
        pq.write_table(pa.table({c: [row.get(c) for row in some] for c in columns}), tmp_path / f"{name}.parquet")
        with open(tmp_path / f"{name}.tsv", "w", newline="") as f:
            table = csv.writer(f, delimiter="\t")
            table.writerow(columns)
            table.writerows([[v if type(v := row.get(c, "")) is str else json.dumps(v) for c in columns] for row in some])
        for ending in ("jsonl.gz", "parquet", "tsv"): assert read(tmp_path / f"{name}.{ending}").sha256 == plain.sha256, ending


@pytest.mark.parametrize("word,label,bad", [("model_a", 1, False), ("model_b", -1, False), ("tie", 0, False), ("both_bad", 0, True), ("tie (bothbad)", 0, True)])
def test_winners(tmp_path, word, label, bad):
    data = read_comparisons(write(tmp_path / "a.jsonl", [VOTE | {"winner": word}]), both_bad="keep")
    assert data.label.tolist() == [label] and data.both_bad.tolist() == [bad] and data.label.dtype == np.float32 and data.models == ["auk", "gull"]


# ---- conversations

@settings(deadline=None)
@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=8).filter(lambda roles: "user" in roles))
def test_the_last_turn_of_the_user_divides(roles):
    turns = [{"role": role, "content": str(at)} for at, role in enumerate(roles)]
    before, prompt, after = last_turn(turns)
    assert [int(text) for _, text in before] + [int(prompt)] + [int(text) for text in after.split("\n") if text] == list(range(len(roles)))
    assert roles[int(prompt)] == "user" and "user" not in roles[int(prompt) + 1:]


def test_arena_rows():
    a, b = talk("Hi", "Hello.", "Why?", "So."), talk("Hi", "Yes?", "Why?", "Dunno.")
    there, back = (asked(arena(conversation_a=one, conversation_b=two)) for one, two in [(a, b), (b, a)])
    assert there[:2] == back[:2] == ("Why?", "user: Hi") and there[2:] == back[:1:-1] == ("So.", "Dunno.")
    assert asked(arena(conversation=talk("Be brief.", "Hi", "Hello.", "Why?", first="system"), response_a="So.")) == \
        ("Why?", "system: Be brief.\nuser: Hi\nassistant: Hello.", "So.", "")
    assert asked(VOTE | {"history": talk("Hi", "Hello.")}).history == asked(VOTE | {"history": "user: Hi\nassistant: Hello."}).history
    assert asked(arena(conversation_a=a, conversation_b=b, response_a="given")).response_a == "given"


def test_the_same_prompt_after_another_history_is_another_prompt():
    data = from_votes([as_vote(VOTE), as_vote(VOTE | {"history": "user: Hi"}), as_vote(VOTE)])
    assert data.prompt.tolist() == [0, 1, 0] and data.history == ["", "user: Hi"] and data.group.tolist() == [0, 0]


def test_both_turns_of_a_question_stay_as_they_are(data_dir):
    rows = [json.loads(line) for line in open(data_dir / "mt_bench_human/human.jsonl")]
    data = read_comparisons(data_dir / "mt_bench_human/human.jsonl")
    label = {"model_a": 1.0, "model_b": -1.0, "tie": 0.0}
    assert told(data) == [("", r["prompt"], r["model_a"], r["model_b"], label[r["winner"]], False, r["judge"], ("", ""), r["category"]) for r in rows]
    assert data.filtered_indexes.tolist() == list(range(1751)) and len(data.prompts) == 160
    question = {r["prompt"]: r["question_id"] for r in rows}
    assert len({(question[p], g) for p, g in zip(data.prompts, data.group)}) == 80 == len(set(data.group.tolist()))


# ---- groups, filters, parts

words = st.sampled_from("sort count merge rows columns keys".split())
prompts = st.one_of(st.sampled_from(["", " "]), st.lists(words, min_size=1, max_size=3).map(" ".join), st.lists(words, min_size=1, max_size=2).map(lambda w: " ".join(w).upper() + "!"))
votes = st.lists(st.builds(lambda prompt, models, outcome, history, judge, category, group: Vote(prompt, *models, *outcome, history, judge=judge, category=category, group=group),
                           prompts, st.permutations(["auk", "gull", "owl", "tern"]).map(lambda m: m[:2]), st.sampled_from([(1, False), (-1, False), (0, False), (0, True)]),
                           st.sampled_from(["", "user: Hi"]), st.sampled_from([None, "ann", "bob", "eve"]), st.sampled_from([None, "x"]), st.sampled_from([None, None, "1", "2"])),
                 min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(votes)
def test_groups_are_the_closure_of_both_ties(some):
    data = from_votes(some)
    keys, label = near_duplicate_keys(data.prompts).tolist(), list(range(len(data.prompts)))
    tied = {(p, q) for p, q in combinations(range(len(data.prompts)), 2) if keys[p] == keys[q]}
    named = {}
    for row, vote in zip(data.prompt.tolist(), some): named.setdefault(vote.group, set()).add(row)
    tied |= {pair for name, rows in named.items() if name for pair in combinations(sorted(rows), 2)}
    for _ in label:
        for p, q in tied: label[p] = label[q] = min(label[p], label[q])
    assert all((data.group[p] == data.group[q]) == (label[p] == label[q]) for p, q in combinations(range(len(label)), 2))
    assert list(dict.fromkeys(data.group.tolist())) == list(range(data.group.max() + 1))


def naive_filter(some, ties, both_bad, least):
    "One filter after another, over lists."
    counts, rows = {"read": len(some)}, list(enumerate(some))
    for name, good in [("ties", lambda v: ties == "keep" or v.label or v.both_bad), ("both_bad", lambda v: both_bad == "keep" or not v.both_bad),
                       ("empty_prompt", lambda v: v.prompt.strip())]:
        kept = [(at, v) for at, v in rows if good(v)]
        counts[name], rows = len(rows) - len(kept), kept
    often = Counter(model for _, v in rows for model in (v.model_a, v.model_b))
    kept = [(at, v) for at, v in rows if often[v.model_a] >= least and often[v.model_b] >= least]
    return kept, counts | {"rare_models": len(rows) - len(kept), "kept": len(kept)}


choices = st.sampled_from(["keep", "drop"])


@settings(max_examples=200, deadline=None)
@given(votes, choices, choices, st.integers(0, 6))
def test_filters_are_those_of_lists(some, ties, both_bad, least):
    kept, counts = naive_filter(some, ties, both_bad, least)
    if not kept:
        with pytest.raises(DataError, match=f"no comparison is left .*read {len(some)}, ties {counts['ties']}, both bad {counts['both_bad']}"):
            filter_comparisons(from_votes(some), ties, both_bad, least)
        return
    data = filter_comparisons(from_votes(some), ties, both_bad, least)
    assert data.filters == counts == data.facts()["filters"] and data.filtered_indexes.tolist() == [at for at, _ in kept]
    category = {}
    for v in some: category[v.history, v.prompt] = category.get((v.history, v.prompt)) or v.category
    assert told(data) == [(v.history, v.prompt, v.model_a, v.model_b, v.label, v.both_bad, v.judge, ("", ""), category[v.history, v.prompt]) for _, v in kept]
    assert data.models == sorted({m for _, v in kept for m in (v.model_a, v.model_b)}) and len(data.prompts) == len({(v.history, v.prompt) for _, v in kept})


def test_filters_are_counted_in_the_log(tmp_path, caplog):
    rows = [VOTE, VOTE | {"winner": "tie"}, VOTE | {"winner": "both_bad"}, VOTE | {"prompt": ""}, VOTE | {"prompt": "", "winner": "tie"}, VOTE | {"model_a": "owl"}]
    with caplog.at_level(logging.INFO, "proj"):
        data = read_comparisons(write(tmp_path / "a.jsonl", rows), ties="drop", min_model_comparisons=1)
        assert "a.jsonl: read 6, ties 2, both bad 1, empty prompt 1, rare models 0, kept 2" in caplog.text and len(data) == 2
    with pytest.raises(DataError, match=r"a.jsonl: no comparison is left \(read 6, ties 2, both bad 1, empty prompt 1, rare models 2, kept 0\).*min_model_comparisons=2"):
        read_comparisons(tmp_path / "a.jsonl", ties="drop", min_model_comparisons=2)
    for wrong in (dict(ties="sometimes"), dict(both_bad="no"), dict(min_model_comparisons=-1)):
        with pytest.raises(ConfigError, match=next(iter(wrong))): read_comparisons(tmp_path / "a.jsonl", **wrong)


@settings(max_examples=150, deadline=None)
@given(votes, st.integers(0, 9), st.sampled_from([(.8, .1, .1), (.5, .5)]))
def test_no_group_is_in_two_parts(some, seed, fractions):
    data = from_votes(some)
    if len(set(data.group.tolist())) < len(fractions):
        with pytest.raises(DataError, match="cannot fill"): split_comparisons(data, fractions, seed)
        return
    parts = split_comparisons(data, fractions, seed)
    for one, two in combinations(parts.values(), 2):
        assert not {*one.group.tolist()} & {*two.group.tolist()} and not {*zip(one.history, one.prompts)} & {*zip(two.history, two.prompts)}
        keys = near_duplicate_keys([*one.prompts, *two.prompts]).tolist()
        assert not {*keys[:len(one.prompts)]} & {*keys[len(one.prompts):]}
    rows = {at: row for at, row in enumerate(told(data))}
    assert sorted(at for part in parts.values() for at in part.filtered_indexes) == list(range(len(data)))
    for part in parts.values(): assert told(part) == [rows[at] for at in part.filtered_indexes] and part.models == data.models and len(part)
    assert {n: p.sha256 for n, p in split_comparisons(data, fractions, seed).items()} == {n: p.sha256 for n, p in parts.items()}


@settings(max_examples=100, deadline=None)
@given(votes, st.randoms(use_true_random=False))
def test_taking_prompts_is_taking_their_votes(some, random):
    data = from_votes(some)
    rows = random.sample(range(len(data.prompts)), random.randint(0, len(data.prompts)))
    part, all_told = data.take(rows), told(data)
    assert part.prompts == [data.prompts[at] for at in rows] and part.group.tolist() == data.group[rows].tolist()
    assert told(part) == [all_told[at] for at in range(len(data)) if data.prompt[at] in rows]
    mask = np.isin(np.arange(len(data.prompts)), rows)
    assert data.take(mask).sha256 == data.take(sorted(rows)).sha256 and data.take(range(len(data.prompts))).sha256 == data.sha256


def test_rows_that_cannot_be_taken():
    data, table = from_votes([as_vote(VOTE)]), from_scored([Scored("Why?", {"auk": 1})])
    for some in (data, table):
        for rows, message in [([1], "row 1 of 1 prompts"), ([-1], "row -1"), ([0, 0], "taken twice"), (np.array([True, False]), "taken twice|row 1")]:
            with pytest.raises(DataError, match=message): some.take(rows)


@pytest.mark.parametrize("change,message", [
    (dict(label=np.array([2.0])), "labels should be"), (dict(label=np.array([1.0]), both_bad=np.array([True])), "0 where both are bad"),
    (dict(second=np.array([0])), "compared with itself"), (dict(second=np.array([5])), "second should hold rows from 0 to 1"), (dict(prompt=np.array([-1])), "prompt should hold"),
    (dict(judge=[]), "judge has 0 values for 1 labels"), (dict(history=[]), "history has 0 values for 1 prompts"), (dict(models=["gull", "auk"]), "sorted and distinct"),
    (dict(prompts=["a", "a"], history=["", ""], category=[None, None], group=np.arange(2)), "stands twice"), (dict(label=np.array([np.nan])), "labels should be")])
def test_arrays_that_do_not_fit(change, message):
    with pytest.raises(DataError, match=message): replace(from_votes([as_vote(VOTE)]), **change)


def test_hashes_know_what_matters():
    data = from_votes([as_vote(VOTE), as_vote(VOTE | {"winner": "tie"})])
    assert replace(data, filtered_indexes=data.filtered_indexes + 7).sha256 == data.sha256 == from_votes([as_vote(VOTE), as_vote(VOTE | {"winner": "tie"})]).sha256
    others = [replace(data, label=-data.label), replace(data, judge=["None", None]), replace(data, history=["x"]), replace(data, group=data.group + 1),
              replace(data, both_bad=data.label == 0), replace(data, responses=np.array([["a", ""], ["", ""]], object))]
    assert len({data.sha256, *(other.sha256 for other in others)}) == 7
    for nothing in (from_votes, from_scored):
        with pytest.raises(DataError, match="pass one"): nothing([])


# ---- outcomes

scores = st.lists(st.dictionaries(st.sampled_from(["auk", "gull", "owl", "tern"]), st.one_of(st.none(), st.integers(0, 3)), min_size=1), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(scores)
def test_comparisons_of_outcomes_are_those_of_a_double_loop(rows):
    table = from_scored(Scored(f"prompt {at}", row) for at, row in enumerate(rows))
    expected = [(f"prompt {at}", a, b, (row[a] > row[b]) - (row[a] < row[b])) for at, row in enumerate(rows)
                for a, b in combinations(sorted(row), 2) if row[a] is not None and row[b] is not None]
    if not expected:
        with pytest.raises(DataError, match="two models"): table.comparisons()
        return
    data = table.comparisons()
    assert [(p, a, b, y) for _, p, a, b, y, *_ in told(data)] == expected and not data.both_bad.any()
    assert [f"prompt {at}" for at in data.filtered_indexes] == [p for p, *_ in expected] and data.models == table.models
    grades, known = table.grades(), [v for row in rows for v in row.values() if v is not None]
    for at, row in enumerate(rows):
        for name, value in row.items():
            grade = grades[at, table.models.index(name)]
            assert np.isnan(grade) if value is None else np.isclose(grade, (value - min(known)) / max(1, max(known) - min(known)))
    for y, p, a, b in zip(data.label, data.filtered_indexes, data.first, data.second): assert y == np.sign(grades[p, a] - grades[p, b])


def test_repeated_prompts_have_the_mean_of_what_is_known(caplog):
    rows = [Scored("a", {"auk": 1, "gull": None}, {"auk": 4}), Scored("b", {"gull": 7}), Scored("a", {"auk": 4, "gull": 2}, {"auk": 8, "gull": 1}, category="x"), Scored("a", {"auk": 4}, history="h")]
    with caplog.at_level(logging.INFO, "proj"): table = from_scored(rows, indexes=[3, 5, 6, 9])
    assert np.array_equal(table.scores, [[2.5, 2], [np.nan, 7], [4, np.nan]], equal_nan=True) and np.array_equal(table.costs, [[6, 1], [np.nan] * 2, [np.nan] * 2], equal_nan=True)
    assert table.filtered_indexes.tolist() == [3, 5, 9] and table.category == ["x", None, None] and "1 rows repeat a prompt" in caplog.text


def test_costs_of_a_model_or_of_each_answer():
    table = from_scored([Scored("a", {"auk": 1, "gull": 0}), Scored("b", {"auk": 1, "gull": 1})])
    cheap = replace(table, costs=np.array([1.0, 30.0]))
    assert cheap.cost_table.tolist() == [[1, 30]] * 2 and cheap.take([1]).cost_table.tolist() == [[1, 30]] and cheap.facts()["costs"] == 4 and table.facts()["costs"] == 0
    assert cheap.sha256 != table.sha256 and "costs known" in repr(cheap) and "costs unknown" in repr(table)
    for change, message in [(dict(costs=np.zeros(3)), "costs of shape"), (dict(costs=np.array([-1.0, 0])), "0 or more"), (dict(scores=np.zeros((2, 3))), "scores of shape"),
                            (dict(scores=np.full((2, 2), np.inf)), "finite")]:
        with pytest.raises(DataError, match=message): replace(table, **change)


@settings(max_examples=60, deadline=None)
@given(scores, st.integers(0, 5))
def test_outcomes_split_by_group_too(rows, seed):
    table = from_scored(Scored(f"prompt {'one two three four'.split()[at % 4]}", row, group=str(at % 3)) for at, row in enumerate(rows))
    if len(set(table.group.tolist())) < 2: return
    parts = split_comparisons(table, (.5, .5), seed)
    assert not {*parts["train"].group.tolist()} & {*parts["test"].group.tolist()} and sorted(parts["train"].prompts + parts["test"].prompts) == sorted(table.prompts)
    for part in parts.values():
        for at, prompt in enumerate(part.prompts): assert np.array_equal(part.scores[at], table.scores[table.prompts.index(prompt)], equal_nan=True)


def test_a_file_of_outcomes_is_a_file_of_comparisons(tmp_path):
    rows = [{"prompt": "a", "scores": {"auk": 1, "gull": 2, "owl": 2}}, {"prompt": "", "scores": {"auk": 1, "gull": 2}}, {"prompt": "b", "scores": {"auk": 3, "gull": None}}]
    data = read_comparisons(write(tmp_path / "a.jsonl", rows), ties="drop")
    assert [row[1:5] for row in told(data)] == [("a", "auk", "gull", -1), ("a", "auk", "owl", -1)] and data.filtered_indexes.tolist() == [0, 0]
    assert data.filters == dict(read=4, ties=1, both_bad=0, empty_prompt=1, rare_models=0, kept=2)
    assert read_outcomes(tmp_path / "a.jsonl").prompts == ["a", "b"] and read_outcomes(tmp_path / "a.jsonl").filtered_indexes.tolist() == [0, 2]


# ---- balance and agreement

@settings(max_examples=100, deadline=None)
@given(votes)
def test_weights_are_those_of_a_loop(some):
    often = Counter(model for vote in some for model in (vote.model_a, vote.model_b))
    assert np.allclose(balanced_weights(from_votes(some)), [max(1 / often[v.model_a], 1 / often[v.model_b]) for v in some])


def said(vote):
    "The winner by name."
    return "bad" if vote.both_bad else "tie" if vote.label == 0 else vote.model_a if vote.label > 0 else vote.model_b


@settings(max_examples=150, deadline=None)
@given(votes)
def test_agreement_is_that_of_all_pairs(some):
    pairs = [(v, w) for v, w in combinations(some, 2) if (v.history, v.prompt) == (w.history, w.prompt) and {v.model_a, v.model_b} == {w.model_a, w.model_b}
             and v.judge and w.judge and v.judge != w.judge]
    if not pairs:
        with pytest.raises(DataError, match="no two judges"): agreement(from_votes(some))
        return
    clear = [(v, w) for v, w in pairs if v.label and w.label]
    found = agreement(from_votes(some))
    assert found["with_ties"] == dict(value=pytest.approx(np.mean([said(v) == said(w) for v, w in pairs])), n=len(pairs))
    assert found["without_ties"] == (dict(value=pytest.approx(np.mean([said(v) == said(w) for v, w in clear])), n=len(clear)) if clear else None)
    i, j = vote_pairs(from_votes(some))
    assert sorted(map(sorted, zip(i.tolist(), j.tolist()))) == sorted([a, b] for a, b in combinations(range(len(some)), 2)
                                                                     if any(some[a] is v and some[b] is w for v, w in pairs))


# ---- real data

def test_people_agree_as_they_are_known_to(data_dir):
    found = agreement(read_comparisons(data_dir / "mt_bench_human/human.jsonl"))
    assert round(found["with_ties"]["value"], 3) == .654 and found["with_ties"]["n"] == 661
    assert found["without_ties"] == dict(value=pytest.approx(346 / 418), n=418)
    with pytest.raises(DataError, match="no two judges"): agreement(read_comparisons(data_dir / "mt_bench_human/gpt4.jsonl"))


@pytest.mark.parametrize("name,n,prompts,ties", [("gsm8k", 1319, 1319, 841), ("mmlu", 14042, 13937, 10803)])
def test_outcomes_of_two_models(data_dir, name, n, prompts, ties):
    file = data_dir / f"routellm/{name}.jsonl"
    rows = [json.loads(line) for line in open(file)]
    data = read_comparisons(file, ties="drop")
    assert data.filters == dict(read=n, ties=ties, both_bad=0, empty_prompt=0, rare_models=0, kept=n - ties) and (data.label != 0).all()
    assert [data.prompts[p] for p in data.prompt] == [rows[at]["prompt"] for at in data.filtered_indexes]
    assert data.label.tolist() == [np.sign(rows[at]["score_a"] - rows[at]["score_b"]) for at in data.filtered_indexes]
    if name == "mmlu": return
    table = read_outcomes(file)
    assert table.scores.shape == (prompts, 2) and table.scores.tolist() == [[r["score_a"], r["score_b"]] for r in rows]
    twice = filter_comparisons(table.comparisons(), ties="drop")
    assert told(twice) == told(data) and twice.filtered_indexes.tolist() == data.filtered_indexes.tolist()


def test_a_vote_of_gpt4_is_read_like_one_of_a_person(data_dir):
    data = read_comparisons(data_dir / "mt_bench_human/gpt4.jsonl", min_model_comparisons=100)
    assert len(data) == 1240 and set(data.judge) == {"gpt-4"} and len(data.models) == 6 and prompt_groups(data.prompts).max() > 80
