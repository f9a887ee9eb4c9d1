"""Published layouts load: logits at every step equal those of stock modules, and a conversion loses no bit."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image as PilImage
from safetensors.torch import load_file

from tests.model.layouts.published import FIXTURES, Written, llava_v1, lora, projector_weights, write_weights
from tests.reference import reference
from vila.core.errors import LayoutError
from vila.core.types import Image
from vila.model.loading import load_model, save_model

PROMPT = "USER: <image>\nWhat? <image> Compare them. ASSISTANT:"


def image(seed, size):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (*reversed(size), 3), generator=generator, dtype=torch.uint8)
    stream = io.BytesIO()
    PilImage.fromarray(noise.numpy()).save(stream, "PNG")
    return Image(stream.getvalue())


IMAGES = [image(0, (40, 30)), image(1, (25, 60))]


def ids_for_reference(inputs, model, processor):
    """Our expanded ids in the released code's form: -200 once per image."""
    out, num_placeholders = [], 0
    for token in inputs["input_ids"][0].tolist():
        if token != model.config.image_token_id:
            out.append(token)
            continue
        if num_placeholders % processor.spec.tokens_per_image == 0:
            out.append(-200)
        num_placeholders += 1
    return out


@pytest.fixture(scope="module", params=FIXTURES)
def written(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return request.param, FIXTURES[request.param](root), root


def plain_equivalent(name, written: Written, root):
    """The complete checkpoint of a stage-1 or LoRA directory, merged by hand."""
    if written.base is None:
        return written.folder
    plain = llava_v1(root / "plain", "mlp2x_gelu").folder
    if name == "v1-lora":
        adapter = torch.load(written.folder / "adapter_model.bin", weights_only=True)
        weights = load_file(plain / "model.safetensors")
        for key in [key for key in adapter if "lora_A" in key]:
            target = key.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[target] = weights[target] + 2.0 * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
        write_weights(plain, weights, "safetensors")
    return plain


def test_logits_equal_those_of_stock_modules_and_depend_on_images(written):
    name, where, root = written
    model, processor = load_model(where.folder, dtype="float32", base=where.base)
    inputs = processor(text=PROMPT, images=IMAGES, return_tensors="pt")
    plain = plain_equivalent(name, where, root)
    expected = reference(plain, ids_for_reference(inputs, model, processor), inputs["pixel_values"])
    with torch.inference_mode():
        torch.testing.assert_close(model.vision_features(inputs["pixel_values"]), expected["vision"], rtol=0, atol=1e-4)
        logits = model(**inputs).logits[0]
        swapped = model(**processor(text=PROMPT, images=IMAGES[::-1], return_tensors="pt")).logits[0]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-4)
    assert (logits - swapped)[-1].abs().max() > 1e-2


def test_a_conversion_keeps_every_bit(written, tmp_path):
    name, where, _ = written
    model, processor = load_model(where.folder, base=where.base, template="vicuna_v1")
    state = model.state_dict()
    ids = processor(text=PROMPT, images=IMAGES)["input_ids"]
    assert ids[0, 0] == 1  # a directory with only tokenizer.model still begins with BOS
    layout = "vila-v15" if name.startswith("v15") else "llava-v1"
    for step, kind in enumerate(("native", layout, "native")):
        folder = tmp_path / f"{step}-{kind}"
        save_model(model, processor, folder, kind)
        model, processor = load_model(folder)
        again = model.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)
        assert processor.template == "vicuna_v1"
        assert torch.equal(processor(text=PROMPT, images=IMAGES)["input_ids"], ids)
    assert load_model(where.folder, base=where.base)[1].spec == processor.spec


def test_the_dtype_of_the_files_is_kept_by_default(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        where = llava_v1(tmp_path / str(dtype), dtype=dtype)
        model, _ = load_model(where.folder)
        assert {p.dtype for n, p in model.named_parameters() if "vision" not in n} == {dtype}
        assert model.dtype == dtype
        assert {p.dtype for p in load_model(where.folder, dtype="float32")[0].parameters()} == {torch.float32}


def test_included_tower_weights_take_precedence(tmp_path):
    inside, beside = llava_v1(tmp_path / "a", inside=True), llava_v1(tmp_path / "b")
    name = "vision_tower.embeddings.class_embedding"
    difference = load_model(inside.folder)[0].state_dict()[name] - load_model(beside.folder)[0].state_dict()[name]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.05), rtol=0, atol=1e-6)


