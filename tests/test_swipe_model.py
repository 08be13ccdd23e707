"The swipe models: parameters, a second implementation of the forward pass, padding, losses, saving and loading."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError, ProjError, rng
from proj.data.keyboards import layout
from proj.data.strokes import Hand, synthetic_swipes
from proj.data.swipes import CLS, EOS, MASK, SEP, Lexicon
from proj.decoding import Decoder
from proj.losses.swipe import SwipeLoss
from proj.models.processor import SwipeProcessor, group_batch, hide_blocks, two_views
from proj.models.swipe import SwipeCrossEncoder, SwipeForPreTraining, SwipeModel, SwipeScorer, cropped, load_base, swipe_config
from proj.templates import TemplateIndex

WORDS = ["to", "hello", "world", "swipe"]
PATHS = [s.path for s in synthetic_swipes(layout(), WORDS, Hand(pace=3))]


def small(processor, **change):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=.2)
    return swipe_config("tiny", processor, **{**shape, **change})


@pytest.fixture(scope="module")
def processor(): return SwipeProcessor(path_length=64, word_length=12)


@pytest.fixture(scope="module")
def cross(processor):
    torch.manual_seed(0)
    return SwipeCrossEncoder(small(processor)).eval()


@pytest.fixture
def scorer(cross, processor): return SwipeScorer(cross, processor, device="cpu")


def count(module): return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    with torch.device("meta"): base, tiny = (SwipeCrossEncoder(swipe_config(size)) for size in ("base", "tiny"))
    assert (count(base.base), count(base.head)) == (85_230_336, 592_897)
    assert count(tiny.base) == 4 * (12 * 256**2 + 13 * 256) + 256 * (43 + 178 + 2 + 3 + 1 + 2)
    with torch.device("meta"):
        for channels in (6, 8): assert count(SwipeModel(swipe_config(channels=channels))) == 85_230_336 + (channels - 3) * 768


