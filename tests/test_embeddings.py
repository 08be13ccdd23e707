"The embedding cache: what its key depends on, what a kill or a flipped bit leaves, several processes at once."
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proj import embeddings
from proj.core import DataError, MachineError
from proj.embeddings import ROW, EmbeddingCache, append_rows, fingerprint, read_rows
from proj.models.dual import DualEncoder
from proj.models.encoder import load_encoder

TEXTS = [f"def function_{i}(x): return x + {i}" for i in range(40)] + [f"add {i} to a number" for i in range(40)]


@pytest.fixture(scope="module")
def encoder(): return DualEncoder(load_encoder("tiny", texts=TEXTS, dropout=0.0), precision="fp32")


def one_step(encoder):
    "A step of real training on two pairs."
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=1e-2)
    q, d = (encoder.model(encoder.model.preprocess(texts))["sentence_embedding"] for texts in (TEXTS[40:42], TEXTS[:2]))
    torch.nn.functional.cross_entropy(q @ d.T / 0.05, torch.arange(2)).backward()
    optimizer.step()


def test_trained_on_it_never_returns_old_vectors(tmp_path, monkeypatch):
    encoder, cache = DualEncoder(load_encoder("tiny", texts=TEXTS), precision="fp32"), EmbeddingCache(tmp_path / "cache")
    blind = EmbeddingCache(tmp_path / "blind")
    whole = embeddings.fingerprint

    def without_weights(*arguments): return {name: value for name, value in whole(*arguments).items() if name != "weights"}

    def cached(which):
        monkeypatch.setattr(embeddings, "fingerprint", without_weights if which is blind else whole)
        return which.encode(encoder, TEXTS)
    for cache_ in (cache, blind): cached(cache_)
    for _ in range(2):
        one_step(encoder)
        assert np.array_equal(cached(cache), encoder.encode(TEXTS))
        assert not np.allclose(cached(blind), encoder.encode(TEXTS), atol=1e-3), "this test would not see a key without weights"
    assert cache.hits == 0 and cache.stats()["shelves"] == 3


def test_unchanged_weights_are_not_encoded_again(encoder, tmp_path, monkeypatch):
    seen = []
    encode = DualEncoder.encode
    monkeypatch.setattr(DualEncoder, "encode", lambda self, texts, *a, **kw: seen.extend(texts) or encode(self, texts, *a, **kw))
    first = EmbeddingCache(tmp_path).encode(encoder, TEXTS[:50])
    again = EmbeddingCache(tmp_path).encode(encoder, TEXTS[:60] + TEXTS[:5])
    assert seen == TEXTS[:60]
    assert np.array_equal(again[:50], first) and np.array_equal(again[60:], first[:5])


def test_a_model_that_was_saved_and_loaded_hits(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    cache = EmbeddingCache(tmp_path / "cache")
    first = cache.encode(encoder, TEXTS)
    loaded = DualEncoder.load(tmp_path / "model", precision="fp32", dropout=0.3)
    assert np.array_equal(cache.encode(loaded, TEXTS), first) and cache.hits == len(TEXTS)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(TEXTS + ["", " ", "\n", "é", "a" * 2000]), max_size=12), min_size=1, max_size=5))
def test_any_sequence_of_requests_gives_the_vectors_of_the_texts(encoder, tmp_path_factory, requests):
    "In fp32, to rounding: which texts share a batch is another each time."
    cache, kept = EmbeddingCache(tmp_path_factory.mktemp("cache")), {}
    for texts in requests:
        vectors = cache.encode(encoder, texts)
        assert vectors.shape == (len(texts), 128) and (not texts or np.abs(vectors - encoder.encode(texts)).max() < 1e-5)
        for text, vector in zip(texts, vectors): assert np.array_equal(kept.setdefault(text, vector), vector)
    assert cache.stats()["texts"] == len(kept)


# ---- damage

