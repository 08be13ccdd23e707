"Planted leaks on generated and on mined data, what is no leak, the lines that are named, cuts that never leak."
import ast
import csv
import gzip
import json
import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from proj.core import DataError, GateError
from proj.data.code import outline, syntax_key
from proj.data.guard import decontaminate, find_leaks, guard, label_conflicts
from proj.data.sources import cut, groups_of, load_data, read_beir_store, read_store
from proj.data.split import grouped_split, near_pairs
from proj.data.store import from_pairs, from_tables

# ---- edits that leave a copy a copy

def changed_word(code, draw):
    word = draw.choice([m for m in re.finditer(r"[A-Za-z_]\w+", code)])
    return code[:word.start()] + "changed" + code[word.end():]


def dropped_line(code, draw):
    lines = code.splitlines()
    del lines[draw.randrange(1, len(lines))]
    return "\n".join(lines)


def added_comment(code, draw):
    lines = code.splitlines()
    at = draw.randrange(1, len(lines) + 1)
    return "\n".join([*lines[:at], "    # this was added later, to say why it is done", *lines[at:]])


def renamed_variable(code, draw):
    names = sorted({node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)} | {node.arg for node in ast.walk(ast.parse(code)) if isinstance(node, ast.arg)})
    names = [name for name in names if not re.search(rf"[.\"']{name}\b|\b{name}=[^=]", code)] or names
    return re.sub(rf"\b{draw.choice(names)}\b", "renamed", code)


EDITS = [changed_word, dropped_line, added_comment, renamed_variable]


class Rename(ast.NodeTransformer):
    "Every variable, argument and function gets a new name; the layout is lost."
    def __init__(self): self.names = {}
    def new(self, name): return self.names.setdefault(name, f"name_{len(self.names)}") if name not in ("self", "cls") else name
    def visit_Name(self, node): return ast.copy_location(ast.Name(self.new(node.id), node.ctx), node)
    def visit_Global(self, node): return ast.Global([self.new(name) for name in node.names])
    visit_Nonlocal = lambda self, node: ast.Nonlocal([self.new(name) for name in node.names])

    def visit_arg(self, node):
        self.generic_visit(node)
        node.arg = self.new(node.arg)
        return node

    def visit_FunctionDef(self, node):
        node.name = self.new(node.name)
        self.generic_visit(node)
        return node

    def visit_ExceptHandler(self, node):
        node.name = node.name and self.new(node.name)
        self.generic_visit(node)
        return node

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef


def renamed_all(code): return ast.unparse(Rename().visit(ast.parse(code)))


def spoilt(text, draw):
    "Case, white space and punctuation, nothing else."
    return "  " + draw.choice([str.upper, str.title, str.swapcase])(text).replace(" ", draw.choice(["  ", "\t", " \n "])) + draw.choice(["", "!", " ..."])


# ---- generated and mined functions

VERBS = "sort read drop merge split count open close parse write move find check load send".split()
NOUNS = "list file row table string number date tree graph queue user page node path key".split()


def made_function(draw):
    "A function of six to sixteen lines with names and constants drawn at random."
    name = lambda: f"{draw.choice(NOUNS)}_{draw.randrange(100)}"
    arguments = sorted({name() for _ in range(draw.randint(2, 4))})
    lines = [f"def {draw.choice(VERBS)}_{name()}({', '.join(arguments)}):"]
    for _ in range(draw.randint(4, 12)):
        x, y = draw.choice(arguments), name()
        lines += draw.choice([[f"    {y} = {x} {draw.choice('+-*/')} {draw.randrange(1000)}"], [f"    if {x}.{name()}({draw.randrange(1000)}): return {y}"],
                              [f"    for {y} in {x}:", f"        {draw.choice(VERBS)}({y}, {x}, {draw.randrange(1000)})"], [f"    {x}.{name()} = [{y} for {y} in {x} if {y} > {draw.randrange(1000)}]"]])
    return "\n".join([*lines, f"    return {', '.join(arguments)}"]) + "\n"


def made_query(draw): return f"{draw.choice(VERBS)} {draw.randrange(1000)} {' '.join(draw.sample(NOUNS, 3))} {draw.choice(VERBS)} {draw.randrange(1000)}".capitalize()


