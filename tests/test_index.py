"""The index against naive search and a dictionary; kills, readers and hostile folders.

    python tests/test_index.py 2000          # so many mutated folders, each as found and with hashes put right
"""
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError, ProjError, sha256_file
from proj.index import Index, measure
from proj.publish import ABOUT, signed
from proj.vectors import KINDS, METRICS, from_arrays, to_arrays

SMALL = {"flat": {}, "hnsw": dict(M=8, ef_construction=60, ef_search=100), "ivfpq": dict(lists=32, m=4, nprobe=32)}


def gaussian(n: int, d: int = 8, seed: int = 0) -> np.ndarray: return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def ids_of(n: int, prefix: str = "d") -> list[str]: return [f"{prefix}{i}" for i in range(n)]


def naive(vectors: dict, query, k: int, metric: str) -> tuple[list, list]:
    "(scores, ids) by a loop over all vectors."
    def score(v): return float(np.dot(query.astype(np.float64), v)) if metric == "ip" else -float(np.linalg.norm(query.astype(np.float64) - v))
    best = sorted((-score(vector), name) for name, vector in vectors.items())[:k]
    return [-score for score, _ in best], [name for _, name in best]


@pytest.fixture(scope="module")
def ivfpq():
    "metric -> an index with its vectors; trained once, as k-means takes its time."
    vectors = gaussian(10_000)
    return {metric: Index.build(vectors, ids_of(10_000), "ivfpq", metric, **SMALL["ivfpq"]) for metric in METRICS}


def copied(index: Index) -> Index:
    arrays = {name: array.copy() for name, array in to_arrays(index.faiss, index.kind).items()}
    return Index(from_arrays(index.kind, index.dim, index.metric, index.options, arrays), index.kind, index.metric, index.ids.copy(), None, index.options)


# ---- search

@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), d=st.integers(1, 20), k=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_flat_is_naive_search(metric, n, d, k, seed):
    vectors, queries = gaussian(n, d, seed), gaussian(3, d, seed + 1)
    scores, ids = Index.build(vectors, ids_of(n), "flat", metric).search(queries, k)
    for query, row_scores, row_ids in zip(queries, scores, ids):
        expected, names = naive(dict(zip(ids_of(n), vectors)), query, k, metric)
        assert np.allclose(row_scores, expected, atol=2e-3) and set(row_ids) <= set(ids_of(n)) and len(row_ids) == len(set(row_ids)) == min(n, k)
        if np.diff(expected).size == 0 or -np.diff(expected).max() > 1e-2: assert row_ids == names


@pytest.mark.parametrize("metric", METRICS)
def test_the_approximate_kinds_are_near_it(metric, ivfpq):
    vectors, queries = gaussian(10_000), gaussian(100, seed=1)
    flat = Index.build(vectors, ids_of(10_000), "flat", metric)
    graph = Index.build(vectors[:4_000], ids_of(4_000), "hnsw", metric, **SMALL["hnsw"])
    exact = Index.build(vectors[:4_000], ids_of(4_000), "flat", metric)
    assert measure(graph, exact, queries).rows[1]["recall"] > 0.95
    few, many = (measure(ivfpq[metric], flat, queries, nprobe=nprobe).rows[1]["recall"] for nprobe in (1, 32))
    assert 0.1 < few < many and many > 0.4


def test_metric_and_options_reach_faiss(ivfpq):
    vectors = gaussian(300)
    for metric, number in (("ip", faiss.METRIC_INNER_PRODUCT), ("l2", faiss.METRIC_L2)):
        for kind in ("flat", "hnsw"): assert Index.build(vectors, ids_of(300), kind, metric).faiss.metric_type == number
        assert ivfpq[metric].faiss.metric_type == number == ivfpq[metric].faiss.quantizer.metric_type
    index = Index.build(vectors, ids_of(300), "hnsw")
    graph = index.faiss.hnsw
    assert (graph.nb_neighbors(1), graph.nb_neighbors(0), graph.efConstruction) == (32, 64, 200)
    assert KINDS["hnsw"]["ef_search"] == 200 and KINDS["ivfpq"] == dict(lists=1024, m=64, nprobe=32)
    assert (ivfpq["ip"].faiss.nlist, ivfpq["ip"].faiss.pq.M, ivfpq["ip"].faiss.pq.nbits) == (32, 4, 8)


