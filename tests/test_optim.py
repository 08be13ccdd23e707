"Optimizers: exact groups by hand-written lists, torch's own optimizers and transformers.Trainer as the reference, saving, resuming, broken input."
import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from proj.core import ConfigError, DataError, MachineError
from proj.optim import MuonAdamW, decayed, hidden_matrices, make_optimizer

LINEARS = [f"attention.self.{n}" for n in ("query", "key", "value")] + ["attention.output.dense", "intermediate.dense", "output.dense"]
NORMS = ["attention.output.LayerNorm", "output.LayerNorm"]
TABLES = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
MATRICES = [f"encoder.encoder.layer.{i}.{n}.weight" for i in (0, 1) for n in LINEARS]
REST_DECAYS = [f"encoder.embeddings.{n}.weight" for n in TABLES] + ["models.weight", "first.weight", "last.weight"]
NO_DECAY = {f"encoder.encoder.layer.{i}.{n}.bias" for i in (0, 1) for n in LINEARS + NORMS} | {f"encoder.encoder.layer.{i}.{n}.weight" for i in (0, 1) for n in NORMS} | {
    "encoder.embeddings.LayerNorm.weight", "encoder.embeddings.LayerNorm.bias", "first.bias", "norm.weight", "norm.bias", "last.bias"}


class Scorer(nn.Module):
    "A BERT, a table of models and a head."
    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel
        torch.manual_seed(0)
        config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16, initializer_range=0.2)
        self.encoder = BertModel(config, add_pooling_layer=False).eval()
        self.models, self.first, self.norm, self.last = nn.Embedding(3, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        x = self.last(self.norm(self.first(self.encoder(input_ids).last_hidden_state.mean(1) * self.models.weight.mean(0))))
        loss = nn.functional.cross_entropy(x, labels) if labels is not None else x.square().mean()
        return {"loss": loss, "logits": x}


def names_of(optimizer): return [(g.get("by"), g["lr"], g["weight_decay"], set(g["param_names"])) for g in optimizer.param_groups]
def backward(model, seed): model(torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(seed)))["loss"].backward()
def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def through_a_file(state):
    saved = io.BytesIO()
    torch.save(state, saved)
    return torch.load(io.BytesIO(saved.getvalue()), weights_only=True)


def steps(model, optimizers, seeds, schedule=None):
    for seed in seeds:
        backward(model, seed)
        for o in optimizers: o.step(), o.zero_grad()
        if schedule: schedule.step()
    return model


# ---- groups

def test_groups_are_exact():
    model = Scorer()
    assert names_of(make_optimizer(model, "muon", 1e-3, 0.1, encoder="encoder")) == [
        ("muon", 1e-3, 0.1, set(MATRICES)), ("adamw", 1e-3, 0.1, set(REST_DECAYS)), ("adamw", 1e-3, 0.0, NO_DECAY)]
    for method in ("adamw", "adam"):
        optimizer = make_optimizer(model, method, 1e-3, 0.1)
        assert sorted(names_of(optimizer), key=lambda g: -g[2]) == [(None, 1e-3, 0.1, {*MATRICES, *REST_DECAYS}), (None, 1e-3, 0.0, NO_DECAY)]
        assert type(optimizer) is dict(adamw=torch.optim.AdamW, adam=torch.optim.Adam)[method]
    for optimizer in (make_optimizer(model, m, 1e-3, encoder="encoder") for m in ("adamw", "adam", "muon")):
        held = [p for g in optimizer.param_groups for p in g["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters())) and [p.shape for p in held] == [model.get_parameter(n).shape for g in optimizer.param_groups for n in g["param_names"]]


def test_multipliers_are_exact():
    optimizer = make_optimizer(Scorer(), "muon", 1e-3, 0.1, {"encoder.encoder.layer.0": 0.5, "first": 4, "models.weight": 10}, "encoder")
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    for name, rate in rates.items():
        factor = 0.5 if ".layer.0." in name else 4 if name.startswith("first.") else 10 if name == "models.weight" else 1
        assert rate == 1e-3 * factor, name
    assert {n for g in optimizer.param_groups if g["by"] == "muon" for n in g["param_names"]} == set(MATRICES)


def test_muon_takes_whole_hidden_matrices_only():
    from proj.models import encoder as enc
    tiny = enc.load_encoder("tiny", texts=["sort a list", "read a file"])
    layer = [f"0.transformer.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")]
    assert hidden_matrices(tiny, "0") == hidden_matrices(tiny, "") == layer
    model = Scorer()
    assert hidden_matrices(model, ["encoder"]) == hidden_matrices(model, {"encoder": None}) == MATRICES
    assert set(hidden_matrices(model, ["encoder.encoder.layer.1", "encoder.embeddings"])) == {n for n in MATRICES if ".layer.1." in n}
    model.encoder.encoder.layer[0].requires_grad_(False)
    assert hidden_matrices(model, "encoder") == [n for n in MATRICES if ".layer.1." in n]


def test_adapters_and_frozen_weights():
    from proj.config import FinetuningSpec
    from proj.models.tune import tune
    model = Scorer()
    tuned = tune(model, FinetuningSpec(method="lora", rank=2))
    optimizer = make_optimizer(model, "adamw", 1e-3)
    assert {n for g in optimizer.param_groups for n in g["param_names"]} == set(tuned.names)
    with pytest.raises(ConfigError, match="nothing to move.*use adamw"): make_optimizer(model, "muon", 1e-3, encoder="encoder")
    assert hidden_matrices(model, "encoder") == []
    model = Scorer()
    tune(model, FinetuningSpec(method="last_layers", num_layers=1))
    optimizer = make_optimizer(model, "muon", 1e-3, encoder="encoder")
    assert names_of(optimizer)[0][3] == {n for n in MATRICES if ".layer.1." in n}


# ---- against others

def test_adamw_is_the_trainers(tmp_path):
    from transformers import Trainer, TrainingArguments
    ours, theirs = Scorer(), Scorer()
    trainer = Trainer(theirs, TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, report_to="none", use_cpu=True, optim="adamw_torch"))
    reference = trainer.create_optimizer()
    by_id = {id(p): n for n, p in theirs.named_parameters()}
    assert {(frozenset(by_id[id(p)] for p in g["params"]), g["weight_decay"]) for g in reference.param_groups} == {
        (frozenset(g["param_names"]), g["weight_decay"]) for g in make_optimizer(ours, "adamw", 1e-3, 0.1).param_groups}
    assert decayed(ours) == set(trainer.get_decay_parameter_names(theirs))
    assert equal(steps(ours, [make_optimizer(ours, "adamw", 1e-3, 0.1)], range(3)), steps(theirs, [reference], range(3)))


