"The three rankers against their formulas, what must not matter to them, broken input, folders."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from proj.core import ConfigError, DataError, ProjError
from proj.data.zoo import TrueScores, build_combined_similarity_loader
from proj.models.recommend import RANKERS, TOKENS, Ranker, load_ranker, make_ranker, save_network

SMALL = dict(dataset_dim=6, model_dim=5, hidden_size=16, num_attention_heads=4, num_hidden_layers=2, intermediate_size=24)
each = pytest.mark.parametrize("name", RANKERS)


def count(module): return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def rankers():
    torch.manual_seed(0)
    found = {name: make_ranker(name, **SMALL).eval() for name in RANKERS}
    for ranker in found.values():  # biases and norms that are not 0 and 1
        for p in ranker.parameters(): p.data += .05 * torch.randn_like(p)
    return found


def sides(seed, b=3, m=5, n=6):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(b, m, 6, generator=draw), torch.randn(b, n, 5, generator=draw)
    lengths = [torch.randint(1, size + 1, (b, 1), generator=draw) for size in (m, n)]
    order = [torch.rand(b, size, generator=draw).argsort(1) for size in (m, n)]  # padding may be anywhere
    return x, y, order[0] < lengths[0], order[1] < lengths[1]


def test_parameter_counts():
    with torch.device("meta"): counts = {name: count(make_ranker(name)) for name in RANKERS}
    assert counts == {"cross_attention": 44_141_057, "custom_similarity": 2_103_296, "similarity": 12_610_049}
    with torch.device("meta"):
        assert count(make_ranker(dataset_dim=384, model_dim=70)) == 44_141_057 + 385 * 512 + 71 * 512
        assert count(torch.nn.Transformer(512, 8, batch_first=True)) + 513 == 44_141_057  # torch's defaults: 6 + 6 layers, 2048


# ---- the formulas again, with nothing but matrix products

def norm(x, w, name): return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def attend(q, kv, mask, w, name, heads=4):
    (wq, wk, wv), (bq, bk, bv) = w[name + ".in_proj_weight"].chunk(3), w[name + ".in_proj_bias"].chunk(3)
    out = []
    for row in range(len(q)):
        there = kv[row][mask[row]]
        q1, k1, v1 = q[row] @ wq.T + bq, there @ wk.T + bk, there @ wv.T + bv
        size = q1.shape[-1] // heads
        parts = [(q1[:, s:s + size] @ k1[:, s:s + size].T / math.sqrt(size)).softmax(-1) @ v1[:, s:s + size] for s in range(0, q1.shape[-1], size)]
        out.append(torch.cat(parts, -1) @ w[name + ".out_proj.weight"].T + w[name + ".out_proj.bias"])
    return torch.stack(out)


def feed(x, w, p): return (x @ w[p + ".linear1.weight"].T + w[p + ".linear1.bias"]).relu() @ w[p + ".linear2.weight"].T + w[p + ".linear2.bias"]


def encoded(x, mask, w, p):
    x = norm(x + attend(x, x, mask, w, p + ".self_attn"), w, p + ".norm1")
    return norm(x + feed(x, w, p), w, p + ".norm2")


def plain_cross(w, x, y, x_mask, y_mask):
    for i in range(2): x = encoded(x, x_mask, w, f"transformer.encoder.layers.{i}")
    x = norm(x, w, "transformer.encoder.norm")
    for i in range(2):
        p = f"transformer.decoder.layers.{i}"
        y = norm(y + attend(y, y, y_mask, w, p + ".self_attn"), w, p + ".norm1")
        y = norm(y + attend(y, x, x_mask, w, p + ".multihead_attn"), w, p + ".norm2")
        y = norm(y + feed(y, w, p), w, p + ".norm3")
    return (norm(y, w, "transformer.decoder.norm") @ w["head.weight"].T + w["head.bias"])[..., 0]


def plain_custom(w, x, y, x_mask, y_mask):
    for i in range(2): x = norm(x + attend(x, y, y_mask, w, f"attention.{i}"), w, f"norms.{i}")
    return torch.stack([y[row] @ x[row][x_mask[row]].mean(0) for row in range(len(x))])


def plain_similarity(w, x, y, x_mask, y_mask):
    z, mask = torch.cat([w["cls"].expand(len(x), 1, -1), y, x], 1), torch.cat([torch.ones(len(x), 1, dtype=torch.bool), y_mask, x_mask], 1)
    for i in range(2): z = encoded(z, mask, w, f"encoder.layers.{i}")
    z = z / z.norm(dim=-1, keepdim=True)
    return (z[:, 1:1 + y.shape[1]] * z[:, :1]).sum(-1) / w["temperature"]


