"Retrieval for a language model: what must never come back, that nothing peeks at the target, and that a difference is found where there is one."
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from proj.config import make
from proj.context import (ContextConfig, OPENING, RetrievalSpec, Retriever, change, examples, exactly, file_of, language_model, opening, per_file, perplexity,
                          predictable, random_chunks, stretches, verdict)
from proj.core import ConfigError, DataError, read_json
from proj.data.split import normalise
from proj.embeddings import EmbeddingCache
from proj.models.dual import DualEncoder
from proj.models.encoder import load_encoder, train_tokenizer
from proj.search import build

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "context.ipynb"
NOUNS = "apple bridge candle desert engine forest garden harbour island jungle kettle ladder meadow needle orchard pepper".split()


def function(noun, variant=0, lines=10):
    "A function of its own words; variants differ in one word."
    body = "\n".join(f"    {noun} = combine({noun}, {NOUNS[(i * i + len(noun)) % 16]}_{noun}, step_{i})" for i in range(lines))
    return f'def make_{noun}(first, second):\n    "Turn the first {noun} into the second {noun}, and say which one of both it was."\n{body}\n    return {noun}, {variant}\n'


def write(folder, files):
    for name, functions in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n\n".join(functions))


@pytest.fixture(scope="module")
def encoder(): return DualEncoder(load_encoder("static"), "fp32")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "Eight files of two functions; near-copies of apple, a verbatim copy of bridge among other lines, and a file that should have been held out."
    home = tmp_path_factory.mktemp("context")
    write(home / "tree", {f"lib/{a}.py": [function(a), function(b)] for a, b in zip(NOUNS[:8], NOUNS[8:])})
    write(home / "tree", {"copies/near.py": [function("apple", 7)], "copies/longer.py": [function("bridge", 0, 16)], "held/out.py": [function("candle", 5), function("lantern")]})
    build(home / "tree", home / "index", "static", cache=EmbeddingCache(home / "cache"))
    return str(home / "index")


@pytest.fixture(scope="module")
def retriever(index): return Retriever(RetrievalSpec(enabled=True, index=index, k=4))


def chunk_of(retriever, path, noun):
    return next(name for name in retriever.index.rows if name.startswith(path) and f"make_{noun}" in retriever.index.text(name))


def shingles(text):
    words = normalise(text).split()
    return {tuple(words[i:i + 5]) for i in range(len(words) - 4)}


# ---- leaks

def test_every_chunk_of_the_index_keeps_the_rules(retriever):
    names = sorted(retriever.index.rows)
    contexts = [opening(retriever.index.text(name))[0] for name in names]
    assert len(names) == 20
    for own, context, ranking in zip(names, contexts, retriever.nearest(contexts, names)):
        mine = retriever.index.text(own)
        assert len(ranking.ids) == 4 and list(ranking.scores) == sorted(ranking.scores, reverse=True)
        for name, text in zip(ranking.ids, ranking.texts):
            assert text == retriever.index.text(name) and file_of(name) != file_of(own)
            assert len(shingles(text) & shingles(mine)) / len(shingles(text) | shingles(mine)) < 0.8
            assert normalise(context) not in normalise(text)


def test_planted_copies_are_the_nearest_ones_and_do_not_come_back(retriever):
    own, near, following = (chunk_of(retriever, *place) for place in [("lib/apple", "apple"), ("copies/near", "apple"), ("lib/apple", "island")])
    context = opening(retriever.index.text(own))[0]
    raw = [ranking.ids for ranking in retriever.index.search_texts(retriever.encoder, [context], 2)][0]
    assert set(raw) == {own, near}, "without rules the copies come first"
    found = retriever.nearest([context], [own])[0].ids
    assert not {own, near, following} & set(found)
    beyond = retriever.nearest([opening(retriever.index.text(following))[0]], [own])[0].ids
    assert following not in beyond, "a context that is like the following chunk does not find it"


