"Weights as vectors, and the autoencoder: an exact k-means, scikit-learn, formulas by hand, broken files."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from proj.core import ConfigError, DataError, ProjError
from proj.models.recommend import save_network
from proj.models.weights import SAMPLE, SIZE, WeightsAutoencoder, WeightsConfig, centres, load_autoencoder, tensors_of, vectors_of, weights_vector

SMALL = dict(input_size=20, hidden_size=12, code_size=4)


def count(module): return sum(p.numel() for p in module.parameters())


def spread(values, found): return float(np.square(np.asarray(values)[:, None] - found).min(1).sum())


# ---- k-means on a line

def optimum(values, k):
    "The least squared error that k centres can have, by dynamic programming over stretches of sorted values."
    x = np.sort(values)
    def cost(i, j): return float(np.square(x[i:j] - x[i:j].mean()).sum()) if j > i else 0.0
    best = [cost(0, j) for j in range(len(x) + 1)]
    for _ in range(k - 1): best = [min(best[i] + cost(i, j) for i in range(j + 1)) for j in range(len(x) + 1)]
    return best[-1]


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=25), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_centres_of_anything(values, k):
    found = centres(np.array(values) / 7, k)
    assert found.shape == (k,) and (np.diff(found) <= 0).all() and min(values) / 7 - 1e-9 <= found[-1] and found[0] <= max(values) / 7 + 1e-9
    assert spread(np.array(values) / 7, found) >= optimum(np.array(values) / 7, k) - 1e-9
    if len(set(values)) <= k: assert spread(np.array(values) / 7, found) < 1e-9  # each value its centre
    label = np.abs(np.array(values)[:, None] / 7 - found).argmin(1)
    for c in set(label): assert np.isclose(found[c], np.mean(np.array(values)[label == c]) / 7, atol=1e-9) or (np.diff(found) == 0).any()


def test_centres_are_near_the_best():
    draw, ratios = np.random.default_rng(0), []
    for _ in range(40):
        values = draw.standard_t(4, size=30)
        ratios.append(spread(values, centres(values, 5)) / optimum(values, 5))
    assert np.median(ratios) < 1.1 and max(ratios) < 2


@pytest.mark.parametrize("kind, most", [("normal", 1.1), ("laplace", 1.1), ("two humps", 1.1), ("standard_cauchy", 1.5)])  # of the last, single values decide
@pytest.mark.parametrize("k", [8, 40])
def test_centres_against_scikit_learn(kind, most, k):
    draw = np.random.default_rng(1)
    values = np.concatenate([draw.normal(-5, .1, 2000), draw.normal(5, 1, 2000)]) if kind == "two humps" else getattr(draw, kind)(size=4000)
    assert spread(values, centres(values, k)) < most * KMeans(k, n_init=3, random_state=0).fit(values[:, None]).inertia_


# ---- vectors

