"Prompt features against counts made another way, and their transform against the definition, as properties."
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import zscore

from proj.core import DataError, ProjError
from proj.prompts import (DOMAINS, FEATURES, KINDS, LISTS, NUMERIC, FeatureTransform, count_turns, fit_column, history_text, list_counts, prompt_features)

COLUMN = {feature.name: at for at, feature in enumerate(FEATURES)}
BLANK = np.zeros((2, 44))


def of(text, *names, history=""):
    row = prompt_features([text], [history])[0]
    return [float(row[COLUMN[name]]) for name in names]


def yes(text, history=""):
    return {feature.name for feature, value in zip(FEATURES, prompt_features([text], [history])[0]) if feature.kind == "boolean" and value}


# ---- the features

def test_the_specified_features_are_there():
    "26 numbers: complexity 8, domain 12, style 4, context 2; 18 yes or no: task 10, three of form, format 5."
    assert [f.kind for f in FEATURES] == ["numeric"] * 26 + ["boolean"] * 18 and NUMERIC == 26
    assert [f.name for f in FEATURES[8:20]] == list(DOMAINS) and len(DOMAINS) == 12
    assert [f.name for f in FEATURES[20:26]] == ["informal", "specificity", "politeness", "urgency", "turns", "context_characters"]


def naive_lists(words):
    "Counts by one regular expression a list entry."
    text, found = " ".join(words), {}
    for name, entries in LISTS.items():
        at = set()
        for entry in entries.split():
            pattern = re.escape(entry.rstrip("*").replace("_", " ")) + (r"[^ ]*" if entry.endswith("*") else "")
            at |= {(m.start(), "_" in entry and entry) for m in re.finditer(rf"(?<![^ ]){pattern}(?![^ ])", text)}  # a word counts once a list
        found[name] = len(at)
    return [found[name] for name in LISTS]


vocabulary = sorted({part.rstrip("*") + tail for entries in LISTS.values() for entry in entries.split() for part in entry.split("_") for tail in ("", "s", "ing")})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(vocabulary), max_size=30))
def test_list_counts_are_those_of_one_pattern_an_entry(words):
    assert list_counts(words).tolist() == naive_lists(words)


def test_every_list_entry_is_found_and_belongs_where_it_stands():
    for name, entries in LISTS.items():
        for entry in entries.split():
            words = entry.rstrip("*").split("_")
            assert list_counts(words)[list(LISTS).index(name)] >= 1, (name, entry)
        assert len(set(entries.split())) == len(entries.split()), name


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.text(max_size=100))
def test_any_text_has_finite_features_within_their_ranges(text, history):
    x = prompt_features([text], [history])
    assert x.shape == (1, 44) and x.dtype == np.float32 and np.isfinite(x).all() and (x >= 0).all()
    row = dict(zip(COLUMN, x[0].tolist()))
    assert set(x[0, NUMERIC:]) <= {0, 1} and row["characters"] == len(text) and row["context_characters"] == len(history)
    assert row["repetition"] < 1 and (row["words"] > 0 or row["repetition"] == row["word_length"] == 0)
    assert row["numbers"] == bool(re.search(r"\d", text)) and row["question"] >= ("?" in text)


def test_complexity_by_hand():
    text = "Tell me: who won, and (if known) why? Tell me more; also when.\n1. the year\n2. the city [or town]"
    words = "tell me who won and if known why tell me more also when 1 the year 2 the city or town".split()
    names = ("characters", "words", "sentences", "repetition", "word_length", "question_marks", "open_brackets", "parts")
    expected = [len(text), 21, 4, 1 - 18 / 21, sum(map(len, words)) / 21, 1 / 21, 2 / 21, 4 / 21]  # parts: 1. 2. ; also
    assert len(words) == 21 and len(set(words)) == 18 and np.allclose(of(text, *names), expected)


