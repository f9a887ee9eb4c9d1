"""Pages and pairs: MMC4, COYO, interleaved documents and WebDataset shards."""

import pytest

from tests.data.good import TEXTS, mmc4
from tests.data.shards import PIXELS, TEXT64, write_lines, write_parquet, write_tar
from vila.core.errors import DataError, UnknownNameError
from vila.core.types import Image, Message, Text
from vila.data.formats.mmc4 import page_of
from vila.data.formats.protocol import FORMATS

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
def test_pictures_stand_immediately_before_their_sentences(sentences, images, expected):
    assert page_of(sentences, images) == expected


def _original(sentences, images):
    """The original's text for a document: markers are joined in and the spaces beside them replaced away."""
    words = [
        "".join("<image>" for place, _ in images if place == number) + sentence.replace("<image>", "<IMAGE>")
        for number, sentence in enumerate(sentences)
    ]
    return " ".join(words).replace(" <image>", "<image>").replace("<image> ", "<image>")


@pytest.mark.parametrize("seed", range(40))
def test_a_page_reads_as_the_original_writes_it(seed):
    import random

    chance = random.Random(seed)
    sentences = [chance.choice(["a", "b c", "", " d", "e ", "  ", " "]) for _ in range(chance.randint(1, 6))]
    images = [(chance.randrange(len(sentences)), Image(str(n))) for n in range(chance.randint(0, 5))]
    written = "".join("<image>" if isinstance(part, Image) else part.text for part in page_of(sentences, images))
    expected = _original(sentences, images)
    while expected.endswith("<image>"):
        expected = expected.removesuffix("<image>")
    assert written == expected


def test_the_first_six_pictures_are_kept_in_file_order(tmp_path):
    sample = lines("mmc4", [document([2, 0, 2, 1, 1, 0, 0, 2])], tmp_path)[0]
    assert [str(image.source.name) for image in sample.media] == ["1.jpg", "5.jpg", "3.jpg", "4.jpg", "0.jpg", "2.jpg"]
    assert sample.template == "page"
    assert len(sample.messages) == 1


def test_forty_pictures_and_none(tmp_path):
    rows = [document([n % 3 for n in range(40)]), {"text_list": TEXTS}, document([])]
    source = lines("mmc4", rows, tmp_path)
    assert [len(sample.media) for sample in source] == [6, 0, 0]
    assert source[1].messages == (Message.of("user", "s0 s1 s2"),)
    assert len(lines("mmc4", rows, tmp_path, max_images=40)[0].media) == 40


def test_documents_without_pictures_are_left_out_when_asked(tmp_path):
    rows = [document([]), {"id": "a", **document([1])}, {"text_list": TEXTS}, {"id": "b", **document([0])}]
    source = lines("mmc4", rows, tmp_path, without_images="drop")
    assert [sample.id for sample in source] == ["a", "b"]
    weak = [{**row, "image_info": [{**info, "matched_sim": 0.2} for info in row.get("image_info", [])]} for row in rows]
    assert len(lines("mmc4", weak, tmp_path, without_images="drop", min_similarity=0.1)) == 2
    assert len(lines("mmc4", weak, tmp_path, without_images="drop", min_similarity=0.3)) == 0


def test_pictures_are_chosen_and_placed_by_similarity(tmp_path):
    row = document([0, 2])
    row["similarity_matrix"] = [[0.1, 0.3, 0.2], [0.2, 0.1, 0.25]]
    assert names(lines("mmc4", [row], tmp_path, place="similarity")[0]) == ["s0", "0.jpg", "s1", "1.jpg", "s2"]
    assert names(lines("mmc4", [row], tmp_path, min_similarity=0.2)[0]) == ["s0 s1", "1.jpg", "s2"]
    row["image_info"][0]["matched_sim"] = 0.9
    assert names(lines("mmc4", [row], tmp_path, min_similarity=0.2)[0]) == ["0.jpg", "s0 s1", "1.jpg", "s2"]


def test_pictures_inside_records_and_shards_are_read_late(tmp_path):
    assert lines("mmc4", [mmc4(image_base64=TEXT64)], tmp_path)[0].media[0].source.read() == PIXELS
    bad = lines("mmc4", [mmc4(image_base64="%%%")], tmp_path)[0].media[0].source
    with pytest.raises(DataError, match=r"d.jsonl row 1 image_info\[0\].image_base64: not base64"):
        bad.read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_info": []}, "expected a document with a list of texts"),
        (document([3]), r"image_info\[0\]: matched_text_index is 3, the document has 3 texts"),
        ({**document([0]), "image_info": [{"matched_text_index": 0}]}, "has none of image_base64, file, image_name"),
        ({"text_list": ["", " "]}, None),
        ({"text_list": [""]}, "the document has no text"),
    ],
)
def test_a_wrong_document_is_named(row, message, tmp_path):
    source = lines("mmc4", [row], tmp_path)
    if message is None:
        assert source[0].messages[0].text == "  "
        return
    with pytest.raises(DataError, match=f"d.jsonl row 1.*{message}"):
        source[0]


def test_similarities_that_are_missing_are_named(tmp_path):
    with pytest.raises(DataError, match="row 1: similarity_matrix has no row of 3 for picture 0"):
        lines("mmc4", [document([0])], tmp_path, place="similarity")[0]