def test_equal_scores_are_sorted_by_id():
    vectors = np.ones((50, 4), np.float32)
    names = ids_of(50)
    random.Random(0).shuffle(names)
    for metric in METRICS:
        scores, ids = Index.build(vectors, names, metric=metric).search(vectors[:2], 50)
        assert ids == [sorted(names)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_hits_than_k_are_short_rows(kind, ivfpq):
    index = copied(ivfpq["l2"]) if kind == "ivfpq" else Index.build(gaussian(40), ids_of(40), kind, "l2", **SMALL[kind])
    index.remove([name for name in index.rows if int(name[1:]) % 1_000 > 5])
    scores, ids = index.search(gaussian(5, seed=3), 70, **({"nprobe": 4} if kind == "ivfpq" else {}))
    for row_scores, row_ids in zip(scores, ids):
        assert len(row_scores) == len(row_ids) == len(set(row_ids)) <= len(index) and set(row_ids) <= set(index.rows)
        assert all(isinstance(name, str) for name in row_ids) and list(row_scores) == sorted(row_scores, reverse=True)
    lengths = {len(row) for row in ids}
    assert lengths == {len(index)} if kind != "ivfpq" else max(lengths) < len(index)


def test_a_search_among_removed_neighbours_is_completed():
    "All that lies around the query is removed: the graph's candidates are used up before k are found."
    near, far = gaussian(900) * 0.01, gaussian(4_100, seed=1) + 10
    index = Index.build(np.concatenate([near, far]), ids_of(5_000), "hnsw", "l2", M=4, ef_construction=20, ef_search=10)
    index.remove(ids_of(900))
    assert (~index.alive).sum() == 900
    exact = Index.build(far, ids_of(5_000)[900:], "flat", "l2")
    _, found = index.search(gaussian(20, seed=2) * 0.01, 10)
    assert all(len(row) == 10 for row in found)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact.search(gaussian(20, seed=2) * 0.01, 10)[1])]) > 0


def test_a_row_that_does_not_exist_is_never_returned():
    index = Index.build(gaussian(30), ids_of(30))
    index.ids = index.ids[:20]
    with pytest.raises(DataError, match="damaged"): index.search(gaussian(5, seed=1), 30)


# ---- changes, against a dictionary

CHANGES = st.lists(st.tuples(st.sampled_from(["add", "remove", "save"]), st.lists(st.integers(0, 14), min_size=1, max_size=6), st.integers(0, 10**6)), max_size=12)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@settings(max_examples=40, deadline=None)
@given(changes=CHANGES, metric=st.sampled_from(METRICS))
def test_changes_are_those_of_a_dictionary(kind, changes, metric):
    first = gaussian(3)
    index = Index.build(first, ["n0", "n1", "n2"], kind, metric, texts=["0", "1", "2"], **SMALL[kind])
    model, texts = {f"n{i}": first[i] for i in range(3)}, {f"n{i}": str(i) for i in range(3)}
    for what, numbers, seed in changes:
        names = [f"n{i}" for i in numbers]
        if what == "add":
            vectors = gaussian(len(names), seed=seed)
            index.add(vectors, names, [f"{name} {seed}" for name in names])
            for name, vector in zip(names, vectors): model[name], texts[name] = vector, f"{name} {seed}"
        elif what == "remove":
            present = [name for name in names if name in model]
            assert index.remove(present) == len(set(present))
            for name in set(present): del model[name], texts[name]
        else:
            with tempfile.TemporaryDirectory() as folder:
                index.save(folder)
                index = Index.load(folder)
        assert len(index) == len(model) and set(index.rows) == set(model) and all(index.text(name) == texts[name] for name in model)
        query = gaussian(1, seed=seed + 1)
        scores, ids = index.search(query, 20)
        expected, names = naive(model, query[0], 20, metric)
        assert np.allclose(scores[0], expected, atol=2e-3) and set(ids[0]) == set(names)


