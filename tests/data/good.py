"""Small valid data in every format and file type, and the expected first sample."""

from tests.data.shards import PIXELS, TEXT64, write_lines, write_list, write_parquet, write_tar
from vila.core.types import Message

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
LLAVA = [
    {"id": "a", "image": "p.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"id": 7, "video": "v.mp4", "conversations": [
        {"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "A cat."}]},
]  # fmt: skip
MESSAGES = [
    {"id": "a", "messages": [
        {"role": "user", "content": [{"type": "image", "path": "p.png"}, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]},
    {"messages": CHAT},
    {"messages": [
        {"role": "user", "content": [{"type": "video", "path": "v.mp4", "num_frames": 4}]},
        {"role": "assistant", "content": "A cat."}], "template": "page"},
    {"images": ["p.png"], "videos": ["v.mp4"], "messages": [{"role": "user", "content": "<image> in <video>"}],
     "branches": [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "A cat."}]]},
    {"image": "p.png", "system": "s", "conversations": [
        {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]},
]  # fmt: skip
TEXTS = ["s0", "s1", "s2"]


def mmc4(**names):
    return {
        "text_list": TEXTS,
        "image_info": [{"matched_text_index": 2, "matched_sim": 0.2, **names}],
        "similarity_matrix": [[0.1, 0.3, 0.2]],
    }


VFLAN = [
    {"id": "a", "question": "<image>\nWhat?  ", "answer": "A cat.\n", "image": ["p.png"]},
    {"question": "Hi", "answer": "Ho", "image": []},
    {"question": "Hi again", "answer": "Ho", "image": TEXT64},
]
FLAN = [
    {"id": "a", "question": "Hi", "answer": "Ho"},
    {"inputs": "Hi ", "targets": "Ho"},
    {"question": "Q", "answer": "A"},
]
PAGES = [
    {"id": "a", "texts": [None, "s0", None, "s1"], "images": ["p.png", None, "q.png", None]},
    {"texts": ["only", "text"], "images": [None, None]},
    {"texts": ["x", None], "images": [None, "p.png"]},
]
CAULDRON = [
    {"id": "a", "images": ["p.png"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "s"}]},
    {"images": [], "texts": [{"user": "Hi", "assistant": "Ho"}, {"user": "And?", "assistant": "So."}]},
    {"images": ["p.png", "q.png"], "texts": [{"user": "Hi", "assistant": "Ho"}]},
]
CLIPS = [
    {"id": "a", "video": "v.mp4", "conversations": [
        {"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    {"video_id": "w", "q": "<image>\nWhat?", "a": "A dog."},
    {"video": "x/y.mp4", "fps": 2, "frame_count": 9, "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]  # fmt: skip


def with_bytes(rows):
    """The records with images as bytes, for parquet."""
    return [{**row, "images": [image and {"bytes": PIXELS, "path": image} for image in row["images"]]} for row in rows]


GOOD = {
    ("messages", "jsonl"): lambda to: write_lines(to / "d.jsonl", MESSAGES),
    ("messages", "json"): lambda to: write_list(to / "d.json", MESSAGES),
    ("messages", "parquet"): lambda to: write_parquet(
        to / "d.parquet",
        [{"id": str(n), "images": [{"bytes": PIXELS, "path": None}], "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]} for n in range(3)],
    ),
    ("llava_json", "json"): lambda to: write_list(to / "d.json", LLAVA, indent=1),
    ("llava_json", "jsonl"): lambda to: write_lines(to / "d.jsonl", LLAVA),
    ("llava_json_v15", "json"): lambda to: write_list(to / "d.json", LLAVA),
    ("mmc4", "jsonl"): lambda to: write_lines(
        to / "d.jsonl",
        [mmc4(image_base64=TEXT64), mmc4(image_name="p.png"), {"text_list": TEXTS, "image_info": []}],
    ),
    ("mmc4", "tar"): lambda to: write_tar(
        to / "d.tar",
        [("a.0.jpg", PIXELS), ("a.json", mmc4(file="0.jpg")), ("b.0.jpg", PIXELS),
         ("b.json", mmc4(image_name="b.0.jpg")), ("c.json", {"text_list": TEXTS})],
    ),
    ("coyo", "tar"): lambda to: write_tar(
        to / "d.tar",
        [(f"{key}.{kind}", content) for key in "abc"
         for kind, content in (("jpg", PIXELS), ("json", {"url": "u"}), ("txt", "A cat."))],
    ),
    ("coyo", "parquet"): lambda to: write_parquet(
        to / "d.parquet", [{"image": PIXELS, "text": f"text {n}", "extra": 1.0} for n in range(3)]
    ),
    ("webdataset", "tar"): lambda to: write_tar(
        to / "d.tar",
        [("a.png", PIXELS), ("a.txt", "A cat."),
         ("b.0.jpg", PIXELS), ("b.json", {"messages": [
             {"role": "user", "content": [{"type": "image", "file": "0.jpg"}, "What?"]},
             {"role": "assistant", "content": "A cat."}]}),
         ("c.0.jpg", PIXELS), ("c.json", {"question": "What?", "answer": "A cat.", "image": ["0.jpg"]}),
         ("d.mp4", b"clip"), ("d.json", {"caption": "A cat runs."})],
    ),
    ("vflan", "jsonl"): lambda to: write_lines(to / "d.jsonl", VFLAN),
    ("vflan", "tar"): lambda to: write_tar(
        to / "d.tar",
        [("a.0.jpg", PIXELS), ("a.json", {**VFLAN[0], "image": ["0.jpg"]}), ("b.json", VFLAN[1]), ("c.json", VFLAN[2])],
    ),
    ("vflan", "parquet"): lambda to: write_parquet(
        to / "d.parquet",
        [{"instruction": "Look. ", "inputs": f"What {n}?", "outputs": "A cat.", "image_base64_str": [TEXT64]}
         for n in range(3)],
    ),
    ("flan", "jsonl"): lambda to: write_lines(to / "d.jsonl", FLAN),
    ("flan", "parquet"): lambda to: write_parquet(
        to / "d.parquet", [{"inputs": f"Hi {n}", "targets": "Ho"} for n in range(3)]
    ),
    ("interleaved", "jsonl"): lambda to: write_lines(to / "d.jsonl", PAGES),
    ("interleaved", "parquet"): lambda to: write_parquet(to / "d.parquet", with_bytes(PAGES)),
    ("cauldron", "jsonl"): lambda to: write_lines(to / "d.jsonl", CAULDRON),
    ("cauldron", "parquet"): lambda to: write_parquet(to / "d.parquet", with_bytes(CAULDRON)),
    ("video_json", "jsonl"): lambda to: write_lines(to / "d.jsonl", CLIPS),
}  # fmt: skip
"""(format, file type) -> function that writes at least three samples into a folder and returns the path."""

RECORDS = {
    "messages": MESSAGES, "llava_json": LLAVA, "llava_json_v15": LLAVA, "flan": FLAN, "interleaved": PAGES,
    "vflan": VFLAN, "cauldron": CAULDRON, "video_json": CLIPS,
    "mmc4": [mmc4(image_base64=TEXT64), mmc4(image_name="p.png")],
}  # fmt: skip
"""The same as JSON records, for the formats that read JSON lines."""

ANSWERED = Message.of("assistant", "A cat.")