@pytest.mark.parametrize("text,names", [
    ("What's the capital of Peru?", "question factual"),
    ("Write a Python script that counts words", "starts_with_verb code_request asks_code"),
    ("Explain this:\n```\nx = [1]\n```", "starts_with_verb analysis code_block numbers"),
    ("import numpy as np\nprint(np.pi)", "code_block code_request"),
    ("If 3x + 4 = 19, find x", "math numbers math_symbols"),
    ("Find the derivative of the curve", "math starts_with_verb"),
    ("Compose a sonnet on autumn", "creative starts_with_verb"),
    ("I read a novel on the train", ""),
    ("How to fix a flat tyre", "question instruction"),
    ("You are a strict teacher. Correct my grammar.", "role_play"),
    ("Compare both plans, pros and cons", "analysis starts_with_verb"),
    ("Rewrite your previous response in French", "follow_up starts_with_verb"),
    ("List seven reasons for the fall", "starts_with_verb asks_list"),
    ("Show the results as a table", "starts_with_verb asks_table"),
    ("Return JSON with the names", "starts_with_verb asks_json"),
    ("A detailed account of the 1848 uprisings", "numbers asks_long"),
    ("Draft an essay of about 800 words", "creative starts_with_verb numbers asks_long"),
    ("ok", "")])
def test_yes_or_no_by_example(text, names): assert yes(text) == set(names.split())


def test_style_and_context():
    assert of("pls help, I can't wait!! :)", "informal")[0] == pytest.approx(4 / 5)
    assert of("Would you kindly tell me, please?", "politeness")[0] == pytest.approx(3 / 6)
    assert of("I need this ASAP, the deadline is urgent", "urgency")[0] == pytest.approx(3 / 8)
    assert of("Meet exactly 3 people in Oslo, \"the best\"", "specificity")[0] == pytest.approx(4 / 8)
    history = history_text([("system", "Be brief."), ("user", "Hi:\nuser unknown"), ("assistant", "Hello.")])
    assert of("Why?", "turns", "context_characters", "follow_up", history=history) == [3, len(history), 1]
    assert of("Why?", "turns", "context_characters", "follow_up", history=" ") == [0, 1, 0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(alphabet="ab :\n.", max_size=20)), max_size=6))
def test_turns_written_down_are_counted_again(turns): assert count_turns(history_text(turns)) == len(turns)


@pytest.mark.parametrize("text", ["\n" * 300_000, "? " * 150_000, "1 " * 150_000, "a" * 300_000, "\t" * 300_000, "\"" * 300_000, "a'" * 150_000, "(x = " * 60_000, "<" * 300_000, ". " * 150_000, "two " * 75_000])
def test_long_monotonous_texts_take_no_more_than_their_length(text):
    "A pattern that looks back would take minutes here."
    assert of(text, "characters") == [len(text)]


def test_wrong_arguments():
    with pytest.raises(DataError, match="prompts is a single string"): prompt_features("why?")
    with pytest.raises(DataError, match=r"prompts\[1\] is a NoneType; expected a string"): prompt_features(["a", None])
    with pytest.raises(DataError, match=r"histories\[0\] is a list"): prompt_features(["a"], [[]])
    with pytest.raises(DataError, match="1 histories for 2 prompts"): prompt_features(["a", "b"], [""])
    assert prompt_features([]).shape == prompt_features([], []).shape == (0, 44)


def test_rows_do_not_depend_on_each_other():
    texts = ["Write a poem.", "What is 2 + 2?", "", "Explain json tables"]
    assert np.array_equal(prompt_features(texts)[::-1], prompt_features(texts[::-1]))
    assert np.array_equal(prompt_features(iter(texts)), prompt_features(tuple(texts)))


# ---- the transform

def columns(**given):
    x = np.zeros((len(next(iter(given.values()))), 44))
    for name, values in given.items(): x[:, COLUMN[name]] = values
    return x