@pytest.mark.parametrize("factors", [{}, {"encoder": 0.1, "models": 7.0}])
def test_muon_steps_like_the_two_apart(factors):
    ours, theirs = Scorer(), Scorer()
    p = dict(theirs.named_parameters())
    rate = lambda name: 1e-3 * next((f for prefix, f in factors.items() if name.startswith(prefix + ".")), 1)
    muon = [torch.optim.Muon([p[n]], rate(n), weight_decay=0.1, adjust_lr_fn="match_rms_adamw") for n in MATRICES]
    adamw = [torch.optim.AdamW([p[n]], rate(n), weight_decay=0.1 if n in REST_DECAYS else 0) for n in p if n not in MATRICES]
    optimizer = make_optimizer(ours, "muon", 1e-3, 0.1, factors, "encoder")
    before = Scorer()
    assert equal(steps(ours, [optimizer], range(4)), steps(theirs, [*muon, *adamw], range(4)))
    assert all(not torch.equal(a, b) for a, b in zip(ours.parameters(), before.parameters()))


def test_updates_are_of_one_size():
    "Scaled as Liu et al. (2025) say, a matrix moves about as far by Muon as by AdamW."
    moved = {}
    for method in ("muon", "adamw"):
        model, before = Scorer(), Scorer()
        steps(model, [make_optimizer(model, method, 1e-3, 0.0, encoder="encoder")], range(3))
        moved[method] = torch.cat([(model.get_parameter(n) - before.get_parameter(n)).flatten() for n in MATRICES]).square().mean().sqrt()
    assert 0.1 < moved["muon"] / moved["adamw"] < 1  # .2 by design, a fresh AdamW moves 1


def test_closures_are_called_once():
    model, calls = Scorer(), []
    optimizer = make_optimizer(model, "muon", 1e-3, encoder="encoder")
    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model, 0)
        return torch.tensor(3.0)
    assert optimizer.step(closure) == 3 and calls == [True]


# ---- state

@pytest.mark.parametrize("method", ["adamw", "adam", "muon"])
def test_saved_and_loaded_the_next_steps_are_the_same(method):
    def new(model):
        optimizer = make_optimizer(model, method, 1e-3, 0.1, {"models": 5}, "encoder")
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model = Scorer()
    optimizer, schedule = new(model)
    steps(model, [optimizer], range(3), schedule)
    assert sorted({round(g["lr"] * 4, 9) for g in optimizer.param_groups}) == [1e-3, 5e-3]
    other = copy.deepcopy(model)
    again, schedule_again = new(other)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    schedule_again.load_state_dict(schedule.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())
    assert equal(steps(model, [optimizer], range(3, 6), schedule), steps(other, [again], range(3, 6), schedule_again))
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
    fresh = copy.deepcopy(other)
    assert not equal(steps(fresh, [new(fresh)[0]], [9]), steps(other, [again], [9], schedule_again))  # the state matters


