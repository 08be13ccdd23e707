"Fine-tuning: exact sets of trained parameters by hand-written lists, one optimizer step, merging, saving, quantised bases, broken input."
import copy
import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from proj.config import FINETUNING, FinetuningSpec, make
from proj.core import ConfigError, DataError, GateError, MachineError
from proj.models import encoder as enc
from proj.models.cross import fresh_parameters
from proj.models.tune import (SELECT, check_round_trip, encoders, load_trained, merge, quantised, save_trained,
                              trained_tensors, tune)

TEXTS = ["sort a list of numbers", "read a file line by line", "join two words", "count the lines of a file", "sort", "a file of words"]
PAIRS = list(zip(TEXTS, TEXTS[1:]))
SHAPE = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
DISTIL = dict(vocab_size=300, dim=32, n_layers=3, n_heads=2, hidden_dim=64, max_position_embeddings=64, pad_token_id=0)

# what the architectures are made of, written down by hand: (prefix of a layer, its linear layers, its norms, embeddings, what follows the layers, head)
BERT_LINEARS = [f"attention.self.{n}" for n in ("query", "key", "value")] + ["attention.output.dense", "intermediate.dense", "output.dense"]
BERT_NORMS = ["attention.output.LayerNorm", "output.LayerNorm"]
TABLES = [f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
MADE_OF = {
    "bert": ("0.model.bert", "encoder.layer", BERT_LINEARS, BERT_NORMS, TABLES, ["pooler.dense"], ["classifier"]),
    "roberta": ("0.model.roberta", "encoder.layer", BERT_LINEARS, BERT_NORMS, TABLES, [], ["classifier.dense", "classifier.out_proj"]),
    "distilbert": ("0.model.distilbert", "transformer.layer", [f"attention.{n}_lin" for n in ("q", "k", "v", "out")] + ["ffn.lin1", "ffn.lin2"],
                   ["sa_layer_norm", "output_layer_norm"], TABLES[:2], [], ["pre_classifier", "classifier"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    "Tiny encoders with random weights and without heads or poolers, as they are found on the hub."
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel
    tokenizer = enc.train_tokenizer(TEXTS, 300)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    wide = dict(initializer_range=0.2)
    bodies = dict(bert=BertModel(BertConfig(**SHAPE, **wide), add_pooling_layer=False), distilbert=DistilBertModel(DistilBertConfig(**DISTIL, **wide)),
                  roberta=RobertaModel(RobertaConfig(**SHAPE, **wide, type_vocab_size=1), add_pooling_layer=False))
    root = tmp_path_factory.mktemp("encoders")
    for name, body in bodies.items():
        body.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in bodies}


def read_cross(folder):
    from sentence_transformers import CrossEncoder
    return CrossEncoder(str(folder), num_labels=1, max_length=32, device="cpu", activation_fn=nn.Identity(), local_files_only=True)


@pytest.fixture(scope="module")
def crosses(folders) -> dict:
    "Cross-encoders with new heads; no parameter is zero, so that weight decay moves each that is trained."
    found = {name: copy.deepcopy(read_cross(folder)) for name, folder in folders.items()}  # copies lie alike in memory, and so give the same bits
    generator = torch.Generator().manual_seed(1)
    for model in found.values():
        for p in model.parameters(): p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return found


@pytest.fixture(scope="module")
def tiny(): return enc.load_encoder("tiny", texts=TEXTS, max_length=32)


@pytest.fixture(scope="module")
def minilm():
    if not (enc.cached_minilm() or enc.packaged_minilm()): pytest.skip("MiniLM is not here; pip install proj[offline]")
    return enc.load_encoder("minilm", max_length=32)


def scores(model): return model.predict(PAIRS, show_progress_bar=False)
def vectors(model): return model.encode(TEXTS, show_progress_bar=False)
def both(names): return {f"{name}.{part}" for name in names for part in ("weight", "bias")}
def adapters(names): return {f"{name}.lora_{side}.default.weight" for name in names for side in "AB"}


def expected(kind: str, spec: FinetuningSpec, fresh_pooler: bool) -> set:
    "The trained parameters by the table above."
    base, where, linears, norms, tables, behind, head = MADE_OF[kind]
    layer = lambda i, parts: [f"{base}.{where}.{i}.{part}" for part in parts]
    behind, head = [f"{base}.{n}" for n in behind], both(f"0.model.{n}" for n in head)
    always = head | (both(behind) if fresh_pooler else set())
    linear = [n for i in range(3) for n in layer(i, linears)] + ([] if fresh_pooler else behind)
    norm = [f"{base}.embeddings.LayerNorm", *(n for i in range(3) for n in layer(i, norms))]
    return always | {
        "full": lambda: both(linear) | both(norm) | both(behind) | {f"{base}.{n}.weight" for n in tables},
        "head": lambda: set(),
        "last_layers": lambda: {n for i in range(3 - spec.num_layers, 3) for n in both(layer(i, linears + norms))} | both(behind),
        "bitfit": lambda: {f"{n}.bias" for n in linear + norm + behind},
        "lora": lambda: adapters(linear), "qlora": lambda: adapters(linear),
    }[spec.method]()


def one_step(model, seed=0):
    "A step of AdamW; (names that moved, names that have a gradient)."
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    torch.manual_seed(seed)
    from sentence_transformers import CrossEncoder
    cross = isinstance(model, CrossEncoder)
    out = model(model.preprocess(PAIRS if cross else TEXTS))["scores" if cross else "sentence_embedding"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    optimizer.step()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}, with_gradient


# ---- the set is exact

SPECS = [FinetuningSpec(method="full"), FinetuningSpec(method="head"), FinetuningSpec(method="last_layers", num_layers=1),
         FinetuningSpec(method="last_layers", num_unfrozen_layers=3), FinetuningSpec(method="bitfit"), FinetuningSpec(method="lora", rank=4)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}{s.num_layers if s.method == 'last_layers' else ''}")
@pytest.mark.parametrize("kind", MADE_OF)
def test_exactly_the_right_parameters_train(kind, spec, crosses, folders):
    for new_pooler in (True, False):
        model = copy.deepcopy(crosses[kind])
        total = sum(p.numel() for p in model.parameters())
        tuned = tune(model, spec, fresh=fresh_parameters(model, folders[kind]) if new_pooler else ())
        assert set(tuned.names) == expected(kind, spec, new_pooler) and tuned.names == sorted(tuned.names)
        assert tuned.names == sorted(name for name, p in model.named_parameters() if p.requires_grad)
        assert tuned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert tuned.total == total + (tuned.trainable - sum(dict(model.named_parameters())[n].numel() for n in tuned.head) if spec.method == "lora" else 0)
        assert np.array_equal(scores(model), scores(crosses[kind]))  # also adapters: B is zero
    moved, with_gradient = one_step(model)
    assert moved == with_gradient == set(tuned.names)


def test_what_the_checkpoint_lacks_is_known(crosses, folders, tmp_path):
    def heads(kind): return both(f"0.model.{n}" for n in MADE_OF[kind][6])
    state = torch.get_rng_state()
    assert fresh_parameters(crosses["bert"], folders["bert"]) == heads("bert") | both(["0.model.bert.pooler.dense"])
    assert fresh_parameters(crosses["roberta"], folders["roberta"]) == heads("roberta")
    crosses["bert"].save_pretrained(str(tmp_path / "whole"))
    assert fresh_parameters(crosses["bert"], tmp_path / "whole") == set()
    other = copy.deepcopy(crosses["bert"])
    other[0].model.config.num_labels = 3
    assert fresh_parameters(other, tmp_path / "whole") == heads("bert")  # there, but in another shape
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match="nowhere"): fresh_parameters(crosses["bert"], tmp_path / "nowhere")


def test_the_tiny_encoder_has_layers_biases_and_adapters(tiny):
    layer = lambda i: {f"0.transformer.layers.{i}.{n}" for n in ("self_attn.in_proj_weight", "self_attn.in_proj_bias")} | both(
        f"0.transformer.layers.{i}.{n}" for n in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"))
    every = layer(0) | layer(1) | both(["0.norm"]) | {"0.transformer.tokens.weight", "0.transformer.positions.weight"}
    wanted = {"full": every, "last_layers": layer(1) | both(["0.norm"]), "bitfit": {n for n in every if n.endswith("bias")},
              "lora": adapters(f"0.transformer.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2))}
    for method, names in wanted.items():
        model = copy.deepcopy(tiny)
        tuned = tune(model, FinetuningSpec(method=method, **dict(num_layers=1) if method == "last_layers" else {}))
        assert set(tuned.names) == names
        assert np.abs(vectors(model) - vectors(tiny)).max() < 1e-6  # not the same bits: adapters take the layer off its short cut
        moved, with_gradient = one_step(model)
        assert with_gradient == names and moved <= names and len(names - moved) <= len([n for n in names if n.endswith("bias")])


def test_minilm_trains_what_is_read(minilm):
    base = "0.model.encoder.layer"
    layer = lambda i, parts: [f"{base}.{i}.{part}" for part in parts]
    linears = [n for i in range(6) for n in layer(i, BERT_LINEARS)]
    norms = ["0.model.embeddings.LayerNorm", *(n for i in range(6) for n in layer(i, BERT_NORMS))]
    wanted = {"last_layers": {n for i in (4, 5) for n in both(layer(i, BERT_LINEARS + BERT_NORMS))},
              "bitfit": {f"{n}.bias" for n in linears + norms}, "lora": adapters(linears)}
    for method, names in wanted.items():
        model = copy.deepcopy(minilm)
        tuned = tune(model, FinetuningSpec(method=method))
        moved, with_gradient = one_step(model)
        assert set(tuned.names) == names == with_gradient == moved
    assert tuned.trainable == 6 * 16 * (4 * (384 + 384) + 2 * (384 + 1536)) and repr(tuned) == f"lora: {tuned.trainable:,} of {tuned.total:,} parameters are trained ({tuned.trainable / tuned.total:.2%})"
    full = copy.deepcopy(minilm)
    assert tune(full, FinetuningSpec()).trainable == sum(p.numel() for p in minilm.parameters()) == 22_713_216


def test_a_dense_module_is_a_head_and_a_static_embedding_is_none(tiny, minilm):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense
    model = SentenceTransformer(modules=[copy.deepcopy(tiny[0]), Dense(128, 16)], device="cpu")
    assert tune(model, FinetuningSpec(method="head")).names == ["1.linear.bias", "1.linear.weight"]
    assert one_step(model)[0] == {"1.linear.bias", "1.linear.weight"}
    static = enc.load_encoder("static")
    for method, reason in {"lora": "needs linear layers", "qlora": "needs linear layers", "bitfit": "trains biases", "last_layers": "needs layers", "head": "needs a head"}.items():
        with pytest.raises(ConfigError, match=reason) as error: tune(static, FinetuningSpec(method=method))
        assert "\n" not in str(error.value) and "use" in str(error.value)
    assert tune(static, FinetuningSpec()).names == ["0.embedding.weight"]


@pytest.mark.parametrize("kind, behind", [("modernbert", {"final_norm"}), ("mpnet", set()), ("electra", set()), ("deberta-v2", set()), ("xlm-roberta", set())])
def test_layers_are_found_under_other_names(kind, behind):
    from transformers import AutoConfig, AutoModelForSequenceClassification
    config = AutoConfig.for_model(kind, **SHAPE, num_labels=1, embedding_size=32, relative_attention=True, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    model = AutoModelForSequenceClassification.from_config(config)
    (prefix, body), = encoders(model).items()
    head = {name for name, _ in model.named_parameters() if not name.startswith(prefix + ".")}
    tuned = tune(model, FinetuningSpec(method="last_layers", num_layers=2))
    inner = {name.removeprefix(prefix + ".") for name in set(tuned.names) - head}
    numbered = {name for name in inner if any(part in ("1", "2") for part in name.split("."))}
    assert head and head <= set(tuned.names) and {name.split(".")[0] for name in inner - numbered} == behind
    assert len(numbered) == 2 / 3 * sum(any(part.isdigit() for part in name.split(".")) for name, _ in body.named_parameters()) or kind == "modernbert"  # its first layer has one norm less


def test_modernbert_has_no_biases():
    from transformers import AutoConfig, AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("modernbert", **SHAPE))
    with pytest.raises(ConfigError, match="trains biases"): tune(model, FinetuningSpec(method="bitfit"))


class Router(nn.Module):
    "A model of another kind around an encoder."
    def __init__(self, body):
        super().__init__()
        self.body, self.norm, self.models, self.head = body, nn.BatchNorm1d(32), nn.Embedding(4, 32), nn.Linear(32, 1)

    def forward(self, ids): return self.head(self.norm(self.body(ids).last_hidden_state.mean(1)) * self.models.weight.mean(0))


def test_any_module_around_an_encoder(folders, tmp_path):
    from transformers import BertModel
    def new():
        torch.manual_seed(3)
        return Router(BertModel.from_pretrained(folders["bert"], add_pooling_layer=False))
    ids, mine = torch.arange(24).reshape(4, 6), both(["norm", "head"]) | {"models.weight"}
    model, other = new(), new()
    assert set(tune(model, FinetuningSpec(method="head")).names) == mine
    assert set(tune(new(), FinetuningSpec(method="lora")).names) == mine | adapters(f"body.encoder.layer.{i}.{n}" for i in range(3) for n in BERT_LINEARS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(ids).sum().backward()
    optimizer.step()
    save_trained(model, tmp_path / "router.safetensors")
    tune(other, FinetuningSpec(method="head"))
    assert "norm.running_mean" in trained_tensors(other)  # no parameter, but it changes
    assert torch.equal(load_trained(other, tmp_path / "router.safetensors").eval()(ids), model.eval()(ids))
    with pytest.raises(ConfigError, match="no pretrained encoder"): tune(nn.Linear(2, 2), FinetuningSpec(method="head"))


# ---- adapters

def fill_adapters(model, scale=0.05):
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if ".lora_B." in name: p.data = scale * torch.randn(p.shape, generator=generator)


def test_an_adapter_computes_the_formula(crosses):
    model = copy.deepcopy(crosses["bert"])
    tune(model, FinetuningSpec(method="lora", rank=4, alpha=12, dropout=0.5, target_modules=["query"]))
    fill_adapters(model)
    query = model.get_submodule("0.model.bert.encoder.layer.1.attention.self.query").eval()
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(6))
    w, b, a, up = (t.detach().double().numpy() for t in (query.base_layer.weight, query.base_layer.bias, query.lora_A["default"].weight, query.lora_B["default"].weight))
    naive = np.array([[sum(w[o, i] * row[i] for i in range(32)) + b[o] + 12 / 4 * sum(up[o, r] * sum(a[r, i] * row[i] for i in range(32)) for r in range(4))
                       for o in range(32)] for row in x.double().numpy()])
    assert np.abs(query(x).detach().numpy() - naive).max() < 1e-5
    assert np.abs(merge(model).get_submodule("0.model.bert.encoder.layer.1.attention.self.query")(x).detach().numpy() - naive).max() < 1e-5


@pytest.mark.parametrize("kind", MADE_OF)
def test_merging_keeps_the_scores_and_the_names(kind, crosses, tmp_path):
    model = copy.deepcopy(crosses[kind])
    tune(model, FinetuningSpec(method="lora", rank=8, dropout=0.3))
    fill_adapters(model)
    adapted = scores(model)
    assert np.abs(adapted - scores(crosses[kind])).max() > 0.01
    assert merge(model) is model and list(model.state_dict()) == list(crosses[kind].state_dict())
    assert not any("lora" in type(m).__module__ for m in model.modules())
    assert np.abs(scores(model) - adapted).max() <= 2e-6 * max(1, np.abs(adapted).max())
    merged = sorted(name for name, p in model.state_dict().items() if not torch.equal(p, crosses[kind].state_dict()[name]))
    assert merged == sorted(n.removesuffix(".lora_A.default.weight") + ".weight" for n in expected(kind, FinetuningSpec(method="lora"), False) if "lora_A" in n)
    assert check_round_trip(model, lambda m: m.save_pretrained(str(tmp_path / "m")), lambda: read_cross(tmp_path / "m"), scores) <= 1e-6
    saved = read_cross(tmp_path / "m").state_dict()
    assert saved.keys() == model.state_dict().keys() and all(torch.equal(t, saved[n]) for n, t in model.state_dict().items())
    assert not list((tmp_path / "m").rglob("*adapter*"))
    assert np.array_equal(scores(merge(model)), scores(model))  # nothing to do
    assert len(tune(model, FinetuningSpec(method="lora")).names) > 4  # and tuned again


def test_adapters_of_the_tiny_encoder_are_not_passed_by_in_evaluation(tiny):
    model = enc.load_encoder("tiny", texts=TEXTS, max_length=32, dropout=0.0)
    model.load_state_dict(tiny.state_dict())
    tune(model, FinetuningSpec(method="lora", dropout=0))
    fill_adapters(model, 0.3)
    with torch.enable_grad(): slow = model.train()(model.preprocess(TEXTS))["sentence_embedding"].detach().numpy()
    model.eval()
    fast = vectors(model)  # inference mode, where torch would read the weights instead of calling the layers
    assert np.abs(fast - slow).max() < 1e-6 and np.abs(fast - vectors(tiny)).max() > 0.01
    assert np.abs(vectors(merge(model)) - slow).max() < 1e-6 and not any(m._forward_pre_hooks for m in model.modules())


def test_an_unmerged_model_does_not_pass(crosses, tmp_path):
    model = copy.deepcopy(crosses["bert"])
    tune(model, FinetuningSpec(method="lora"))
    with pytest.raises(GateError, match="merge") as error:
        check_round_trip(model, lambda m: m.save_pretrained(str(tmp_path / "m")), lambda: read_cross(tmp_path / "m"), scores)
    assert "\n" not in str(error.value) and error.value.exit_code == 4
    for other in (np.array([1.0, np.nan]), np.array([1.0, 2 + 1e-5]), np.array([1.0])):
        with pytest.raises(GateError): check_round_trip(None, lambda m: None, lambda: other, lambda m: np.array([1.0, 2.0]) if m is None else m)
    assert check_round_trip(None, lambda m: None, lambda: 0, lambda m: np.array([1.0, 2.0])) == 0


def test_adapters_depend_on_their_seed_alone(crosses):
    def drawn(seed):
        torch.rand(np.random.default_rng().integers(1, 50))  # whatever was drawn before
        model = copy.deepcopy(crosses["distilbert"])
        state = torch.get_rng_state()
        tune(model, FinetuningSpec(method="lora"), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([t.flatten() for n, t in sorted(trained_tensors(model).items()) if "lora_A" in n])
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("wanted, message", [(["query", "vlaue"], "'vlaue'"), (["classifier"], "'classifier'"), (["LayerNorm"], "'LayerNorm'"), ([], "''"), (["uery"], "'uery'")])
def test_target_modules_that_match_nothing(wanted, message, crosses):
    model = copy.deepcopy(crosses["bert"])
    with pytest.raises(ConfigError) as error: tune(model, FinetuningSpec(method="lora", target_modules=wanted))
    assert message in str(error.value) and "self.value" in str(error.value) and "\n" not in str(error.value)
    assert list(model.state_dict()) == list(crosses["bert"].state_dict())  # nothing happened


def test_target_modules_are_endings(crosses):
    base = "0.model.bert.encoder.layer"
    for wanted, linears in {"query": ["attention.self.query"], "attention.output.dense": ["attention.output.dense"],
                            "output.dense": ["attention.output.dense", "output.dense"]}.items():
        tuned = tune(copy.deepcopy(crosses["bert"]), FinetuningSpec(method="lora", target_modules=[wanted]))
        assert set(tuned.names) == both(["0.model.classifier"]) | adapters(f"{base}.{i}.{n}" for i in range(3) for n in linears)


def test_an_adapted_model_is_not_adapted_again(crosses):
    model = copy.deepcopy(crosses["bert"])
    tune(model, FinetuningSpec(method="lora"))
    with pytest.raises(ConfigError, match=r"merge\(model\)"): tune(model, FinetuningSpec(method="full"))


def test_the_trainer_of_the_library_trains_adapters_and_head(crosses, tmp_path):
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    model = copy.deepcopy(crosses["bert"])
    tuned = tune(model, FinetuningSpec(method="lora", rank=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = Dataset.from_dict(dict(query=TEXTS, document=TEXTS[::-1], label=[0.0, 1.0] * 3))
    arguments = CrossEncoderTrainingArguments(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
                                              save_strategy="no", disable_tqdm=True, use_cpu=True)
    CrossEncoderTrainer(model, arguments, data, loss=BinaryCrossEntropyLoss(model)).train()
    assert sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name])) == tuned.names


# ---- quantised bases

def bytes_of(model, names): return sum(t.numel() * t.element_size() for name in names for t in [model.get_parameter(name)])


@pytest.mark.parametrize("options", [dict(load_in_4bit=True), dict(bits=4, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), dict(load_in_8bit=True)], ids=["nf4", "fp4", "int8"])
def test_quantised_bases(options, crosses, tmp_path):
    pytest.importorskip("bitsandbytes")
    spec, base = FinetuningSpec(method="qlora", rank=4, **options), crosses["bert"]
    model = copy.deepcopy(base)
    tuned = tune(model, spec)
    assert set(tuned.names) == expected("bert", spec, False)
    lora = tune(copy.deepcopy(base), FinetuningSpec(method="lora", rank=4))
    assert (tuned.names, tuned.trainable, tuned.total) == (lora.names, lora.trainable, lora.total)
    linear = [n.removesuffix("lora_A.default.weight") for n in tuned.names if "lora_A" in n]
    packed = [n + "base_layer.weight" for n in linear]
    assert bytes_of(model, packed) * 32 // spec.bits == bytes_of(base, [n + "weight" for n in linear])
    assert 0 < np.abs(scores(model) - scores(base)).max() < (1 if spec.bits == 4 else 0.1) * np.abs(scores(base)).max()

    frozen = {n: model.get_parameter(n).detach().clone() for n in packed}
    scores(model)  # evaluation does not repack the base
    moved, with_gradient = one_step(model)
    assert moved == with_gradient == set(tuned.names)
    assert all(torch.equal(model.get_parameter(n), t) for n, t in frozen.items())

    fill_adapters(model)
    trained, again = scores(model), copy.deepcopy(base)
    save_trained(model, tmp_path / "trained.safetensors")
    tune(again, spec, seed=7)
    assert np.array_equal(scores(load_trained(again, tmp_path / "trained.safetensors")), trained)

    merge(model)
    assert not any("bitsandbytes" in type(m).__module__ or "peft" in type(m).__module__ for m in model.modules())
    assert {n: (t.shape, t.dtype) for n, t in model.state_dict().items()} == {n: (t.shape, t.dtype) for n, t in base.state_dict().items()}
    limit = 2e-6 if spec.bits == 4 else 0.05  # 8 bits: the inputs were rounded too
    assert np.abs(scores(model) - trained).max() <= limit * max(1, np.abs(trained).max())
    assert check_round_trip(model, lambda m: m.save_pretrained(str(tmp_path / "m")), lambda: read_cross(tmp_path / "m"), scores) <= 1e-6


def test_what_is_computed_in_bf16_is_merged_in_fp32(crosses):
    pytest.importorskip("bitsandbytes")
    model, name = copy.deepcopy(crosses["bert"]), "0.model.bert.encoder.layer.0.output.dense"
    tune(model, FinetuningSpec(method="qlora", bnb_4bit_compute_dtype="bfloat16"))
    one_step(model)
    scores(model)
    merge(model)
    assert torch.equal(model.get_parameter(f"{name}.bias"), crosses["bert"].get_parameter(f"{name}.bias"))  # though the layer casts its own
    assert {p.dtype for p in model.parameters()} == {torch.float32} and np.isfinite(scores(model)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_computes_with_its_unpacked_weights(bits):
    pytest.importorskip("bitsandbytes")
    from proj.models.tune import plain
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64), torch.randn(10, 128)
    x[:, 3] *= 20  # an outlier, which 8-bit inputs would round to nothing else
    layer = quantised(linear, FinetuningSpec(method="qlora", bits=bits)).eval()
    with torch.no_grad(): found, unpacked, exact = layer(x), plain(layer)(x), linear(x)
    assert (found - unpacked).abs().max() < (1e-5 if bits == 4 else 0.02) * exact.abs().max()
    assert 0 < (unpacked - exact).abs().max() < (0.2 if bits == 4 else 0.01) * exact.abs().max()
    blocks = linear.weight.detach().reshape(-1, 64) if bits == 4 else linear.weight.detach()
    step = blocks.abs().amax(1, keepdim=True) * (0.16 if bits == 4 else 1 / 254)  # half of the widest gap between two levels: .304 in NF4, 1 / 127 in int8
    assert ((plain(layer).weight.detach().reshape(blocks.shape) - blocks).abs() <= step * 1.02 + 1e-4).all()


def test_quantised_tiny_encoder(tiny):
    pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(tiny)
    tuned = tune(model, FinetuningSpec(method="qlora", target_modules=["linear1"]))
    assert set(tuned.names) == adapters(f"0.transformer.layers.{i}.linear1" for i in (0, 1))
    assert model[0].transformer.layers[0].linear2.weight.dtype == torch.uint8 and np.abs(vectors(model) - vectors(tiny)).max() < 0.2
    quantised_vectors = vectors(model)
    assert np.abs(vectors(merge(model)) - quantised_vectors).max() < 1e-6 and list(model.state_dict()) == list(tiny.state_dict())


def test_without_bitsandbytes(crosses, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = copy.deepcopy(crosses["bert"])
    with pytest.raises(MachineError) as error: tune(model, FinetuningSpec(method="qlora"))
    assert "pip install proj[qlora]" in str(error.value) and error.value.exit_code == 3 and np.array_equal(scores(model), scores(crosses["bert"]))


# ---- checkpoints

def test_trained_parameters_come_back_bit_by_bit(crosses, tmp_path):
    for spec in SPECS:
        model, path = copy.deepcopy(crosses["roberta"]), tmp_path / f"{spec.method}{spec.num_layers}.safetensors"
        tune(model, spec)
        one_step(model)
        save_trained(model, path)
        other = copy.deepcopy(crosses["roberta"])
        tune(other, spec, seed=9)
        load_trained(other, path)
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items()) and np.array_equal(scores(other), scores(model))
        from safetensors.torch import load_file
        assert sorted(load_file(path)) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop("0.model.classifier.bias"), r"0\.model\.classifier\.bias is missing, the model makes it float32 \(1,\)"),
    (lambda t: t.update(extra=torch.zeros(2)), r"extra is float32 \(2,\), the model makes it superfluous"),
    (lambda t: t.update({"0.model.classifier.bias": torch.zeros(2)}), r"float32 \(2,\), the model makes it float32 \(1,\)"),
    (lambda t: t.update({"0.model.classifier.bias": torch.zeros(1, dtype=torch.float64)}), r"float64 \(1,\), the model makes it float32"),
])
def test_another_models_checkpoint_changes_nothing(damage, message, crosses, tmp_path):
    from safetensors.torch import load_file, save_file
    model = copy.deepcopy(crosses["bert"])
    tune(model, FinetuningSpec(method="head"))
    save_trained(model, tmp_path / "a.safetensors")
    tensors = {n: t + 1 for n, t in load_file(tmp_path / "a.safetensors").items()}
    damage(tensors)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match=message) as error: load_trained(model, tmp_path / "b.safetensors")
    assert "\n" not in str(error.value) and "b.safetensors" in str(error.value) and np.array_equal(scores(model), scores(crosses["bert"]))


def test_damaged_checkpoints_are_one_line(crosses, tmp_path):
    model = copy.deepcopy(crosses["bert"])
    tune(model, FinetuningSpec(method="head"))
    save_trained(model, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for name, content in {"cut": whole[:-3], "empty": b"", "text": b"no tensors at all"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error: load_trained(model, tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError): load_trained(model, tmp_path / "nowhere")


# ---- specs

@pytest.mark.parametrize("values, message", [
    (dict(method="lorra"), "method"), (dict(method="lora", rnk=4), "did you mean 'rank'"), (dict(method="lora", rank=0), "rank"),
    (dict(method="lora", dropout=1), "dropout"), (dict(method="lora", alpha=math.nan), "alpha"), (dict(method="last_layers", num_layers=0), "num_layers"),
    (dict(method="qlora", bits=3), "bits"), (dict(method="head", rank=8), "does nothing with method 'head'"), (dict(method="lora", target_modules="query"), "target_modules"),
])
def test_wrong_specs_are_one_line(values, message):
    with pytest.raises(ConfigError) as error: make(FinetuningSpec, values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_method_of_the_configuration_is_there(): assert SELECT.keys() == FINETUNING.keys()


@cache
def small_bert():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SHAPE, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}, num_labels=1, initializer_range=0.3)).eval()


LINEARS_OF_SMALL = {"query": (16, 16), "key": (16, 16), "value": (16, 16), "intermediate.dense": (16, 24), "pooler.dense": (16, 16)}
some_specs = st.one_of(
    st.builds(FinetuningSpec, method=st.sampled_from(["full", "head", "bitfit"])),
    st.builds(FinetuningSpec, method=st.just("last_layers"), num_layers=st.integers(1, 2)),
    st.builds(FinetuningSpec, method=st.just("lora"), rank=st.integers(1, 20), alpha=st.floats(0.5, 64), dropout=st.floats(0, 0.9),
              target_modules=st.lists(st.sampled_from(sorted(LINEARS_OF_SMALL)), min_size=1, unique=True)))


@settings(max_examples=25, deadline=None)
@given(spec=some_specs, pooler=st.booleans())
def test_any_spec_trains_the_head_and_merges(spec, pooler):
    model, ids = copy.deepcopy(small_bert()), torch.arange(12).reshape(2, 6)
    names, new = list(model.state_dict()), both(["bert.pooler.dense"]) if pooler else set()
    if spec.method == "lora" and pooler and spec.target_modules == ["pooler.dense"]:
        with pytest.raises(ConfigError, match="pooler.dense"): tune(model, spec, new)  # it is trained as a whole
        return
    if spec.method == "lora" and pooler: spec = spec.model_copy(update=dict(target_modules=[n for n in spec.target_modules if n != "pooler.dense"]))
    tuned = tune(model, spec, new)
    assert both(["classifier"]) | new <= set(tuned.names) and tuned.names == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    if spec.method == "lora":
        sides = sum((1 if n == "pooler.dense" else 2) * sum(LINEARS_OF_SMALL[n]) for n in spec.target_modules)
        assert tuned.trainable == spec.rank * sides + 17 + 272 * pooler
    with torch.no_grad():
        assert torch.equal(model(ids).logits, small_bert()(ids).logits)
        fill_adapters(model, 0.3)
        adapted = model(ids).logits
        assert list(merge(model).state_dict()) == names
        assert (model(ids).logits - adapted).abs().max() <= 5e-6 * max(1, adapted.abs().max())