@settings(max_examples=10, deadline=None)
@given(changes=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 10_400), min_size=1, max_size=300), st.integers(0, 10**6)), max_size=4), metric=st.sampled_from(METRICS))
def test_changes_of_an_ivfpq_index(ivfpq, changes, metric):
    "A vector that was replaced is found by the new one, with the rounded vector's score."
    index, model = copied(ivfpq[metric]), dict(zip(ids_of(10_000), gaussian(10_000)))
    for adds, numbers, seed in changes:
        names = [f"d{i}" for i in numbers]
        if adds:
            vectors = gaussian(len(names), seed=seed)
            index.add(vectors, names)
            model.update(zip(names, vectors))
        else:
            index.remove([name for name in names if name in model])
            for name in names: model.pop(name, None)
    assert set(index.rows) == set(model)
    fresh, names = copied(ivfpq[metric]), sorted(model)
    fresh.remove(list(fresh.rows))
    assert len(fresh) == 0 and fresh.search(gaussian(2), 3)[1] == [[], []]
    fresh.add(np.stack([model[name] for name in names]), names)
    for mine, its in zip(index.search(gaussian(10, seed=5), 20), fresh.search(gaussian(10, seed=5), 20)): assert all(map(np.array_equal, mine, its))


def test_a_refused_change_changes_nothing():
    index = Index.build(gaussian(10), ids_of(10), texts=ids_of(10))
    before = index.search(gaussian(3, seed=1), 10)
    bad = gaussian(2)
    bad[1, 3] = np.nan
    for vectors, ids, texts in [(bad, ["d1", "x"], ["", ""]), (gaussian(2), ["d1"], ["", ""]), (gaussian(2), ["d1", 3], ["", ""]), (gaussian(2), ["d1", ""], ["", ""]),
                                (gaussian(2), ["d1", "x"], None), (gaussian(2), ["d1", "x"], ["one"]), (gaussian(2, 9), ["d1", "x"], ["", ""]), (gaussian(2), ["d1", "\ud800"], ["", ""])]:
        with pytest.raises(DataError) as error: index.add(vectors, ids, texts)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError): index.remove(["d1", "x"])
    after = index.search(gaussian(3, seed=1), 10)
    assert before[1] == after[1] and np.array_equal(before[0], after[0])


# ---- what is refused or falls back

def test_what_cannot_be_indexed_is_said_in_one_line():
    good = gaussian(4)
    for arguments in [dict(vectors=np.zeros((0, 8)), ids=[]), dict(vectors=np.zeros((4, 0))), dict(vectors=good * np.nan), dict(vectors=good * np.inf), dict(vectors=good * 0),
                      dict(vectors=good[0]), dict(vectors="text"), dict(vectors=[[None]]), dict(ids="abcd"), dict(ids=ids_of(3)), dict(ids=range(4)), dict(ids=["", "a", "b", "c"]),
                      dict(kind="flatt"), dict(metric="cosine"), dict(nlist=3), dict(kind="hnsw", M=1), dict(kind="hnsw", ef_search=0), dict(kind="hnsw", ef_search=2.5),
                      dict(kind="ivfpq", m=3), dict(texts=["one"])]:
        with pytest.raises(ProjError) as error: Index.build(**{"vectors": good, "ids": ids_of(4)} | arguments)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    index = Index.build(good, ids_of(4))
    for queries, k, options in [(good[:, :7], 1, {}), (good * np.nan, 1, {}), (good * 0, 1, {}), (good, 0, {}), (good, -1, {}), (good, 1.5, {}), (good, True, {}), (good, 1, {"ef_search": 3})]:
        with pytest.raises(ProjError) as error: index.search(queries, k, **options)
        assert "\n" not in str(error.value)
    assert Index.build(good * 0, ids_of(4), metric="l2").search(good, 1)[1] == [["d0"]] * 4, "by distance, a vector of zeros is one like others"