def plain_forward(model, batch):
    "The formulas again, with nothing but matrix products; (b, 2 + L + C, d)."
    w, config = model.state_dict(), model.config
    def norm(x, name): return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]
    e, length = "embeddings.", config.path_length
    mark = w[e + "symbols.weight"]
    content = torch.cat([mark[CLS].expand(len(batch["input_ids"]), 1, -1), batch["path_values"] @ w[e + "points.weight"].T + w[e + "points.bias"],
                         mark[SEP].expand(len(batch["input_ids"]), 1, -1), mark[batch["input_ids"]]], 1)
    side = torch.cat([w[e + "sides.weight"][0].expand(2 + length, -1), w[e + "sides.weight"][1].expand(config.word_length, -1)])
    x = norm(content + w[e + "places.weight"] + side, e + "norm")
    one = torch.ones(len(x), 1, dtype=torch.bool)
    seen = torch.cat([one, batch["path_mask"], one, batch["word_mask"]], 1)
    heads, d = config.num_attention_heads, config.hidden_size
    for layer in range(config.num_hidden_layers):
        p = f"layers.{layer}."
        q, k, v = (norm(x, p + "norm1") @ w[p + "self_attn.in_proj_weight"].T + w[p + "self_attn.in_proj_bias"]).split(d, -1)
        q, k, v = (t.unflatten(-1, (heads, d // heads)).transpose(1, 2) for t in (q, k, v))
        share = (q @ k.transpose(-1, -2) / (d // heads)**.5).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        x = x + (share @ v).transpose(1, 2).flatten(-2) @ w[p + "self_attn.out_proj.weight"].T + w[p + "self_attn.out_proj.bias"]
        inner = norm(x, p + "norm2") @ w[p + "linear1.weight"].T + w[p + "linear1.bias"]
        x = x + (inner * .5 * (1 + torch.erf(inner / 2**.5))) @ w[p + "linear2.weight"].T + w[p + "linear2.bias"]
    return x


def test_forward_agrees_with_a_second_implementation(cross, processor):
    batch = processor([*PATHS[:3], np.zeros((0, 3))], WORDS)
    with torch.no_grad():
        states, plain = cross.base(**batch), plain_forward(cross.base, batch)
        head = cross.head
        scores = head[3](F.layer_norm(F.gelu(head[0](plain[:, 1 + 64])), (32,), head[2].weight, head[2].bias))[:, 0]
        assert torch.allclose(states.pooler_output, plain[:, 65], atol=1e-4) and torch.allclose(cross(**batch), scores, atol=1e-4)
    assert scores.std() > .01


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_padding_has_no_say(cross, processor, seed):
    batch, draw = processor([*PATHS[:2], np.zeros((0, 3)), PATHS[3]], WORDS), np.random.default_rng(seed)
    spoiled = {name: value.clone() for name, value in batch.items()}
    spoiled["path_values"][~batch["path_mask"]] = torch.tensor(draw.normal(0, 10.0**draw.integers(-3, 30), (int((~batch["path_mask"]).sum()), 3)), dtype=torch.float32)
    spoiled["input_ids"][~batch["word_mask"]] = torch.tensor(draw.integers(0, 43, int((~batch["word_mask"]).sum())))
    with torch.no_grad():
        right = cross(**batch)
        assert torch.allclose(cross(**spoiled), right, atol=1e-5, rtol=0) and torch.allclose(cross(**cropped(batch)), right, atol=1e-5, rtol=0)
        order = torch.tensor(draw.permutation(4))
        assert torch.allclose(cross(**{name: value[order] for name, value in batch.items()}), right[order], atol=1e-5, rtol=0)


def test_what_is_there_has_a_say(cross, processor):
    batch = processor(PATHS, WORDS)
    with torch.no_grad():
        right = cross(**batch)
        for name in ("path_values", "input_ids"):
            changed = {**batch, name: batch[name].clone()}
            changed[name][:, 1] = changed[name][:, 1] + (1 if name == "input_ids" else .2)
            assert (cross(**changed) - right).abs().min() > 1e-6
        hidden = torch.zeros_like(batch["path_mask"])
        hidden[:, 3] = True
        first, moved = cross(**batch, hidden_points=hidden), {**batch, "path_values": batch["path_values"].clone()}
        moved["path_values"][:, 3] = 9
        assert torch.equal(cross(**moved, hidden_points=hidden), first) and (first - right).abs().min() > 1e-7  # hidden is hidden


def test_groups_may_differ_in_size(scorer, processor):
    negatives = [["too"], [], ["word", "work", "would"], ["swift", "stripe"]]
    rows, group = group_batch(processor, PATHS, WORDS, negatives)
    assert group.bincount().tolist() == [2, 1, 4, 3] and len(rows["input_ids"]) == 10
    with torch.no_grad(): scores = scorer.model(**rows).numpy()
    for at, (path, word, others) in enumerate(zip(PATHS, WORDS, negatives)):
        assert np.allclose(scores[group.numpy() == at], scorer.predict(path, [word, *others]), atol=1e-5)


def test_scores_are_those_of_single_pairs(scorer):
    single = np.array([[scorer.predict(path, word) for word in WORDS] for path in PATHS])
    assert np.allclose(scorer.score(PATHS, WORDS), single, atol=1e-5) and np.allclose(scorer.batch_predict(PATHS, WORDS), single.diagonal(), atol=1e-5)
    assert np.allclose(scorer.predict(PATHS, "to"), single[:, 0], atol=1e-5) and scorer.score([], WORDS).shape == (0, 4)
    ranking = scorer.rank(PATHS[0], WORDS)
    assert ranking.ids == [WORDS[at] for at in np.argsort(-single[0])] and (np.diff(ranking.scores) <= 0).all()
    for call in (scorer.batch_predict, scorer.predict, scorer.encode):
        with pytest.raises(DataError, match="4 paths but 3 words"): call(PATHS, WORDS[:3])


def test_models_come_back_in_another_process(scorer, tmp_path):
    scorer.save(tmp_path / "m")
    np.save(tmp_path / "paths.npy", PATHS[1])
    script = """if True:
        import sys, numpy as np, proj.models.swipe
        from transformers import AutoModelForSequenceClassification, AutoProcessor
        folder, path = sys.argv[1], np.load(sys.argv[2])
        model, processor = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        print(*[float(v) for v in proj.models.swipe.SwipeScorer(model, processor, device="cpu").predict(path, ["hello", "help", "to"])])"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m"), str(tmp_path / "paths.npy")], capture_output=True, text=True, check=True)
    assert np.abs(np.array(done.stdout.split(), float) - scorer.predict(PATHS[1], ["hello", "help", "to"])).max() <= 1e-6
    loaded = SwipeScorer.load(tmp_path / "m", device="cpu")
    assert np.abs(loaded.score(PATHS, WORDS) - scorer.score(PATHS, WORDS)).max() <= 1e-6


def test_damaged_folders_are_refused(scorer, tmp_path):
    scorer.save(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(DataError, match="model.safetensors"): SwipeScorer.load(tmp_path / "m")
    with pytest.raises(DataError, match="no config.json"): SwipeScorer.load(tmp_path)
    with pytest.raises(ConfigError, match="the model's channels is 3, the processor's 6"): SwipeScorer(scorer.model, SwipeProcessor(6, 64, 12))


@pytest.mark.parametrize("change", [{"channels": "three"}, {"hidden_size": 33}, {"path_length": -4}, {"model_type": "bert"}, {"num_hidden_layers": 3}, None])
def test_foreign_folders_are_one_error(scorer, tmp_path, change):
    scorer.save(tmp_path / "m")
    (tmp_path / "m" / "COMMIT.json").unlink()
    for file in (tmp_path / "m").glob("*.json"):
        if change is None and file.name == "processor_config.json": file.unlink()
        if change and file.name == "config.json": file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ProjError) as e: SwipeScorer.load(tmp_path / "m", device="cpu")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_the_decoder_takes_the_model_as_its_reranker(scorer):
    index = TemplateIndex(Lexicon([*WORDS, "too", "help", "word", "sweep"]), layout(), weight=.01)
    decoder, plain = Decoder(index, scorer, depth=3, blend=.1), Decoder(index)
    for path in PATHS:
        three, ranking = plain.decode(path, 3), decoder.decode(path, 8)
        expected = {word: score + .1 * scorer.predict(path, word) for word, score in zip(three.ids, three.scores)}
        assert ranking.ids[:3] == sorted(expected, key=expected.get, reverse=True) and np.allclose(ranking.scores[:3], sorted(expected.values(), reverse=True), atol=1e-5)
        assert ranking.ids[3:] == plain.decode(path, 8).ids[3:]


def test_a_head_that_was_not_saved_is_not_made_up(processor, tmp_path):
    for part in (SwipeForPreTraining(small(processor)), processor): part.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the weights lack head.0.bias and 5 more"): SwipeScorer.load(tmp_path)


def test_a_model_is_replaced_but_nothing_else(scorer, tmp_path):
    for _ in range(2): scorer.save(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"): scorer.save(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_exactly_these_are_frozen(processor):
    model = SwipeCrossEncoder(small(processor))
    def trained(): return {name for name, p in model.named_parameters() if p.requires_grad}
    every = trained()
    head = {name for name in every if not name.startswith("base.")}
    model.freeze_encoder()
    assert trained() == head and len(head) == 6
    for n in (0, 1, 2):
        model.unfreeze_top_layers(n)
        assert trained() == head | {name for name in every for layer in range(2 - n, 2) if name.startswith(f"base.layers.{layer}.")}
    model.unfreeze_top_layers(1)
    model(**processor(PATHS, WORDS)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained()
    model.unfreeze_encoder()
    assert trained() == every


def test_base_weights_from_several_layouts(processor, tmp_path):
    source, other = SwipeForPreTraining(small(processor)), SwipeCrossEncoder(small(processor))
    weights = source.base.state_dict()
    def loads(what):
        model = SwipeCrossEncoder(small(processor))
        told = load_base(model, what)
        assert not told.missing and all(torch.equal(value, weights[name]) for name, value in model.base.state_dict().items())
        return told.left_over
    source.save_pretrained(tmp_path / "pre")
    source.base.save_pretrained(tmp_path / "base")
    heads = {f"{head}.{part}" for head in ("characters", "points", "lengths") for part in ("weight", "bias")}
    assert set(loads(tmp_path / "pre")) == set(loads(tmp_path / "pre" / "model.safetensors")) == set(loads(source.state_dict())) == heads
    assert loads(tmp_path / "base") == [] and set(loads({"module." + name: value for name, value in source.state_dict().items()})) == {"module." + head for head in heads}
    partly = load_base(other, {name: value for name, value in weights.items() if not name.startswith("layers.1.")})
    assert partly.missing == [name for name in weights if name.startswith("layers.1.")]
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole safetensors file"): load_base(other, tmp_path / "torn.safetensors")
    with pytest.raises(ConfigError, match="pickles are not read"): load_base(other, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="the model's is"): load_base(SwipeCrossEncoder(small(processor, hidden_size=64)), weights)


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_as_many_points_are_hidden_as_were_wanted(length, share, seed):
    assert hide_blocks(length, share, np.random.default_rng(seed)).sum() == round(share * length)


def test_views_show_what_they_should(processor):
    batch = processor(PATHS * 100, WORDS * 100)
    inputs, targets = two_views(batch, rng(0, "views"))
    points, symbols = inputs["path_mask"].any(1), inputs["word_mask"].any(1)
    apart = ~(points & symbols)
    assert .15 < apart[:400].float().mean() < .25 and torch.equal(apart[:400], apart[400:]) and torch.equal(points[:400] ^ points[400:], apart[:400])
    share = (inputs["hidden_points"].sum(1) / inputs["path_mask"].sum(1).clamp(min=1))[~apart].reshape(2, -1)
    assert (share.max(0).values > .46).all() and (share.max(0).values < .74).all() and (share.min(0).values < .24).all() and (share[0] > share[1]).float().mean() > .4
    assert (targets["symbols"][targets["hidden_symbols"]] != MASK).all() and (inputs["input_ids"][targets["hidden_symbols"]] == MASK).all()
    assert targets["lengths"].tolist() == [len(word) for word in WORDS] * 200 and not (inputs["input_ids"][~inputs["word_mask"]]).any()
    assert (batch["input_ids"] == EOS).sum() == 400


def test_the_loss_reaches_every_weight_and_falls(processor):
    torch.manual_seed(0)
    model, loss = SwipeForPreTraining(small(processor, initializer_range=.02, hidden_dropout_prob=0.0)), SwipeLoss(gamma=1, counts=torch.arange(43), dims={16: 1, 32: 1})
    inputs, targets = two_views(processor(PATHS * 4, WORDS * 4), rng(1, "views"))
    optimizer, seen = torch.optim.AdamW(model.parameters(), 5e-3), []
    for step in range(25):
        parts = loss(model(**inputs), targets)
        optimizer.zero_grad()
        parts.loss.backward()
        if step == 0: assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
        optimizer.step()
        seen.append(parts.loss.item())
    assert seen[-1] < .5 * seen[0]


def test_neither_path_nor_word_is_an_error(processor):
    with pytest.raises(ConfigError, match="neither paths nor words"): processor()
    with pytest.raises(ConfigError, match="pass a list of words"): processor(PATHS[:1], "to")