def test_an_included_published_tower_needs_no_other_file(tmp_path):
    # Its config comes from a table: CLIP-L/336 itself is too large for a test, so the table is asked alone.
    from vila.model.layouts.tower_files import known_tower

    facts = known_tower("openai/clip-vit-large-patch14-336")
    assert (facts.config.hidden_size, facts.config.num_hidden_layers, facts.image_size) == (1024, 24, 336)
    siglip = known_tower("google/siglip-so400m-patch14-384")
    assert (siglip.config.hidden_size, siglip.config.intermediate_size, siglip.image_size) == (1152, 4304, 384)


@pytest.mark.parametrize("layout", ["native", "llava-v1", "llava-hf", "vila-v15"])
def test_sampling_values_without_sampling_are_dropped(tmp_path, layout):
    """LLaVA-1.5 and Vicuna are published this way, and transformers refuses to write such a file."""
    where = llava_v1(tmp_path)
    published = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": 0}
    (where.folder / "generation_config.json").write_text(json.dumps(published))
    model, processor = load_model(where.folder)
    assert (model.generation_config.max_length, model.generation_config.temperature) == (4096, None)
    save_model(model, processor, tmp_path / "out", layout)
    assert load_model(tmp_path / "out")[0].generation_config.max_length == 4096


class TestRefusals:
    def edit(self, folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_an_unknown_projector(self, tmp_path):
        where = llava_v1(tmp_path)
        self.edit(where.folder, mm_projector_type="resampler")
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        error = caught.value
        assert (error.file, error.field) == (str(where.folder / "config.json"), "mm_projector_type")
        assert error.value == "resampler"

    def test_tiles_of_llava_next(self, tmp_path):
        where = llava_v1(tmp_path, image_aspect_ratio="anyres")
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert (caught.value.field, caught.value.value) == ("image_aspect_ratio", "anyres")

    def test_a_missing_shard_is_named(self, tmp_path):
        where = llava_v1(tmp_path, form="sharded-bin")
        (where.folder / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert caught.value.value == ["pytorch_model-00002-of-00003.bin"]

    def test_missing_unexpected_and_mismatched_weights_are_listed_together(self, tmp_path):
        where = llava_v1(tmp_path, form="bin")
        file = where.folder / "pytorch_model.bin"
        weights = torch.load(file, weights_only=True)
        del weights["model.norm.weight"]
        weights["model.mm_projector.7.weight"] = torch.zeros(2)
        weights["lm_head.weight"] = torch.zeros(3, 4)
        torch.save(weights, file)
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        error = caught.value
        assert (error.missing, error.unexpected) == (["language_model.model.norm.weight"], ["projector.7.weight"])
        (mismatched,) = error.mismatched
        assert all(text in mismatched for text in ("lm_head.weight", "pytorch_model.bin", "(3, 4)", "(1200, 64)"))

    def test_a_pickle_that_is_not_weights_is_never_run(self, tmp_path):
        where = llava_v1(tmp_path, form="bin")
        marker = tmp_path / "ran"

        class Trap:
            def __reduce__(self):
                return (marker.write_text, ("x",))

        torch.save({"model.norm.weight": Trap()}, where.folder / "pytorch_model.bin")
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert caught.value.file == str(where.folder / "pytorch_model.bin")
        assert "write_text" in caught.value.value or "getattr" in caught.value.value
        assert not marker.exists()

    @pytest.mark.parametrize("keep", [0, 10, 5000])
    @pytest.mark.parametrize("form", ["bin", "safetensors"])
    def test_a_file_cut_short_is_named(self, tmp_path, form, keep):
        where = llava_v1(tmp_path, form=form)
        file = next(where.folder.glob(f"*.{form}"))
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert caught.value.file == str(file)

    def test_a_text_file_instead_of_weights_is_named(self, tmp_path):
        where = llava_v1(tmp_path, form="bin")
        file = next(where.folder.glob("*.bin"))
        file.write_text("hello")
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert caught.value.file == str(file)

    def test_a_lora_directory_without_its_base_names_the_option(self, tmp_path):
        where = lora(tmp_path)
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert caught.value.file == str(where.folder) and "--model-base" in caught.value.hint

    def lora_with(self, tmp_path, vocabulary, more):
        """A LoRA directory with more weights than the projector in non_lora_trainables."""
        where = lora(tmp_path)
        file = where.folder / "non_lora_trainables.bin"
        torch.save(torch.load(file, weights_only=True) | more, file)
        self.edit(where.folder, vocab_size=vocabulary)
        return load_model(where.folder, base=where.base)[0]

    def test_a_lora_directory_with_a_head_of_its_own(self, tmp_path):
        head = torch.randn(1200, 64).half()
        model = self.lora_with(tmp_path, 1200, {"base_model.model.lm_head.weight": head})
        assert torch.equal(model.get_output_embeddings().weight, head)

    def test_a_lora_directory_with_a_larger_vocabulary(self, tmp_path):
        head, rows = torch.randn(2, 1203, 64).half()
        names = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")
        model = self.lora_with(tmp_path, 1203, dict(zip(names, (head, rows), strict=True)))
        assert torch.equal(model.get_output_embeddings().weight, head)
        assert torch.equal(model.get_input_embeddings().weight, rows)

    def test_an_adapter_of_another_base_lists_unmatched_weights(self, tmp_path):
        where = lora(tmp_path)
        file = where.folder / "adapter_model.bin"
        adapter = torch.load(file, weights_only=True)
        torch.save({name.replace("layers.1.", "layers.9."): t for name, t in adapter.items()}, file)
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder, base=where.base)
        assert caught.value.file == str(file) and "model.layers.9.mlp.down_proj.weight" in caught.value.problem

    def test_a_missing_tower_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        where = llava_v1(tmp_path)
        shutil.rmtree(tmp_path / "tower")
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        assert (caught.value.file, caught.value.field, caught.value.value) == (
            str(where.folder / "config.json"),
            "mm_vision_tower",
            "tower",
        )

    def test_interpolated_position_embeddings_are_refused(self, tmp_path):
        where = FIXTURES["v15-odd-grid"](tmp_path)
        self.edit(where.folder, vision_resolution=98)
        with pytest.raises(LayoutError) as caught:
            load_model(where.folder)
        error = caught.value
        assert (error.file, error.field, error.value) == (str(where.folder / "config.json"), "vision_resolution", 98)

    @pytest.mark.parametrize(
        ("name", "layout", "field_and_value"),
        [
            ("v15-odd-grid", "llava-hf", ("projector_type", "mlp_downsample")),
            ("v15-odd-grid", "llava-v1", ("projector_type", "mlp_downsample")),
            ("v15-s2", "llava-hf", ("s2_scales", [28, 56])),
            ("v15-intern-vit", "llava-v1", ("projector_type", "mlp_downsample")),
            ("v1-mlp3x", "llava-hf", ("projector_type", "mlp3x_gelu")),
            ("v15-mlp2x", "llava-v1", ("vision_config.model_type", "siglip_vision_model")),
        ],
    )
    def test_unsupported_models_are_refused_and_nothing_is_written(self, tmp_path, name, layout, field_and_value):
        where = FIXTURES[name](tmp_path)
        with pytest.raises(LayoutError) as caught:
            save_model(*load_model(where.folder), tmp_path / "out", layout)
        assert (caught.value.field, caught.value.value) == field_and_value
        assert layout in caught.value.problem
        assert not (tmp_path / "out").exists()


def test_the_fixture_projectors_have_the_published_names():
    assert set(projector_weights("mlp_downsample", 32)) == {
        f"{n}.{leaf}" for n in (1, 2, 4) for leaf in ("weight", "bias")
    }
