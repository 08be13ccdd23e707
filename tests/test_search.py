"Search in code: real trees, a real encoder, real folders; what is encoded is counted by the encoder's own cache."
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proj.chunk import chunks, walk
from proj.core import ConfigError, DataError
from proj.embeddings import EmbeddingCache
from proj.index import Index
from proj.models.dual import DualEncoder
from proj.search import build, open_encoder, refresh, search

from kills import lived

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa nu mu".split()


def function(n: int) -> str:
    draw = random.Random(n)
    return f"def {draw.choice(WORDS)}_{n}({draw.choice(WORDS)}):\n    '{' '.join(draw.choices(WORDS, k=5))} {n}'\n    return {n}\n\n\n"


@pytest.fixture
def tree(tmp_path):
    "Thirty files of four functions each."
    folder = tmp_path / "tree"
    for i in range(30):
        path = folder / ("pkg" if i % 2 else "") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(function(10 * i + j) for j in range(4)))
    return folder


@pytest.fixture(scope="module")
def encoder(): return DualEncoder(open_encoder("static", device="cpu").model, precision="fp32")


@pytest.fixture
def cache(tmp_path): return EmbeddingCache(tmp_path / "cache")


def contents(folder) -> dict:
    "id -> text."
    index = Index.load(folder)
    return {name: index.text(name) for name in index.rows}


def expected(tree) -> dict:
    "id -> text, from the files themselves."
    return {chunk.id: chunk.text for source in walk(tree) for chunk in chunks(source.text, source.path, source.language)}


def vectors_of(folder, names):
    index = Index.load(folder)
    return [index.faiss.reconstruct(index.row(name)) for name in names]


# ---- build and refresh

def test_a_refresh_after_ten_files_encodes_those_only(tree, tmp_path, encoder, cache):
    built = build(tree, tmp_path / "index", encoder, cache=cache)
    assert (built.new, built.chunks, built.encoded, cache.misses) == (30, 120, 120, 120) and contents(tmp_path / "index") == expected(tree)
    cold = EmbeddingCache(tmp_path / "another cache")  # knows nothing, so that every text that is asked for is encoded
    for i in range(10):
        path = next(tree.rglob(f"m{i}.py"))
        path.write_text(path.read_text().replace("return", "return 1 +"))
    done = refresh(tmp_path / "index", encoder, cache=cold)
    assert (done.unchanged, done.changed, done.new, done.deleted) == (20, 10, 0, 0)
    assert done.encoded == cold.misses == 40 == done.added and done.chunks == 120 and done.removed == 0
    assert contents(tmp_path / "index") == expected(tree)


def test_a_refreshed_index_is_the_one_that_a_build_would_make(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "index", encoder, cache=cache)
    draw = random.Random(0)
    for step in range(4):
        paths = sorted(tree.rglob("*.py"))
        draw.choice(paths).unlink()
        draw.choice(paths[:5]).with_name(f"new{step}.py").write_text("".join(function(1_000 + 10 * step + j) for j in range(step)))
        for path in draw.sample([path for path in paths if path.exists()], 3):
            parts = re.split(r"(?=def )", path.read_text())
            path.write_text("".join(draw.sample(parts, len(parts))[:-1]) + "\nX = 1\n" * draw.randint(0, 2))
        done = refresh(tmp_path / "index", encoder, cache=cache)
        assert done.deleted == 1 and done.new <= 1 and contents(tmp_path / "index") == expected(tree)
    build(tree, tmp_path / "fresh", encoder, cache=cache)
    names = sorted(contents(tmp_path / "index"))
    assert all((a == b).all() for a, b in zip(vectors_of(tmp_path / "index", names), vectors_of(tmp_path / "fresh", names)))
    assert Index.load(tmp_path / "index").facts == Index.load(tmp_path / "fresh").facts
    assert search(tmp_path / "index", "alpha beta", encoder=encoder).ids == search(tmp_path / "fresh", "alpha beta", encoder=encoder).ids


def test_code_that_only_moved_is_not_encoded_again(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "index", encoder, cache=cache)
    path = tree / "m0.py"
    path.write_text("import os\n\n" + path.read_text())
    done = refresh(tmp_path / "index", encoder, cache=cache)
    assert (done.changed, done.added, done.removed, done.encoded) == (1, 5, 4, 1) and contents(tmp_path / "index") == expected(tree)


def test_what_did_not_change_needs_no_encoder_and_writes_nothing(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "index", encoder, cache=cache)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    for path in tree.rglob("*.py"): os.utime(path)  # as after a checkout
    assert refresh(tmp_path / "index").encoded == 0, "the encoder has no name and was not given"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == files
    (tree / "m0.py").unlink()
    assert refresh(tmp_path / "index").removed == 4, "nor does what is only gone"


