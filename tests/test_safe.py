"Model folders that lie, bring code, or were damaged: refused in one line before anything of theirs runs; and nothing of ours is a pickle."
import ast
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import proj
from proj import core
from proj.core import DataError, MachineError, ProjError
from proj.manifest import MANIFEST, check_manifest, files_in
from proj.models import encoder as enc
from proj.models.dual import DualEncoder
from proj.models.safe import check_folder
from proj.tasks.dual import DualTraining

from test_dual import TOY, bert
from test_train import config, write_pairs

SOURCES = Path(proj.__file__).parent
ST = "sentence_transformers.sentence_transformer.modules."


# ---- good folders, from which the hostile ones are made

@pytest.fixture(scope="module")
def tiny() -> DualEncoder: return DualEncoder.load("tiny", texts=TOY, max_length=32)


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> dict[str, Path]:
    "A folder of each kind, without a manifest, as if from elsewhere."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as m
    top = tmp_path_factory.mktemp("good")
    plain = str(bert(top / "plain", tiny.model.tokenizer))
    models = {
        "chain": [m.Transformer(plain), m.Pooling(32), m.Dense(32, 16), m.LayerNorm(16), m.Normalize()],
        "layers": [m.Transformer(plain, config_args={"output_hidden_states": True}), m.WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1), m.Pooling(32)],
        "static": [m.StaticEmbedding(tiny.model.tokenizer.backend_tokenizer, embedding_dim=8), m.Normalize()],
        "router": [m.Router.for_query_document([m.Transformer(plain), m.Pooling(32)], [m.Transformer(plain), m.Pooling(32)])],
        "scratch": list(tiny.model),
    }
    for name, parts in models.items(): SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(top / name), create_model_card=False)
    return {name: top / name for name in ("plain", *models)}


@pytest.mark.parametrize("kind", ["plain", "chain", "static", "router", "scratch"])
def test_every_kind_of_good_folder_loads_and_reloads_with_the_same_scores(kind, good, tmp_path):
    state = torch.random.get_rng_state()
    check_folder(good[kind])
    assert torch.equal(state, torch.random.get_rng_state())
    dual = DualEncoder.load(good[kind])
    dual.save(tmp_path / "m")
    again = DualEncoder.load(tmp_path / "m")
    assert np.abs(again.score(TOY, TOY, precision="fp32") - dual.score(TOY, TOY, precision="fp32")).max() <= 1e-6
    assert again.weights_hash() == dual.weights_hash()


# ---- ways to change them

def put(file, **values):
    "Set values in a JSON file."
    def change(folder):
        path = folder / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    return change


def module(at, **values):
    "Change one module of modules.json."
    def change(folder):
        listed = json.loads((folder / "modules.json").read_text())
        listed[at] |= values
        (folder / "modules.json").write_text(json.dumps(listed))
    return change


def router(change):
    def go(folder):
        path = folder / "router_config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return go


def elsewhere(folder) -> Path:
    "A copy of the folder, outside of it."
    copy = folder.with_name("elsewhere")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copy


def link(name):
    def change(folder):
        target, path = elsewhere(folder) / name, folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)
    return change


def index(target):
    "Sharded weights, the shard being somewhere else or a pickle."
    def change(folder):
        copy, weights = elsewhere(folder), load_file(folder / "model.safetensors")
        torch.save(weights, folder / "shard.bin")
        (folder / "model.safetensors").unlink()
        put("model.safetensors.index.json", metadata={"total_size": 1}, weight_map=dict.fromkeys(weights, target.format(copy=copy)))(folder)
    return change


class Payload:
    "Leaves a mark when it is unpickled."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return open, (self.mark, "w")


def pickled(part="", name="pytorch_model.bin", evil=True):
    def change(folder):
        weights = load_file(folder / part / "model.safetensors")
        (folder / part / "model.safetensors").unlink()
        if evil: (folder / part / name).write_bytes(pickle.dumps(Payload(folder.parent / "mark")))
        else: torch.save(weights, folder / part / name)
    return change