def test_too_few_vectors_for_ivfpq_fall_back_with_a_warning(caplog):
    assert Index.build(gaussian(500), ids_of(500), "ivfpq", m=4).kind == "flat" and "becomes flat" in caplog.text
    index = Index.build(gaussian(10_000, 6), ids_of(10_000), "ivfpq")
    assert index.options["lists"] == 256 and index.options["m"] == 6 and "there will be 256" in caplog.text and "6 bytes a vector instead of 64" in caplog.text
    assert Index.build(gaussian(500), ids_of(500)).kind == "flat"


# ---- with an encoder

@pytest.fixture(scope="module")
def encoder():
    from proj.models.dual import DualEncoder
    from proj.models.encoder import load_encoder
    return DualEncoder(load_encoder("tiny", texts=TEXTS), precision="fp32")


TEXTS = [f"def f{i}(x): return x * {i}" for i in range(30)]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_scores_are_the_encoders_own(encoder, similarity, tmp_path):
    encoder.model.similarity_fn_name = similarity
    from proj.embeddings import EmbeddingCache
    cache = EmbeddingCache(tmp_path / "cache")
    Index.of(encoder, ids_of(20), TEXTS[:20], cache=cache).save(tmp_path / "index")
    index = Index.load(tmp_path / "index")
    index.add_texts(encoder, ids_of(30)[15:], TEXTS[15:], cache)
    assert cache.hits == 5 and len(index) == 30
    for ranking, scores in zip(index.search_texts(encoder, TEXTS[:3], 30), encoder.score(TEXTS[:3], TEXTS)):
        assert np.allclose(ranking.scores, np.sort(scores)[::-1], atol=2e-3) and ranking.ids[0] == ids_of(30)[TEXTS.index(ranking.query)]
        assert ranking.texts == [TEXTS[int(name[1:])] for name in ranking.ids]
    encoder.model.similarity_fn_name = "cosine"


def test_another_encoder_is_refused(encoder):
    import copy
    from proj.models.dual import DualEncoder
    index = Index.of(encoder, ids_of(30), TEXTS)
    def changed(change):
        other = DualEncoder(copy.deepcopy(encoder.model), "bf16")
        change(other.model)
        return other
    def train(model): next(model.parameters()).data[0, 0] += 1e-4
    def prompt(model): model.prompts["query"] = "find: "
    def similarity(model): model.similarity_fn_name = "dot"
    for change, word in (train, "weights"), (prompt, "prompts"), (similarity, "similarity"):
        for use in (lambda e: index.search_texts(e, ["a"]), lambda e: index.add_texts(e, ["a"], ["b"])):
            with pytest.raises(DataError, match=f"other {word}|another {word}") as error: use(changed(change))
            assert "\n" not in str(error.value)
    assert index.search_texts(changed(lambda model: None), ["a"], 3)[0].ids, "another precision is no other encoder"
    with pytest.raises(DataError, match="does not say"): Index.build(gaussian(3), ids_of(3)).search_texts(encoder, ["a"])


# ---- publishing

def numbered(number: int) -> Index:
    "Publication `number`: its size, kind, vectors, ids and texts follow from the number."
    n = 50 + 7 * (number % 20)
    return Index.build(gaussian(n, seed=number), ids_of(n, f"{number}-"), ["flat", "hnsw"][number % 2], "l2", [f"text {number}"] * n, **SMALL[["flat", "hnsw"][number % 2]])


def check_whole(index: Index) -> int:
    "The number of the publication; an assertion fails where parts of several are mixed."
    number = int(next(iter(index.rows)).split("-")[0])
    vectors = gaussian(50 + 7 * (number % 20), seed=number)
    assert list(index.rows) == ids_of(len(vectors), f"{number}-") and set(index.texts) == {f"text {number}"}
    assert index.search(vectors[:20], 1)[1] == [[f"{number}-{i}"] for i in range(20)]
    return number


