"Nearest ideal paths and decoding: naive loops, invariances, the figures on real paths."
import numpy as np
import pytest

from proj.core import ConfigError, DataError
from proj.data.keyboards import carried, ideal_paths, layout, moved
from proj.data.strokes import synthetic_swipes
from proj.data.swipes import Lexicon, Swipe, read_lexicon, read_swipes, split_swipes
from proj.decoding import Decoder, by_length, by_quality, dropped, evaluate_decoders, places_of, unreachable
from proj.geometry import resample
from proj.templates import TemplateIndex, best_words, choose_weight, places

QWERTY = layout()
LEXICON = Lexicon("the to and of hello help hero hell jello world word work too tool quick quack quiz sea see set".split(), np.linspace(7.5, 3, 20))


@pytest.fixture(scope="module")
def swipes(): return synthetic_swipes(QWERTY, LEXICON.words * 2)


@pytest.fixture(scope="module")
def real(data_dir): return split_swipes(read_swipes(data_dir / "swipe/real_train.jsonl"), {"validation": .5, "test": .5})


@pytest.fixture(scope="module")
def vocabulary(data_dir): return read_lexicon(data_dir / "swipe/vocab.tsv")


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_distances_agree_with_loops(swipes, shape):
    index = TemplateIndex(LEXICON, QWERTY, points=12, shape=shape)
    got = index.distances([s.path for s in swipes])
    def shaped(p): return (p - p.mean(0)) / max(np.ptp(p, axis=0).max(), QWERTY.key_width)
    for row, swipe in zip(got[:6], swipes):
        p = resample([swipe.path[:, :2]], 12)[0]
        for value, word in zip(row, LEXICON.words):
            q, total = ideal_paths(QWERTY, [word], 12)[0], 0.0
            for u, v, su, sv in zip(p, q, shaped(p), shaped(q)): total += ((u - v)**2).sum() + shape * ((su - sv)**2).sum()
            assert np.isclose(value, np.sqrt(total / 12), atol=1e-6)


def test_twins_tie_and_the_alphabet_decides(swipes):
    index = TemplateIndex(LEXICON, QWERTY)
    scores = index.scores([s.path for s in swipes])
    assert np.array_equal(scores[:, LEXICON.row["to"]], scores[:, LEXICON.row["too"]])
    ranked = [words for words, _ in best_words(index, [s.path for s in swipes], len(LEXICON))]
    for words, swipe, place in zip(ranked, swipes, places(scores, LEXICON.words, [s.word for s in swipes])):
        assert words.index("to") + 1 == words.index("too") and words.index(swipe.word) + 1 == place


def test_keyboard_and_path_may_move_together(swipes):
    index, board = TemplateIndex(LEXICON, QWERTY), moved(QWERTY, (2, 2), (.3, -.2))
    there = TemplateIndex(LEXICON, board).distances([carried(s.path, (2, 2), (.3, -.2)) for s in swipes])
    assert np.allclose(there, 2 * index.distances([s.path for s in swipes]), atol=1e-6)


def test_the_frequency_is_worth_what_the_weight_says():
    index, path = TemplateIndex(Lexicon(["sea", "set"], [3, 5]), QWERTY), ideal_paths(QWERTY, ["sea"])[0]
    gap = float(np.abs(np.diff(index.distances([path]))[0, 0]))
    assert best_words(index, [path], 1, weight=gap / 2 * .99)[0][0] == ["sea"] and best_words(index, [path], 1, weight=gap / 2 * 1.01)[0][0] == ["set"]


def test_words_beyond_the_lexicon_count_as_misses(swipes):
    decoder = Decoder(TemplateIndex(LEXICON, QWERTY))
    found = places_of(decoder, [*swipes, Swipe("zebra", swipes[0].path)])
    assert found[-1] == 0 and (found[:-1] > 0).all()
    summary = evaluate_decoders({"template": decoder}, [*swipes, Swipe("zebra", swipes[0].path)])
    assert np.isclose(summary["systems"]["template"]["mrr"]["value"], (1 / found[:-1]).sum() / 41)