def made_rows(n, seed):
    draw = random.Random(seed)
    return [{"query": made_query(draw), "code": made_function(draw)} for _ in range(n)]


def parses(code):
    try: return bool(ast.parse(code))
    except SyntaxError: return False


@pytest.fixture(scope="module")
def generated(): return made_rows(2000, 0), made_rows(300, 1)


@pytest.fixture(scope="module")
def mined(data_dir): return [[json.loads(line) for line in (data_dir / "pymined" / f"{part}.jsonl").open(encoding="utf-8")] for part in ("train", "val")]


def planted(train, test, seed=0):
    "Test rows with 100 copies of each kind, of a training query or of a training function; {kind: the row's index}."
    draw, rows, where = random.Random(seed), list(test), {}
    fresh = iter(made_rows(2000, 99))
    def plant(kind, row):
        where.setdefault(kind, []).append(len(rows))
        rows.append(row)
    sources = iter(draw.sample([row for row in train if parses(row["code"])], 1000))
    for row in (next(sources) for _ in range(100)): plant("exact query", next(fresh) | {"query": row["query"]})
    for row in (next(sources) for _ in range(100)): plant("exact document", next(fresh) | {"code": row["code"]})
    for row in (next(sources) for _ in range(100)): plant("normalised query", next(fresh) | {"query": spoilt(row["query"], draw)})
    for row in (next(sources) for _ in range(100)): plant("normalised document", next(fresh) | {"code": spoilt(row["code"], draw)})
    for edit in EDITS:
        for row in (next(sources) for _ in range(25)): plant("near-duplicate document", next(fresh) | {"code": edit(row["code"], draw)})
    for row in (next(sources) for _ in range(100)): plant("renamed document", next(fresh) | {"code": renamed_all(row["code"])})
    return rows, where


def check_planted(train, test):
    rows, where = planted(train, test)
    leaks = find_leaks({"train": from_pairs(train), "test": from_pairs(rows)})
    queries = {text: hit for text, hit in zip(leaks.parts["test"].query_texts, leaks.affected("test"))}
    found = {kind: sum(queries[rows[at]["query"]] for at in places) for kind, places in where.items()}
    assert all(n == 100 for kind, n in found.items() if kind.split()[0] in ("exact", "normalised")), found
    assert found["near-duplicate document"] >= 95 and found["renamed document"] >= 95, found
    return leaks, [row for row in test if queries[row["query"]]]


def test_planted_leaks_among_generated_functions(generated):
    leaks, flagged = check_planted(*generated)
    assert flagged == []


def test_planted_leaks_among_mined_functions(mined):
    train, test = mined
    leaks, flagged = check_planted(train, test)
    assert len(flagged) <= 0.01 * len(test)
    assert {"joblib", "packaging"} <= {row["source"] for row in flagged}  # functions that numpy has copied


def test_the_kind_is_the_strictest_that_applies(generated):
    train, _ = generated
    draw, codes = random.Random(0), [row["code"] for row in train[:5]]
    copies = [codes[0], spoilt(codes[1], draw), codes[2].replace(":", ": # why\n", 1), renamed_all(codes[3])]
    leaks = find_leaks({"train": from_pairs(train), "test": from_pairs([{"query": f"q{i} {i * 977}", "code": code} for i, code in enumerate(copies)])})
    assert [leak.kind for leak in leaks.found] == ["exact", "normalised", "near-duplicate", "syntax tree"]


# ---- near pairs, syntax keys

words = st.sampled_from("a b c d e f".split())