def servant():
    "Processes that begin with everything imported."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_index", "pyarrow.parquet", "safetensors.numpy"])
    return context


def publish_all(folder, numbers, die_at: int = 0):
    faiss.omp_set_num_threads(1)
    os.environ["_PROJ_DIE_AT"] = str(die_at)
    for number in numbers: numbered(number).save(folder)


def read_until(folder, last: int, report):
    faiss.omp_set_num_threads(1)
    seen, loads = [0], 0
    while seen[-1] < last:
        seen.append(check_whole(Index.load(folder)))
        loads += 1
        if loads == 1: report.put("ready")
        assert seen[-2] <= seen[-1], "a reader went back in time"
    report.put((loads, len(set(seen))))


def test_a_hundred_publications_under_four_readers(tmp_path):
    context = servant()
    numbered(0).save(tmp_path)
    report = context.Queue()
    readers = [context.Process(target=read_until, args=(tmp_path, 100, report)) for _ in range(4)]
    for reader in readers: reader.start()
    assert [report.get() for _ in readers] == ["ready"] * 4
    publish_all(tmp_path, range(1, 101))
    for reader in readers: reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert sum(report.get()[1] for _ in readers) > 12, "too few publications were seen to prove anything"
    assert len(list(tmp_path.iterdir())) == 4


def test_two_publishers_take_turns(tmp_path):
    context = servant()
    publishers = [context.Process(target=publish_all, args=(tmp_path, range(first, first + 20))) for first in (100, 200)]
    for publisher in publishers: publisher.start()
    for publisher in publishers: publisher.join()
    assert [publisher.exitcode for publisher in publishers] == [0, 0] and check_whole(Index.load(tmp_path)) in (119, 219) and len(list(tmp_path.iterdir())) == 4


def test_death_at_each_write_step_of_a_publication(tmp_path):
    context = servant()
    found, step = [], 0
    while True:
        step, folder = step + 1, tmp_path / str(step)
        numbered(1).save(folder)
        publisher = context.Process(target=publish_all, args=(folder, [2], step))
        publisher.start()
        publisher.join()
        found.append(check_whole(Index.load(folder)))
        if publisher.exitcode == 0: break
        assert publisher.exitcode == -signal.SIGKILL
        numbered(3).save(folder)
        assert check_whole(Index.load(folder)) == 3 and len(list(folder.iterdir())) == 4, "what a killed publisher left is cleared away"
    assert step == 8 and found == sorted(found) and found[0] == 1 and found[-2] == 2


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="thesis.txt"): numbered(1).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="index.json: missing"): Index.load(tmp_path)


# ---- damage and malice