@each
def test_forward_agrees_with_a_second_implementation(rankers, name):
    plain = {"cross_attention": plain_cross, "custom_similarity": plain_custom, "similarity": plain_similarity}[name]
    ranker, (x, y, x_mask, y_mask) = rankers[name], sides(1)
    w = ranker.state_dict()
    with torch.no_grad():
        expected = plain(w, x @ w["dataset_in.weight"].T + w["dataset_in.bias"], y @ w["model_in.weight"].T + w["model_in.bias"], x_mask, y_mask)
        found = ranker(x, y, x_mask, y_mask)
    assert torch.allclose(found[y_mask], expected[y_mask], atol=1e-4) and found[y_mask].std() > .01
    assert (found[~y_mask] == torch.finfo(torch.float32).min).all()


# ---- what must not matter, and what must

@each
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_order_and_padding(rankers, name, seed):
    ranker, (x, y, x_mask, y_mask), draw = rankers[name], sides(seed), np.random.default_rng(seed)
    with torch.no_grad():
        right = ranker(x, y, x_mask, y_mask)
        tokens, models = torch.tensor(draw.permutation(5)), torch.tensor(draw.permutation(6))
        moved = ranker(x[:, tokens], y[:, models], x_mask[:, tokens], y_mask[:, models])
        assert torch.allclose(moved, right[:, models], atol=1e-5, rtol=1e-5)
        junk = [float(draw.normal(0, 10.0**draw.integers(0, 30))), math.nan][seed % 2]
        spoiled = ranker(x.masked_fill(~x_mask[..., None], junk), y.masked_fill(~y_mask[..., None], junk), x_mask, y_mask)
        assert torch.equal(spoiled, right)
        longer = ranker(F.pad(x, (0, 0, 0, 3), value=9), F.pad(y, (0, 0, 0, 2), value=9), F.pad(x_mask, (0, 3)), F.pad(y_mask, (0, 2)))
        assert torch.allclose(longer[:, :6], right, atol=1e-5, rtol=1e-5)
        for row in range(3):
            alone = ranker(x[row][x_mask[row]][None], y[row][y_mask[row]][None])[0]
            assert torch.allclose(alone, right[row][y_mask[row]], atol=1e-5, rtol=1e-5)


@each
def test_tokens_and_models_matter(rankers, name):
    ranker, (x, y, _, _) = rankers[name], sides(2)
    with torch.no_grad():
        right, far = ranker(x, y), ranker(x.roll(1, 0), y)
        other = ranker(x, torch.cat([y[:, :-1], -y[:, -1:]], 1))
    assert (far - right).abs().mean() > 1e-3 and (other - right)[:, -1].abs().mean() > 1e-3


@each
def test_one_row_is_taken_for_all(rankers, name):
    ranker, (x, y, x_mask, y_mask) = rankers[name], sides(3)
    with torch.no_grad():
        assert torch.allclose(ranker(x[:1], y, x_mask[:1], y_mask), ranker(x[:1].repeat(3, 1, 1), y, x_mask[:1].repeat(3, 1), y_mask), atol=1e-6)
        assert torch.allclose(ranker(x, y[:1], x_mask, y_mask[:1]), ranker(x, y[:1].repeat(3, 1, 1), x_mask, y_mask[:1].repeat(3, 1)), atol=1e-6)


@each
def test_logits_are_no_probabilities(rankers, name):
    ranker, (x, y, x_mask, y_mask) = rankers[name], sides(4)
    with torch.no_grad():
        logits, p = ranker(x, y, x_mask, y_mask), ranker(x, y, x_mask, y_mask, probabilities=True)
        with torch.autocast("cpu", torch.bfloat16): half = ranker(x, y, x_mask, y_mask)
    for row in range(3): assert torch.allclose(p[row][y_mask[row]], logits[row][y_mask[row]].softmax(0), atol=1e-6)
    assert not p[~y_mask].any() and torch.allclose(p.sum(1), torch.ones(3), atol=1e-6)
    assert half.isfinite().all() and (half[y_mask].float() - logits[y_mask]).abs().max() < .2 * logits[y_mask].abs().max()
    assert (half.argsort(1)[:, :1] >= 0).all() and all(half[row].argmax() in y_mask[row].nonzero() for row in range(3))


@each
def test_the_gradient_reaches_every_weight_and_no_padding(name):
    torch.manual_seed(0)
    ranker, (x, y, x_mask, y_mask) = make_ranker(name, **SMALL), sides(5)
    x.requires_grad_(), y.requires_grad_()
    logits = ranker(x, y, x_mask, y_mask)
    (torch.where(y_mask, logits, 0).square().sum() + logits.logsumexp(1).sum()).backward()
    assert [p for p, value in ranker.named_parameters() if value.grad is None or not value.grad.isfinite().all() or not value.grad.abs().sum() > 0] == []
    assert not x.grad[~x_mask].any() and not y.grad[~y_mask].any() and x.grad[x_mask].abs().sum() > 0