def test_what_repeats_the_context_does_not_come_back_even_without_an_id(retriever):
    longer, own = chunk_of(retriever, "copies/longer", "bridge"), chunk_of(retriever, "lib/bridge", "bridge")
    assert not {longer, own} & set(retriever.nearest([opening(retriever.index.text(own))[0]])[0].ids)


def test_a_held_out_file_is_not_found_though_it_stands_in_the_index(index, retriever):
    held = [name for name in retriever.index.rows if name.startswith("held/")]
    texts = [retriever.index.text(name) for name in held]
    careful = Retriever(RetrievalSpec(enabled=True, index=index, k=4), held_out=texts)
    contexts = [opening(text)[0] for text in texts] + ["make the lantern", "def make_candle("]
    everything = [name for ranking in careful.nearest(contexts) for name in ranking.ids]
    candle = chunk_of(retriever, "lib/candle", "candle")  # a near-duplicate of a held-out chunk
    assert len(held) == 2 and not {*held, candle} & {*everything, *careful.allowed()} and len(careful.allowed()) == 17
    assert {*held, candle} & {name for ranking in retriever.nearest(contexts) for name in ranking.ids}, "nobody said that they are held out"
    assert not [name for name in retriever.nearest(contexts[:1], held[:1])[0].ids if name.startswith("held/")], "its own id is enough"


def test_random_chunks_keep_the_rules_too(retriever):
    own = [chunk_of(retriever, "lib/apple", "apple")] * 20
    drawn, forbidden = random_chunks(retriever, own, seed=3), {retriever.index.text(name) for name in retriever.index.rows if "apple.py" in name or "near.py" in name}
    assert drawn == random_chunks(retriever, own, seed=3) != random_chunks(retriever, own, seed=4)
    assert all(len(set(texts)) == 4 and not forbidden & set(texts) for texts in drawn) and len({text for texts in drawn for text in texts}) > 12


# ---- no peeking

def test_the_target_cannot_change_what_is_retrieved(retriever):
    names = sorted(retriever.index.rows)
    whole = [(name, retriever.index.text(name)) for name in names]
    other = [(name, opening(text)[0] + function(NOUNS[i % 16])) for i, (name, text) in enumerate(whole)]
    (_, openings, targets), (_, same, others) = predictable(whole), predictable(other)
    assert openings == same and not set(targets) & set(others) and all(len(text.encode()) >= OPENING for text in openings)
    assert [a + b for a, b in zip(openings, targets)] == [text for _, text in whole]
    fresh = Retriever(retriever.spec)
    assert [r.ids for r in retriever.nearest(openings, names)] == [r.ids for r in fresh.nearest(same, names)]


def test_the_same_target_tokens_are_predicted_with_any_context(retriever):
    tokenizer = train_tokenizer([function(noun) for noun in NOUNS], 400)
    names, openings, targets = predictable([(name, retriever.index.text(name)) for name in sorted(retriever.index.rows)])
    arms = [examples(tokenizer, openings, targets, contexts, 20, 30, 40) for contexts in
            ([[]] * len(names), random_chunks(retriever, names), [r.texts for r in retriever.nearest(openings, names)])]
    for rows in zip(*arms):
        counted = [[token for token in row["labels"] if token != -100] for row in rows]
        assert counted[0] == counted[1] == counted[2] and 0 < len(counted[0]) <= 40
        for row, kept in zip(rows, counted):
            assert len(row["labels"]) == len(row["input_ids"]) and row["input_ids"][-len(kept):] == kept and set(row["labels"][:-len(kept)]) == {-100}
        none, random, nearest = ([i for i in row["input_ids"]] for row in rows)
        assert random[-len(none):] == nearest[-len(none):] == none and nearest.count(tokenizer.eos_token_id) == 4 and none.count(tokenizer.eos_token_id) == 0