@pytest.mark.parametrize("path", [np.zeros((0, 3)), np.zeros(3), np.full((4, 3), np.nan), np.zeros((3, 1))])
def test_paths_that_cannot_be_decoded(path):
    with pytest.raises(DataError, match="the path has the shape"): Decoder(TemplateIndex(LEXICON, QWERTY)).decode(path)


def test_one_point_and_a_resting_finger_can_be_decoded():
    decoder = Decoder(TemplateIndex(Lexicon(["a", "i", "it"]), QWERTY, shape=.1))
    for path in (np.array([[.1, .23, 0]]), np.array([[.1, .23, 0]] * 5)): assert decoder.decode(path, 1).ids == ["a"]


def test_decoders_on_different_lexicons_are_not_compared(swipes):
    with pytest.raises(ConfigError, match="choose among \\[2, 20\\] words"):
        evaluate_decoders({"a": Decoder(TemplateIndex(LEXICON, QWERTY)), "b": Decoder(TemplateIndex(Lexicon(["to", "hello"]), QWERTY))}, swipes)


def test_a_reranker_orders_the_depth_and_nothing_else(swipes):
    class Backwards:
        def predict(self, path, words): return np.arange(len(words)) - 100.0
    index, paths = TemplateIndex(LEXICON, QWERTY, weight=.01), [s.path for s in swipes[:5]]
    plain, turned = index.scores(paths), Decoder(index, Backwards(), depth=4, blend=10).scores(paths)
    for a, b in zip(plain, turned):
        first = np.argsort(-a, kind="stable")
        assert np.argsort(-b)[:4].tolist() == first[:4][::-1].tolist() and np.argsort(-b, kind="stable")[4:].tolist() == first[4:].tolist()


# ---- real paths, all 10,033 words

def test_figures_on_real_paths(real, vocabulary, record_property):
    "The reference (other gestures of the study): top-1 .786, top-5 .937, MRR .853; with frequency top-1 .814."
    template = TemplateIndex(vocabulary, QWERTY)
    weight, _ = choose_weight(template, real["validation"])
    frequency = TemplateIndex(vocabulary, QWERTY, weight=weight)
    assert not {s.word for s in real["validation"]} & {s.word for s in real["test"]}
    summary = evaluate_decoders({"template + frequency": Decoder(frequency), "template": Decoder(template)}, real["test"])
    plain, prior = summary["systems"]["template"], summary["systems"]["template + frequency"]
    for metric, reference in {"top@1": .786, "top@5": .937, "mrr": .853}.items():
        low, high = plain[metric]["ci95"]
        assert low <= reference <= high + .01, (metric, plain[metric])
    assert prior["top@1"]["value"] >= .814 and summary["pool"] == 10_033 and plain["mrr"]["n"] == len(real["test"])
    assert summary["differences"]["template + frequency - template"]["top@1"]["ci95"][0] > 0
    record_property("figures", repr(summary))


def test_parts_of_the_real_paths_add_up(real, vocabulary):
    index, test = TemplateIndex(vocabulary, QWERTY, weight=.01), real["test"]
    found = places_of(Decoder(index), test)
    for parts in (by_length(test, found), by_quality(test, found, index)):
        assert sum(part["n"] for part in parts.values()) == len(test)
        assert np.isclose(sum(part["n"] * part["value"] for part in parts.values()), (found == 1).sum())
    quality = by_quality(test, found, index)
    assert quality["near"]["value"] > quality["far"]["value"]
    assert unreachable(index, test)["out of vocabulary"] == 0 and 0 < unreachable(index, test)["behind a twin"] < .02


def test_dropped_points_and_shifted_keyboards_cost_something(real, vocabulary):
    decoder, test = Decoder(TemplateIndex(vocabulary, QWERTY, weight=.01)), real["test"]
    def top(swipes): return (places_of(decoder, swipes) == 1).mean()
    half, few = ([dropped(s, share) for s in test] for share in (.5, .9))
    assert abs(top(half) - top(test)) < .03 and top(few) < top(test)
    assert top([Swipe(s.word, carried(s.path, shift=(.05, .05))) for s in test]) < top(test) - .05  # nobody told the index