@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=30).map(" ".join), max_size=12), st.randoms(use_true_random=False), st.sampled_from([(0.8, 0), (0.5, 0), (0.8, 10), (0.8, 30)]))
def test_near_pairs_are_those_of_comparing_everything(texts, random, rule):
    threshold, apart = rule
    texts = [*texts, *(text.replace("a", "b", 1) for text in texts)]
    part = np.array([random.randrange(3) for _ in texts], dtype=int)
    def shingles(text):
        units = text.split() if text.count(" ") >= 7 else list(text)
        units += [""] * (5 - len(units))
        return {tuple(units[i:i + 5]) for i in range(len(units) - 4)}
    sets, near = [shingles(text) for text in texts], {}
    for i, j in combinations(range(len(texts)), 2):
        if part[i] == part[j]: continue
        one, two = sets[i], sets[j]
        similarity, long = len(one & two) / len(one | two), min(texts[i].count(" "), texts[j].count(" ")) >= 7
        if similarity >= threshold or long and apart and similarity >= 0.3 and len(one ^ two) <= apart:
            near[(i, j) if part[i] < part[j] else (j, i)] = similarity
    best = {}
    for (i, j), similarity in sorted(near.items()):
        for own, other in ((i, j), (j, i)):
            key = (own, part[other])
            if key not in best or (similarity, -other) > best[key][:2]: best[key] = (similarity, -other, (i, j))
    i, j, similarity = near_pairs(texts, part, threshold, apart)
    assert dict(zip(zip(i.tolist(), j.tolist()), similarity.tolist())) == {pair: near[pair] for *_, pair in best.values()}


def test_renaming_reformatting_and_documenting_keep_the_key():
    rows = made_rows(50, 5)
    for row in rows:
        renamed = renamed_all(row["code"])
        assert renamed != row["code"] and syntax_key(renamed) == syntax_key(row["code"]) and outline(renamed) == outline(row["code"])
        head, body = row["code"].split("\n", 1)
        documented = f'async {head}\n    """If not: for x in y."""  # return\n{body}'
        assert syntax_key(documented.removeprefix("async ")) == syntax_key(row["code"]) != syntax_key(documented)
    assert len({syntax_key(row["code"]) for row in rows}) == 50


@pytest.mark.parametrize("one, two, same", [
    ("x.append(y)", "x.extend(y)", False), ("x.append(1)", "x.append(2)", False), ("total = x * 2", "total = x + 2", False),
    ("import json as a\na.load(x)", "import pickle as a\na.load(x)", False), ("sort(x, key=y)", "arrange(x, key=y)", True),
    ("sort(x, key=y)", "sort(x, by=y)", False), ("global a\na = x", "global b\nb = x", True), ("x, y = y, x", "x, y = x, y", False)])
def test_what_the_key_of_a_small_tree_tells_apart(one, two, same):
    def function(body): return "def f(x, y, z, w):\n" + "".join(f"    {line}\n" for line in f"{body}\nreturn x".split("\n"))
    assert syntax_key(function(one)) is not None and (syntax_key(function(one)) == syntax_key(function(two))) == same


@pytest.mark.parametrize("text", ["", "def f(:", "x = 1\0", "print 'hello'", "x = " + "(" * 5000 + ")" * 5000, "return the list of all files in the folder, sorted by name and size, please", "\ud800", "'d" * 5])
def test_what_is_no_python_has_no_key(text):
    assert syntax_key(text) is None


# ---- what is no leak

def test_a_shared_corpus_is_no_leak(data_dir):
    train, test = (read_beir_store(data_dir / "scifact", split) for split in ("train", "test"))
    leaks = find_leaks({"train": train, "test": test})
    assert leaks.shared > 100 and all(leak.side == "query" for leak in leaks.found) and len(leaks) <= 3
    assert leaks.counts()["exact query"] == 2 and "qrels/train.tsv: 871 195689316" in str(leaks)


def test_documents_of_a_corpus_are_told_by_their_ids():
    texts = [(f"d{i}", row["code"]) for i, row in enumerate(made_rows(4, 0))]
    train = from_tables([("1", "sort it"), ("2", "read it")], texts, [("1", "d0", 1), ("2", "d1", 1)])
    test = from_tables([("3", "where is it"), ("4", "what does it say")], texts, [("3", "d0", 2), ("4", "d3", 1)])
    assert len(find_leaks({"train": train, "test": test})) == 0 and find_leaks({"train": train, "test": test}).shared == 1
    as_pairs = find_leaks({"train": from_pairs([{"query": "sort it", "code": texts[0][1]}]), "test": from_pairs([{"query": "where is it", "code": texts[0][1]}])})
    assert as_pairs.counts() == {"exact document": 1} and as_pairs.shared == 0