def old_module(name, settings, weights):
    "A second module of another class, with its weights in a pickle."
    def change(folder):
        (folder / "x").mkdir()
        (folder / "x" / "config.json").write_text(json.dumps(settings))
        torch.save(weights, folder / "x" / "pytorch_model.bin")
        module(1, type=ST + name, path="x")(folder)
    return change


def adapter(base):
    def change(folder): put("adapter_config.json", peft_type="LORA", base_model_name_or_path=base.format(copy=elsewhere(folder), here=folder))(folder)
    return change


def write(name, content):
    def change(folder): (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def header(tensors, length=None, body=bytes(96)):
    raw = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return write("model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def sparse(folder):
    "Valid by its header, a hundred gigabytes, none of them on the disk."
    raw = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [10**6, 25_000], "data_offsets": [0, 10**11]}}).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + 10**11)


def without_tensors(folder):
    "Nothing contradicts the configuration, because nothing it names is there: all of it would be made up, in memory."
    header({"other": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}})(folder)
    put("config.json", hidden_size=40_000)(folder)


def cut(name, share=2):
    def change(folder): (folder / name).write_bytes((folder / name).read_bytes()[:(folder / name).stat().st_size // share])
    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return change


def post_processor(folder):
    "A template with a token that it does not define: a panic in Rust."
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


AUTO = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None], "AutoProcessor": "evil.Tokenizer"}
BERT = "sentence_bert_config.json"  # the arguments that the library passes on
CONFIGS = ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"]
WEIGHTS = [("plain", ""), ("chain", ""), ("chain", "2_Dense"), ("chain", "3_LayerNorm"), ("layers", "1_WeightedLayerPooling"), ("static", ""), ("scratch", ""),
           ("router", "query_0_Transformer")]

# each: kind of folder, change, what the line names