def test_the_temperature_is_clamped(rankers):
    x, y, _, _ = sides(6)
    torch.manual_seed(0)
    ranker = make_ranker("similarity", **SMALL).eval()
    assert ranker.temperature.item() == pytest.approx(.07)
    found = []
    for temperature in (1e-9, .01, 5, 80):
        ranker.temperature.data.fill_(temperature)
        with torch.no_grad(): found.append(ranker(x, y))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and torch.allclose(found[0], 500 * found[2], rtol=1e-4) and found[0].abs().max() <= 100.001


@each
def test_dropout_is_for_training_only(name):
    torch.manual_seed(0)
    ranker, (x, y, _, _) = make_ranker(name, **SMALL | dict(dropout=.5)), sides(7)
    with torch.no_grad():
        assert not torch.allclose(ranker.train()(x, y), ranker(x, y)) and torch.equal(ranker.eval()(x, y), ranker(x, y))


# ---- broken input

def test_shapes_are_named(rankers):
    x, y, x_mask, y_mask = sides(8)
    for given, message in [((x[0], y), "dataset_tokens is (5, 6); expected (B, M, 6)"), ((x, y[..., :3]), "model_tokens is (3, 6, 3); expected (B, N, 5)"),
                           ((x[:2], y), "dataset_tokens has 2 rows, model_tokens has 3"), ((x, y, x_mask.T), "dataset_mask is (5, 3), but dataset_tokens is (3, 5, 6)"),
                           ((x, y, x_mask, y_mask[:1]), "model_mask is (1, 6), but model_tokens is (3, 6, 5)"), ((x[:, :0], y), "row 0 of dataset_mask has no token"),
                           ((x, y, x_mask * torch.tensor([[1], [1], [0]]).bool()), "row 2 of dataset_mask has no token"), ((x, y, None, y_mask & False), "row 0 of model_mask has no token")]:
        for ranker in rankers.values():
            with pytest.raises(DataError) as e: ranker(*given)
            assert str(e.value).startswith(message)


@pytest.mark.parametrize("change, message", [(dict(hidden_size=18), "not a multiple"), (dict(num_hidden_layers=0), "num_hidden_layers is 0"), (dict(dropout=1.0), "dropout is 1.0"), (dict(model_dim=2.5), "model_dim is 2.5"),
                                             (dict(dropot=.1), "unknown option 'dropot'; did you mean 'dropout'"), (dict(name="crossattention"), "unknown ranker 'crossattention'; did you mean 'cross_attention'")])
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ProjError, match=message): make_ranker(**SMALL | change)


# ---- batches and folders

@each
def test_a_batch_of_the_loader_goes_in(name):
    scores = TrueScores(["a", "b"], list("mno"), [[.1, .3, np.nan], [.2, .1, .4]])
    loader = build_combined_similarity_loader(scores, {model: np.arange(5.) + at for at, model in enumerate("mno")}, {"a": np.ones((2, 6)), "b": np.ones((3, 6))})
    batch, ranker = next(iter(loader)), make_ranker(name, **SMALL)
    logits = ranker(**{part: batch[part] for part in TOKENS})
    assert logits.shape == batch["true_scores"].shape == (2, 3) and (logits[~batch["model_mask"]] < -1e38).all()


@each
def test_a_folder_gives_the_model_back(rankers, name, tmp_path):
    ranker, (x, y, x_mask, y_mask) = rankers[name], sides(9)
    for _ in range(2): save_network(ranker, tmp_path / "m")
    again = load_ranker(tmp_path / "m")
    with torch.no_grad(): assert (again(x, y, x_mask, y_mask) - ranker(x, y, x_mask, y_mask)).abs().max() <= 1e-6
    assert type(again) is type(ranker) and not again.training and sorted(p.name for p in (tmp_path / "m").iterdir()) == ["COMMIT.json", "config.json", "model.safetensors"]
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"): save_network(ranker, tmp_path / "m")


@pytest.mark.parametrize("change", [{"model_type": "bert"}, {"model_type": None}, {"hidden_size": 17}, {"hidden_size": "big"}, {"num_hidden_layers": 3}, {"num_attention_heads": -4}, {"dropout": 7}, "weights", "config", "torn"])
def test_foreign_folders_are_one_line(rankers, tmp_path, change):
    save_network(rankers["cross_attention"], tmp_path / "m")
    weights, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    if change == "torn": weights.write_bytes(weights.read_bytes()[:-40])
    else:
        (tmp_path / "m" / "COMMIT.json").unlink()
        if change == "weights": weights.unlink()
        elif change == "config": config.unlink()
        else: config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ProjError) as e: load_ranker(tmp_path / "m")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_all_are_rankers(): assert all(issubclass(kind, Ranker) for kind in RANKERS.values())