@pytest.mark.parametrize("kind", ["hnsw", "flat"])
def test_kinds(tree, tmp_path, encoder, cache, kind):
    build(tree, tmp_path / "index", encoder, kind=kind, cache=cache)
    (tree / "m0.py").unlink()
    (tree / "zz.py").write_text("def open_the_window():\n    return 'fresh air'\n")
    refresh(tmp_path / "index", encoder, cache=cache)
    assert Index.load(tmp_path / "index").kind == kind and contents(tmp_path / "index") == expected(tree)
    assert search(tmp_path / "index", "open the window", 1, encoder).ids == ["zz.py:1-2"]


def test_everything_that_was_asked_for_is_remembered(tree, tmp_path, cache):
    (tree / "long.js").write_text("let text = '" + "beta " * 200 + "';\n")
    (tree / "b.min.js").write_text("let x;\n")
    build(tree, tmp_path / "index", "static", exclude=["*.min.js", "pkg/"], limit=200, max_length=8, device="cpu", cache=cache)
    before = contents(tmp_path / "index")
    assert len([name for name in before if name.startswith("long.js:1-1#")]) == 6 and not [name for name in before if name.startswith(("pkg", "b."))]
    (tree / "m0.py").write_text("x = 1\n" + "def alpha():\n" + "    beta = 1\n" * 30)
    (tree / "c.min.js").write_text("let y;\n")
    done = refresh(tmp_path / "index", device="cpu", cache=cache)
    assert (done.changed, done.new) == (1, 0) and max(len(text.encode()) for text in contents(tmp_path / "index").values()) <= 200
    facts = Index.load(tmp_path / "index").facts["source"]
    assert (facts["encoder"], facts["max_length"], facts["folder"]) == ("static", 8, str(tree.resolve()))


def test_a_killed_build_goes_on_from_the_cache(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "one", encoder, cache=cache)
    again = build(tree, tmp_path / "two", encoder, cache=EmbeddingCache(tmp_path / "cache"))
    assert (again.new, again.added, again.encoded) == (30, 120, 0)


def test_nothing_but_punctuation_is_not_indexed(tmp_path, encoder, cache):
    (tmp_path / "a.js").write_text("\x01\n")
    (tmp_path / "b.js").write_text("}\n")
    (tmp_path / "c.js").write_text("sort(list)\n")
    assert build(tmp_path, tmp_path / "index", encoder, cache=cache).chunks == 1
    assert search(tmp_path / "index", "sort", 5, encoder).ids == ["c.js:1-1"]
    (tmp_path / "c.js").unlink()
    with pytest.raises(DataError, match="no source code is left there; the index .* stays as it was"): refresh(tmp_path / "index", encoder)
    assert list(contents(tmp_path / "index")) == ["c.js:1-1"]


# ---- a killed refresh

def refresh_and_die(tree, index, cache, step):
    import torch
    torch.set_num_threads(1)
    from proj import core
    os.environ["_PROJ_DIE_AT"] = str(step)
    core.WRITES = 0
    refresh(index, device="cpu", cache=EmbeddingCache(cache))
    Path(index).with_name("writes").write_text(str(core.WRITES))


def test_a_refresh_that_is_killed_at_any_write_leaves_an_index_that_can_be_used(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "index", "static", device="cpu", cache=cache)
    before = contents(tmp_path / "index")
    for i in range(3): (tree / f"m{2 * i}.py").write_text(function(500 + i))
    after = expected(tree)
    assert before != after
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proj.search", "proj.models.encoder", "sentence_transformers", "faiss"])

    def run(name, step):
        shutil.copytree(tmp_path / "index", tmp_path / name / "index")
        child = lived(context.Process(target=refresh_and_die, args=(str(tree), str(tmp_path / name / "index"), str(tmp_path / name / "cache"), step)))
        return child.exitcode, tmp_path / name / "index"

    code, whole = run("whole", 0)
    assert code == 0 and contents(whole) == after
    writes = int(whole.with_name("writes").read_text())
    assert writes >= 5
    outcomes = []
    with ThreadPoolExecutor(2) as pool:
        for code, folder in pool.map(lambda step: run(f"step{step}", step), [*range(1, writes - 1, 2), writes - 1, writes]):
            assert code == -signal.SIGKILL and contents(folder) in (before, after)
            outcomes.append(contents(folder) == after)
            refresh(folder, encoder, cache=cache)
            assert contents(folder) == after
    assert outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1], "the old one up to a step, the new one from there on"


# ---- search

def test_a_search_finds_shows_and_says_what_is_stale(tree, tmp_path, encoder, cache):
    (tree / "window.py").write_text("# Let air in.\ndef open_the_window(room):\n\n    return room.windows[0].open()\n")
    build(tree, tmp_path / "index", encoder, cache=cache)
    hits = search(tmp_path / "index", "open the window of a room", 3, encoder)
    assert hits.ids[0] == "window.py:1-4" and hits.kinds[0] == "function" and len(hits) == 3 and list(hits.scores) == sorted(hits.scores, reverse=True)
    assert f"window.py:1-4  {hits.scores[0]:.4f}  function\n    # Let air in.\n    def open_the_window(room):\n        return" in repr(hits)
    (tree / "window.py").write_text("x = 1\n")
    assert "the file has changed since" in repr(search(tmp_path / "index", "open the window", 1, encoder))
    (tree / "window.py").unlink()
    assert "the file is gone" in repr(search(tmp_path / "index", "open the window", 1, encoder))
    assert len(search(tmp_path / "index", "alpha", 500, encoder)) == 121
    assert search(Index.load(tmp_path / "index"), "open the window of a room", 3, encoder).ids == hits.ids


