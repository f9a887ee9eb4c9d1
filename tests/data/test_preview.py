"""Preview of image resizing and of overlong samples, with numbers worked out by hand."""

import numpy as np
import pytest
from PIL import Image as PilImage

from tests.data.reading import SPEC, reader_of, write_records
from tests.data.shards import write_lines
from vila.core.errors import ConfigError
from vila.core.types import Image
from vila.core.vision_spec import VisionSpec
from vila.data.dataset import DatasetEntry
from vila.data.formats.base import FORMATS
from vila.data.preview import ImagePreview, LengthPreview, first_images, preview_images, save_views
from vila.data.stats import dataset_stats, require_images
from vila.media.image import open_image
from vila.media.transform import square_bytes


def preview(size, mode, *sizes):
    found = ImagePreview(size, mode)
    for width, height in sizes:
        found.add(width, height)
    return found


def test_a_screenshot_in_56_pixels_loses_its_text():
    found = preview(56, "pad", (1024, 768), (1024, 768), (1024, 768))
    assert found.mean_size == (1024, 768)
    assert found.reduction == 18.3  # 1024 / 56
    assert found.min_text_px == 147  # 8 x 18.3, rounded up
    assert found.changed == 0
    assert found.as_json()["min_text_px"] == 147
    (line,) = found.lines()
    assert "1024 x 768" in line and "56 x 56" in line and "147" in line


@pytest.mark.parametrize(
    ("mode", "size", "reduction", "changed"),
    [
        ("square", (800, 600), 6.0, 0),  # 100 pixels a side; a quarter of the area is cropped, not more
        ("square", (900, 600), 6.0, 1),
        ("square", (600, 900), 6.0, 1),
        ("resize", (900, 600), 9.0, 0),
        ("resize", (1000, 600), 10.0, 1),
        ("pad", (1000, 500), 10.0, 0),
        ("pad", (1000, 400), 10.0, 1),
        ("pad", (400, 1000), 10.0, 1),
    ],
)
def test_images_that_a_mode_changes_strongly_are_counted(mode, size, reduction, changed):
    found = preview(100, mode, size)
    assert (found.reduction, found.changed) == (reduction, changed)
    assert len(found.lines()) == 1 + changed


def test_small_images_and_no_images_have_no_warning():
    assert preview(100, "pad").lines() == []
    (line,) = preview(100, "pad", (50, 50)).lines()
    assert "readable" not in line


def test_the_reduction_is_a_median_and_the_memory_does_not_grow_with_the_images():
    found = preview(100, "pad", *((100 * n, 10) for n in (1, 2, 9)))
    assert found.reduction == 2.0
    found = preview(100, "pad", *((n, n) for n in range(100, 5100)))
    assert len(found._reductions) <= 501


def test_a_tower_without_center_crop_resizes_and_a_data_set_has_its_own_mode():
    spec = VisionSpec(28, 4, (0.5,) * 3, (0.5,) * 3, "square", center_crop=False)
    assert ImagePreview.of(spec).image_mode == "resize"
    assert ImagePreview.of(spec, "pad").image_mode == "pad"


@pytest.mark.parametrize(
    ("overlong", "kept", "left_out", "lost"), [("error", None, 0, 0), ("drop", 0, 1, 30), ("truncate", 12, 0, 18)]
)
def test_overlong_samples_are_counted(overlong, kept, left_out, lost):
    rows = LengthPreview(20, overlong)
    rows.add(20)
    assert rows.lines() == []
    rows.add(30, kept)
    assert (rows.count, rows.longer, rows.longest, rows.left_out, rows.lost_tokens) == (2, 1, 30, left_out, lost)
    assert len(rows.lines()) == 1


def test_images_of_a_few_samples_are_previewed_without_unreadable_ones(tmp_path):
    file = write_records(tmp_path)  # 16 images of 40 x 20
    (tmp_path / "4.png").write_bytes(b"broken")
    part = reader_of(file).mixture.datasets[0]
    assert (preview_images(part, SPEC, 24).count, preview_images(part, SPEC, 24).mean_size) == (15, (40, 20))
    assert preview_images(part, SPEC, 6).count <= 6
    assert len(first_images(part, 3)) == 3 and len(first_images(part, 99)) == 15


def test_saved_views_are_the_bytes_that_the_tower_reads(tmp_path):
    PilImage.effect_noise((90, 30), 80).convert("RGB").save(tmp_path / "a b.png")
    image = Image(tmp_path / "a b.png")
    (path,) = save_views([image], SPEC, tmp_path / "views", start=7)
    assert path.name == "007_a_b.png"
    view = np.asarray(PilImage.open(path)).transpose(2, 0, 1)
    assert np.array_equal(view, square_bytes(open_image(image), SPEC))
    path = write_lines(tmp_path / "d.jsonl", [{"messages": []}])
    reader = reader_of(DatasetEntry("messages", str(path), image_mode="resize"))
    assert reader.mixture.datasets[0].vision_spec(SPEC).image_mode == "resize"


def test_statistics_have_the_lengths_of_the_measured_samples(tmp_path):
    reader = reader_of(write_records(tmp_path))
    (stats,) = dataset_stats(reader.mixture, reader.tokenize, 24)
    assert len(stats.lengths) == 24 == stats.num_measured
    assert sum(stats.lengths) == stats.tokens


def test_data_without_images_are_an_error_if_training_needs_images(tmp_path):
    turn = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    text = write_lines(tmp_path / "text.jsonl", [turn] * 9)
    mixture = reader_of(text).mixture
    with pytest.raises(ConfigError) as raised:
        require_images(mixture, "nothing else is trained")
    assert raised.value.field == "data.mixture" and "9 samples" in raised.value.problem
    with_image = {"messages": [{"role": "user", "content": [{"type": "image", "path": "p.png"}]}, turn["messages"][1]]}
    require_images(reader_of(text, write_lines(tmp_path / "one.jsonl", [with_image])).mixture, "")
    video = {"messages": [{"role": "user", "content": [{"type": "video", "path": "p.mp4"}]}, turn["messages"][1]]}
    require_images(reader_of(write_lines(tmp_path / "video.jsonl", [video])).mixture, "")
    # An unreadable record may have an image.
    require_images(reader_of(write_lines(tmp_path / "bad.jsonl", [turn, {}])).mixture, "")
    assert FORMATS["messages"].open(text, tmp_path)[0].media == ()