CODE = {  # what would run code, or asks to
    "a class from elsewhere": ("chain", module(1, type="evil.Encoder"), "modules.json"),
    "a library's import": ("chain", module(1, type="sentence_transformers.base.model.pickle"), "modules.json"),
    "a library's torch": ("chain", module(1, type="sentence_transformers.base.model.torch"), "modules.json"),
    "a whole model as a module": ("chain", module(1, type="sentence_transformers.SentenceTransformer"), "modules.json"),
    "a class with a line break": ("chain", module(1, type="evil\nEncoder"), "modules.json"),
    "a router's class": ("router", router(lambda c: c | {"types": c["types"] | {"query_1_Pooling": "evil.Encoder"}}), "evil.Encoder"),
    **{f"auto_map in {file}": ("plain", put(file, auto_map=AUTO), file) for file in CONFIGS},
    "auto_map in text_config": ("plain", put("config.json", text_config={"auto_map": AUTO}), "config.json"),
    "auto_map in the arguments": ("chain", put(BERT, config_args={"auto_map": AUTO}), BERT),
    "auto_map inside a router": ("router", put("query_0_Transformer/config.json", auto_map=AUTO), "query_0_Transformer/config.json"),
    "custom_pipelines": ("plain", put("config.json", custom_pipelines={"x": {"impl": "evil.Model"}}), "config.json"),
    "trust_remote_code": ("chain", put(BERT, tokenizer_args={"trust_remote_code": True}), BERT),
    "weights_only switched off": ("chain", put(BERT, model_args={"weights_only": False, "use_safetensors": False}), BERT),
    "an activation from elsewhere": ("chain", put("2_Dense/config.json", activation_function="evil.Activation"), "2_Dense/config.json"),
    "an activation that is a function": ("chain", put("2_Dense/config.json", activation_function="torch.hub.load"), "2_Dense/config.json"),
    "a word tokenizer": ("chain", old_module("WordEmbeddings", {"tokenizer_class": "evil.Tokenizer"}, {"emb_layer.weight": torch.eye(3)}), "tokenizer_class"),
    "tokenizer_class from elsewhere": ("plain", put("tokenizer_config.json", tokenizer_class="evil.Tokenizer"), "tokenizer_config.json"),
    "tokenizer_class of another trade": ("plain", put("tokenizer_config.json", tokenizer_class="RagRetriever"), "tokenizer_config.json"),
    "processor_class of another trade": ("plain", put("processor_config.json", processor_class="RagRetriever"), "processor_config.json"),
    "a kernel from the hub": ("plain", put("config.json", _attn_implementation="evil/kernel"), "config.json"),
    "a kernel in the arguments": ("chain", put(BERT, model_args={"attn_implementation": "evil/kernel"}), BERT),
    "any kernel": ("chain", put(BERT, model_args={"use_kernels": True, "allow_all_kernels": True}), BERT),
    "transformers_weights": ("plain", lambda f: (pickled(name="w.bin")(f), put("config.json", transformers_weights="w.bin")(f)), "w.bin"),
    "safetensors that are a pickle": ("plain", lambda f: write("model.safetensors", pickle.dumps(Payload(f.parent / "mark")))(f), "model.safetensors"),
    "a tokenizer that is a pickle": ("plain", lambda f: write("tokenizer.json", pickle.dumps(Payload(f.parent / "mark")))(f), "tokenizer.json"),
    **{f"a pickle in {kind} {part}": (kind, pickled(part), f"{part}/pytorch_model.bin") for kind, part in WEIGHTS},
    **{f"a harmless pickle in {kind} {part}": (kind, pickled(part, evil=False), f"{part}/pytorch_model.bin") for kind, part in WEIGHTS},
    **{f"a pickle called {name}": ("plain", pickled(name=name), name) for name in ("model.pt", "model.pkl", "model.joblib", "weights.npy", "model.ckpt")},
    "an old CNN": ("chain", old_module("CNN", {"in_embedding_dimension": 32, "out_channels": 8, "kernel_sizes": [1]}, {"convs.0.weight": torch.ones(8, 32, 1)}), "CNN"),
    "an old LSTM": ("chain", old_module("LSTM", {"embedding_dimension": 32, "hidden_dim": 3}, torch.nn.LSTM(32, 3).state_dict(prefix="encoder.")), "LSTM"),
    "an old bag of words": ("chain", old_module("BoW", {"vocab": ["a"]}, {}), "BoW"),
    "old word weights": ("chain", old_module("WordWeights", {"vocab": ["a"], "word_weights": {"a": 1}}, {}), "WordWeights"),
}

ELSEWHERE = {  # what would be read from, or written to, another place
    "a tokenizer": ("chain", lambda f: put(BERT, tokenizer_name_or_path=str(elsewhere(f)))(f), "tokenizer_name_or_path"),
    "a tokenizer's file": ("chain", lambda f: put(BERT, tokenizer_args={"tokenizer_file": str(elsewhere(f) / "tokenizer.json")})(f), "tokenizer_file"),
    "a folder to write to": ("chain", put(BERT, model_args={"device_map": "disk", "offload_folder": "/tmp"}), "offload_folder"),
    "an adapter's base": ("plain", adapter("{copy}"), "adapter_config.json"),
    "an adapter's base on the hub": ("chain", adapter("someone/base"), "adapter_config.json"),
    "an adapter of itself": ("plain", adapter("{here}"), "adapter_config.json"),
    "a module, by dots": ("chain", lambda f: module(1, path=f"../{elsewhere(f).name}/1_Pooling")(f), "1_Pooling"),
    "a module, by name": ("chain", lambda f: module(1, path=str(elsewhere(f) / "1_Pooling"))(f), "1_Pooling"),
    "a router's part": ("router", lambda f: router(lambda c: json.loads(json.dumps(c).replace("query_1", f"../{elsewhere(f).name}/query_1")))(f), "query_1"),
    "another configuration": ("plain", put("config.json", configuration_files=["../elsewhere/config.1.0.0.json"]), "configuration_files"),
    "weights, by link": ("chain", link("model.safetensors"), "model.safetensors"),
    "a module, by link": ("chain", link("1_Pooling"), "1_Pooling"),
    "a tokenizer, by link": ("plain", link("tokenizer.json"), "tokenizer.json"),
    "weights, by dots": ("plain", index("../elsewhere/model.safetensors"), "index.json"),
    "weights, by name": ("plain", index("{copy}/model.safetensors"), "index.json"),
    "weights, as a pickle": ("plain", index("shard.bin"), "index.json"),
}