def test_a_path_with_colons_and_hashes(tmp_path, encoder, cache):
    (tmp_path / "a:1#2 b.py").write_text("def window(): pass\n")
    build(tmp_path, tmp_path / "index", encoder, cache=cache)
    hits = search(tmp_path / "index", "window", 1, encoder)
    assert hits.ids == ["a:1#2 b.py:1-1"] and hits.kinds == ["function"] and hits.notes == [""]


# ---- one line for every mistake

def test_mistakes(tree, tmp_path, encoder, cache):
    with pytest.raises(DataError, match="no such folder"): build(tmp_path / "none", tmp_path / "i", encoder)
    (tmp_path / "prose").mkdir(), (tmp_path / "prose" / "a.md").write_text("#"), (tmp_path / "prose" / "b.py").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no source code found; left out: 1 \(binary\); expected files such as"): build(tmp_path / "prose", tmp_path / "i", encoder)
    with pytest.raises(ConfigError, match="holds something else than an index"): build(tree, tmp_path / "prose", encoder)
    with pytest.raises(ConfigError, match="holds something else"): build(tree, tmp_path / "prose" / "a.md", encoder)
    with pytest.raises(ConfigError, match="not trained yet"): build(tree, tmp_path / "i", "tiny")
    with pytest.raises(ConfigError, match="did you mean 'minilm'"): build(tree, tmp_path / "i", "minilmm")
    with pytest.raises(ConfigError, match="unknown kind of index"): build(tree, tmp_path / "i", encoder, kind="tree", cache=cache)
    with pytest.raises(ConfigError, match="at least 64"): build(tree, tmp_path / "i", encoder, limit=10)
    assert not (tmp_path / "i").exists()
    with pytest.raises(DataError, match="index.json: missing"): search(tmp_path / "i", "x")
    with pytest.raises(DataError, match="index.json: missing"): refresh(tmp_path / "i")
    build(tree, tmp_path / "i", encoder, cache=cache)
    with pytest.raises(ConfigError, match="encoder without a name; pass encoder="): search(tmp_path / "i", "x")
    with pytest.raises(ConfigError, match="k is 0"): search(tmp_path / "i", "x", 0, encoder)
    with pytest.raises(ConfigError, match="the query is blank"): search(tmp_path / "i", " \n", 1, encoder)
    shutil.move(tree, tmp_path / "moved")
    with pytest.raises(DataError, match="no such folder"): refresh(tmp_path / "i", encoder)


def test_another_encoder_is_refused(tree, tmp_path, encoder, cache):
    encoder.save(tmp_path / "model")
    build(tree, tmp_path / "index", tmp_path / "model", device="cpu", cache=cache)
    assert search(tmp_path / "index", "alpha", device="cpu").ids == search(tmp_path / "index", "alpha", encoder=encoder).ids
    trained = DualEncoder(open_encoder("static", device="cpu").model, precision="fp32")
    trained.model[0].embedding.weight.data[100] += 1
    trained.save(tmp_path / "model")  # trained on, under the same name
    (tree / "m0.py").write_text("x = 1\n")
    for use in (lambda: search(tmp_path / "index", "alpha", device="cpu"), lambda: refresh(tmp_path / "index", device="cpu", cache=cache)):
        with pytest.raises(DataError, match="other weights"): use()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ConfigError, match="its encoder is not where it was .* pass encoder="): search(tmp_path / "index", "alpha")
    assert refresh(tmp_path / "index", encoder, cache=cache).changed == 1


def test_a_damaged_index(tree, tmp_path, encoder, cache):
    build(tree, tmp_path / "index", encoder, cache=cache)
    about = tmp_path / "index" / "index.json"
    whole = json.loads(about.read_text())
    for damaged in (json.dumps(whole).replace("m0.py", "../m0.py"), about.read_text()[:-20], "{}"):
        about.write_text(damaged)
        for use in (lambda: search(tmp_path / "index", "alpha", 1, encoder), lambda: refresh(tmp_path / "index", encoder)):
            with pytest.raises(DataError) as error: use()
            assert "index.json" in str(error.value) and "\n" not in str(error.value)


def test_this_repository_and_modules_of_the_standard_library(tmp_path, encoder, cache):
    "Real code is found by what it does."
    build(Path(__file__).parent.parent, tmp_path / "here", encoder, exclude=["tests"], cache=cache)
    assert "proj/metrics.py" in " ".join(search(tmp_path / "here", "reciprocal rank of the first relevant document", 5, encoder).ids)
    build(sysconfig.get_path("stdlib"), tmp_path / "stdlib", encoder, exclude=["/*/", "[!abc]*"], cache=cache)
    assert search(tmp_path / "stdlib", "calendar of a month", 5, encoder).ids[0].startswith("calendar.py")
