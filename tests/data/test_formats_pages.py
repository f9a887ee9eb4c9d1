"""Pages and pairs: MMC4, COYO, interleaved documents and WebDataset shards."""

import pytest

from tests.data.good import TEXTS, mmc4
from tests.data.shards import PIXELS, TEXT64, refusal, write_lines, write_parquet, write_tar
from vila.core.errors import UnknownNameError
from vila.core.types import Image, Message, Text
from vila.data.formats.base import FORMATS
from vila.data.formats.mmc4 import page_of

A, B, C = Image("a"), Image("b"), Image("c")


def lines(kind, rows, folder, **options):
    return FORMATS[kind].open(write_lines(folder / "d.jsonl", rows), folder, **options)


def shard(kind, members, folder, **options):
    return FORMATS[kind].open(write_tar(folder / "d.tar", members), folder, **options)


def names(sample):
    return [part.text if isinstance(part, Text) else part.source.name for part in sample.messages[0].parts]


def document(images, texts=TEXTS):
    return {
        "text_list": texts,
        "image_info": [{"image_name": f"{n}.jpg", "matched_text_index": place} for n, place in enumerate(images)],
    }


@pytest.mark.parametrize(
    ("sentences", "images", "expected"),
    [
        (["s0", "s1", "s2"], [(2, A), (0, B), (2, C)], (B, Text("s0 s1"), A, C, Text("s2"))),
        (["s0", "s1"], [], (Text("s0 s1"),)),
        (["s0 ", " s1"], [(1, A)], (Text("s0 "), A, Text("s1"))),
        (["s0", "", "s2"], [(1, A), (2, B)], (Text("s0"), A, B, Text("s2"))),
        (["s0", ""], [(1, A)], (Text("s0"),)),
        ([""], [(0, A)], ()),
        (["see <image> here", "s1"], [(1, A)], (Text("see <image> here"), A, Text("s1"))),
    ],
)
def test_images_go_immediately_before_their_sentences(sentences, images, expected):
    assert page_of(sentences, images) == expected


def _original(sentences, images):
    """Text of the original code for a document: markers are inserted and spaces next to them removed."""
    words = [
        "".join("<image>" for place, _ in images if place == number) + sentence.replace("<image>", "<IMAGE>")
        for number, sentence in enumerate(sentences)
    ]
    return " ".join(words).replace(" <image>", "<image>").replace("<image> ", "<image>")


@pytest.mark.parametrize("seed", range(40))
def test_a_page_equals_that_of_the_upstream_algorithm(seed):
    import random

    chance = random.Random(seed)
    sentences = [chance.choice(["a", "b c", "", " d", "e ", "  ", " "]) for _ in range(chance.randint(1, 6))]
    images = [(chance.randrange(len(sentences)), Image(str(n))) for n in range(chance.randint(0, 5))]
    written = "".join("<image>" if isinstance(part, Image) else part.text for part in page_of(sentences, images))
    expected = _original(sentences, images)
    while expected.endswith("<image>"):
        expected = expected.removesuffix("<image>")
    assert written == expected


def test_the_first_six_images_are_kept_in_file_order(tmp_path):
    sample = lines("mmc4", [document([2, 0, 2, 1, 1, 0, 0, 2])], tmp_path)[0]
    assert [str(image.source.name) for image in sample.media] == ["1.jpg", "5.jpg", "3.jpg", "4.jpg", "0.jpg", "2.jpg"]
    assert sample.template == "page"
    assert len(sample.messages) == 1


def test_forty_images_and_none(tmp_path):
    rows = [document([n % 3 for n in range(40)]), {"text_list": TEXTS}, document([])]
    source = lines("mmc4", rows, tmp_path)
    assert [len(sample.media) for sample in source] == [6, 0, 0]
    assert source[1].messages == (Message.of("user", "s0 s1 s2"),)
    assert len(lines("mmc4", rows, tmp_path, max_images=40)[0].media) == 40