NUMBERS = [*(("plain", *pair) for pair in [("hidden_size", 10**9), ("hidden_size", 10**6), ("hidden_size", -32), ("hidden_size", "32"), ("vocab_size", 10**9), ("num_labels", 10**9),
                                          ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**5), ("num_hidden_layers", -1), ("num_attention_heads", 0),
                                          ("intermediate_size", 10**10), ("intermediate_size", 10**6), ("max_position_embeddings", 10**12)]),
           *(("scratch", *pair) for pair in [("dim", 10**9), ("dim", -128), ("dim", 256), ("layers", 10**9), ("layers", 3), ("layers", -1), ("heads", 0), ("vocab_size", 10**10),
                                             ("ff", 10**6), ("max_length", 10**6), ("max_seq_length", 10**10), ("dropout", 5)])]

LIES = {  # sizes and contents that are not so
    **{f"{kind} {key} = {value}": (kind, put("config.json", **{key: value}), "") for kind, key, value in NUMBERS},
    "a header with huge tensors": ("plain", header({"a": {"dtype": "F32", "shape": [10**9, 10**4], "data_offsets": [0, 4 * 10**13]}}), "model.safetensors"),
    "a header with a huge shape": ("plain", header({"a": {"dtype": "F32", "shape": [10**9, 10**4], "data_offsets": [0, 96]}}), "model.safetensors"),
    "a header that overflows": ("plain", header({"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 96]}}), "model.safetensors"),
    "a long header": ("plain", header({}, length=2**60), "model.safetensors"),
    "no header": ("plain", header(b"\xff" * 100), "model.safetensors"),
    "no weights": ("static", write("model.safetensors", ""), "model.safetensors"),
    "half of the weights": ("plain", cut("model.safetensors"), "model.safetensors"),
    "half of a layer": ("chain", cut("2_Dense/model.safetensors"), "2_Dense/model.safetensors"),
    "all made up": ("plain", without_tensors, "config.json"),
    "100 GB of weights": ("static", sparse, "memory"),
    "100 GB of configuration": ("plain", lambda f: os.truncate(f / "config.json", 10**11), "config.json"),
    "a layer of 10^12": ("chain", put("2_Dense/config.json", in_features=10**6, out_features=10**6), "2_Dense/config.json"),
    "a norm of 10^10": ("chain", put("3_LayerNorm/config.json", dimension=10**10), "3_LayerNorm/config.json"),
    "a pooling of 10^9": ("chain", put("1_Pooling/config.json", embedding_dimension=10**9), "1_Pooling/config.json"),
    "a pooling of 31": ("router", put("query_1_Pooling/config.json", embedding_dimension=31), ""),
    "a tokenizer that is no JSON": ("plain", write("tokenizer.json", "tokens"), "tokenizer.json"),
    "half a tokenizer": ("chain", cut("tokenizer.json"), "tokenizer.json"),
    "an empty tokenizer": ("static", write("tokenizer.json", "{}"), "tokenizer.json"),
    "a deep tokenizer": ("scratch", write("tokenizer.json", "[" * 10**6), "tokenizer.json"),
    "a tokenizer that panics": ("scratch", post_processor, ""),
    "a deep configuration": ("plain", write("config.json", '{"a":' * 10**5), ""),
    "a configuration that is a list": ("plain", write("config.json", "[1]"), "config.json"),
    "modules as a mapping": ("chain", write("modules.json", '{"a": 1}'), "modules.json"),
    "modules as words": ("chain", write("modules.json", '["a"]'), "modules.json"),
    "a path that is a number": ("chain", module(1, path=5), "modules.json"),
    "a pipe for a configuration": ("plain", pipe("generation_config.json"), "generation_config.json"),
    "a pipe for a tokenizer": ("plain", pipe("tokenizer.json"), "tokenizer.json"),
    "a file with a line break in its name": ("plain", write("a\nb", "c"), "unprintable"),
    "prompts that are numbers": ("chain", put("config_sentence_transformers.json", prompts={"query": 5}), ""),
    "no prompts": ("scratch", write("config_sentence_transformers.json", "{}"), ""),
    "an unknown similarity": ("chain", put("config_sentence_transformers.json", similarity_fn_name="os.system"), "similarity_fn_name"),
    "a method that is none": ("chain", put(BERT, modality_config={"text": {"method": "save_pretrained", "method_output_name": None}}), ""),
}


@pytest.fixture
def bounded():
    "Two more gigabytes of address space and a minute, no more."
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, limits[1]))
    def too_long(*_): raise TimeoutError("a minute has passed")
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def evil(folder, mark):
    "A module that leaves a mark when it is imported, and then offers what it is asked for."
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n"
                                    "from sentence_transformers.sentence_transformer.modules import Pooling as Encoder\n"
                                    "Model = Config = Tokenizer = Activation = Encoder\n")