def test_the_transform_is_the_definition():
    draw = np.random.default_rng(0)
    words, chars, parts = draw.normal(30, 6, 500).clip(1), draw.lognormal(5, 1.2, 500), draw.gamma(3, .01, 500) * (draw.random(500) < .4)
    words[:50] = 0  # fewer zeros than a fifth are numbers like others
    x = columns(words=words, characters=chars, parts=parts, numbers=parts > 0)
    fitted = FeatureTransform.fit(x)
    assert [fitted.kind[COLUMN[n]] for n in ("words", "characters", "parts", "numbers")] == ["plain", "log", "zeros", "boolean"]
    y = fitted.transform(x)
    assert np.allclose(y[:, COLUMN["words"]], zscore(words), atol=1e-5)
    assert np.allclose(y[:, COLUMN["characters"]], zscore(np.log1p(chars / np.median(chars))), atol=1e-5)
    some = parts > 0
    assert np.allclose(y[some, COLUMN["parts"]], np.log(1 + np.exp(zscore(parts[some]))), atol=1e-5) and (y[~some, COLUMN["parts"]] == -1).all()
    assert np.array_equal(y[:, COLUMN["numbers"]], some)


def test_the_rules_at_their_edges():
    draw = np.random.default_rng(0)
    x = draw.gamma(4, 1, 1000)
    for zeros, kind in [(199, "plain"), (200, "zeros")]: assert fit_column(np.r_[np.zeros(zeros), x[zeros:]])[0] == kind
    assert fit_column(draw.exponential(1, 200_000)**.8)[0] == "plain" and fit_column(draw.exponential(1, 200_000)**1.2)[0] == "log"  # skewness 1.5 and 2.7
    assert fit_column(np.full(5, 100.))[1:] == (1, 100, 100) and fit_column(np.zeros(5))[0] == "zeros log"
    assert fit_column(np.array([0, 0, 0, 0, .05]))[0] == "zeros"


def test_other_rows_change_nothing():
    draw = np.random.default_rng(1)
    train, other = columns(words=draw.lognormal(3, 1, 50)), columns(words=draw.lognormal(9, 1, 20))
    fitted = FeatureTransform.fit(train)
    assert np.array_equal(fitted.transform(np.r_[train, other])[50:], fitted.transform(other))
    assert np.array_equal(fitted.transform(other[3:4])[0], fitted.transform(other)[3])


numbers = arrays(np.float64, st.tuples(st.integers(2, 12), st.just(NUMERIC)), elements=st.one_of(
    st.just(0.0), st.floats(0, 1, width=32, allow_subnormal=False), st.floats(0, 1e6, width=32, allow_subnormal=False), st.integers(0, 5).map(float)))


TINY, FOUR = np.zeros((2, NUMERIC)), np.zeros((2, NUMERIC))
TINY[1, 9], FOUR[1, 9] = 1.17549435e-38, 4  # a spread below which a usual value overflows


@example(TINY, FOUR)
@settings(max_examples=60, deadline=None)
@given(numbers, numbers)
def test_the_inverse_gives_the_features_back(train, other):
    "Rows not seen in training too, whatever was seen."
    train, other = (np.concatenate([x, np.resize([0, 1, 1], (len(x), 44 - NUMERIC))], axis=1) for x in (train, other))
    fitted = FeatureTransform.fit(train)
    for x in (train, other):
        y = fitted.transform(x)
        size = np.maximum(1, np.maximum(np.abs(x), np.abs(train).max(0)))
        assert np.isfinite(y).all() and (np.abs(fitted.inverse(y) - x) <= 1e-4 * size).all()
        assert np.array_equal(y[:, NUMERIC:], x[:, NUMERIC:])
        assert ((y == -1) >= (fitted.zeros & (x == 0))).all() and (y[fitted.zeros & (x > 0)] > 0).all()
        ordered = np.take_along_axis(x, np.argsort(y, 0, kind="stable"), 0)
        assert (np.diff(ordered, axis=0) >= -1e-4 * size.max(0)).all()  # what is larger stays larger


@settings(max_examples=15, deadline=None)
@given(numbers)
def test_a_transform_read_again_is_the_same(train):
    x = np.concatenate([train, np.zeros((len(train), 44 - NUMERIC))], axis=1)
    fitted = FeatureTransform.fit(x)
    again = FeatureTransform.from_dict(json.loads(json.dumps(fitted.as_dict())))
    assert np.array_equal(again.transform(x), fitted.transform(x)) and again.kind == fitted.kind and set(fitted.kind) <= set(KINDS)