def test_without_images_drop_removes_documents_without_images(tmp_path):
    rows = [document([]), {"id": "a", **document([1])}, {"text_list": TEXTS}, {"id": "b", **document([0])}]
    source = lines("mmc4", rows, tmp_path, without_images="drop")
    assert [sample.id for sample in source] == ["a", "b"]
    weak = [{**row, "image_info": [{**info, "matched_sim": 0.2} for info in row.get("image_info", [])]} for row in rows]
    assert len(lines("mmc4", weak, tmp_path, without_images="drop", min_similarity=0.1)) == 2
    assert len(lines("mmc4", weak, tmp_path, without_images="drop", min_similarity=0.3)) == 0


def test_images_are_selected_and_placed_by_similarity(tmp_path):
    row = document([0, 2])
    row["similarity_matrix"] = [[0.1, 0.3, 0.2], [0.2, 0.1, 0.25]]
    assert names(lines("mmc4", [row], tmp_path, place="similarity")[0]) == ["s0", "0.jpg", "s1", "1.jpg", "s2"]
    assert names(lines("mmc4", [row], tmp_path, min_similarity=0.2)[0]) == ["s0 s1", "1.jpg", "s2"]
    row["image_info"][0]["matched_sim"] = 0.9
    assert names(lines("mmc4", [row], tmp_path, min_similarity=0.2)[0]) == ["0.jpg", "s0 s1", "1.jpg", "s2"]


