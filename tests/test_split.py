"Near-duplicate keys against the definition and planted copies; grouped splits as properties."
import json, re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components

from proj.core import ConfigError, DataError
from proj.data.split import exact_keys, grouped_split, near_duplicate_keys, normalise


# ---- normalise

@settings(deadline=None)
@given(st.text())
def test_normalise_is_stable_and_ignores_case_space_and_punctuation(text):
    folded = normalise(text)
    assert normalise(f"  {text}\t\n") == folded == normalise(f"({text})!")
    assert folded == " ".join(folded.split())


def test_normalise_keeps_what_makes_a_difference():
    pairs = [("a < b", "a > b"), ("x_1", "x1"), ("कि", "की"), ("5 €", "5 $"), ("straße", "strase"), ("1 + 1", "1 1"), ("👍", "👎")]
    for one, two in pairs: assert normalise(one) != normalise(two), (one, two)
    same = [("STRASSE", "straße"), ("ﬁle", "file"), ("e\u0301", "\u00e9"), ("a—b", "a b"), ("“quoted”", "quoted"), ("a<b", "a < b"), ("x\u00a0y", "x y")]
    for one, two in same: assert normalise(one) == normalise(two), (one, two)
    assert normalise("...") == normalise("") == ""


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a b", "A  b!", "b a", "", "?", "a_b"])))
def test_exact_keys_point_to_the_first_equal_text(texts):
    expected = [next(j for j, other in enumerate(texts) if normalise(other) == normalise(text)) for text in texts]
    assert exact_keys(texts).tolist() == expected


# ---- near-duplicates

def brute_force(texts, threshold, ngram=5):
    "Components of the graph of all pairs, by the definition; nothing of the library but `normalise`."
    def shingles(text):
        parts = normalise(text).split()
        if len(parts) < 8: parts = list(normalise(text))
        parts += [""] * (ngram - len(parts))
        return {tuple(parts[i:i + ngram]) for i in range(len(parts) - ngram + 1)}
    sets, near = [shingles(text) for text in texts], np.zeros((len(texts), len(texts)))
    for i, j in combinations(range(len(texts)), 2): near[i, j] = len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    label = connected_components(near, directed=False)[1]
    return [int(np.flatnonzero(label == own)[0]) for own in label]


words = st.sampled_from("a b c d Ab x_y 1 < , .".split())
short_texts = st.lists(words, max_size=14).map(" ".join)

@st.composite
def families(draw):
    "Texts and copies of them with a few words changed, added or dropped."
    texts = draw(st.lists(st.one_of(short_texts, st.lists(words, min_size=20, max_size=40).map(" ".join)), min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 10))):
        parts = draw(st.sampled_from(texts)).split(" ")
        at = draw(st.integers(0, len(parts) - 1))
        parts[at:at + draw(st.integers(0, 1))] = draw(st.lists(words, max_size=2))
        texts.append(" ".join(parts))
    return texts


@settings(max_examples=300, deadline=None)
@given(families(), st.sampled_from([0.3, 0.5, 0.56, 0.7, 0.8, 0.9, 1.0]), st.sampled_from([1, 2, 3, 5]))
def test_keys_are_those_of_brute_force(texts, threshold, ngram):
    assert near_duplicate_keys(texts, threshold, ngram).tolist() == brute_force(texts, threshold, ngram)


@settings(max_examples=50, deadline=None)
@given(families(), st.randoms(use_true_random=False))
def test_components_do_not_depend_on_the_order(texts, random):
    order = list(range(len(texts)))
    random.shuffle(order)
    keys, moved = near_duplicate_keys(texts), near_duplicate_keys([texts[i] for i in order])
    for a, b in combinations(range(len(texts)), 2): assert (moved[a] == moved[b]) == (keys[order[a]] == keys[order[b]])


def test_a_similarity_of_exactly_the_threshold_counts():
    "0.56 * 25 is above 14 in floating point, 14 / 25 is not below 0.56."
    names = [f"word{i}" for i in range(25)]
    assert near_duplicate_keys([" ".join(names), " ".join(names[:14])], threshold=0.56, ngram=1).tolist() == [0, 0]
    assert near_duplicate_keys([" ".join(names), " ".join(names[:13])], threshold=0.56, ngram=1).tolist() == [0, 1]


@pytest.mark.parametrize("texts", [[], [""], ["", "", "?"], ["a"], ["\ud800", "\0"]])
def test_odd_texts(texts):
    assert near_duplicate_keys(texts).tolist() == exact_keys(texts).tolist()
    assert near_duplicate_keys(texts).dtype == np.int64


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ConfigError, match="threshold="): near_duplicate_keys(["a"], threshold)


def test_thousands_of_copies_of_one_template_are_cheap():
    "All pairs of 5,000 texts would be 12 million comparisons."
    numbers = np.random.default_rng(0).integers(0, 10**9, 5000)
    preamble = " ".join(f"word{i}" for i in range(40))
    assert len(set(near_duplicate_keys([f"{preamble} {n}" for n in numbers]).tolist())) == 1
    questions = [f"{preamble} {' '.join(map(str, row))}" for row in np.random.default_rng(1).integers(0, 10**9, (5000, 20))]
    assert len(set(near_duplicate_keys(questions).tolist())) == 5000