def test_stretches_of_whole_files_lose_nothing_but_the_end():
    tokenizer = train_tokenizer([function(noun) for noun in NOUNS], 400)
    files = [function(noun) for noun in NOUNS[:5]]
    rows = stretches(tokenizer, files, 33)
    flat = [token for row in rows for token in row["input_ids"]]
    assert all(row["input_ids"] == row["labels"] and len(row["labels"]) == 33 for row in rows)
    assert "<eos>".join(files).startswith(tokenizer.decode(flat)) and flat.count(tokenizer.eos_token_id) == 4
    assert len(stretches(tokenizer, files, 10**6)) == 1, "less than a row is a row"


# ---- the same answers

def test_answers_do_not_depend_on_batch_order_or_process_state(retriever):
    names = sorted(retriever.index.rows)
    contexts = [opening(retriever.index.text(name))[0] for name in names]
    together = [r.ids for r in Retriever(retriever.spec).nearest(contexts, names)]
    backwards = [r.ids for r in Retriever(retriever.spec).nearest(contexts[::-1], names[::-1])][::-1]
    alone = [Retriever.nearest(retriever, [context], [name])[0].ids for context, name in zip(contexts, names)]
    assert together == backwards == alone


def test_more_than_there_is_gives_short_rows_and_a_blank_context_none(index):
    greedy = Retriever(RetrievalSpec(enabled=True, index=index, k=100))
    found, blank = greedy.nearest(["a garden", " \n"])
    assert len(found.ids) == len(set(greedy.keys.values())) == 18 and blank.ids == blank.texts == [] and len(blank.scores) == 0


def test_not_enabled_needs_neither_index_nor_encoder():
    off = Retriever(RetrievalSpec(index="there is none", encoder="nor this"))
    assert [(r.ids, r.texts) for r in off.nearest(["a", "b"], ["x:1-2", None])] == [([], [])] * 2 and off.nearest([]) == []


def test_mistakes_are_named(index, encoder, tmp_path):
    with pytest.raises(ConfigError, match="index.*proj index build"): make(RetrievalSpec, {"enabled": True})
    with pytest.raises(ConfigError, match="'k'"): make(RetrievalSpec, {"k": 0})
    with pytest.raises(DataError): Retriever(RetrievalSpec(enabled=True, index=str(tmp_path / "nothing")))
    stranger = DualEncoder(load_encoder("tiny", texts=NOUNS), "fp32")
    with pytest.raises(DataError, match="encoder"): Retriever(RetrievalSpec(enabled=True, index=index), encoder=stranger)
    with pytest.raises(DataError, match="2 ids for 1 contexts|pass one id"): Retriever(RetrievalSpec(enabled=True, index=index), encoder=encoder).nearest(["a"], [None, None])
    with pytest.raises(DataError, match="text 1 is int"): Retriever(RetrievalSpec()).nearest(["a", 3])


def test_globs_that_fit_one_path_leave_out_one_file(tmp_path, encoder):
    write(tmp_path / "tree", {name: [function(noun)] for name, noun in zip(["a.py", "b/a.py", "[ab].py", "a b.py", "!c.py", "#d.py"], NOUNS)})
    for name in ("a.py", "[ab].py", "!c.py"):
        done = build(tmp_path / "tree", tmp_path / "index", encoder, exclude=[exactly(name)], cache=EmbeddingCache(tmp_path / "cache"))
        assert done.chunks == 5 and not [i for i in Retriever(RetrievalSpec(enabled=True, index=str(tmp_path / "index")), encoder=encoder).index.rows if file_of(i) == name]


# ---- measuring

