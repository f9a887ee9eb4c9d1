"""MME: points worked out by hand, pairing by image, prompts, damaged files."""

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, jsonl, whole_prompt
from tests.eval.checks import has_note, refused
from vila.core.errors import DataError
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.mme import COGNITION, PERCEPTION, Mme, parse_lmms, parse_upstream
from vila.eval.predictions import read_answers

# Answers to both questions of an image, whose truth is Yes and No; how many the original and lmms-eval call right.
EXISTENCE = [
    ("Yes", "No", 2, 2, "casing does not count"),
    ("yes", "no.", 2, 2, "the word opens the answer"),
    ("Y", "N", 0, 2, "letters count for lmms-eval alone"),
    ("yesterday", "snow", 2, 2, "yes and no anywhere within four characters"),
    ("know", "none", 1, 1, "both hold no"),
    (" yes", "  no", 2, 2, "within four characters, white space counted"),
    ("   yes", "", 0, 1, "too far behind white space, which lmms-eval strips; nothing is other"),
    ("I think yes", "not sure", 1, 1, "too late; not opens with no"),
    ("Yes, no", "No, yes", 2, 2, "the first four characters decide"),
    ("YES!", "NO", 2, 2, "casing does not count"),
    (". yes", "n.o", 0, 2, "full stops go for lmms-eval alone"),
    ("ye\ns", "no\tway", 1, 1, "line breaks and tabs become spaces"),
]
# Original: 15 of 24 right, 6 of 12 images: 62.5 + 50. lmms-eval: 20 of 24, 8 of 12: 83.33 + 66.67.
ARTWORK = [("Yes", "Yes", 1, 1, "the same to both questions: 50 + 0")]
CODE = [
    ("yes", "no", 2, 2, "both: with the next 50 + 50"),
    ("maybe", "\uff4e\uff4f", 0, 0, "neither word, nor wide letters"),
]
SCORES = {"upstream": (162.5, 100.0), "lmms-eval": (200.0, 100.0)}
FILES = [("existence", "png", EXISTENCE), ("artwork", "jpg", ARTWORK), ("code_reasoning", "png", CODE)]


def ids(category: str, kind: str, number: int) -> str:
    return f"{category}/{'images/' if category == 'artwork' else ''}{number:04d}.{kind}"


def question(category: str, number: int, place: int) -> str:
    return f"Is this {category} {number}, {place}?"


@pytest.fixture
def folder(tmp_path):
    release = tmp_path / "MME" / "MME_Benchmark_release_version"
    for category, _, rows in FILES:
        own = release / category / ("questions_answers_YN" if category == "artwork" else "")
        own.mkdir(parents=True)
        for number in range(len(rows)):
            # A few questions of the release have two spaces before the request.
            gap = "  " if number == 1 else " "
            lines = [
                f"{question(category, number, place)}{gap}Please answer yes or no.\t{truth}"
                for place, truth in enumerate(("Yes", "No"))
            ]
            (own / f"{number:04d}.txt").write_text("\n".join(lines) + "\n")
    (release / "artwork" / "images").mkdir()
    (release / "eval_tool").mkdir()
    return tmp_path


@pytest.fixture
def rows():
    return [
        {
            "question_id": ids(category, kind, n),
            "prompt": f"{question(category, n, place)}\n{SHORT}",
            "text": pair[place],
        }
        for category, kind, pairs in FILES
        for n, pair in enumerate(pairs)
        for place in (0, 1)
    ]


def answers(rows) -> list[Answer]:
    return [Answer(row["question_id"], row["text"], row.get("prompt", "")) for row in rows]


@pytest.mark.parametrize("protocol", ["upstream", "lmms-eval"])
def test_points_by_hand(folder, rows, protocol):
    result = BENCHMARKS["mme"](folder, 0).score(answers(rows), protocol)
    perception, cognition = SCORES[protocol]
    assert (result.score, result.unit) == (pytest.approx(perception), "points")
    assert result.metrics["perception"] == result.score
    assert result.metrics["cognition"] == pytest.approx(cognition)


