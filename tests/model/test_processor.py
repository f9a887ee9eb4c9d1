"""The processor in the Hugging Face convention: text with markers, messages, videos, image modes."""

import base64
import io

import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from vila.core.errors import MediaError, TemplateError, VilaError
from vila.core.types import Image, Message, Video
from vila.media.image import open_image


def gif(colours, size=(28, 28)):
    frames = [PilImage.new("RGB", size, colour) for colour in colours]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=40)
    return stream.getvalue()


@pytest.fixture(scope="module")
def loaded():
    return tiny.vila(template="chatml")


def placeholders(processor):
    return [processor.image_token_id] * processor.spec.tokens_per_image


def test_markers_become_runs_of_placeholders_in_reading_order(loaded):
    model, processor = loaded
    inputs = processor(text="a<image>b<image>", images=[tiny.image(0), tiny.image(1)], return_tensors="pt")
    a, b = (processor.span_tokenizer.encode(letter, False)[0] for letter in "ab")
    assert inputs["input_ids"].tolist() == [[*a, *placeholders(processor), *b, *placeholders(processor)]]
    assert inputs["pixel_values"].shape == (2, 3, 28, 28)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_text_alone_gives_no_pixels(loaded):
    model, processor = loaded
    inputs = processor(text="hello", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert model(**inputs).logits.shape[1] == 5


def test_left_and_right_padding_give_the_same_logits(loaded):
    model, processor = loaded
    texts, images = ["<image>what?", "a longer text <image><image>"], [tiny.image(n) for n in range(3)]
    right = processor(text=texts, images=images, return_tensors="pt")
    left = processor(text=texts, images=images, return_tensors="pt", padding_side="left")
    alone = processor(text=texts[0], images=images[:1], return_tensors="pt")
    length = alone["input_ids"].shape[1]
    assert right["attention_mask"][0].tolist() == [1] * length + [0] * (right["input_ids"].shape[1] - length)
    expected = model(**alone).logits[0]
    torch.testing.assert_close(model(**right).logits[0, :length], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**left).logits[0, -length:], expected, rtol=0, atol=1e-4)
    new = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    assert model.generate(**left, **new)[0, -4:].tolist() == model.generate(**alone, **new)[0, -4:].tolist()
    with pytest.raises(ValueError) as caught:
        model.generate(**right, **new)
    assert "padding_side='left'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "images", "videos", "expected"),
    [
        ("<image><image>", 1, 0, ("images", 1, "2")),
        ("no marker", 2, 0, ("images", 2, "0")),
        ("<video>", 0, 0, ("videos", 0, "1")),
    ],
)
def test_different_numbers_of_markers_and_media_are_an_error(loaded, text, images, videos, expected):
    _, processor = loaded
    with pytest.raises(MediaError) as caught:
        processor(text=text, images=[tiny.image(n) for n in range(images)], videos=[b""] * videos)
    assert (caught.value.field, caught.value.value, caught.value.expected) == expected


def test_a_video_is_its_frames_each_with_a_newline(loaded):
    _, processor = loaded
    clip = Video(gif([(250, 0, 0), (0, 250, 0), (0, 0, 250)]), 2)
    newline = processor.span_tokenizer.encode("\n", False)[0]
    for text in ("<video>What?", "<video>\nWhat?"):
        inputs = processor(text=text, videos=[clip])
        what = processor.span_tokenizer.encode("What?", False)[0]
        assert inputs["input_ids"][0].tolist() == [
            *placeholders(processor),
            *newline,
            *placeholders(processor),
            *newline,
            *what,
        ]
        assert inputs["pixel_values"].shape[0] == 2
    frames = [open_image(Image(frame.source)) for frame in processor.frames(clip)]
    as_list = processor(text="<video>What?", videos=[frames])
    assert torch.equal(as_list["input_ids"], inputs["input_ids"])
    assert torch.equal(as_list["pixel_values"], inputs["pixel_values"])


