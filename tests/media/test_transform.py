"""Pixel values are bit-equal to transformers' PIL processors and to the released code."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vila.core.errors import UnknownNameError
from vila.core.types import Image
from vila.core.vision_spec import IMAGE_MODES, VisionSpec
from vila.media import transform
from vila.media.image import open_image
from vila.media.transform import normalise, pixels, resample_lines, shrinker, square_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "pixels"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SIZES = (
    (64, 32),
    (30, 90),
    (1, 1),
    (1, 40),
    (40, 1),
    (3, 2),
    (56, 56),
    (57, 55),
    (333, 200),
    (61, 101),
    (50, 400),
    (300, 7),
)


def noise(width: int, height: int) -> PilImage.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return PilImage.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip_spec(mode: str, size: int = 56) -> VisionSpec:
    return VisionSpec(size, 16, CLIP_MEAN, CLIP_STD, mode)


def reference(image: PilImage.Image, spec: VisionSpec) -> np.ndarray:
    """The steps of the released code: its padding or resizing, then the processor of the tower."""
    size = spec.image_size
    if spec.image_mode == "resize":
        processor = SiglipImageProcessorPil(
            size={"height": size, "width": size}, image_mean=list(spec.mean), image_std=list(spec.std)
        )
        image = image.resize((size, size))
    else:
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=list(spec.mean),
            image_std=list(spec.std),
        )
    if spec.image_mode == "pad":
        width, height = image.size
        side = max(width, height)
        square = PilImage.new("RGB", (side, side), tuple(int(value * 255) for value in spec.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_equal_the_processors_bit_for_bit(mode, size):
    image = noise(*size)
    for side in (14, 27, 70):
        spec = clip_spec(mode, side)
        np.testing.assert_array_equal(pixels(image, spec), reference(image, spec))


@pytest.mark.parametrize("mode", ("resize", "square"))
def test_a_line_of_20000_pixels_equals_the_processors(mode):
    for image in (noise(20_000, 1), noise(1, 20_000)):
        spec = clip_spec(mode, 14)
        np.testing.assert_array_equal(pixels(image, spec), reference(image, spec))


@pytest.mark.parametrize("mode", ("pad", "square"))
def test_parts_of_a_canvas_that_is_not_built_equal_the_full_canvas(mode, monkeypatch):
    monkeypatch.setattr(transform, "_MAX_CANVAS", 0)
    for image in (noise(1, 700), noise(3, 401), noise(90, 400), noise(61, 101), noise(150, 700)):
        for side in (14, 56, 101):
            spec = clip_spec(mode, side)
            np.testing.assert_array_equal(pixels(image, spec), reference(image, spec))


def test_padding_a_strip_does_not_build_a_square_of_400_million_pixels():
    spec = clip_spec("pad", 28)
    border = pixels(PilImage.new("RGB", (1, 1), (122, 116, 104)), spec)[:, :1, :1]
    for size in ((60, 20_000), (20_000, 60)):
        array = pixels(PilImage.new("RGB", size, "white"), spec)
        array = array if size[0] < size[1] else array.transpose(0, 2, 1)
        assert (array[:, :, :12] == border).all()
        assert (array[:, :, 16:] == border).all()
        assert (array[:, :, 13:15] > border).all()


@pytest.mark.parametrize("size", (5, 33, 100, 250))
def test_resampled_lines_equal_pillow(size):
    image = noise(40, 100)
    lines = np.asarray(image).reshape(100, 120)
    whole = np.asarray(image.resize((40, size), PilImage.Resampling.BICUBIC)).reshape(size, 120)
    np.testing.assert_array_equal(resample_lines(lines, length=100, size=size), whole)
    np.testing.assert_array_equal(resample_lines(lines, length=100, size=size, first=2, count=3), whole[2:5])
    with pytest.raises(ValueError):
        resample_lines(lines[:90], length=100, size=size)


@pytest.mark.parametrize("center_crop", (True, False))
@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_a_resized_square_maps_to_itself(mode, center_crop):
    """So video frames can be resized while the video is decoded."""
    spec = replace(clip_spec(mode), center_crop=center_crop)
    for size in ((41, 67), (67, 41), (300, 20), (20, 300), (56, 56), (8, 8)):
        whole = square_bytes(noise(*size), spec)
        np.testing.assert_array_equal(square_bytes(shrinker(spec)(noise(*size)), spec), whole)


@pytest.mark.parametrize(
    "mean, std", ((CLIP_MEAN, CLIP_STD), (HALF, HALF), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
)
def test_every_byte_is_normalised_like_the_processors(mean, std):
    every_byte = PilImage.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    spec = VisionSpec(16, 1, mean, std, "resize")
    array = pixels(every_byte, spec)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, reference(every_byte, spec))


def test_a_batch_normalises_to_the_pixels_of_each_image():
    spec = clip_spec("pad")
    images = [noise(20, 20 + i) for i in range(3)]
    squares = np.stack([square_bytes(image, spec) for image in images])
    assert squares.dtype == np.uint8
    expected = np.stack([pixels(image, spec) for image in images])
    buffer = np.zeros((5, 3, 56, 56), np.float32)
    assert np.shares_memory(normalise(squares, spec, buffer[1:4]), buffer)
    np.testing.assert_array_equal(buffer[1:4], expected)
    np.testing.assert_array_equal(normalise(squares, spec), expected)
    assert not buffer[[0, 4]].any()


def images_of_other_modes() -> dict[str, PilImage.Image]:
    colour = noise(41, 67)
    palette = colour.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    rotated = colour.copy()
    exif = PilImage.Exif()
    exif[0x0112] = 6
    rotated.info["exif"] = exif.tobytes()
    alpha = colour.copy()
    alpha.putalpha(noise(41, 67).convert("L"))
    return {
        "grey": colour.convert("L"),
        "bilevel": colour.convert("1"),
        "palette with alpha": palette,
        "EXIF orientation": rotated,
        "alpha": alpha,
        "CMYK": colour.convert("CMYK"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # from the reference
@pytest.mark.parametrize("kind", images_of_other_modes())
def test_images_of_other_modes_equal_the_released_code(kind):
    image = images_of_other_modes()[kind]
    for mode in IMAGE_MODES:
        expected = reference(image.convert("RGB"), clip_spec(mode))
        opened = open_image(Image(image), exif_orientation=False)
        np.testing.assert_array_equal(pixels(opened, clip_spec(mode)), expected)


@pytest.mark.parametrize("key", np.load(GOLDEN / "pixels.npz").files)
def test_pixels_equal_those_of_the_released_code(key):
    generation, mode, name = key.split("/")
    spec = clip_spec(mode) if generation == "v1" else VisionSpec(70, 9, HALF, HALF, mode)
    array = pixels(open_image(Image(name), base=GOLDEN), spec)
    np.testing.assert_array_equal(array, np.load(GOLDEN / "pixels.npz")[key])


def test_images_that_are_not_rgb_and_unknown_modes_are_refused():
    with pytest.raises(ValueError):
        pixels(PilImage.new("L", (4, 4)), clip_spec("pad"))
    with pytest.raises(UnknownNameError) as caught:
        pixels(noise(4, 4), clip_spec("pda"))
    assert (caught.value.name, caught.value.near) == ("pda", ["pad"])