def test_a_category_has_its_parts(folder, rows):
    existence = Mme(folder).score(answers(rows)).metrics["by_category"]["existence"]
    expected = {"score": 112.5, "acc": 62.5, "acc_plus": 50, "questions": 24, "images": 12, "other": 8}
    assert existence == pytest.approx(expected)


@pytest.mark.parametrize(("place", "protocol"), [(2, "upstream"), (3, "lmms-eval")])
def test_score_of_each_pair(folder, rows, place, protocol):
    question_scores = Mme(folder).score(answers(rows), protocol).question_scores
    right = [question_scores[n].value + question_scores[n + 1].value for n in range(0, len(question_scores), 2)]
    pairs = [pair for _, _, pairs in FILES for pair in pairs]
    assert [pair[-1] for pair, value in zip(pairs, right, strict=True) if value != pair[place]] == []
    assert {mark.group for mark in question_scores[:2]} == {"existence/0000"}


def test_readings():
    assert [parse_upstream(text) for text in ("Yes.", "none", "", "  no", "   no")] == [
        "yes",
        "no",
        "other",
        "no",
        "other",
    ]
    assert [parse_lmms(text) for text in ("Y.", "n", "x", "  no", "n.o")] == ["yes", "no", "other", "no", "no"]


def test_answers_with_tabs_or_line_breaks_are_noted(folder, rows):
    notes = Mme(folder).score(answers(rows)).notes
    assert has_note(notes, "2 answers", "line breaks", "existence/0011")


def test_lmms_eval_reads_answers_with_line_breaks_as_they_are(folder, rows):
    rows[1]["text"] = "a\n\nno"  # "a no" would be read as no
    question_scores = {
        protocol: Mme(folder).score(answers(rows), protocol).question_scores[1]
        for protocol in ("upstream", "lmms-eval")
    }
    assert [question_scores[protocol].value for protocol in ("upstream", "lmms-eval")] == [1, 0]
    assert question_scores["lmms-eval"].rule == "parsed as other"


def test_pairing_is_independent_of_order(folder, rows):
    shuffled = rows[::2] + rows[1::2]
    result = Mme(folder).score(answers(shuffled))
    assert result.score == pytest.approx(162.5)
    assert has_note(result.notes, "not adjacent", "existence, code_reasoning")
    assert not has_note(Mme(folder).score(answers(rows)).notes, "not adjacent")


def test_images_without_answers_are_not_counted_but_noted(folder, rows):
    result = Mme(folder).score(answers(rows[2:]))
    # Without the first image: 13 of 22 and 5 of 11; artwork's 50 besides.
    assert result.score == pytest.approx(100 * 13 / 22 + 100 * 5 / 11 + 50)
    assert has_note(result.notes, "1 images without answers", "existence/0000")


def test_lmms_eval_counts_an_image_without_answers_as_wrong(folder, rows):
    empty = [{**row, "text": ""} for row in rows[:2]]
    wanted = Mme(folder).score(answers([*empty, *rows[2:]]), "lmms-eval")
    result = Mme(folder).score(answers(rows[2:]), "lmms-eval")
    assert result.metrics["by_category"] == wanted.metrics["by_category"]
    assert (result.score, result.metrics["questions"]) == (wanted.score, wanted.metrics["questions"])


def test_half_a_pair_is_refused(folder, rows):
    with refused("1 images", "existence/0000 ", field="mme"):
        Mme(folder).score(answers(rows[1:]))
    # An even number of rows, which the original would pair wrongly without a word.
    with refused("existence/0000 (1), existence/0001 (1)"):
        Mme(folder).score(answers(rows[1:3] + rows[4:]))
    with refused("existence/0000 (2)"):
        Mme(folder).score(answers([rows[0], rows[0], *rows[2:]]))


def test_a_pair_repeated_counts_twice_or_is_refused(folder, rows):
    again = answers(rows[:2] + rows)
    result = Mme(folder).score(again)
    assert result.metrics["by_category"]["existence"]["score"] == pytest.approx(100 * 17 / 26 + 100 * 7 / 13)
    assert has_note(result.notes, "1 images", "existence/0000")
    assert len({mark.id for mark in result.question_scores}) == len(result.question_scores)
    with refused("1 images", "existence/0000", field="mme"):
        Mme(folder).score(again, "lmms-eval")