def resign(folder):
    "Put all hashes right, as somebody would who means harm."
    about = json.loads((folder / ABOUT).read_text())
    for name in about["files"]: about["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    about.pop("sha256", None)
    (folder / ABOUT).write_text(signed(about))


def mutate(path: Path, draw: random.Random):
    "Flip, overwrite, cut, repeat or insert; the first bytes more often than others, as sizes and shapes are there."
    raw = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(min(len(raw), draw.choice([16, 200, 2_000, len(raw)])) or 1) if raw else 0
        if draw.random() < 0.3: at = max(0, len(raw) - 1 - at)  # Parquet has its sizes at the end
        how = draw.choice(["flip", "flip", "number", "cut", "insert", "same"])
        if how == "flip" and raw: raw[at] ^= 1 << draw.randrange(8)
        elif how == "number": raw[at:at + 4] = draw.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80", draw.randbytes(4)])
        elif how == "cut": del raw[at:at + draw.choice([1, 8, 10_000])]
        elif how == "insert": raw[at:at] = draw.randbytes(draw.choice([1, 8, 300]))
        elif how == "same": raw[at:at + 8] = raw[:8]
    path.write_bytes(raw)


def attack(folder: Path, home: Path, seed: int, signed: bool) -> str:
    "Mutate one file of a good index and load it: refused or loaded. Anything but a ProjError of one line gets out."
    draw = random.Random(f"{seed} {signed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home, folder)
    victims = sorted(path for path in folder.iterdir() if path.name != ".lock" and not (signed and path.name == ABOUT))
    victim = draw.choice(victims)
    before = victim.read_bytes()
    mutate(victim, draw)
    if victim.read_bytes() == before: return "unchanged"
    if signed: resign(folder)
    try: index = Index.load(folder)
    except ProjError as e:
        assert "\n" not in str(e)
        return "refused"
    scores, ids = index.search(gaussian(20, index.dim), 10)
    assert set(sum(ids, [])) <= set(index.rows)
    return "loaded"


def attacks(home: str, count: int):
    "What the child process does: `count` mutations as found, and `count` with hashes put right."
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    folder, homes = Path(home, "victim"), sorted(Path(home).glob("good-*"))
    for signed in (False, True):
        outcomes = [attack(folder, homes[seed % len(homes)], seed, signed) for seed in range(count)]
        print("signed" if signed else "as found", {name: outcomes.count(name) for name in ("refused", "loaded", "unchanged")}, flush=True)


def run_attacks(folder: Path, ivfpq: Index, count: int, seconds: int) -> list[str]:
    for kind in ("flat", "hnsw"): Index.build(gaussian(500), ids_of(500), kind, texts=[f"text {i}" for i in range(500)], **SMALL[kind]).save(folder / f"good-{kind}")
    ivfpq.save(folder / "good-ivfpq")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_index; test_index.attacks({str(folder)!r}, {count})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.splitlines()


def test_mutated_folders_are_refused_and_forged_ones_do_no_harm(tmp_path, ivfpq):
    found, forged = run_attacks(tmp_path, ivfpq["l2"], 250, 240)
    assert "'loaded': 0" in found and "'refused'" in forged


@pytest.fixture
def forge(tmp_path):
    "Change what index.json says, put the hashes right, load."
    def load(kind="hnsw", change=lambda about: None, files=lambda folder: None):
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        Index.build(gaussian(300), ids_of(300), kind, **SMALL[kind]).save(folder)
        about = json.loads((folder / ABOUT).read_text())
        change(about)
        (folder / ABOUT).write_text(json.dumps(about))
        files(folder)
        resign(folder)
        return Index.load(folder)
    return load


@pytest.mark.parametrize("change", [
    {"count": 10**9, "rows": 10**9}, {"rows": -1}, {"dim": 10**9}, {"dim": 0}, {"dim": 7}, {"kind": "ivfpq"}, {"kind": "flat"}, {"kind": "ondisk"}, {"metric": "L1"}, {"format": 2},
    {"texts": True}, {"options": {}}, {"options": dict(M=1, ef_construction=1, ef_search=1)}, {"options": dict(M=8, ef_construction=60, ef_search=2**31)},
    {"options": dict(M=9, ef_construction=60, ef_search=100)}, {"options": dict(M="8", ef_construction=60, ef_search=100)}, {"count": 299}, {"count": True, "rows": "x"}, {"facts": []},
    {"metric": ["ip"]}, {"extra": 1}], ids=str)
def test_a_forged_description_is_refused(forge, change):
    assert len(forge()) == 300
    with pytest.raises(ProjError) as error: forge(change=lambda about: about.update(change))
    assert "\n" not in str(error.value)


def rewrite(**changes):
    "Change arrays of the vectors file."
    from safetensors.numpy import load_file, save_file
    def change(folder):
        path = next(folder.glob("vectors-*"))
        arrays = load_file(path)
        for name, value in changes.items(): arrays[name] = value(arrays[name]) if name in arrays else value(None)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}, path)
    return change