def test_groups_and_state_are_shared_also_after_loading_and_copying():
    model = Scorer()
    optimizer = make_optimizer(model, "muon", 1e-3, encoder="encoder")
    steps(model, [optimizer], range(2))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    for o in (optimizer, pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert isinstance(o, (MuonAdamW, torch.optim.Optimizer)) and len(o.parts) == 2 and len(o.state) == len(list(model.parameters()))
        assert [id(g) for part in o.parts for g in part.param_groups] == [id(g) for g in o.param_groups] and all(part.state is o.state for part in o.parts)
        for g in o.param_groups: g["lr"] = 0.0
        o.step()
    before = copy.deepcopy(model)
    assert equal(steps(model, [optimizer], [5]), before)  # rate 0


def test_the_state_is_small_and_of_plain_values():
    model = Scorer()
    optimizer = make_optimizer(model, "muon", 1e-3, encoder="encoder")
    steps(model, [optimizer], range(1))
    state = optimizer.state_dict()
    numbers = {n: sum(t.numel() for t in s.values() if t.ndim) for (n, s) in zip([n for g in optimizer.param_groups for n in g["param_names"]], state["state"].values())}
    assert state.keys() == {"state", "param_groups"}
    assert all(numbers[n] == (1 if n in MATRICES else 2) * p.numel() for n, p in model.named_parameters())  # Muon keeps one moment, AdamW two


def test_a_state_of_other_parameters_is_refused():
    model = Scorer()
    state = make_optimizer(model, "muon", 1e-3, encoder="encoder").state_dict()
    for other, message in [(make_optimizer(model, "adamw", 1e-3), "other groups"), (make_optimizer(model, "muon", 1e-3, lr_multipliers={"first": 2}, encoder="encoder"), "other groups")]:
        with pytest.raises(DataError, match=message) as error: other.load_state_dict(state)
        assert "\n" not in str(error.value)
    model.last.requires_grad_(False)
    with pytest.raises(DataError, match="'last.bias' and 1 more"): make_optimizer(model, "muon", 1e-3, encoder="encoder").load_state_dict(state)
    with pytest.raises(ConfigError, match="fixed"): make_optimizer(model, "muon", 1e-3, encoder="encoder").add_param_group({"params": []})


def test_the_trainer_trains_and_resumes_with_it(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    ids = torch.randint(0, 50, (32, 6), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict(dict(input_ids=ids.tolist(), labels=[i % 3 for i in range(32)]))

    def run(folder, resume=None):
        model = Scorer()
        arguments = TrainingArguments(str(folder), max_steps=8, save_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", use_cpu=True,
                                      disable_tqdm=True, warmup_steps=2, lr_scheduler_type="cosine", logging_steps=1)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(make_optimizer(model, "muon", 1e-2, lr_multipliers={"models": 3}, encoder="encoder"), None))
        trainer.train(resume_from_checkpoint=resume)
        return trainer
    whole = run(tmp_path / "a")
    part = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert equal(whole.model, part.model) and not equal(whole.model, Scorer())
    assert {round(g["lr"] / whole.optimizer.param_groups[0]["lr"], 6) for g in whole.optimizer.param_groups if g["lr"]} <= {1.0, 3.0}


# ---- broken input

@pytest.mark.parametrize("factors, message", [
    ({"encoder": 0.1, "encoder.embeddings": 2}, "'encoder' and 'encoder.embeddings'"), ({"encoder.embeddings": 2, "encoder": 0.1}, "'encoder' and 'encoder.embeddings'"),
    ({"encodr": 0.1}, "did you mean 'encoder'"), ({"encoder.layer": 0.1}, "no part of the model"), ({"": 2}, "no part of the model"), ({"first": 0}, "the factor 0"),
    ({"first": -1.0}, "the factor -1.0"), ({"first": math.nan}, "the factor nan"), ({"first": math.inf}, "the factor inf"), ({"first": "2"}, "the factor '2'"), ({"first": True}, "the factor True"),
    ({"last": 2}, "nothing in it is trained"), ({"enc": 2}, "no part of the model"),
])
def test_wrong_multipliers_are_one_line(factors, message):
    model = Scorer()
    model.last.requires_grad_(False)
    with pytest.raises(ConfigError) as error: make_optimizer(model, "adamw", 1e-3, lr_multipliers=factors)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("options, message", [
    (dict(method="adamv"), "did you mean 'adam"), (dict(learning_rate=0), "learning_rate is 0"), (dict(learning_rate=math.nan), "learning_rate is nan"), (dict(weight_decay=-0.1), "weight_decay is -0.1"),
    (dict(weight_decay=math.nan), "weight_decay is nan"), (dict(method="muon"), "pass encoder="), (dict(method="muon", encoder="head"), "encoder names 'head'"), (dict(method="muon", encoder="models"), "nothing to move"),
])
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigError) as error: make_optimizer(Scorer(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_train_and_no_muon(monkeypatch):
    with pytest.raises(ConfigError, match="nothing in the model is trained"): make_optimizer(Scorer().requires_grad_(False))
    monkeypatch.setitem(MuonAdamW.KINDS, "muon", None)  # torch before 2.9
    with pytest.raises(MachineError, match="needs torch 2.9"): make_optimizer(Scorer(), "muon", encoder="encoder")