@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(4, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_layout(sizes, size, seed):
    "A loop over the spec: last first, so many places each, raw or centres, padded or cut."
    draw = np.random.default_rng(seed)
    state = {f"layer{i}": draw.normal(size=n).astype(np.float32) for i, n in enumerate(sizes)}
    kept = [name for name in state if len(state[name])]
    if not kept:
        with pytest.raises(DataError, match="no floating-point tensors"): weights_vector(state, size)
        return
    expected, places = [], size // len(kept) or 1
    for name in kept[::-1]: expected += (state[name] if len(state[name]) <= places else centres(state[name], places)).tolist()
    found = weights_vector(state, size)
    assert found.shape == (size,) and found.dtype == np.float32 and np.allclose(found, (expected + [0] * size)[:size], atol=1e-6)


def test_more_tensors_than_places():
    for n in (SIZE, SIZE + 3):
        vector = weights_vector({f"{i}": torch.full((2, 2), float(i + 1)) for i in range(n)})
        assert np.array_equal(vector[:min(n, SIZE)], np.arange(n, max(0, n - SIZE), -1)) and vector.shape == (SIZE,) and not vector[n:].any()


def test_types_of_tensors():
    state = {"a": torch.randn(40, 5), "steps": torch.arange(3), "mask": torch.tensor([True]), "none": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    plain = weights_vector(state)
    assert plain[0] == 2.5 and [name for name, _ in tensors_of(state)] == ["one", "a"]
    assert np.array_equal(weights_vector({name: value.numpy() for name, value in state.items()}), plain)
    for kind in (torch.bfloat16, torch.float16, torch.float64): assert np.allclose(weights_vector({name: v.to(kind) if v.is_floating_point() else v for name, v in state.items()}), plain, rtol=.01, atol=.01)
    module = torch.nn.Linear(3, 2)
    assert np.array_equal(weights_vector(dict(module.named_parameters())), weights_vector(module.state_dict()))


def test_files_in_the_order_of_layers(tmp_path):
    torch.manual_seed(0)
    state = torch.nn.Sequential(*[torch.nn.Linear(9, 9) for _ in range(12)]).state_dict()
    plain, (one, two) = weights_vector(state, 400), (tmp_path / "one", tmp_path / "two")
    one.mkdir(), two.mkdir()
    save_file(state, one / "model.safetensors")
    for i, part in enumerate((0, 1)): save_file({name: v for at, (name, v) in enumerate(state.items()) if at % 2 == part}, two / f"model-{i}.safetensors")
    assert [name for name, _ in tensors_of(one)] == list(state)[::-1] == [name for name, _ in tensors_of(two)]
    for source in (one, one / "model.safetensors", two, str(two)): assert np.array_equal(weights_vector(source, 400), plain)
    assert np.array_equal(vectors_of([state, one], 400), [plain, plain])


def test_what_is_no_model(tmp_path):
    for name in ("model.bin", "model.pt", "model.pkl"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises(ConfigError, match="pickles are not read"): weights_vector(tmp_path / name)
    with pytest.raises(DataError, match="no \\*.safetensors"): weights_vector(tmp_path)
    with pytest.raises(DataError, match="no such file"): weights_vector(tmp_path / "no.safetensors")
    save_file({"a": torch.randn(30)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole safetensors file"): weights_vector(tmp_path / "m.safetensors")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="layer.weight: holds NaN or infinity"): weights_vector({"layer.weight": torch.tensor([1., bad])})
    with pytest.raises(DataError, match="the state dict: holds no floating-point tensors"): weights_vector({})


def test_a_large_tensor_is_sampled():
    torch.manual_seed(0)
    state = {"a": torch.randn(3 * SAMPLE)}
    first = weights_vector(state, 50)
    assert np.array_equal(first, weights_vector(state, 50)) and not np.array_equal(first, weights_vector(state, 50, seed=1))
    whole = centres(state["a"].numpy(), 50)
    assert np.abs(first - whole).mean() < .1 and np.corrcoef(first, whole)[0, 1] > .999


# ---- the autoencoder

def made(seed=0, **change):
    torch.manual_seed(seed)
    return WeightsAutoencoder(WeightsConfig(**SMALL | change))


def rows(n=16, seed=0): return (np.random.default_rng(seed).normal(size=(n, 20)) * np.arange(1, 21) + 3).astype(np.float32)


def test_parameter_count():
    for activation in ("gelu", "relu", "leaky_relu"):
        with torch.device("meta"): assert count(WeightsAutoencoder(WeightsConfig(activation=activation))) == 17_836_544


@pytest.mark.parametrize("error", ["smooth_l1", "mse", "l1"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "leaky_relu"])
def test_the_loss_by_hand(error, activation):
    model, x = made(error=error, activation=activation, sparsity=.3, beta=.7).eval().fit_standardisation(rows()), rows(5, seed=1)
    w, z = {name: value.double().numpy() for name, value in model.state_dict().items()}, ((x - rows().mean(0, dtype=float)) / rows().std(0, dtype=float))
    act = {"gelu": lambda a: F.gelu(torch.tensor(a)).numpy(), "relu": lambda a: np.maximum(a, 0), "leaky_relu": lambda a: np.where(a > 0, a, .01 * a)}[activation]
    def linear(a, name): return a @ w[name + ".weight"].T + w[name + ".bias"]
    code = linear(act(linear(z, "down.0")), "down.3")
    away = np.abs(linear(act(linear(code, "up.0")), "up.3") - z)
    by_hand = {"mse": (away**2).mean(), "l1": away.mean(), "smooth_l1": np.where(away < .7, away**2 / 1.4, away - .35).mean()}[error]
    with torch.no_grad(): parts = model(weights=torch.from_numpy(x))
    assert np.isclose(parts["error"], by_hand, rtol=1e-4) and np.isclose(parts["sparsity"], np.abs(code).mean(), rtol=1e-4)
    assert np.isclose(parts["loss"], by_hand + .3 * np.abs(code).mean(), rtol=1e-4) and np.isclose(parts["explained"], 1 - (away**2).sum() / (z**2).sum(), rtol=1e-3)
    assert np.allclose(model.encode(x), code, atol=1e-5)


def test_the_defaults(): assert (lambda c: (c.input_size, c.hidden_size, c.code_size, c.activation, c.dropout, c.error, c.beta, c.sparsity))(WeightsConfig()) == (8192, 1024, 512, "gelu", .05, "smooth_l1", .5, 1e-3)


def test_standardisation_is_of_the_training_rows_and_happens_once():
    x = rows()
    x[:, 3], x[:, 4] = 0, 7.3
    model = made().fit_standardisation(x)
    z = model.standardised(torch.from_numpy(x)).numpy()
    assert np.allclose(z.mean(0), 0, atol=1e-5) and np.allclose(z.std(0)[5:], 1, atol=1e-5) and np.allclose(z[:, 3:5], 0, atol=1e-5) and model.scale[3] == model.scale[4] == 1
    before = model.mean.clone(), model.scale.clone()
    model.encode(rows(9, seed=4) * 50)
    model.train()(torch.from_numpy(rows(9, seed=4) * 50))
    assert torch.equal(model.mean, before[0]) and torch.equal(model.scale, before[1])
    assert not any(p is model.mean or p is model.scale for p in model.parameters())
    with pytest.raises(DataError, match="no standardisation; call fit_standardisation"): made()(torch.from_numpy(x))
    with pytest.raises(DataError, match="no standardisation"): made().encode(x)


def test_codes_do_not_depend_on_batches_or_mode():
    model = made(dropout=.5).fit_standardisation(rows()).train()
    codes = model.encode(rows(7))
    assert model.training and codes.dtype == np.float32 and codes.shape == (7, 4) and np.array_equal(codes, model.encode(rows(7)))
    assert np.allclose(model.encode(rows(7), batch_size=2), codes, atol=1e-6) and np.allclose(model.eval().encode(rows(7)[[3]]), codes[[3]], atol=1e-6) and model.encode(rows(0)).shape == (0, 4)
    for bad, message in ((rows()[:, :3], r"\(16, 3\); expected \(N, 20\)"), (rows() * np.nan, "NaN or infinity"), (rows()[0], r"expected \(N, 20\)"), ([[1.0], [2.0, 3.0]], "no array of numbers")):
        with pytest.raises(DataError, match=message): model.encode(bad)
        with pytest.raises(DataError, match=message): model.fit_standardisation(bad)
    with pytest.raises(DataError, match="weights of 1 models"): model.fit_standardisation(rows(1))


def test_training_reaches_every_weight_and_sparsity_shrinks_codes():
    x, sizes = torch.from_numpy(rows(32)), {}
    for sparsity in (0.0, 1.0):
        model, losses = made(sparsity=sparsity, dropout=0.0).fit_standardisation(rows(32)), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
        for step in range(80):
            parts = model(weights=x)
            optimizer.zero_grad()
            parts["loss"].backward()
            if step == 0: assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == [] and not parts["error"].requires_grad
            optimizer.step()
            losses.append(parts["loss"].item())
        sizes[sparsity] = np.abs(model.encode(rows(32))).mean()
        assert losses[-1] < (.9 if sparsity else .75) * losses[0]
    assert sizes[1.0] < .3 * sizes[0.0]


def test_a_folder_gives_the_model_back(tmp_path):
    model = made(error="l1", activation="relu").fit_standardisation(rows())
    save_network(model, tmp_path / "m")
    again = load_autoencoder(tmp_path / "m")
    assert np.abs(again.encode(rows(5)) - model.encode(rows(5))).max() <= 1e-6 and torch.equal(again.mean, model.mean) and torch.equal(again.scale, model.scale)
    with torch.no_grad(): assert abs(again(torch.from_numpy(rows(5)))["loss"] - model.eval()(torch.from_numpy(rows(5)))["loss"]) <= 1e-6
    raw = bytearray((tmp_path / "m" / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="sha256 differs"): load_autoencoder(tmp_path / "m")


@pytest.mark.parametrize("change", [{"model_type": "swipe"}, {"code_size": 5}, {"activation": "swish"}, {"dropout": 1.5}, {"input_size": "all"}])
def test_foreign_folders_are_one_line(tmp_path, change):
    save_network(made().fit_standardisation(rows()), tmp_path / "m")
    (tmp_path / "m" / "COMMIT.json").unlink()
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ProjError) as e: load_autoencoder(tmp_path / "m")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
