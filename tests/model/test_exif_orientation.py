"""EXIF orientation is applied or ignored according to the vision settings, in every path from image to pixels."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from tests.data.reading import SPEC, reader_of
from tests.data.shards import write_lines
from tests.model.layouts.published import FIXTURES
from vila.config import Recipe, load_recipe
from vila.core.types import Image
from vila.core.vision_spec import VisionSpec
from vila.data.dataset import DatasetEntry
from vila.model.loading import load_model, save_model
from vila.train.train_state import load_initial_model, open_initial_model

SIZE = (40, 20)


def sideways(orientation: int = 6) -> bytes:
    """A PNG with an EXIF rotation of 90 degrees clockwise."""
    exif, stream = PilImage.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored().save(stream, "PNG", exif=exif)
    return stream.getvalue()


def stored() -> PilImage.Image:
    return PilImage.open(io.BytesIO(tiny.image(1, SIZE).source)).convert("RGB")


def upright() -> PilImage.Image:
    return stored().transpose(PilImage.Transpose.ROTATE_270)


def test_the_processor_applies_the_orientation_setting(tmp_path):
    processor = tiny.vila()[1]
    ignoring = processor.with_vision(exif_orientation=False)
    (tmp_path / "a.png").write_bytes(sideways())
    turned, plain = (processor.pixels([Image(image)]) for image in (upright(), stored()))
    for source in (sideways(), tmp_path / "a.png", PilImage.open(tmp_path / "a.png")):
        assert torch.equal(processor.pixels([Image(source)]), turned)
        assert torch.equal(ignoring.pixels([Image(source)]), plain)
        assert torch.equal(ignoring(text="<image>", images=source)["pixel_values"], plain)
    assert not torch.equal(turned, plain)


def test_content_keys_differ_by_orientation():
    one, other = PilImage.open(io.BytesIO(sideways(6))), PilImage.open(io.BytesIO(sideways(8)))
    assert Image(one).key() != Image(other).key()
    assert Image(stored()).key() == Image(stored()).key()


def test_training_data_use_the_orientation_setting(tmp_path):
    (tmp_path / "a.png").write_bytes(sideways())
    content = [{"type": "image", "path": "a.png"}, "what?"]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
    reader = reader_of(DatasetEntry("messages", str(write_lines(tmp_path / "data.jsonl", [{"id": "r0", **row}]))))
    for applied, image in ((True, upright()), (False, stored())):
        reader = replace(reader, spec=replace(SPEC, exif_orientation=applied))
        expected = tiny.vila()[1].pixels([Image(image)])[0]
        np.testing.assert_array_equal(reader.pixels(0, reader(0))[0], expected.numpy())


def test_the_setting_is_written_only_where_it_is_not_the_default():
    assert "exif_orientation" not in SPEC.to_dict()
    assert VisionSpec.from_dict(SPEC.to_dict()).exif_orientation
    ignoring = replace(SPEC, exif_orientation=False)
    assert VisionSpec.from_dict(json.loads(json.dumps(ignoring.to_dict()))) == ignoring


@pytest.mark.parametrize("name", ["v1-mlp2x", "v15-odd-grid"])
def test_every_layout_keeps_the_setting(name, tmp_path):
    where = FIXTURES[name](tmp_path / "published")
    model, processor = load_model(where.folder, base=where.base, template="vicuna_v1")
    assert processor.spec.exif_orientation
    for applied in (True, False):
        own = processor.with_vision(exif_orientation=applied)
        model.config.vision_spec = own.vision_spec
        for layout in ("native", "vila-v15" if name.startswith("v15") else "llava-v1", "llava-hf"):
            if layout == "llava-hf" and name.startswith("v15"):
                continue
            folder = tmp_path / f"{layout}-{applied}"
            save_model(model, own, folder, layout)
            assert load_model(folder)[1].spec == own.spec
            assert ("exif_orientation" in (folder / "config.json").read_text()) == (not applied)


def test_a_stage_stores_the_setting_of_its_recipe(tmp_path):
    save_model(*tiny.vila(), tmp_path / "model")
    for applied in (True, False):
        facts = load_recipe("starter/3_sft", ["output.dir=x"]).model_dump(mode="json")
        facts["model"] = {"path": str(tmp_path / "model"), "exif_orientation": applied, "template": "starter_qa"}
        recipe = Recipe.model_validate(facts)
        model, processor = load_initial_model(recipe, open_initial_model(recipe))
        assert processor.spec.exif_orientation is applied
        assert VisionSpec.from_dict(model.config.vision_spec) == processor.spec


def test_recipes_of_the_original_ignore_it_and_ours_apply_it():
    for family, applied in (("vila_7b", False), ("vila_13b", False), ("vila_1_5_3b", False), ("vila_1_5_8b", False),
                            ("small", True), ("starter", True)):  # fmt: skip
        for stage in ("1_align", "3_sft"):
            # null: as the checkpoint has it, which for a new model is to apply it.
            assert (load_recipe(f"{family}/{stage}").model.exif_orientation is not False) is applied