def test_negatives_and_the_pool_are_no_leak():
    one, two, three = (row["code"] for row in made_rows(3, 0))
    train = from_pairs([{"query": "sort it", "code": one, "negatives": [two]}])
    assert len(find_leaks({"train": train, "test": from_pairs([{"query": "where is it", "code": two, "negatives": [one, three]}])})) == 0


def test_groups_that_straddle():
    def store(part, packages, column): return from_pairs([row | {column: p} for row, p in zip(made_rows(len(packages), part), packages)], column, origins=[f"{part}:{n}" for n, _ in enumerate(packages, 1)])
    leaks = find_leaks({"train": store("train", "aabbcd", "package"), "test": store("test", "beeffc", "package")})
    assert leaks.counts() == {"group": 2} and [leak.origins for leak in leaks.found] == [(["train:3", "train:4"], ["test:1"]), (["train:5"], ["test:6"])]
    assert leaks.affected("train").tolist() == [False, False, True, True, True, False] and leaks.affected("test").tolist() == [True] + [False] * 4 + [True]
    sites = {part: store(part, "ababab", "source") for part in ("train", "test")}
    assert len(find_leaks(sites)) == 0  # every source is in both parts: rows were not divided by it
    with pytest.raises(GateError, match="package b"): guard(leaks.parts)


def test_source_says_nothing_about_questions(data_dir):
    "Nine web sites, all in both files; the files are divided by disease."
    parts = {part: read_store(data_dir / "medquad" / f"{part}.jsonl") for part in ("train", "dev")}
    leaks = find_leaks(parts)
    assert "group" not in leaks.counts() and leaks.counts()["exact document"] >= 10


@pytest.mark.parametrize("query, code", [("?", "..."), ("q", "x"), ("sort", "def f(): pass")])
def test_parts_of_one_row(query, code):
    rows = [{"query": query, "code": code}]
    same = find_leaks({"train": from_pairs(rows), "test": from_pairs(rows)})
    assert same.counts() == {"exact query": 1, "exact document": 1} and "exact query: row 1 | row 1" in str(same)
    other = find_leaks({"train": from_pairs(rows), "test": from_pairs([{"query": "how tall is it", "code": "tower.height()"}])})
    assert len(other) == 0 and not other.affected("train").any() and "0 leaks" in repr(other)
    with pytest.raises(DataError, match="every train row"): decontaminate(same.parts)


# ---- lines

def line_of(path, text):
    "The line of a file on which a text begins, which stands there once."
    content = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
    assert content.count(text) == 1
    return content[:content.index(text)].count("\n") + 1


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.csv.gz", "train.tsv"])
def test_the_lines_that_are_named_are_those_in_the_file(tmp_path, name):
    rows = [{"query": f"{row['query']} unique{n}\nand more", "code": row["code"]} for n, row in enumerate(made_rows(40, 0))]
    path, test = tmp_path / name, tmp_path / "test.jsonl"
    with (gzip.open if name.endswith("gz") else open)(path, "wt", encoding="utf-8", newline="") as file:
        if "csv" in name or "tsv" in name:
            writer = csv.DictWriter(file, ["query", "code"], delimiter="\t" if "tsv" in name else ",", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            for n, row in enumerate(rows): file.write("\n" * (n % 3) + json.dumps(row) + "\n")
    picked = random.Random(0).sample(range(40), 10)
    test.write_text("\n".join(json.dumps({"query": rows[n]["query"].upper(), "code": f"x = {n}"}) for n in picked))
    leaks = find_leaks({"train": read_store(path), "test": read_store(test)})
    assert sorted(leak.texts[0] for leak in leaks.found) == sorted(rows[n]["query"] for n in picked)
    for leak in leaks.found:
        n = int(re.search(r"unique(\d+)", leak.texts[0])[1])
        line = line_of(path, f"unique{n}" + ("\\n" if "json" in name else "\n"))
        assert leak.origins == ([f"{path}:{line}"], [f"{test}:{picked.index(n) + 1}"])


def test_every_line_of_a_text_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"query": q, "code": c}) + "\n" for q, c in [("sort it", "a = sorted(b)"), ("drop it", "del a"), ("sort it", "a.sort()"), ("order it", "a.sort()")]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"query": q, "code": c}) + "\n" for q, c in [("sort it", "sorted(a, key=b)"), ("put in order", "a.sort()")]))
    parts = {part: read_store(tmp_path / f"{part}.jsonl") for part in ("train", "test")}
    found = {leak.side: leak.origins for leak in find_leaks(parts).found}
    name = {part: f"{tmp_path}/{part}.jsonl" for part in parts}
    assert found == {"query": ([f"{name['train']}:1", f"{name['train']}:3"], [f"{name['test']}:1"]), "document": ([f"{name['train']}:3", f"{name['train']}:4"], [f"{name['test']}:2"])}