def test_a_member_that_is_missing_is_named(tmp_path):
    source = shard("mmc4", [("k.1.jpg", PIXELS), ("k.json", mmc4(file="0.jpg"))], tmp_path)
    with pytest.raises(DataError, match=r"d.tar sample 'k': member '0.jpg' is missing; the sample has 1.jpg"):
        source[0]
    source = shard("vflan", [("k.json", {"question": "q", "answer": "a", "image": ["0.jpg"]})], tmp_path)
    with pytest.raises(DataError, match=r"member '0.jpg' is missing; the sample has none"):
        source[0]


def test_a_pair_is_a_page_of_picture_and_text(tmp_path):
    sample = shard("coyo", [("k.webp", PIXELS), ("k.json", {"url": "u"}), ("k.txt", "A cat.\n")], tmp_path)[0]
    assert sample.template == "page" and sample.id == "d/k"
    (message,) = sample.messages
    assert message.role == "user" and message.text == "A cat.\n" and isinstance(message.parts[0], Image)


def test_columns_of_pairs_may_have_other_names(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"pic": {"bytes": PIXELS, "path": "x"}, "caption": "c", "alt": "t"}])
    assert FORMATS["coyo"].open(path, tmp_path, image="pic")[0].messages[0].text == "c"
    sample = FORMATS["coyo"].open(path, tmp_path, image="pic", text="alt")[0]
    assert sample.messages[0].text == "t" and sample.media[0].source.read() == PIXELS
    with pytest.raises(DataError, match=r"d.parquet row 1: has no 'nope'; it has 'pic'"):
        FORMATS["coyo"].open(path, tmp_path, image="pic", text="nope")[0]


@pytest.mark.parametrize("kind", ["coyo", "webdataset"])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.jpg", PIXELS), ("k.txt", " ")], "sample 'k': the text is empty"),
        ([("k.txt", "t")], "sample 'k': no picture"),
        ([("k.jpg", PIXELS)], "sample 'k': has no 'text' or 'caption'"),
        ([("k.jpg", PIXELS), ("k.txt", b"\xff")], "member 'txt' is not UTF-8"),
        ([("k.0.jpg", PIXELS), ("k.1.jpg", PIXELS), ("k.txt", "t")], "2 pictures"),
        ([("k.jpg", PIXELS), ("k.json", "{")], "sample 'k': not JSON"),
        ([("k.jpg", PIXELS), ("k.txt", "t"), ("k.json", "")], "sample 'k': not JSON"),
    ],
)
def test_a_wrong_pair_is_named(kind, members, message, tmp_path):
    with pytest.raises(DataError, match=f"d.tar.*{message}"):
        shard(kind, members, tmp_path)[0]


def test_a_shard_of_captions_is_question_and_answer_or_a_page(tmp_path):
    path = write_tar(tmp_path / "d.tar", [("k.jpg", PIXELS), ("k.txt", "A cat.")])
    plain = FORMATS["webdataset"].open(path, tmp_path)[0]
    image = plain.media[0]
    assert plain.messages == (Message.of("user", image, "\n"), Message.of("assistant", "A cat."))
    assert plain.template is None
    assert FORMATS["webdataset"].open(path, tmp_path, template="caption")[0].template == "caption"
    page = FORMATS["webdataset"].open(path, tmp_path, template="page")[0]
    assert (page.messages, page.template) == ((Message.of("user", image, "A cat."),), "page")
    with pytest.raises(UnknownNameError, match="unknown template 'pge'"):
        FORMATS["webdataset"].open(path, tmp_path, template="pge")


def test_a_shard_of_clips_and_conversations(tmp_path):
    asked = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "file": "1.jpg"},
        {"type": "image", "file": "k.0.jpg"},
    ]
    chat = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Two."}]}
    members = [("k.0.jpg", b"0"), ("k.1.jpg", b"1"), ("k.json", chat), ("v.mp4", b"clip"), ("v.txt", "It runs.")]
    pictures, clip = shard("webdataset", members, tmp_path, num_frames=4)
    assert [image.source.read() for image in pictures.media] == [b"1", b"0"]
    assert clip.media[0].num_frames == 4 and clip.media[0].source.read() == b"clip"
    assert clip.messages[1] == Message.of("assistant", "It runs.")


def test_an_interleaved_page_keeps_its_order(tmp_path):
    row = {"texts": ["a", "b", None, "c", None], "images": [None, None, "p.png", None, "q.png"]}
    assert names(lines("interleaved", [row], tmp_path)[0]) == ["a\n\nb", "p.png", "c", "q.png"]
    assert names(lines("interleaved", [row], tmp_path, joiner=" ", max_images=1)[0]) == ["a b", "p.png", "c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": ["a"], "images": []}, "1 texts beside 0 images"),
        ({"texts": ["a"], "images": ["p"]}, "place 1: exactly one of text and image"),
        ({"texts": [None], "images": [None]}, "place 1: exactly one of text and image"),
        ({"texts": [None], "images": ["p.png"]}, "the page has no text"),
        ({"texts": ["a"]}, "'images' is no list"),
    ],
)
def test_a_wrong_page_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=f"d.jsonl row 1.*{message}"):
        lines("interleaved", [row], tmp_path)[0]
