"""transformers' LLaVA layout: equal logits when read, and stock transformers loads what is written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests import tiny
from tests.model.layouts.published import FIXTURES, LLM, TOKENIZER, TOWER, llava_v1
from tests.model.layouts.test_published import IMAGES, image
from vila.core.errors import LayoutError
from vila.core.types import Message
from vila.model.loading import load_model, save_model
from vila.model.processor import VilaProcessor

THIRD = image(2, (56, 56))


def stock(folder, llm="llama", tower="clip", image_token=1150, **changes):
    """A random LLaVA written by transformers."""
    torch.manual_seed(0)
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**TOWER, image_size=56)
    text = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[llm](**LLM)
    facts = {"image_token_index": image_token, "image_seq_length": 16, **changes}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **facts)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return model


@pytest.mark.parametrize("llm", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_directory_of_transformers_gives_its_logits(tmp_path, llm, tower):
    full = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    theirs = stock(tmp_path / "stock", llm, tower, **full)
    ours, processor = load_model(tmp_path / "stock")
    assert ours.config.image_token_id == 1150
    for images in ([], [IMAGES[0]], [*IMAGES, THIRD]):
        inputs = processor(text="Look: " + "<image>\n" * len(images) + "What?", images=images, return_tensors="pt")
        with torch.inference_mode():
            expected = theirs(**inputs).logits
            got = ours(**inputs).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        new = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(**inputs, **new), theirs.generate(**inputs, **new))
    with torch.inference_mode():
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        assert (ours(**inputs).logits - got).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("field", "value"),
    [("vision_feature_layer", [-2, -1]), ("multimodal_projector_bias", False), ("projector_hidden_act", "silu")],
)
def test_unsupported_variants_are_refused(tmp_path, field, value):
    stock(tmp_path / "stock", **{field: value})
    with pytest.raises(LayoutError) as caught:
        load_model(tmp_path / "stock")
    error = caught.value
    assert (error.file, error.field, error.value) == (str(tmp_path / "stock" / "config.json"), field, value)


def test_two_linear_projector_layers_are_refused(tmp_path):
    stock(tmp_path / "stock", projector_hidden_act="linear")
    with pytest.raises(LayoutError) as caught:
        load_model(tmp_path / "stock")
    assert caught.value.file == str(tmp_path / "stock")
    assert caught.value.field == "multi_modal_projector.linear_2.weight"


WITHOUT_US = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

messages = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert not [name for name in sys.modules if name.split(".")[0] == "vila"], "vila was imported"
    logits = model(**inputs).logits[0, -1].tolist()
    print(json.dumps({"ids": inputs["input_ids"][0].tolist(), "new": out[0, inputs["input_ids"].shape[1]:].tolist(),
                      "logits": logits, "pixels": inputs["pixel_values"].sum(dim=(1, 2, 3)).tolist()}))
"""
WRITTEN = ("v1-linear", "v1-mlp2x", "v1-square", "v1-bfloat16", "v15-mlp2x")


def test_stock_transformers_loads_written_directories(tmp_path):
    loaded = {}
    for name in WRITTEN:
        loaded[name] = load_model(FIXTURES[name](tmp_path / name).folder, template="vicuna_v1", dtype="float32")
        save_model(*loaded[name], tmp_path / name / "hf", "llava-hf")
    files = []
    for number, photo in enumerate(IMAGES):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(photo.source)
    content = [
        {"type": "image", "path": str(files[0])},
        {"type": "text", "text": "\nWhat? "},
        {"type": "image", "path": str(files[1])},
        {"type": "text", "text": "\nCompare them."},
    ]
    messages = [{"role": "user", "content": content}]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, json.dumps(messages), *(str(tmp_path / name / "hf") for name in WRITTEN)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (model, processor), line in zip(loaded.values(), done.stdout.splitlines(), strict=True):
        theirs = json.loads(line)
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        image_id = model.config.image_token_id
        assert theirs["ids"] == [1200 if token == image_id else token for token in inputs["input_ids"][0].tolist()]
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        torch.testing.assert_close(torch.tensor(theirs["logits"][: len(logits)]), logits, rtol=0, atol=1e-5)
        assert theirs["new"] == out[0, inputs["input_ids"].shape[1] :].tolist()
        torch.testing.assert_close(torch.tensor(theirs["pixels"]), inputs["pixel_values"].sum(dim=(1, 2, 3)))


def test_round_trip_is_lossless(tmp_path):
    model, processor = load_model(llava_v1(tmp_path, "linear").folder, template="vicuna_v1")
    for number in range(2):
        save_model(model, processor, tmp_path / str(number), "llava-hf")
        again, processor_again = load_model(tmp_path / str(number))
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["text_config"]["vocab_size"] == 1201
        assert again.config.text_config.vocab_size == 1200
        assert again.config.projector_type == "linear"
        assert again.config.image_token_id == model.config.image_token_id
        assert processor_again.spec == processor.spec
        assert len(processor_again.tokenizer) == len(processor.tokenizer)
        assert processor_again.template == "vicuna_v1"
        state = model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
        model, processor = again, processor_again


def test_the_image_placeholder_is_never_the_most_likely_token(tmp_path):
    model, processor = load_model(llava_v1(tmp_path).folder, template="vicuna_v1")
    save_model(model, processor, tmp_path / "hf", "llava-hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    inputs = processor(text="Hello", return_tensors="pt")
    logits = theirs(**inputs).logits[0]
    assert logits.shape[-1] == 1201
    assert (logits[:, 1200] < logits.max(-1).values).all()


def test_the_stock_processor_gives_the_same_pixels(tmp_path):
    wide = image(5, (120, 60))
    for name in ("v1-linear", "v1-square"):
        model, processor = load_model(FIXTURES[name](tmp_path / name).folder, template="vicuna_v1")
        save_model(model, processor, tmp_path / name / "hf", "llava-hf")
        theirs = AutoProcessor.from_pretrained(tmp_path / name / "hf")
        from vila.media.image import open_image

        got = theirs(text="<image>", images=[open_image(wide)], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, processor.pixels([wide]), rtol=0, atol=1e-6)


def test_the_stock_chat_template_renders_the_same_conversation(tmp_path):
    model, processor = load_model(llava_v1(tmp_path).folder, template="vicuna_v1")
    save_model(model, processor, tmp_path / "hf", "llava-hf")
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    ours = processor.tokens([Message.of(m["role"], m["content"][0]["text"]) for m in messages])
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert list(ids[0] if isinstance(ids[0], list) else ids) == ours.ids


def test_a_larger_image_size_than_the_towers_is_kept(tmp_path):
    model, small = tiny.vila()
    model.config.select_layer = -2
    spec = replace(small.spec, image_size=56, tokens_per_image=16)
    model.config.vision_spec = spec.to_dict()
    processor = VilaProcessor(tiny.tokenizer(), vision_spec=spec.to_dict(), template="starter_qa")
    save_model(model, processor, tmp_path / "model", "llava-hf")
    again, its = load_model(tmp_path / "model")
    assert its.spec == spec
    inputs = its(text="<image>What?", images=[tiny.image(0, (56, 56))], return_tensors="pt")
    expected = processor(text="<image>What?", images=[tiny.image(0, (56, 56))], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(again(**inputs).logits, model(**expected).logits)