def test_origins_are_no_data(tmp_path):
    for name in ("a.jsonl", "b.jsonl"): (tmp_path / name).write_text("\n" * (name == "b.jsonl") + '{"query": "sort it", "code": "a.sort()", "negatives": ["a.sort()"]}\n')
    one, two = read_store(tmp_path / "a.jsonl"), read_store(tmp_path / "b.jsonl")
    assert one.sha256 == two.sha256 and one.judgements["origin"].to_pylist() == [f"{tmp_path}/a.jsonl:1"] != two.judgements["origin"].to_pylist()
    assert one.take([0]).judgements.equals(one.judgements) and one.take([0]).group_column is None


# ---- the gate

def test_the_gate_names_lines_and_writes_them_all(tmp_path, caplog):
    rows = made_rows(30, 0)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*made_rows(5, 1), *rows[10:20]]))
    parts = {part: read_store(tmp_path / f"{part}.jsonl") for part in ("train", "test")}
    with pytest.raises(GateError) as error: guard(parts, folder=tmp_path / "run")
    first, *lines = str(error.value).splitlines()
    assert error.value.exit_code == 4 and first == "20 leaks between train, test: 10 exact query, 10 exact document" and len(lines) == 3 + 3 + 2
    assert f"{tmp_path}/train.jsonl:11 | {tmp_path}/test.jsonl:6" in lines[0] and "allow_leak=true" in lines[-1] and str(tmp_path / "run" / "leaks.jsonl") in lines[-2]
    written = (tmp_path / "run" / "leaks.jsonl").read_bytes()
    records = [json.loads(line) for line in written.splitlines()]
    assert len(records) == 20 and records[0]["first"] == {"part": "train", "id": records[0]["second"]["id"], "origins": [f"{tmp_path}/train.jsonl:11"], "text": rows[10]["query"]}
    facts = guard(parts, allow_leak=True, folder=tmp_path / "again")
    assert facts["leaking_queries"] == {"train": 10, "test": 10} and facts["allowed"] and "20 leaks" in caplog.text
    assert (tmp_path / "again" / "leaks.jsonl").read_bytes() == written


def test_clean_parts_leave_no_file(tmp_path):
    parts = {"train": from_pairs(made_rows(30, 0)), "validation": from_pairs(made_rows(5, 2)), "test": from_pairs(made_rows(5, 1))}
    facts = guard(parts, folder=tmp_path)
    assert facts["leaks"] == {} and facts["leaking_queries"] == {"train": 0, "validation": 0, "test": 0} and not list(tmp_path.iterdir())


def test_three_parts_are_compared_two_by_two():
    rows = made_rows(12, 0)
    leaks = find_leaks({"train": from_pairs(rows[:6]), "validation": from_pairs(rows[5:9]), "test": from_pairs([rows[0], *rows[8:]])})
    assert sorted((leak.parts, leak.side) for leak in leaks.found) == sorted((pair, side) for side in ("query", "document") for pair in [("train", "test"), ("train", "validation"), ("validation", "test")])
    clean = decontaminate(leaks.parts)
    assert [len(store.queries) for store in clean.values()] == [4, 3, 5] and clean["test"] is leaks.parts["test"] and not len(find_leaks(clean))


# ---- contradicting labels

