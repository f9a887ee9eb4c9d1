"""llama.cpp itself reads the files; needs an environment with llama-cpp-python (docs/export.md)."""

import os

import numpy as np
import pytest
import torch

from tests import tiny
from tests.export.gguf_fixtures import MEAN, STD, ask_llama, export, llama_python, llama_tokenizer, seeing
from vila.chat.render import render
from vila.core.types import Message
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.model.loading import load_model
from vila.starter.data import english_eval

pytestmark = pytest.mark.slow
TEXTS = (
    "What is the capital of France? It is",
    "Once upon a time there was a 12345 little",
    "The   colours of\n\n the rainbow are caf\u00e9 \u00fcber \u65e5\u672c\u8a9e don't it's",
    " what shape is in the picture?",
)


@pytest.fixture(autouse=True)
def consumer():
    llama_python()


def greedy(model, ids, count, **inputs):
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), **inputs).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tiny_model_generates_the_same_tokens(tmp_path, family):
    """Random models of all families: rotation, grouped heads, biases."""
    model, processor = tiny.vila(family, seed=3)
    rows = [torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]
    out = ask_llama(model=export(tmp_path, model, processor) / "model-f16.gguf", greedy=[(ids, 16) for ids in rows])
    assert out["greedy"] == [greedy(model.language_model, ids, 16) for ids in rows]


def test_llama_cpp_tokenizes_as_the_model(tmp_path):
    processor = tiny.vila()[1]
    processor.tokenizer = llama_tokenizer()
    processor.image_token_id = len(llama_tokenizer())
    processor.template = "vicuna_v1"
    model = tiny.vila(vocab_size=len(llama_tokenizer()))[0]
    model.config.image_token_id, model.config.template = processor.image_token_id, "vicuna_v1"
    out = ask_llama(model=export(tmp_path, model, processor) / "model-f16.gguf", texts=list(TEXTS))
    # As our walk cuts them: a space before the text even where it starts with one, as SentencePiece itself does.
    walk = processor.span_tokenizer
    assert out["texts"] == [[*walk.bos_ids, *walk.encode(text, first=True)[0]] for text in TEXTS]
    assert "ASSISTANT:" in out["template"]


@pytest.fixture(scope="module")
def starter():
    """The trained starter, as VILA_STARTER_MODEL names it (`vila quickstart` makes one)."""
    folder = os.environ.get("VILA_STARTER_MODEL", "")
    if not folder:
        pytest.skip("VILA_STARTER_MODEL names no trained starter (vila quickstart makes one: RUN/model)")
    return folder


@pytest.fixture(scope="module")
def starter_in_torch(starter):
    return load_model(starter, dtype="float32")


def exported(starter, folder, precision):
    write_export(open_source(starter), "gguf-text", folder / precision, ExportOptions(precision))
    return folder / precision / f"model-{precision}.gguf"


def test_the_starter_model_in_f16_generates_the_same_tokens(starter, starter_in_torch, tmp_path):
    model, processor = starter_in_torch
    rows = [processor.tokenizer(text)["input_ids"] for text in TEXTS]
    asked = [segment.text for segment in render([Message.of("user", TEXTS[0])], processor.find_template(), prompt=True)]
    file = exported(starter, tmp_path, "f16")
    out = ask_llama(model=file, texts=[*TEXTS, "".join(asked)], greedy=[(ids, 16) for ids in rows])
    assert out["texts"] == [*rows, processor.tokens([Message.of("user", TEXTS[0])]).ids]
    assert out["greedy"] == [greedy(model.language_model, ids, 16) for ids in rows]


@pytest.mark.parametrize(("precision", "least"), [("f16", 0.995), ("q8_0", 0.95), ("q4_1", 0.7)])
def test_the_most_likely_tokens_of_the_starter_model_agree(starter, starter_in_torch, tmp_path, precision, least):
    """2,000 tokens of held-out English; llama-cpp-python 0.3.36, two trainings: F16 1.0, Q8_0 0.963 and 0.954."""
    model, processor = starter_in_torch
    ids = processor.tokenizer(english_eval())["input_ids"]
    rows = [ids[start : start + 500] for start in range(0, 2000, 500)]
    with torch.no_grad():
        wanted = [model.language_model(torch.tensor([row])).logits[0].argmax(-1).numpy() for row in rows]
    found = ask_llama(model=exported(starter, tmp_path, precision), forced=rows)["forced"]
    assert np.mean([(one == np.array(other)).mean() for one, other in zip(wanted, found, strict=True)]) > least


def look(tmp_path, tower, projector="mlp2x_gelu", select_layer=-2):
    """Return image embeddings of vila and of llama.cpp for a random image, and the greedy tokens of both."""
    model, processor = seeing(tower, projector, select_layer)
    out = export(tmp_path, model, processor, "gguf")
    rgb = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    asked = {"side": 56, "rgb": rgb.tobytes().hex(), "before": [5, 6], "after": [40, 41], "count": 4}
    seen = ask_llama(model=out / "model-f16.gguf", mmproj=out / "mmproj-f16.gguf", image=asked)["image"]
    pixels = torch.from_numpy((rgb / 255 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)[None].float()
    ids = [5, 6, *[model.config.image_token_id] * seen["tokens"], 40, 41]
    with torch.no_grad():
        ours = model.project(model.vision_features(pixels))[0].numpy()
    return ours, np.array(seen["vectors"]), greedy(model, ids, 4, pixel_values=pixels), seen["greedy"]


def cosine(a, b):
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()


@pytest.mark.parametrize(
    ("projector", "select_layer"), [("mlp2x_gelu", -2), ("mlp2x_gelu", -1), ("linear", -2), ("mlp2x_gelu", 1)]
)
def test_image_embeddings_of_a_siglip_model_agree(tmp_path, projector, select_layer):
    """0.3.36: cosines above 0.99996, the rest is half precision. The layer and the GELU are as in our model."""
    ours, theirs, we_say, they_say = look(tmp_path, "siglip", projector, select_layer)
    assert ours.shape == theirs.shape
    assert cosine(ours, theirs) > 0.9999
    assert we_say == they_say


def test_a_clip_model_runs_with_the_known_defect_of_llama_cpp(tmp_path):
    """It counts positions as if CLIP's class token came first, and appends it: 0.3.36 gives a mean cosine of 0.59.

    Its vectors are then those of the next patch, at its neighbour's position: 0.97 with ours, moved by one. When this
    fails, llama.cpp is mended: say so in the README of the export, from which version on.
    """
    ours, theirs, _, they_say = look(tmp_path, "clip")
    assert ours.shape == theirs.shape and len(they_say) == 4
    assert cosine(ours, theirs) < 0.9
    assert cosine(ours[1:], theirs[:-1]) > 0.9