def generated_functions(n, seed=0):
    "Unrelated function bodies of 60 to 200 words, drawn from a vocabulary with a long tail."
    random = np.random.default_rng(seed)
    vocabulary = np.array([f"name_{i}" for i in range(2000)])
    weight = 1 / np.arange(1, 2001)
    texts = []
    for i in range(n):
        body = random.choice(vocabulary, random.integers(60, 200), p=weight / weight.sum())
        texts.append(f"def function_{i}(value):\n    " + "\n    ".join(" = ".join(body[k:k + 2]) for k in range(0, len(body), 2)))
    return texts


def planted(codes, n=100):
    "Copies of the first n codes: one identifier renamed, a space added, or punctuation changed, in turn."
    edits = [lambda code: re.sub(r"def (\w+)", "def renamed_here", code, count=1),
             lambda code: code.replace("(", "( ", 1).replace("\n", "\n ", 1),
             lambda code: code.replace(":", ";", 1).replace(",", ".")]
    return [edits[i % 3](code) for i, code in enumerate(codes[:n])]


def check_planted(codes):
    copies = planted(codes)
    assert all(copy != code for copy, code in zip(copies, codes))
    keys = near_duplicate_keys([*codes, *copies])
    found = sum(keys[i] == keys[len(codes) + i] for i in range(len(copies)))
    assert found >= 95
    return keys[:len(codes)]


def test_planted_copies_are_found_and_unrelated_texts_are_not():
    codes = generated_functions(1000)
    keys = check_planted(codes)
    assert len(set(keys.tolist())) >= 0.99 * len(codes)


def test_planted_copies_among_real_functions(data_dir):
    lines = (data_dir / "pymined" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    codes = [json.loads(line)["code"] for line in lines[::6]]
    codes.sort(key=lambda code: len(code.split()) < 40)  # first those long enough that one name is a small part
    keys = check_planted(codes)
    assert 0.98 * len(codes) < len(set(keys.tolist())) <= len(codes)
    for i in np.flatnonzero(keys != np.arange(len(codes)))[:50]:  # what it joined by itself shares most of its words
        family = np.flatnonzero(keys == keys[i])
        assert max(overlap(codes[i], codes[j]) for j in family if j != i) > 0.8


def overlap(one, two):
    a, b = set(normalise(one).split()), set(normalise(two).split())
    return len(a & b) / max(len(a), len(b))


# ---- splits

labels = st.lists(st.integers(0, 12), min_size=3, max_size=80)

@settings(max_examples=300, deadline=None)
@given(labels, st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), {"train": 0.98, "dev": 0.01, "test": 0.01}]), st.integers(0, 5))
def test_split_is_a_partition_that_divides_no_group(groups, fractions, seed):
    if len(set(groups)) < len(fractions):
        with pytest.raises(DataError, match="cannot fill"): grouped_split(groups, fractions, seed)
        return
    split = grouped_split(groups, fractions, seed)
    assert list(split) == (list(fractions) if isinstance(fractions, dict) else ["train", "val", "test"] if len(fractions) == 3 else ["train", "test"])
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(groups)))
    for rows in split.values(): assert len(rows) and (np.diff(rows) > 0).all() and rows.dtype == np.int64
    for one, two in combinations(split.values(), 2): assert not {groups[i] for i in one} & {groups[i] for i in two}


@settings(max_examples=100, deadline=None)
@given(labels, st.integers(0, 5), st.randoms(use_true_random=False))
def test_split_depends_on_seed_and_labels_only(groups, seed, random):
    if len(set(groups)) < 3: return
    def sides(rows): return {name: {rows[i] for i in part} for name, part in grouped_split(rows, seed=seed).items()}
    moved = groups[:]
    random.shuffle(moved)
    assert sides(groups) == sides(groups) == sides(moved)
    assert {name: set(map(str, side)) for name, side in sides(groups).items()} == sides([str(g) for g in groups])


def test_seeds_differ():
    groups = [f"group {i}" for i in range(100)]
    assert len({tuple(grouped_split(groups, seed=seed)["test"]) for seed in range(20)}) == 20


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=30, max_size=60), st.integers(0, 3))
def test_sizes_are_within_one_group_of_the_target(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    target = {"train": 0.8, "val": 0.1, "test": 0.1}
    for name, rows in grouped_split(groups, target, seed).items():
        assert abs(len(rows) - target[name] * len(groups)) <= max(sizes)


@pytest.mark.parametrize("giant", [50, 200, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_a_giant_group_leaves_the_rest_to_the_others(giant, seed):
    groups = ["giant"] * giant + [f"small {i}" for i in range(50)]
    split = grouped_split(groups, seed=seed)
    assert groups[split["train"][0]] == "giant"
    if giant > 200: assert len(split["train"]) == giant and abs(len(split["val"]) - 25) <= 1
    else: assert abs(len(split["train"]) - 0.8 * len(groups)) <= 1


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (1.0,), (1.1, -0.1), (0.25,) * 4, {"train": 1, "test": 0}, {"a": float("nan"), "b": 0.5}])
def test_fractions_that_make_no_sense(fractions):
    with pytest.raises(ConfigError, match="fractions"): grouped_split(range(10), fractions)


@pytest.mark.parametrize("groups", [[], ["a"], ["a", "b"] * 50])
def test_too_few_groups(groups):
    with pytest.raises(DataError, match=f"{len(set(groups))} groups cannot fill 3 parts"): grouped_split(groups)