def test_conflicting_labels_and_false_negatives(tmp_path, caplog):
    one, two, three, four = (row["code"] for row in made_rows(4, 3))
    rows = [{"query": "sort it", "code": one, "negatives": [two]},
            {"query": "Sort it!", "code": two, "negatives": [three]},                  # of line 1: another spelling of the query
            {"query": "read it", "code": three, "negatives": [three, four]},           # itself
            {"query": "find it", "code": four, "negatives": [spoilt(four, random.Random(0)), one + "\n# copied"]},  # itself, with other spacing
            {"query": "drop it", "code": one, "grade": 0}, {"query": "drop it", "code": two}, {"query": "drop it", "code": one},   # by its grade
            {"query": "sort it", "code": three, "negatives": ["# a comment\n" + one]}]  # nearly what line 1 answers
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(leak.kind, *(int(places[0].split(":")[-1]) for places in leak.origins)) for leak in label_conflicts(read_store(path))}
    assert found == {("conflicting label", 2, 1), ("conflicting label", 3, 3), ("conflicting label", 4, 4), ("conflicting label", 7, 5), ("false negative", 1, 8), ("conflicting label", 8, 2)}
    facts = guard({"train": read_store(path), "test": from_pairs(made_rows(3, 9))}, folder=tmp_path)
    assert (facts["conflicting_labels"], facts["false_negatives"], facts["leaks"]) == (5, 1, {}) and f"{path}:3" in caplog.text
    assert len((tmp_path / "leaks.jsonl").read_text().splitlines()) == 6


def test_a_positive_of_another_query_is_a_fine_negative():
    one, two = (row["code"] for row in made_rows(2, 3))
    assert label_conflicts(from_pairs([{"query": "sort it", "code": one, "negatives": [two]}, {"query": "read it", "code": two, "negatives": [one]}])) == []


# ---- our own cuts

@st.composite
def related_rows(draw):
    "Rows of several packages, with copies and edited copies of each other."
    random_ = random.Random(draw(st.integers(0, 10**6)))
    rows = [row | {"package": f"p{random_.randrange(12)}"} for row in made_rows(draw(st.integers(30, 60)), random_.random())]
    for _ in range(draw(st.integers(0, 15))):
        row = random_.choice(rows)
        change = random_.choice([lambda code: code, lambda code: spoilt(code, random_), lambda code: added_comment(code, random_), renamed_all])
        copy = {"query": random_.choice([row["query"], made_query(random_), spoilt(row["query"], random_)]), "package": f"p{random_.randrange(12)}"}
        rows.append(copy | {"code": change(row["code"]) if parses(row["code"]) else row["code"]})
    return rows


@settings(max_examples=30, deadline=None)
@given(related_rows(), st.booleans(), st.integers(0, 3))
def test_cuts_never_leak(rows, grouped, seed):
    store = from_pairs(rows, group="package" if grouped else None)
    try: parts = dict(zip(("train", "validation", "test"), cut(store, 0.1, 0.3, seed)))
    except DataError as error:  # a part of a few rows may be copies altogether: then, and only then, the cut is refused
        shares = {"train": 1 - 0.1 - 0.3, "validation": 0.1, "test": 0.3}
        raw = {name: store.take(rows, own_documents=name != "test") for name, rows in grouped_split(groups_of(store), shares, seed=seed).items()}
        refused = str(error).split()[1]
        assert find_leaks(raw).affected(refused, ends=(0,)).all()
        return
    assert guard(parts)["leaks"] == {}
    again = dict(zip(parts, cut(store, 0.1, 0.3, seed)))
    assert {name: part.sha256 for name, part in parts.items()} == {name: part.sha256 for name, part in again.items()}


def test_leaks_do_not_depend_on_chance(generated):
    train, test = generated
    rows, _ = planted(train, test)
    parts = {"train": from_pairs(train), "test": from_pairs(rows)}
    assert repr(find_leaks(parts)) == repr(find_leaks(parts)) and find_leaks(parts).found == find_leaks(parts).found


def test_the_standard_library_is_cut_without_leaks():
    parts = load_data("stdlib")
    facts = guard(dict(parts.parts()))
    assert facts["leaks"] == {} and len(parts.train.queries) > 1000
    origin = parts.train.judgements["origin"].to_pylist()[0]
    assert re.fullmatch(r"[\w/]+\.py:\d+", origin)