def test_images_inside_records_and_shards_are_read_when_needed(tmp_path):
    assert lines("mmc4", [mmc4(image_base64=TEXT64)], tmp_path)[0].media[0].source.read() == PIXELS
    bad = lines("mmc4", [mmc4(image_base64="%%%")], tmp_path)[0].media[0].source
    error = refusal(bad.read)
    assert (error.record, error.field, error.value) == (0, "image_info[0].image_base64", "%%%")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"image_info": []}, "text_list"),
        ({"text_list": ["a", 3]}, "text_list[1]"),
        (document([3]), "image_info[0].matched_text_index"),
        (document([True]), "image_info[0].matched_text_index"),
        ({**document([0]), "image_info": {}}, "image_info"),
        ({**document([0]), "image_info": 0}, "image_info"),
        ({**document([0]), "image_info": ["p.png"]}, "image_info[0]"),
        ({**document([0]), "image_info": [{"matched_text_index": 0}]}, "image_info[0]"),
        ({"text_list": ["", " "]}, None),
        ({"text_list": [""]}, "text_list"),
    ],
)
def test_a_wrong_document_is_an_error_with_its_field(row, field, tmp_path):
    source = lines("mmc4", [row], tmp_path)
    if field is None:
        assert source[0].messages[0].text == "  "
        return
    error = refusal(lambda: source[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.jsonl"), 0, field)


@pytest.mark.parametrize("matrix", [None, [], 3, {}, [3], [[0.1]], [[0.1, "x", None]], [[True, 0, 0]]])
def test_missing_or_invalid_similarities_are_an_error(matrix, tmp_path):
    row = {**document([0]), "similarity_matrix": matrix}
    error = refusal(lambda: lines("mmc4", [row], tmp_path, place="similarity")[0])
    assert (error.record, error.field) == (0, "similarity_matrix[0]")


def test_a_missing_member_is_an_error(tmp_path):
    source = shard("mmc4", [("k.1.jpg", PIXELS), ("k.json", mmc4(file="0.jpg"))], tmp_path)
    error = refusal(lambda: source[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.tar"), "key k", "image_info[0].file")
    assert error.value == "0.jpg" and "1.jpg" in error.expected
    source = shard("vflan", [("k.json", {"question": "q", "answer": "a", "image": ["0.jpg"]})], tmp_path)
    assert refusal(lambda: source[0]).field == "image[0]"


def test_a_pair_is_a_page_of_image_and_text(tmp_path):
    sample = shard("coyo", [("k.webp", PIXELS), ("k.json", {"url": "u"}), ("k.txt", "A cat.\n")], tmp_path)[0]
    assert sample.template == "page" and sample.id == "d/k"
    (message,) = sample.messages
    assert message.role == "user" and message.text == "A cat.\n" and isinstance(message.parts[0], Image)


def test_columns_of_pairs_may_have_other_names(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"pic": {"bytes": PIXELS, "path": "x"}, "caption": "c", "alt": "t"}])
    assert FORMATS["coyo"].open(path, tmp_path, image="pic")[0].messages[0].text == "c"
    sample = FORMATS["coyo"].open(path, tmp_path, image="pic", text="alt")[0]
    assert sample.messages[0].text == "t" and sample.media[0].source.read() == PIXELS
    error = refusal(lambda: FORMATS["coyo"].open(path, tmp_path, image="pic", text="nope")[0])
    assert (error.file, error.record, error.field) == (str(path), 0, "nope")


@pytest.mark.parametrize("kind", ["coyo", "webdataset"])
@pytest.mark.parametrize(
    ("members", "field"),
    [
        ([("k.jpg", PIXELS), ("k.txt", " ")], "txt"),
        ([("k.txt", "t")], None),
        ([("k.jpg", PIXELS)], "text or caption"),
        ([("k.jpg", PIXELS), ("k.json", {"text": 3})], "text"),
        ([("k.jpg", PIXELS), ("k.txt", b"\xff")], "member txt"),
        ([("k.0.jpg", PIXELS), ("k.1.jpg", PIXELS), ("k.txt", "t")], None),
        ([("k.jpg", PIXELS), ("k.json", "{")], None),
        ([("k.jpg", PIXELS), ("k.txt", "t"), ("k.json", "")], None),
    ],
)
def test_a_wrong_pair_is_an_error_with_its_field(kind, members, field, tmp_path):
    error = refusal(lambda: shard(kind, members, tmp_path)[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.tar"), "key k", field)


def test_a_shard_of_captions_is_question_and_answer_or_a_page(tmp_path):
    path = write_tar(tmp_path / "d.tar", [("k.jpg", PIXELS), ("k.txt", "A cat.")])
    plain = FORMATS["webdataset"].open(path, tmp_path)[0]
    image = plain.media[0]
    assert plain.messages == (Message.of("user", image, "\n"), Message.of("assistant", "A cat."))
    assert plain.template is None
    assert FORMATS["webdataset"].open(path, tmp_path, template="caption")[0].template == "caption"
    page = FORMATS["webdataset"].open(path, tmp_path, template="page")[0]
    assert (page.messages, page.template) == ((Message.of("user", image, "A cat."),), "page")
    with pytest.raises(UnknownNameError):
        FORMATS["webdataset"].open(path, tmp_path, template="pge")


def test_a_shard_of_videos_and_conversations(tmp_path):
    asked = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "file": "1.jpg"},
        {"type": "image", "file": "k.0.jpg"},
    ]
    chat = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Two."}]}
    members = [("k.0.jpg", b"0"), ("k.1.jpg", b"1"), ("k.json", chat), ("v.mp4", b"video"), ("v.txt", "It runs.")]
    images, video = shard("webdataset", members, tmp_path, num_frames=4)
    assert [image.source.read() for image in images.media] == [b"1", b"0"]
    assert video.media[0].num_frames == 4 and video.media[0].source.read() == b"video"
    assert video.messages[1] == Message.of("assistant", "It runs.")


def test_an_interleaved_page_keeps_its_order(tmp_path):
    row = {"texts": ["a", "b", None, "c", None], "images": [None, None, "p.png", None, "q.png"]}
    assert names(lines("interleaved", [row], tmp_path)[0]) == ["a\n\nb", "p.png", "c", "q.png"]
    assert names(lines("interleaved", [row], tmp_path, joiner=" ", max_images=1)[0]) == ["a b", "p.png", "c"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"texts": ["a"], "images": []}, "images"),
        ({"texts": ["a"], "images": ["p"]}, "texts[0]"),
        ({"texts": [None], "images": [None]}, "texts[0]"),
        ({"texts": ["a", 3], "images": [None, None]}, "texts[1]"),
        ({"texts": ["a", None], "images": [None, 3]}, "images[1]"),
        ({"texts": [None], "images": ["p.png"]}, "texts"),
        ({"texts": ["a"]}, "images"),
    ],
)
def test_a_wrong_page_is_an_error_with_its_field(row, field, tmp_path):
    error = refusal(lambda: lines("interleaved", [row], tmp_path)[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.jsonl"), 0, field)
