"Images as tokens: against transformers' own features, in three precisions, from folders good and bad."
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from proj.core import ConfigError, DataError, ProjError
from proj.data.zoo import load_tokens, save_tokens
from proj.models.clip import ClipImageEncoder, image_files

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, max_position_embeddings=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Both sides of a CLIP, as it is published."
    folder = tmp_path_factory.mktemp("clip") / "model"
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(32, 32), (50, 33), (7, 90), (200, 120), (1, 1), (32, 40), (64, 64)]]


def load(folder, **kw): return ClipImageEncoder(folder, device="cpu", **{"precision": "fp32", **kw})


def test_features_are_those_of_transformers(folder, images, capfd):
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad(): pooled = model.vision_model(**processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")).pooler_output
    expected = model.visual_projection(pooled).detach().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for batch_size in (1, 3, 64):
        found = load(folder, batch_size=batch_size).encode(images)
        assert found.dtype == np.float32 and found.shape == (7, 24) and np.abs(found - expected).max() < 1e-5
    assert "UNEXPECTED" not in "".join(capfd.readouterr())  # nothing is wrong with a folder that has a text side too


@pytest.mark.parametrize("precision, apart", [("fp16", 0.005), ("bf16", 0.03)])
def test_half_the_bits(folder, images, precision, apart):
    encoder, full = load(folder, precision=precision), load(folder)
    assert {p.element_size() for p in encoder.model.parameters()} == {2} and {p.element_size() for p in full.model.parameters()} == {4}
    found = encoder.encode(images)
    assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6) and 0 < np.abs(found - full.encode(images)).max() < apart


def test_an_image_is_the_same_however_it_is_given(folder, images, tmp_path):
    file, grey = tmp_path / "a.png", images[1][..., 0]
    Image.fromarray(images[1]).save(file)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    encoder = load(folder)
    same = encoder.encode([images[1], Image.fromarray(images[1]), file, str(file), Image.fromarray(images[1]).convert("RGBA")])
    assert np.abs(same - same[0]).max() < 1e-6
    same = encoder.encode([grey, np.stack([grey] * 3, -1), tmp_path / "grey.png"])
    assert np.abs(same - same[0]).max() < 1e-6 and encoder.encode([]).shape == (0, 24)


def test_a_folder_becomes_shards_with_draws_of_every_class(folder, images, tmp_path):
    for name, count in (("cat", 5), ("dog", 2), ("eel", 9)):
        for i in range(count):
            (file := tmp_path / "set" / name / "deep" / f"{i}.{'PNG' if i % 2 else 'png'}").parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(images[0], 7 * i + len(name) * count, 0)).save(file, "PNG")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    encoder, found = load(folder), {}
    tokens = encoder.tokens(tmp_path / "set", draws=4, seed=3)
    assert tokens.features.shape == (4, 3, 24) and tokens.mask.sum(0).tolist() == [4, 2, 4] and tokens.class_names.tolist() == ["cat", "dog", "eel"]
    for k, (name, files) in enumerate(image_files(tmp_path / "set").items()):
        own = encoder.encode(files)
        near = np.abs(tokens.features[tokens.mask[:, k], k][:, None] - own).max(-1)
        assert (near.min(1) < 1e-6).all() and len(set(near.argmin(1))) == len(near)  # each is a different file of its class
    assert np.array_equal(encoder.tokens(tmp_path / "set", draws=4, seed=3).features, tokens.features)
    assert not np.array_equal(encoder.tokens(tmp_path / "set", draws=4, seed=4).features, tokens.features)
    save_tokens(tokens, tmp_path / "shards", per_shard=3)
    again = load_tokens(tmp_path / "shards", width=24)
    assert np.array_equal(again.features, tokens.features) and np.array_equal(again.mask, tokens.mask) and again.class_names.tolist() == ["cat", "dog", "eel"]


def one_line(error): assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("image, said", [
    (np.zeros((3, 3)), "image 1: an array of float64"), (np.zeros((3, 3, 4), np.uint8), "uint8 (3, 3, 4)"), (np.zeros((0, 3), np.uint8), "(0, 3)"), (7, "image 1: cannot be read"), (None, "image 1: cannot be read"),
    ("nowhere.png", "nowhere.png: cannot be read as an image (FileNotFoundError)")])
def test_what_is_no_image_is_named(folder, images, image, said):
    with pytest.raises(DataError) as error: load(folder).encode([images[0], image])
    assert said in str(error.value)
    one_line(error)


def test_torn_files_and_empty_classes_are_named(folder, images, tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(images[3]).save(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match="1 sub-folder; expected one with images for each of two classes") as error: load(folder).tokens(tmp_path)
    one_line(error)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"/b: no image in it") as error: load(folder).tokens(tmp_path)
    one_line(error)
    whole = (tmp_path / "a" / "x.png").read_bytes()
    for cut in (0, 10, 40, len(whole) // 2):
        (tmp_path / "b" / "y.png").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b/y.png: cannot be read as an image") as error: load(folder).tokens(tmp_path)
        one_line(error)
    with pytest.raises(DataError, match="no such folder"): load(folder).tokens(tmp_path / "c")


def test_folders_that_hold_no_clip_are_refused(folder, images, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'bf16'"): load(folder, precision="bf61")
    with pytest.raises(DataError, match="no config.json"): load(tmp_path)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=24))
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="no preprocessor_config.json"): load(tmp_path / "bare")
    def made(name, change=None):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
        if change: (tmp_path / name / "config.json").write_text(json.dumps(json.loads((tmp_path / name / "config.json").read_text()) | change))
        return tmp_path / name
    assert load(made("good")).encode(images).shape == (7, 24)
    torn = made("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-50])
    pickled = made("pickled")
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for bad in (torn, pickled, made("wide", dict(hidden_size=64)), made("deep", dict(num_hidden_layers=3)), made("code", dict(auto_map={"AutoModel": "evil.Model"}))):
        with pytest.raises(ProjError) as error: load(bad)
        one_line(error)
    with torch.no_grad(): model.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="7 of 7 images have NaN") as error: load(made("nan")).encode(images)
    one_line(error)