def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    import torch
    model = language_model(300, 16, 1, 2)
    with torch.no_grad():
        for weight in model.parameters(): weight.zero_()
        found = model(torch.tensor([[5, 6, 7, 8], [9, 9, 9, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[-100, -100, 7, 8], [-100, 9, 9, -100]]))
    files, values = per_file(["a.py", "b.py"], found["nll"].numpy(), found["tokens"].numpy())
    assert found["tokens"].tolist() == [2, 2] and perplexity(values)["value"] == pytest.approx(300) and files == ["a.py", "b.py"]


def test_values_of_files_and_changes_are_those_by_hand():
    draw = np.random.default_rng(0)
    files, nll, tokens = draw.choice(list("abcdefgh"), 60), draw.random(60) * 50, draw.integers(1, 20, 60)
    names, values = per_file(files, nll, tokens)
    for name, value in zip(names, values): assert value == pytest.approx(sum(nll[files == name]) / sum(tokens[files == name]))
    worse = change(values + np.log(1.25), values)
    assert worse["value"] == pytest.approx(0.25) and worse["ci95"] == pytest.approx([0.25, 0.25]) and worse["n"] == 8
    noise = draw.normal(0, 1, (2, 200))
    assert verdict(noise[0], noise[0] + 0.2, noise[0] + noise[1]).startswith("A context helps; that it was retrieved is not shown")
    assert verdict(noise[0], noise[0] - 0.2, noise[0] - 0.3).startswith("Retrieval hurts") and verdict([1.0], [1.0], [2.0]).startswith("Retrieval is not shown")


def test_a_model_learns_to_use_a_context_that_tells_the_target(tmp_path):
    "The positive control: the opening says nothing, the context says everything, random contexts mislead."
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    tokenizer = train_tokenizer([" ".join(NOUNS[:4]) + " start"] * 2, 300)
    draw, values = np.random.default_rng(0), {}
    said, misled = draw.integers(0, 4, (2, 480))
    for name, told in {"none": None, "random": misled, "nearest": said}.items():
        contexts = [[] if told is None else [NOUNS[i]] for i in (said if told is None else told)]
        rows = examples(tokenizer, ["start"] * 480, [f" {NOUNS[i]}" * 3 for i in said], contexts)
        trainer = Trainer(language_model(len(tokenizer), 32, 2, 2), TrainingArguments(
            str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, train_sampling_strategy="sequential",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True), DataCollatorForSeq2Seq(tokenizer), rows)
        trainer.train()
        values[name] = per_file(np.arange(80), *trainer.predict(rows[-80:]).predictions)[1]
    assert values["nearest"].mean() < values["none"].mean() / 2
    assert verdict(values["nearest"], values["none"], values["random"]).startswith("Retrieval helps, and it is what was retrieved that helps")


# ---- the notebook

def test_the_notebook_declares_exactly_the_fields_of_its_config():
    declared = papermill.inspect_notebook(str(NOTEBOOK))
    assert list(declared) == list(ContextConfig.model_fields)
    for name, parameter in declared.items(): assert eval(parameter["default"]) == ContextConfig.model_fields[name].default, name


def test_the_notebook_ends_with_three_perplexities(tmp_path):
    write(tmp_path / "tree", {f"{a}/{b}.py": [function(a, i), function(b, i), function(f"{a}_{b}", i)] for i, (a, b) in enumerate(zip(NOUNS, NOUNS[1:]))})
    values = dict(source=tmp_path / "tree", out=tmp_path / "out", first_steps=2, steps=3, batch_size=2, dim=16, layers=1, heads=2, vocab_size=300, context_tokens=12, target_tokens=12, held_out_share=0.3)
    done = subprocess.run([sys.executable, "-m", "papermill", str(NOTEBOOK), "note.ipynb", "-k", "python3", "--no-progress-bar",
                           *(str(part) for name, value in values.items() for part in ("-p", name, value))], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    results = read_json(tmp_path / "out" / "results.json")
    assert list(results["perplexity"]) == ["without context", "random chunks", "nearest chunks", "nearest model, random chunks"]
    for figure in results["perplexity"].values(): assert 1 < figure["ci95"][0] <= figure["value"] <= figure["ci95"][1] and figure["n"] >= 4
    shown = [o["data"] for c in nbformat.read(tmp_path / "note.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 3 and any(results["verdict"] in data.get("text/plain", "") for data in shown)