def with_value(at, value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[at] = value
        return array
    return change


@pytest.mark.parametrize("files", [
    rewrite(links=with_value(0, 300)), rewrite(links=with_value(0, -2)), rewrite(links=with_value(5, 2**31 - 1)), rewrite(entry=with_value(0, 300)), rewrite(entry=with_value(0, -1)),
    rewrite(levels=with_value(3, 0)), rewrite(levels=with_value(3, -5)), rewrite(levels=with_value(3, 10_000)), rewrite(levels=with_value(3, 2)), rewrite(links=lambda a: a[:-1]),
    rewrite(vectors=with_value(17, np.nan)), rewrite(vectors=with_value(17, np.inf)), rewrite(vectors=lambda a: a.astype(np.float64)), rewrite(vectors=lambda a: a[:-1]),
    rewrite(vectors=lambda a: a.reshape(-1)), rewrite(links=lambda a: None), rewrite(more=lambda a: np.zeros(3))])
def test_a_forged_graph_is_refused(forge, files):
    with pytest.raises(DataError) as error: forge(files=files)
    assert "\n" not in str(error.value)


def test_forged_rows_are_refused(forge):
    import pyarrow as pa
    import pyarrow.parquet as pq
    names = ids_of(300)
    for columns, options in [({"id": names[:-1]}, {}), ({"id": names[:-1] + ["d0"]}, {}), ({"id": names[:-1] + [None]}, {}), ({"id": names[:-1] + [""]}, {}), ({"id": list(range(300))}, {}),
                             ({"name": names}, {}), ({"id": names, "text": names}, {}), ({"id": [f"{i}" + "x" * 100_000 for i in range(300)]}, {"compression": "zstd"})]:
        with pytest.raises(DataError) as error: forge("flat", files=lambda folder: pq.write_table(pa.table(columns), next(folder.glob("rows-*")), **options))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_pipes_links_and_strange_json_are_refused(tmp_path):
    def fresh(): return shutil.rmtree(tmp_path / "i", ignore_errors=True) or numbered(1).save(tmp_path / "i") or tmp_path / "i"
    def pipe(path): path.unlink(), os.mkfifo(path)
    def link(path): path.rename(tmp_path / "elsewhere"), path.symlink_to(tmp_path / "elsewhere")
    for change in (lambda f: pipe(f / ABOUT), lambda f: pipe(next(f.glob("vectors-*"))), lambda f: pipe(next(f.glob("rows-*"))), lambda f: link(next(f.glob("vectors-*"))),
                   lambda f: (f / ABOUT).write_text("[" * 10**6), lambda f: (f / ABOUT).write_text('{"a":' * 10**5), lambda f: (f / ABOUT).write_text("1" * 10**5),
                   lambda f: (f / ABOUT).write_bytes(b"\xff\xfe"), lambda f: (f / ABOUT).write_text((f / ABOUT).read_text() + "\n"), lambda f: os.truncate(f / ABOUT, 2**40)):
        folder = fresh()
        change(folder)
        with pytest.raises(ProjError) as error: Index.load(folder)
        assert "\n" not in str(error.value)
        for path in tmp_path.glob("elsewhere"): path.unlink()
    about = json.loads((fresh() / ABOUT).read_text())
    for names in (["../i/vectors-1.safetensors", "rows-1.parquet"], ["/etc/passwd", "rows-1.parquet"], ["vectors-1.safetensors"], ["vectors-1.safetensors", "vectors-2.safetensors"], []):
        changed = {**about, "files": {name: {"size": 1, "sha256": ""} for name in names}}
        changed.pop("sha256")
        (tmp_path / "i" / ABOUT).write_text(signed(changed))
        with pytest.raises(DataError, match="must name|bytes"): Index.load(tmp_path / "i")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trained = Index.build(gaussian(10_000), ids_of(10_000), "ivfpq", "l2", **SMALL["ivfpq"])
        print(*run_attacks(Path(folder), trained, int(sys.argv[1]) if len(sys.argv) > 1 else 2_000, 3_600), sep="\n")