def filled(shelf, n=50, dim=8):
    "A shelf with n rows; returns keys and vectors."
    draw = np.random.default_rng(0)
    keys, vectors = [draw.bytes(32) for _ in range(n)], draw.normal(size=(n, dim)).astype(np.float32)
    append_rows(shelf, keys, vectors)
    return keys, vectors


@pytest.mark.parametrize("name", ["rows.bin", "vectors.bin"])
def test_a_file_cut_anywhere_loses_its_tail_only(tmp_path, name):
    shelf = tmp_path / "shelf"
    keys, vectors = filled(shelf, n=4)
    whole, width = (shelf / name).read_bytes(), {"rows.bin": ROW.itemsize, "vectors.bin": 4 * 8}[name]
    for length in range(len(whole)):
        (shelf / name).write_bytes(whole[:length])
        stored, found, damaged = read_rows(shelf, keys, 8)
        assert found.tolist() == [i < length // width for i in range(4)] and not damaged and np.array_equal(stored[found], vectors[found])


def test_a_torn_append_is_written_over(tmp_path):
    "Whatever prefix of vectors, and then of rows, a killed process wrote."
    extra_keys, extra = [b"a" * 32, b"b" * 32], np.ones((2, 8), np.float32)
    for torn in range(0, 2 * (4 * 8 + ROW.itemsize), 5):
        shelf = tmp_path / str(torn)
        keys, vectors = filled(shelf, n=3)
        with open(shelf / "vectors.bin", "ab") as file: file.write((b"\x7f" * 64)[:torn])
        with open(shelf / "rows.bin", "ab") as file: file.write((b"?" * 72)[:max(0, torn - 64)])
        assert not read_rows(shelf, extra_keys, 8)[1].any()
        append_rows(shelf, extra_keys, extra)
        stored, found, _ = read_rows(shelf, keys + extra_keys, 8)
        sound = np.concatenate([vectors, extra])
        assert found.all() and np.array_equal(stored, sound)


def test_a_flipped_bit_is_computed_again_and_said(encoder, tmp_path, caplog):
    cache = EmbeddingCache(tmp_path)
    vectors = cache.encode(encoder, TEXTS[:10])
    shelf, draw = cache.shelf_of(fingerprint(encoder)), random.Random(0)
    for name in ("vectors.bin", "rows.bin") * 20:
        whole = bytearray((shelf / name).read_bytes())
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (shelf / name).write_bytes(whole)
        assert np.abs(cache.encode(encoder, TEXTS[:10]) - vectors).max() < 1e-6
    assert cache.damaged >= 10 and "damaged; they are computed again" in caplog.text


def test_rows_that_changed_places_are_not_believed(tmp_path):
    shelf = tmp_path / "shelf"
    keys, vectors = filled(shelf)
    (shelf / "vectors.bin").write_bytes(vectors[::-1].tobytes())
    assert not read_rows(shelf, keys, 8)[1].any()


def test_only_what_is_asked_for_comes_into_memory(tmp_path):
    "200 MB of vectors, ten of them wanted."
    import resource
    shelf, count, dim = tmp_path / "shelf", 50_000, 1_000
    shelf.mkdir()
    keys = [i.to_bytes(32, "big") for i in range(count)]
    with open(shelf / "vectors.bin", "wb") as file: file.truncate(4 * count * dim)
    zero = np.zeros(dim, np.float32)
    np.array([(key, embeddings.checksum(key, zero)) for key in keys], ROW).tofile(shelf / "rows.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_rows(shelf, keys[::5_000], dim)[1].all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_a_cache_that_cannot_be_written_costs_time_only(encoder, tmp_path, caplog):
    shelf = EmbeddingCache(tmp_path).shelf_of(fingerprint(encoder))
    shelf.with_name(f"{shelf.name}.lock").mkdir()  # stands for a disk that cannot be written: these tests may run as root
    vectors = EmbeddingCache(tmp_path).encode(encoder, TEXTS[:3])
    assert np.array_equal(vectors, encoder.encode(TEXTS[:3])) and "cannot be kept" in caplog.text


def test_a_folder_that_is_none_is_said(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="not a directory"): EmbeddingCache(tmp_path / "file").encode(encoder, TEXTS[:3])


def test_what_is_not_text_is_refused_before_anything_is_stored(encoder, tmp_path):
    for wrong in ["one text", ["good", None], ["good", "\ud800"], [3]]:
        with pytest.raises(DataError) as error: EmbeddingCache(tmp_path / "cache").encode(encoder, wrong)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_clear_leaves_other_files_alone(encoder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep"), (tmp_path / ("0" * 32)).mkdir()
    cache = EmbeddingCache(tmp_path)
    cache.encode(encoder, TEXTS[:3])
    assert cache.clear() > 0 and (tmp_path / "mine.txt").exists() and (tmp_path / ("0" * 32)).exists()


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EmbeddingCache().folder == tmp_path / "proj" / "embeddings"


# ---- several processes

def vector_of(number: int) -> np.ndarray: return np.random.default_rng(number).normal(size=64).astype(np.float32)


def write_forever(shelf, start: int, die_at: int = 0):
    "Append rows of known content until killed."
    os.environ["_PROJ_DIE_AT"] = str(die_at)
    for first in range(start, start + 100_000, 50):
        numbers = range(first, first + 50)
        append_rows(shelf, [n.to_bytes(32, "big") for n in numbers], np.stack([vector_of(n) for n in numbers]))


def sound(shelf) -> int:
    "Every row that is found is its text's; returns how many there are."
    raw = np.fromfile(shelf / "rows.bin", ROW, (shelf / "rows.bin").stat().st_size // ROW.itemsize)
    keys = [row.tobytes() for row in raw["text"]]
    vectors, found, damaged = read_rows(shelf, keys, 64)
    assert found.all() and not damaged
    for key, vector in list(zip(keys, vectors))[::7]: assert np.array_equal(vector, vector_of(int.from_bytes(key, "big")))
    return len(keys)


def test_two_writers_killed_again_and_again_leave_nothing_wrong(tmp_path):
    context, shelf, draw, counts = multiprocessing.get_context("fork"), tmp_path / "shelf", random.Random(0), [0]
    for turn in range(15):
        writers = [context.Process(target=write_forever, args=(shelf, (2 * turn + side) * 100_000)) for side in range(2)]
        for writer in writers: writer.start()
        time.sleep(draw.uniform(0.02, 0.2))
        for writer in writers: os.kill(writer.pid, signal.SIGKILL)
        for writer in writers: writer.join()
        if (shelf / "rows.bin").exists(): counts.append(sound(shelf))
    assert counts == sorted(counts) and counts[-1] > 500


def test_death_at_each_write_step(tmp_path):
    context, shelf = multiprocessing.get_context("fork"), tmp_path / "shelf"
    for step in range(1, 9):
        writer = context.Process(target=write_forever, args=(shelf, step * 1_000, step + embeddings.write_step.__globals__["WRITES"]))
        writer.start()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        if (shelf / "rows.bin").exists(): sound(shelf)
    assert sound(shelf) == 50 * (0 + 0 + 1 + 1 + 2 + 2 + 3 + 3)


def encode_often(encoder, folder, texts, expected, cleaning):
    torch.set_num_threads(1)
    cache = EmbeddingCache(folder)
    for turn in range(30):
        part = random.Random(turn + 100 * cleaning).sample(range(len(texts)), 10)
        assert np.abs(cache.encode(encoder, [texts[i] for i in part]) - expected[part]).max() < 1e-5
        if cleaning and turn % 5 == 0: cache.clear()
        cache.stats()


def test_processes_that_encode_and_clear_at_once_get_right_vectors(encoder, tmp_path):
    context = multiprocessing.get_context("forkserver")
    expected = encoder.encode(TEXTS)
    others = [context.Process(target=encode_often, args=(encoder, tmp_path, TEXTS, expected, cleaning)) for cleaning in (0, 1, 2)]
    for other in others: other.start()
    for other in others: other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
