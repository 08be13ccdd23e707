"Paths, keyboards, synthetic paths and negatives of gesture typing: broken input, outside references, naive loops, real data."
import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from proj.confusions import build_pool, difficulty, draw_negatives, load_pool, save_pool
from proj.core import ConfigError, DataError
from proj.data.keyboards import carried, find_keyboard, ideal_paths, layout, moved, outline, read_keyboard, swapped, twins, write_keyboard
from proj.data.strokes import Hand, swipe_word, synthetic_swipes, traits
from proj.data.swipes import SYMBOLS, Lexicon, read_lexicon, read_swipes, spell, split_swipes, swipe_rows, unspell
from proj.geometry import arc_length, curvature, derivative, features, resample

QWERTY = layout()
GOOD = {"word": "to", "path": [[.45, .077, 0], [.85, .077, 250]]}
A, B, C = [.1, .2, 0], [.2, .2, 10], [.3, .2, 20]


def write(path, rows):
    path.write_text("".join(row if type(row) is str else json.dumps(row) + "\n" for row in rows))
    return path


# ---- reading

BROKEN = {
    "empty": ({"word": "to", "path": []}, "path", "has 0 points; a path has 2 at least"),
    "one point": ({"word": "to", "path": [A]}, "path", "has 1 point; a path has 2 at least"),
    "NaN": ('{"word": "to", "path": [[0.4, NaN, 0], [0.5, 0.1, 9]]}\n', "path", "NaN is not a finite number"),
    "infinite": ('{"word": "to", "path": [[0.4, 1e999, 0], [0.5, 0.1, 9]]}\n', "path", "is not a finite number"),
    "backwards": ({"word": "to", "path": [A, C, B]}, "path", "time goes backwards at point 2, from 20 to 10 ms"),
    "off the keyboard": ({"word": "na\u00efve", "path": [A, B]}, "word", "has '\u00ef', which is not on the keyboard qwerty"),
    "apostrophe": ({"word": "don't", "path": [A, B]}, "word", "which is not on the keyboard qwerty"),
    "two fingers": ({"word": "to", "data": {"L": [A], "R": [B]}, "canvas_width": 1, "canvas_height": 1}, "data", "holds two fingers"),
    "two fingers, apart": ({"word": "to", "L": [A], "R": [B]}, "L", "holds two fingers"),
    "pixels": ({"word": "to", "path": [[140, 98, 0], [150, 99, 8]]}, "path", "divide by the keyboard's width"),
    "no time": ({"word": "to", "path": [[.1, .2], [.1, .3]]}, "path", "point 0 is [0.1, 0.2]; expected [x, y, t]"),
    "text": ({"word": "to", "path": [A, [.1, "0.2", 4]]}, "path", "point 1 is"),
    "true": ({"word": "to", "path": [A, [.1, True, 4]]}, "path", "point 1 is"),
    "no path": ({"word": "to"}, "path", "missing; expected 'path' or 'data' or 'L'"),
    "both": ({"word": "to", "path": [A, B], "data": [A, B]}, "data", "given beside 'path'"),
    "no canvas": ({"word": "to", "data": [A, B]}, "canvas_width", "missing"),
    "flat canvas": ({"word": "to", "data": [A, B], "canvas_width": 10, "canvas_height": 0}, "canvas_height", "expected a size above 0"),
    "blank word": ({"word": " ", "path": [A, B]}, "word", "expected a non-blank string"),
    "a string": ({"word": "to", "path": "abc"}, "path", "expected a list of points"),
    "a finger of strings": ({"word": "to", "L": ["a", "b", "c"]}, "L", "point 0 is 'a'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named(tmp_path, name):
    row, field, reason = BROKEN[name]
    file = write(tmp_path / "a.jsonl", [GOOD, "\n", row])
    with pytest.raises(DataError) as e: read_swipes(file)
    first = str(e.value).split("\n")[0]
    assert first.startswith(f"{file}:3: {field}: ") and reason in first, first


def test_bad_rows_are_skipped_and_kept(tmp_path):
    rows = [row for row, *_ in BROKEN.values()]
    file, rejects = write(tmp_path / "a.jsonl", [*rows, GOOD]), tmp_path / "rejects.jsonl"
    assert len(read_swipes(file, skip_bad=len(rows), rejects=rejects)) == 1
    listed = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(row["line"], row["field"]) for row in listed] == [(at, field) for at, (_, field, _) in enumerate(BROKEN.values(), 1)]
    with pytest.raises(DataError, match=f"bad rows, skip_bad allows {len(rows) - 1}"): read_swipes(file, skip_bad=len(rows) - 1)


def test_formats_agree(tmp_path):
    rows = [GOOD, {"word": "at", "path": [A, B, C]}]
    plain = read_swipes(write(tmp_path / "a.jsonl", rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f: f.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    named = [{"word": row["word"], "path": [dict(zip("xyt", point)) for point in row["path"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "b.parquet")
    for file in ("a.jsonl.gz", "a.parquet", "b.parquet"):
        assert [(s.word, s.path.tolist()) for s in read_swipes(tmp_path / file)] == [(s.word, s.path.tolist()) for s in plain]


def test_parquet_errors_name_the_row(tmp_path):
    rows = [GOOD, {"word": "to", "path": [[.1, float("nan"), 0], [.1, .2, 3]]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:2: path: .*finite"): read_swipes(tmp_path / "a.parquet")


def test_two_fingers_are_merged_by_time(tmp_path):
    left, right = [[A, C], [[.4, .2, 40]]], [[[.9, .2, 5], [.8, .2, 30]]]  # strokes, as in the public set's fifth collection
    row = {"word": "to", "data": {"L": left, "R": right}, "canvas_width": 400, "canvas_height": 200}
    merged, = read_swipes(write(tmp_path / "a.jsonl", [row]), two_fingers="merge")
    assert merged.path.tolist() == [[.1, .1, 0], [.9, .1, 5], [.3, .1, 20], [.8, .1, 30], [.4, .1, 40]]
    with pytest.raises(ConfigError, match="two_fingers is 'both'"): swipe_rows(tmp_path / "a.jsonl", two_fingers="both")


def test_real_paths_are_what_the_file_says(data_dir):
    with open(data_dir / "swipe/real_train.jsonl") as f: plain = [json.loads(line) for line in f]
    got = list(swipe_rows(data_dir / "swipe/real_train.jsonl", data_dir / "swipe/keyboard.json"))
    assert len(got) == 736 and [s.word for _, s in got] == [row["word"] for row in plain]
    assert all(np.array_equal(s.path, row["path"]) for (_, s), row in zip(got, plain))  # all of them begin at 0 ms
    parts = split_swipes([s for _, s in got], {"train": .8, "test": .2})
    assert not {s.word for s in parts["train"]} & {s.word for s in parts["test"]} and .17 < len(parts["test"]) / 736 < .23


# ---- keyboards

def test_the_formula_gives_the_keyboard_of_the_study(data_dir):
    theirs = read_keyboard(data_dir / "swipe/keyboard.json")
    for key in theirs.keys: assert np.allclose(theirs.points(key), QWERTY.points(key), atol=1e-4), key
    assert theirs.key_height == QWERTY.key_height and sorted(theirs.keys) == sorted(QWERTY.keys)


@pytest.mark.parametrize("change,message", [
    (dict(q=None), "'q' missing"), (dict(q=[.1]), "'q' is \\[0.1\\]"), (dict(q=[.1, "a"]), "'q' is"), (dict(q=[.1, 1e9]), "'q' is"), (dict(qq=[0, 0]), "'qq' is not one character")])
def test_broken_keyboards_are_named(tmp_path, change, message):
    keys = {key: place.tolist() for key, place in zip(QWERTY.keys, QWERTY.centres)} | change
    (tmp_path / "k.json").write_text(json.dumps({"keys": {key: place for key, place in keys.items() if place is not None}}))
    with pytest.raises(DataError, match=f"k.json: keys: {message}"): find_keyboard(tmp_path / "k.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 3}', '{"keys": {"a": [0, 0], "a": [0, 1]}}', '{"keys": {"a": [NaN, 0]}}', "[" * 5000, "\x00"])
def test_files_that_are_no_keyboard(tmp_path, text):
    (tmp_path / "k.json").write_text(text)
    with pytest.raises(DataError, match="k.json"): read_keyboard(tmp_path / "k.json", letters="a")


def test_keyboards_survive_their_file(tmp_path):
    for board in (QWERTY, layout("azerty"), swapped(QWERTY, "y", "z"), moved(QWERTY, (1.1, 1.3), (-.05, .1))):
        write_keyboard(tmp_path / "k.json", board)
        again = read_keyboard(tmp_path / "k.json")
        assert again.keys == board.keys and np.allclose(again.centres, board.centres, atol=1e-6) and np.isclose(again.key_width, board.key_width)


def test_twins_are_the_words_whose_ideal_paths_coincide(data_dir):
    words = read_lexicon(data_dir / "swipe/vocab.tsv").words
    group = twins(QWERTY, words)
    paths = ideal_paths(QWERTY, words, 64).reshape(len(words), -1)
    keys = np.round(paths * 1e4).astype(int)  # far coarser than rounding errors, far finer than a key
    order = np.lexsort(keys.T)
    near = np.abs(np.diff(paths[order], axis=0)).max(1) < 1e-9
    assert near.sum() > 100
    assert all(group[a] == group[b] for a, b in zip(order[:-1][near], order[1:][near]))
    for number in np.unique(group[np.bincount(group)[group] > 1]):
        members = np.flatnonzero(group == number)
        assert np.abs(paths[members] - paths[members[0]]).max() < 1e-9, [words[at] for at in members]


@given(st.text("qwertyasdzx", min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_an_outline_draws_the_same_path(word):
    short = outline(QWERTY, word)
    assert np.allclose(*ideal_paths(QWERTY, [word, short], 40), atol=1e-9) and outline(QWERTY, short) == short


# ---- geometry

path_points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 60)), min_size=1, max_size=40)


@given(path_points, st.sampled_from(["arc", "time", "index"]), st.integers(2, 50))
@settings(max_examples=80, deadline=None)
def test_resampled_paths_stay_on_the_path(points, by, length):
    path = np.array(points)
    path[:, 2] = np.cumsum(path[:, 2])
    got = resample([path], length, by)[0]
    assert np.array_equal(got[[0, -1]], path[[0, -1]]) and np.isfinite(got).all()
    assert (got.min(0) >= path.min(0) - 1e-9).all() and (got.max(0) <= path.max(0) + 1e-9).all()
    assert arc_length(got)[-1] <= arc_length(path)[-1] + 1e-9
    shifted = resample([carried(path, (2, 2), (.5, -.5))], length, by)[0]
    if arc_length(path)[-1] > 1e-6: assert np.allclose(shifted, carried(got, (2, 2), (.5, -.5)), atol=1e-6)


def test_derivatives_are_those_of_a_fitted_parabola():
    values = np.random.default_rng(0).normal(size=30)
    for degree in (0, 1, 2):
        got = derivative(values, degree, .5)
        for at in range(30):
            middle = min(max(at, 3), 26)
            fit = np.polynomial.Polynomial.fit((np.arange(middle - 3, middle + 4) - at) * .5, values[middle - 3:middle + 4], 2).convert()
            assert np.isclose(got[at], (fit.deriv(degree) if degree else fit)(0))


def test_curvature_does_not_depend_on_the_speed():
    u = np.linspace(0, 1, 300)
    for pace in (u, u**2 + u):  # the same ellipse, evenly and faster and faster
        first, second = (derivative(np.stack([.4 * np.cos(pace), .2 * np.sin(pace)]), degree, u[1]).T for degree in (1, 2))
        exact = .4 * .2 / ((.4 * np.sin(pace))**2 + (.2 * np.cos(pace))**2)**1.5
        assert np.allclose(curvature(first, second)[5:-5], exact[5:-5], rtol=5e-3)


@given(st.lists(path_points, max_size=4), st.sampled_from([3, 6, 8]))
@settings(max_examples=40, deadline=None)
def test_features_are_finite_and_padded(paths, channels):
    paths = [np.array(path) for path in paths] + [np.zeros((0, 3))]
    for path in paths[:-1]: path[:, 2] = np.cumsum(path[:, 2])
    values, mask = features(paths, channels, 32)
    assert values.shape == (len(paths), 32, channels) and np.isfinite(values).all() and not values[mask == 0].any()
    assert not mask[-1].any() and all(row.sum() == (min(32, len(path)) if channels == 3 else 32) for row, path in zip(mask, paths[:-1]))
    for path, row in zip(paths[:-1], values): assert np.array_equal(features([path], channels, 32)[0][0], row)
    if channels == 6: assert not values[:, 0, 2:].any() and values[..., 5].max(initial=0) <= np.log(200) + 1e-6


# ---- words

@given(st.text(min_size=0, max_size=47))
@settings(max_examples=60, deadline=None)
def test_spelling_comes_back(word):
    if len(word.lower()) > 47: return
    expected = "".join(char if char in "0123456789abcdefghijklmnopqrstuvwxyz" else "'" for char in word.lower())
    assert unspell(spell([word])) == [expected] and spell([word]).max(initial=0) < len(SYMBOLS) == 43


def test_the_lexicon_is_the_file(data_dir):
    with open(data_dir / "swipe/vocab.tsv", newline="") as f: plain = {row["word"]: float(row["zipf"]) for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)}
    lexicon = read_lexicon(data_dir / "swipe/vocab.tsv")
    assert len(lexicon) == 10_033 and dict(zip(lexicon.words, lexicon.zipf)) == plain and (np.diff(lexicon.zipf) <= 0).all()
    assert len(lexicon.on(QWERTY)) == 10_033


@pytest.mark.parametrize("words,zipf,message", [
    ([], None, "empty"), (["a", "a"], None, "'a' stands in the lexicon twice"), (["a"], [1, 2], "2 frequencies for 1"), (["a"], [np.nan], "of 'a' is not finite")])
def test_lexicons_that_are_refused(words, zipf, message):
    with pytest.raises(DataError, match=message): Lexicon(words, zipf)


# ---- synthetic paths

def test_synthetic_paths_depend_on_nothing_else():
    alone = swipe_word(QWERTY, "hello", seed=3, take=1)
    among = synthetic_swipes(QWERTY, ["world", "hello", "a", "hello"], seed=3)[3]
    assert np.array_equal(alone.path, among.path)


@pytest.mark.parametrize("name", ["qwerty", "azerty", "qwertz"])
def test_a_calm_hand_passes_the_keys_in_order_on_any_layout(name):
    board, calm = layout(name), Hand(touch=0, low=0, overshoot=0, bow=0, overlap=0, sensor=0, pause=0, pace=.5, rate=200)
    path = swipe_word(board, "wizard", calm).path
    nearest = [int(np.hypot(*(path[:, :2] - centre).T).argmin()) for centre in board.points("wizard")]
    assert nearest == sorted(nearest) and all(np.hypot(*(path[at, :2] - centre)) < .01 for at, centre in zip(nearest, board.points("wizard")))


def test_synthetic_paths_are_like_real_ones(data_dir):
    real = read_swipes(data_dir / "swipe/real_train.jsonl")
    made, ours = traits(synthetic_swipes(QWERTY, [s.word for s in real]), QWERTY), traits(real, QWERTY)
    unlike = traits(synthetic_swipes(QWERTY, [s.word for s in real], Hand(touch=0, overshoot=0, bow=0, uneven=0, pause=0, spread=0, pace=2)), QWERTY)
    for name in ours:
        assert ks_2samp(ours[name], made[name]).statistic < .2 < ks_2samp(ours[name], unlike[name]).statistic, name


# ---- negatives

@pytest.fixture(scope="module")
def lexicon(): return Lexicon("hello jello hell help hells hero world word work to too tool a of off the then than quick quack cat car".split())


def test_difficulty_by_hand():
    assert difficulty(.7, 2) == 9.0 and [float(difficulty(j, 0)) for j in (.6, .4, .2, .1)] == [10, 8, 5, 2] and difficulty(.1, 4) == .1


def test_the_pool_agrees_with_double_loops(lexicon):
    words, pool = lexicon.words, build_pool(lexicon, QWERTY)
    def pairs(word): return {word[at:at + 2] for at in range(len(word) - 1)}
    paths, same = ideal_paths(QWERTY, words), twins(QWERTY, words)
    for i, a in enumerate(words):
        expected = {}
        for j, b in enumerate(words):
            if same[i] == same[j]: continue
            distance = np.sqrt(((paths[i] - paths[j])**2).sum(1).mean())
            expected[b] = (max(.1, 10 * np.exp(-distance / .1)), "path")
            shared, union = pairs(a) & pairs(b), pairs(a) | pairs(b)
            if shared and .2 <= len(shared) / len(union) <= .9 and abs(len(a) - len(b)) <= 2:
                text = float(difficulty(len(shared) / len(union), abs(len(a) - len(b))))
                expected[b] = (max(text, expected[b][0]), "both")
        got = {b: (d, kind) for b, d, kind in pool.of(a)}
        assert got.keys() == expected.keys()
        for b in got: assert abs(got[b][0] - expected[b][0]) < 1e-3 and got[b][1] == expected[b][1]


@given(st.integers(1, 18), st.sampled_from(["difficulty", "uniform"]), st.integers(0, 3), st.integers(0, 3), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_draws_hold_their_promise(k, by, seed, take, top):
    words = "hello jello hell help hells hero world word work to too tool a of off the then than quick quack cat car".split()
    pool = build_pool(Lexicon(words), QWERTY, ["text"], top=top)
    drawn = draw_negatives(pool, words, k, by=by, seed=seed, take=take)
    for word, others in zip(words, drawn):
        assert len(others) == len(set(others)) == k and all(outline(QWERTY, other) != outline(QWERTY, word) for other in others)
        inside = [other for other, *_ in pool.of(word)]
        assert set(others[:len(inside)]) <= set(inside)  # the pool first, then random words
    assert drawn == draw_negatives(pool, words[::-1], k, by=by, seed=seed, take=take)[::-1]


def test_a_vocabulary_that_is_too_small_ends_at_once():
    pool = build_pool(Lexicon(["to", "too", "hello"]), QWERTY)
    with pytest.raises(DataError, match="the lexicon has 3 words, of which 1 can be negatives of 'to', but 16 are wanted"): draw_negatives(pool, ["to"], 16)
    assert draw_negatives(pool, ["to"], 16, short=True) == [["hello"]]
    single = build_pool(Lexicon(["a"]), QWERTY)
    assert draw_negatives(single, ["a"], 4, short=True) == [[]] and len(single) == 0


def test_pools_from_other_lexicons_and_keyboards_are_refused(tmp_path, lexicon):
    save_pool(tmp_path / "p.parquet", build_pool(lexicon, QWERTY))
    again = load_pool(tmp_path / "p.parquet", lexicon, QWERTY)
    assert draw_negatives(again, lexicon.words, 5) == draw_negatives(build_pool(lexicon, QWERTY), lexicon.words, 5)
    with pytest.raises(DataError, match="p.parquet:[0-9]+: .*a word of the lexicon"): load_pool(tmp_path / "p.parquet", Lexicon(["hello", "jello"]), QWERTY)
    table = pa.table(dict(word=["to"], negative=["too"], difficulty=[1.], kind=["text"]))
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="t.parquet:1: negative: 'too' has the same ideal path as 'to'"): load_pool(tmp_path / "t.parquet", lexicon, QWERTY)
    pq.write_table(table.set_column(2, "difficulty", [[0.0]]), tmp_path / "z.parquet")
    with pytest.raises(DataError, match="z.parquet:1: difficulty: expected a number from 0.1 to 10"): load_pool(tmp_path / "z.parquet", lexicon, QWERTY)