def test_the_payloads_do_leave_a_mark(tmp_path):
    "The control: what must not happen below does happen when it is let."
    evil(tmp_path, tmp_path / "imported")
    runpy.run_path(str(tmp_path / "evil.py"))
    pickle.loads(pickle.dumps(Payload(tmp_path / "unpickled")))
    assert (tmp_path / "imported").exists() and (tmp_path / "unpickled").exists()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of this process is read from /proc")
@pytest.mark.parametrize("kind, change, named", [pytest.param(*case, id=name) for cases in (CODE, ELSEWHERE, LIES) for name, case in cases.items()])
def test_a_hostile_folder_is_one_line_and_runs_nothing(kind, change, named, good, tmp_path, monkeypatch, bounded):
    folder, mark = tmp_path / "m", tmp_path / "mark"
    shutil.copytree(good[kind], folder)
    change(folder)
    for place in (folder, tmp_path): evil(place, mark)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProjError) as error: DualEncoder.load(folder)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and str(folder) in line and named in line and "MemoryError" not in line and "allocate" not in line, line
    assert not mark.exists() and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_what_many_good_models_have_is_no_offence(good, tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "0f"  # the hub's cache: every file is a link to a blob
    shutil.copytree(good["chain"], folder)
    put("config.json", _name_or_path="/home/author/model", rope_theta=1_000_000, bos_token_id=151_643)(folder)
    put("tokenizer_config.json", tokenizer_file="/root/.cache/tokenizer.json", name_or_path="author/base", model_max_length=10**30)(folder)
    put("vocab.json", auto_map=1, trust_remote_code=2)(folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.bin").write_bytes(b"other")
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    assert np.array_equal(DualEncoder.load(folder).encode(TOY), DualEncoder.load(good["chain"]).encode(TOY))


# ---- the manifest

@pytest.fixture(scope="module")
def saved(good, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    DualEncoder.load(good["chain"]).save(folder)
    return folder


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"one bit": flipped, "half": lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]), "removed": Path.unlink, "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_names_it(damage, saved, tmp_path):
    names = [*files_in(saved), *([] if damage == "removed" else [MANIFEST])]  # without a manifest a folder counts as foreign
    assert len(names) > 10
    for i, name in enumerate(names):
        folder = shutil.copytree(saved, tmp_path / str(i))
        DAMAGE[damage](folder / name)
        with pytest.raises(DataError) as error: enc.load_folder(folder)
        assert len(str(error.value).splitlines()) == 1 and str(folder) in str(error.value), name
        assert name == MANIFEST or str(folder / name) in str(error.value), error.value


@pytest.mark.parametrize("name", ["adapter_config.json", "1_Pooling/evil.py", "sub/model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_added_is_named(name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(DataError) as error: DualEncoder.load(folder)
    assert str(folder / name) in str(error.value) and "verify" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_no_bit_of_a_manifest_can_be_flipped_unseen(saved, tmp_path):
    "A flip is either seen or leaves the list of files as it was."
    folder = shutil.copytree(saved, tmp_path / "m")
    whole, random = (folder / MANIFEST).read_bytes(), np.random.default_rng(0)
    for place in random.integers(0, 8 * len(whole), 150):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(content)
        try: enc.load_folder(folder)
        except ProjError as e: assert len(str(e).splitlines()) == 1
        else: assert json.loads(content)["files"] == json.loads(whole)["files"]


# ---- saving

def other() -> DualEncoder:
    "The same kind of model with other weights."
    return DualEncoder.load("tiny", texts=TOY, max_length=32, seed=1)


def in_a_child(work) -> int:
    "Run `work` in a process of its own; how it ended."
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            work()
            os._exit(0)
        except BaseException: os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_save_that_dies_leaves_the_old_model_or_the_new_one(tiny, tmp_path, monkeypatch):
    new, folder, seen = other(), tmp_path / "model", set()
    def halfway(*_): os.kill(os.getpid(), signal.SIGKILL)  # after the weights, before the tokenizer
    def torn():
        new.model[0].save_tokenizer = halfway
        new.save(folder)
    def at(step):
        os.environ["_PROJ_DIE_AT"] = str(core.WRITES + step)
        new.save(folder)
    for work in [torn, *(lambda step=step: at(step) for step in range(1, 9))]:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        tiny.save(folder)
        status = in_a_child(work)
        found = DualEncoder.load(folder)
        check_manifest(folder)
        seen.add((status, found.weights_hash() == new.weights_hash()))
        assert found.weights_hash() in (tiny.weights_hash(), new.weights_hash())
        new.save(folder)
        assert DualEncoder.load(folder).weights_hash() == new.weights_hash() and sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert (signal.SIGKILL, False) in seen and (signal.SIGKILL, True) in seen and (0, True) in seen


def test_a_save_that_fails_leaves_the_old_model(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may become larger
    try:
        with pytest.raises(MachineError) as error: other().save(tmp_path / "model")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "model") in str(error.value) and len(str(error.value).splitlines()) == 1
    assert DualEncoder.load(tmp_path / "model").weights_hash() == tiny.weights_hash() and len(list(tmp_path.iterdir())) == 1


def test_saving_never_deletes_what_is_not_ours(tiny, tmp_path, good):
    foreign = shutil.copytree(good["plain"], tmp_path / "foreign")
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    for place in (foreign, tmp_path / "model", tmp_path, tmp_path / "a file"):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(ProjError, match="choose a folder"): tiny.save(place)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to("far")  # a link to a larger disk stays one
    tiny.save(tmp_path / "near")
    tiny.save(tmp_path / "near")
    assert (tmp_path / "near").is_symlink() and DualEncoder.load(tmp_path / "near").weights_hash() == tiny.weights_hash()


# ---- no pickle in our formats

STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # of torch: read with weights_only after their hash was checked


def kind_of(path: Path) -> str:
    "What a file is, by its content."
    raw = path.read_bytes()
    if raw.startswith(b"PAR1") and raw.endswith(b"PAR1"): return "parquet"
    if raw.startswith(b"\x89PNG"): return "png"
    if zipfile.is_zipfile(path): return "pickle in a zip" if any(n.endswith(".pkl") for n in zipfile.ZipFile(path).namelist()) else "zip"
    if raw[:1] == b"\x80" and raw.endswith(b"."): return "pickle"
    if raw.startswith(b"\x93NUMPY"): return "array of objects" if b"'|O'" in raw[:200] else "array"
    try:
        with safe_open(str(path), "np"): return "safetensors"
    except Exception: pass
    try:
        for text in raw.splitlines() if path.suffix == ".jsonl" else [raw]: json.loads(text)
        return "json"
    except ValueError: pass
    if raw.lstrip()[:9].lower() == b"<!doctype": return "html"
    return "text" if not raw or path.suffix in (".txt", ".md") and raw.decode(errors="replace").replace("\n", "").isprintable() else "unknown"


def test_kinds_are_told_by_content(tmp_path):
    "The control: each kind of pickle is found."
    pickle.dump({"a": 1}, open(tmp_path / "a.json", "wb"))
    torch.save({"a": 1}, tmp_path / "b.safetensors")
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    pickle.dump({"a": 1}, open(tmp_path / "d.txt", "wb"), protocol=2)
    (tmp_path / "e.json").write_text("{}")
    assert [kind_of(p) for p in sorted(tmp_path.iterdir())] == ["pickle", "pickle in a zip", "array of objects", "pickle", "json"]


def test_a_run_writes_no_pickle_but_states_that_load_as_weights(tmp_path):
    kept = {}

    class Watched(DualTraining):
        "Looks at every checkpoint while it is there."
        def trainer(self, *args, **kw):
            from transformers import TrainerCallback
            from transformers.trainer_pt_utils import safe_globals
            made = super().trainer(*args, **kw)

            class Keep(TrainerCallback):
                def on_step_end(self, *_, **__):
                    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
                        if not path.is_file(): continue
                        kept[path.name] = kind_of(path)
                        with safe_globals():  # what the trainer allows beside tensors: the arrays of NumPy's random state
                            if path.name in STATES: torch.load(path, weights_only=True, map_location="cpu")
            made.add_callback(Keep())
            return made

    training = Watched(config(write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"))
    training.baselines()
    training.train()
    training.evaluate()
    run = training.report()
    files = {p: kind_of(p) for p in run.folder.rglob("*") if p.is_file()}
    assert len(files) > 12 and set(files.values()) <= {"json", "safetensors", "parquet", "png", "html", "text"}, files
    assert "model.safetensors" in kept and {name for name, kind in kept.items() if kind not in ("json", "safetensors")} <= STATES, kept
    check_manifest(run / "model")


UNPICKLERS = ("pickle", "_pickle", "dill", "joblib", "shelve", "cloudpickle", "marshal")


def offences(path: Path):
    "Calls and imports in a source file that could run what a file says."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"{path.name}:{node.lineno} imports {name}" for name in names if name.split(".")[0] in UNPICKLERS)
        if not isinstance(node, ast.Call): continue
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        call = ast.unparse(node.func)
        if call == "torch.load" and given.get("weights_only") is not True: yield f"{path.name}:{node.lineno} torch.load without weights_only=True"
        if call in ("eval", "exec", "__import__") or call.endswith("read_pickle"): yield f"{path.name}:{node.lineno} {call}"
        for key in ("allow_pickle", "trust_remote_code"):
            if given.get(key, False) is not False: yield f"{path.name}:{node.lineno} {key}"
        if given.get("weights_only", True) is not True: yield f"{path.name}:{node.lineno} weights_only"


def test_no_source_of_ours_unpickles_or_trusts(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom joblib import load\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nM(f, trust_remote_code=True)\n"
                   "torch.load(f, weights_only=False)\nfine = torch.load(f, weights_only=True)\n")
    assert sorted(int(line.split()[0].split(":")[1]) for line in offences(bad)) == [1, 2, 3, 4, 5, 6, 6]
    assert [line for path in sorted(SOURCES.rglob("*.py")) for line in offences(path)] == []