def test_missing_categories_are_reported(folder, rows):
    result = Mme(folder).score(answers(rows))
    assert result.metrics["missing_categories"] == [
        name for name in (*PERCEPTION, *COGNITION) if name not in ("existence", "artwork", "code_reasoning")
    ]
    assert has_note(result.notes, "categories", ": count, position")


def test_a_category_of_other_answers_only_is_zero_and_noted(folder, rows):
    for row in rows[-4:]:
        row["text"] = "perhaps"
    result = Mme(folder).score(answers(rows))
    assert result.metrics["cognition"] == 0
    assert has_note(result.notes, "code_reasoning: ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question_id": "existence/9999.png"}, "existence/9999.png"),
        ({"question_id": 7}, "7 ('Is this"),
        ({"question_id": "n161313"}, "n161313"),
        ({"prompt": "What colour is it?"}, "'What colour is it"),
        ({"prompt": ""}, "no prompt"),
        ({"question_id": "eval_tool/0000.png"}, "eval_tool/0000.png"),
    ],
    ids=["unknown image", "number", "another benchmark's", "another question", "no prompt", "no category"],
)
def test_answers_to_no_question_of_mme_are_named(folder, rows, change, named):
    rows[0].update(change)
    with refused("1 answers", named, field="mme"):
        Mme(folder).score(answers(rows))


def test_both_forms_of_the_prompt_find_their_question(folder, rows):
    for row in rows[:4]:
        row["prompt"] = row["prompt"].replace(f"\n{SHORT}", "")
    rows[4]["prompt"] = question("existence", 2, 0) + " Please answer yes or no."
    assert Mme(folder).score(answers(rows)).score == pytest.approx(162.5)


def test_an_original_file_is_parsed(folder, rows, tmp_path):
    path = jsonl(tmp_path / "mme.jsonl", rows)
    assert Mme(folder / "MME").score(read_answers(path).answers).score == pytest.approx(162.5)


@pytest.mark.parametrize(
    "line", ["Is it?  Please answer yes or no.", "Is it?\tMaybe", "a\tb\tYes"], ids=["one", "maybe", "three"]
)
def test_invalid_line_of_a_text_file_is_named(folder, rows, line):
    (folder / "MME" / "MME_Benchmark_release_version" / "existence" / "0003.txt").write_text(f"ok\tYes\n{line}\n")
    with pytest.raises(DataError) as caught:
        Mme(folder).score(answers(rows))
    assert caught.value.file.endswith("0003.txt") and (caught.value.record, caught.value.value) == ("line 2", line)


def test_missing_files_are_named_with_their_source(tmp_path, folder):
    with refused("MME_Benchmark_release_version", "BradyFU"):
        Mme(tmp_path / "nowhere")
    with refused("llava_mme.jsonl", "eval.zip"):
        Mme(folder).items()


@pytest.fixture
def asking(folder, rows):
    asked = [
        {"question_id": row["question_id"], "image": row["question_id"], "text": row["prompt"], "category": "x"}
        for row in rows
    ]
    jsonl(folder / "MME" / "llava_mme.jsonl", asked)
    return folder


def test_whole_prompts_and_items(asking, rows):
    items = Mme(asking).items()
    assert whole_prompt(items[0]) == (
        f"{VICUNA}Is this existence 0, 0?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    assert [(item.id, item.truth, item.group, item.category) for item in items[24:26]] == [
        ("artwork/images/0000.jpg#1", "Yes", "artwork/0000", "artwork"),
        ("artwork/images/0000.jpg#2", "No", "artwork/0000", "artwork"),
    ]
    release = asking / "MME" / "MME_Benchmark_release_version"
    assert items[24].messages[0].parts[0].source == release / "artwork" / "images" / "0000.jpg"
    assert [mark.id for mark in Mme(asking).score(answers(rows)).question_scores] == [item.id for item in items]


def test_limited_benchmark_scores_only_its_questions(asking, rows):
    benchmark = Mme(asking, limit=3)
    assert len(benchmark.items()) == 4  # whole images
    result = benchmark.score(answers(rows[:4]))
    assert result.score == 200
    assert not has_note(result.notes, "images without answers")