def test_constant_columns_become_constants_and_new_values_stay_small():
    fitted = FeatureTransform.fit(columns(words=[7, 7, 7]))
    y = fitted.transform(columns(words=[7, 7]))
    assert (y[:, COLUMN["words"]] == 0).all() and (y[:, COLUMN["science"]] == -1).all() and np.isfinite(y).all()
    assert np.allclose(fitted.transform(columns(words=[7, 14, 0]))[:, COLUMN["words"]], [0, 1, -1])
    assert fitted.transform(columns(words=[7], context_characters=[100_000]))[0, COLUMN["context_characters"]] < 12  # never seen in training


@pytest.mark.parametrize("change,message", [
    (lambda x: x[:1], "1 row of features; a spread takes 2"), (lambda x: x[:0], "0 rows of features"), (lambda x: x[:, :40], r"shape \(2, 40\); expected \(prompts, 44\)"),
    (lambda x: x[0], r"shape \(44,\)"), (lambda x: x + np.nan, "feature 'characters' of prompt 0 is nan; expected a finite number, 0 or more"),
    (lambda x: x + np.inf, "is inf"), (lambda x: x - 1, "is -1"), (lambda x: x + .5, "feature 'code_request' of prompt 0 is 0.5; expected 0 or 1")])
def test_features_that_cannot_be_fitted_are_named(change, message):
    with pytest.raises(DataError, match=message): FeatureTransform.fit(change(BLANK))


def test_what_cannot_be_transformed_is_named():
    fitted, broken = FeatureTransform.fit(BLANK), BLANK.copy()
    broken[1, 3] = np.nan
    for way in (fitted.transform, fitted.inverse):
        with pytest.raises(DataError, match="feature 'repetition' of prompt 1 is nan"): way(broken)
        with pytest.raises(DataError, match="shape"): way(BLANK[:, 1:])
        assert way(BLANK[:0]).shape == (0, 44) and way(BLANK[:1]).shape == (1, 44)


@pytest.mark.parametrize("change,message", [
    (dict(features=["a"]), "fitted to other features"), (dict(kind=["plain"]), "damaged"), (dict(kind=["plane"] * 44), "damaged"), (dict(spread=[0.0] * 44), "damaged"),
    (dict(scale=[-1.0] * 44), "damaged"), (dict(mean=[float("nan")] * 44), "damaged"), (dict(mean=["a"] * 44), "damaged"), (dict(mean=None), "damaged"), (dict(more=1), "not a feature transform")])
def test_a_damaged_transform_is_refused(change, message):
    with pytest.raises(DataError, match=message): FeatureTransform.from_dict(FeatureTransform.fit(BLANK).as_dict() | change)


def test_files(tmp_path):
    fitted = FeatureTransform.fit(columns(words=[1, 2, 9]))
    fitted.save(tmp_path / "deep" / "features.json")
    assert FeatureTransform.load(tmp_path / "deep" / "features.json").as_dict() == fitted.as_dict()
    (tmp_path / "torn.json").write_text((tmp_path / "deep" / "features.json").read_text()[:99])
    for name in ("torn.json", "none.json"):
        with pytest.raises(ProjError, match=name): FeatureTransform.load(tmp_path / name)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="not a feature transform"): FeatureTransform.load(tmp_path / "list.json")


# ---- real prompts

def test_real_prompts(data_dir):
    prompts = {name: [json.loads(line)["prompt"] for line in open(data_dir / f"{name}.jsonl")][::step]
               for name, step in [("routellm/mmlu", 20), ("routellm/gsm8k", 3), ("mt_bench_human/human", 5)]}
    x = {name: prompt_features(texts) for name, texts in prompts.items()}
    share = {name: dict(zip(COLUMN, rows.mean(0))) for name, rows in x.items()}
    assert share["routellm/gsm8k"]["numbers"] > .95 and share["routellm/gsm8k"]["math"] > .8 > .3 > share["routellm/mmlu"]["math"]
    assert share["mt_bench_human/human"]["starts_with_verb"] > .3 > .1 > share["routellm/mmlu"]["starts_with_verb"]
    for rows in x.values():
        fitted = FeatureTransform.fit(rows)
        y = fitted.transform(rows)
        assert np.abs(y).max() < 12 and np.allclose(fitted.inverse(y), rows, rtol=1e-4, atol=1e-4)