def test_a_video_in_a_message_gives_the_same_prompt(loaded):
    _, processor = loaded
    clip = Video(gif([(250, 0, 0), (0, 250, 0), (0, 0, 250)]), 3)
    for text in ("What?", "\nWhat?"):
        tokens = processor.prompt([Message.of("user", clip, text)])
        images = [Image(frame.source) for frame in processor.frames(clip)]
        parts = [part for image in images for part in (image, "\n")]
        assert tokens.ids == processor.prompt([Message.of("user", *parts, "What?")]).ids
    assert len(processor.frames(Video(clip.source))) == processor.spec.num_video_frames


def test_an_image_mode_for_one_call(loaded):
    _, processor = loaded
    wide = Image(PilImage.new("RGB", (56, 28), (200, 10, 10)))
    by_mode = {
        mode: processor(text="<image>", images=wide, image_aspect_ratio=mode)["pixel_values"]
        for mode in ("pad", "resize", "square")
    }
    assert torch.equal(by_mode["pad"], processor(text="<image>", images=wide)["pixel_values"])
    assert not torch.equal(by_mode["pad"], by_mode["resize"])
    assert torch.equal(by_mode["resize"], by_mode["square"])  # one colour: the crop shows it too
    with pytest.raises(VilaError) as caught:
        processor(text="<image>", images=wide, image_aspect_ratio="stretch")
    assert "stretch" in str(caught.value)


def parts_of(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return [
        {"type": "image", "path": str(path)},
        {"type": "image", "image": open_image(Image(path))},
        {"type": "image", "base64": data},
        {"type": "image", "url": f"data:image/png;base64,{data}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]


def test_content_parts_give_the_prompt_of_our_messages(loaded, tmp_path):
    model, processor = loaded
    path = tmp_path / "a.png"
    path.write_bytes(tiny.image(7).source)
    expected = processor.prompt([Message.of("user", Image(path), "\nWhat?")])
    for part in parts_of(path):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "\nWhat?"}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == expected.ids
        assert torch.equal(inputs["pixel_values"], processor.pixels([Image(path)]))
        assert model(**inputs).logits.shape[1] == len(expected.ids)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(messages, tokenize=True) == expected.ids
    both = processor.apply_chat_template([messages, messages], tokenize=True, return_dict=True, return_tensors="pt")
    assert both["input_ids"].shape[0] == both["pixel_values"].shape[0] == 2


def test_markers_inside_a_messages_text_stay_text(loaded):
    _, processor = loaded
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Is <image> a tag?<|im_end|>"}], tokenize=True, return_dict=True
    )
    assert processor.image_token_id not in inputs["input_ids"][0]
    end = processor.span_tokenizer.special_ids["<|im_end|>"]
    assert inputs["input_ids"][0].count(end) == 1


def test_a_generation_prompt_cannot_be_disabled_after_a_user_message(loaded):
    _, processor = loaded
    question = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError) as caught:
        processor.apply_chat_template(question, add_generation_prompt=False)
    assert caught.value.field == "add_generation_prompt"
    whole = [*question, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(whole).endswith("yes<|im_end|>\n")


def test_raw_text_needs_no_template_but_messages_do():
    _, processor = tiny.vila(template="")
    assert processor(text="<image>hi", images=tiny.image(0))["input_ids"].shape[1] == 6
    with pytest.raises(TemplateError) as caught:
        processor.apply_chat_template([{"role": "user", "content": "hi"}])
    assert caught.value.field == "template" and caught.value.hint


def test_peft_wraps_and_merges(loaded, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny.vila()
    inputs = processor(text="<image>what?", images=[tiny.image(1)], return_tensors="pt")
    before = model(**inputs).logits
    config = LoraConfig(r=2, target_modules=r"language_model.*\.q_proj", init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == {
        f"base_model.model.language_model.model.layers.{n}.self_attn.q_proj.lora_{x}.default.weight"
        for n in range(2)
        for x in "AB"
    }
    changed = wrapped(**inputs).logits
    assert (changed - before).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, changed, rtol=0, atol=1e-4)
