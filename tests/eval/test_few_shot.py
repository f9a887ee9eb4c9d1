"""Few-shot examples: their choice, their answers, and no example with the image of the question."""

import json
from collections import Counter

import pytest

from tests import tiny
from tests.eval.checks import refused
from vila.core.errors import ConfigError
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import Answer, Benchmark, Item
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.few_shot import few_shot, few_shot_variants, wrong_answers

TEST = [["what shape is in the image?", "circle", 0], ["is there a red shape?", "no", 0], ["what color?", "red", 1]]
TRAIN = [
    row
    for n in range(12)
    for row in (
        ["what shape is in the image?", ("circle", "triangle", "rectangle")[n % 3], n],
        ["is there a red shape?", ("yes", "no")[n % 2], n],
    )
]


class OneQuestion(Benchmark):
    name = "one"
    max_new_tokens = 4

    def __init__(self, item):
        self.item = item

    def load_items(self):
        return [self.item]

    def score(self, answers, protocol="upstream"):
        raise NotImplementedError


@pytest.fixture
def folder(tmp_path):
    for split, rows, first in (("test", TEST, 0), ("train", TRAIN, 100)):
        (tmp_path / split / "images").mkdir(parents=True)
        for number in {row[2] for row in rows}:
            (tmp_path / split / "images" / f"{number}.png").write_bytes(tiny.image(first + number).source)
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def pool(folder):
    return EasyVqa(folder, split="train").items()


def examples(item):
    """(image, question, answer) of each example, and the question that is asked."""
    *before, last = item.messages
    shots = [
        (user.parts[0].source, user.text, assistant.text)
        for user, assistant in zip(before[::2], before[1::2], strict=True)
    ]
    assert [message.role for message in before] == ["user", "assistant"] * len(shots)
    return shots, last


def test_examples_come_before_the_question_with_their_true_answers(folder, pool):
    truths = {(i.messages[0].parts[0].source, i.messages[0].text): i.truth for i in pool}
    plain = EasyVqa(folder).items()
    for shots in (1, 2, 4):
        items = few_shot(EasyVqa(folder), shots, pool).items()
        for item, bare in zip(items, plain, strict=True):
            found, last = examples(item)
            assert len({image for image, _, _ in found}) == shots
            assert all(truths[image, question] == answer for image, question, answer in found)
            assert (last, item.truth, item.id, item.group) == (bare.messages[-1], bare.truth, bare.id, bare.group)


def test_the_choice_depends_on_seed_and_image_alone(folder, pool):
    def chosen(seed=0, limit=0):
        return [item.messages for item in few_shot(EasyVqa(folder, limit), 2, pool, seed).items()]

    assert chosen() == chosen()
    assert chosen(limit=1) == chosen()[:2]
    assert any(chosen(seed) != chosen() for seed in (1, 2))
    first, second, third = chosen()
    assert first[:4] == second[:4]  # one image: the engine computes the examples once
    assert first[:4] != third[:4]


def test_shuffled_answers_are_all_wrong_and_nothing_else_changes(folder, pool):
    truths = {(i.messages[0].parts[0].source, i.messages[0].text): i.truth for i in pool}
    true, false = (few_shot(EasyVqa(folder), 4, pool, 0, shuffled) for shuffled in (False, True))
    assert (true.name, false.name) == ("easy_vqa_4shot", "easy_vqa_4shot_shuffled")
    for one, other in zip(true.items(), false.items(), strict=True):
        (right, asked), (wrong, last) = examples(one), examples(other)
        assert [shot[:2] for shot in right] == [shot[:2] for shot in wrong]
        assert asked == last
        for image, question, answer in wrong:
            assert answer != truths[image, question]
            category = {i.truth for i in pool if i.messages[0].text == question}
            assert answer in category  # another answer to a question of this kind


def test_wrong_answers_are_the_pools_own_permuted(pool):
    wrong = wrong_answers(pool)
    assert all(wrong[item.id] != item.truth for item in pool)
    for category in {item.category for item in pool}:
        items = [item for item in pool if item.category == category]
        assert Counter(wrong[item.id] for item in items) == Counter(item.truth for item in items)


@pytest.mark.parametrize("truths", ["yyyyn", "yyn", "yn", "yyyynnab", " y,y,n"])
def test_an_answer_that_is_over_half_is_wrong_everywhere_too(truths):
    answers = truths.split(",") if "," in truths else list(truths)
    items = [Item(str(n), (Message.of("user", "q"),), answer, str(n)) for n, answer in enumerate(answers)]
    wrong = wrong_answers(items)
    assert all(wrong[item.id].strip() != item.truth.strip() for item in items)


def test_a_pool_with_one_answer_cannot_be_shuffled():
    items = [Item(str(n), (Message.of("user", "q"),), "yes", str(n), category="k") for n in range(3)]
    with refused("'k'", value="yes"):
        wrong_answers(items)


def test_an_items_own_image_is_never_shown_before(folder):
    # The pool is the scored set; one of its images exists a second time under another name.
    (folder / "test" / "images" / "2.png").write_bytes((folder / "test" / "images" / "0.png").read_bytes())
    rows = [*TEST, ["what color?", "red", 2]]
    (folder / "test" / "questions.json").write_text(json.dumps(rows))
    benchmark = EasyVqa(folder)
    for item in few_shot(benchmark, 1, benchmark.items(), seed=5).items():
        ((image, _, _),), last = examples(item)
        assert image.read_bytes() != last.parts[0].source.read_bytes()
    with refused("only 1", "'0'", expected="2 examples"):
        few_shot(benchmark, 2, benchmark.items()).items()


def test_images_in_memory_and_missing_ones_are_compared_too(tmp_path):
    same = tiny.image(1)
    asked = Item("a", (Message.of("user", same, "q"),), "x", "a")
    pool = [
        Item("b", (Message.of("user", Image(same.source), "q"),), "x", "b"),
        Item("c", (Message.of("user", Image(tmp_path / "none.png"), "q"),), "y", "c"),
    ]

    (item,) = few_shot(OneQuestion(asked), 1, pool).items()
    assert item.messages[0].parts[0].source == tmp_path / "none.png"


def test_a_system_message_stays_first(pool):
    asked = Item("a", (Message.of("system", "s"), Message.of("user", "q")), "x", "a", prompt="as asked")

    (item,) = few_shot(OneQuestion(asked), 2, pool).items()
    assert [message.role for message in item.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert item.prompt == "as asked"


def test_scores_are_the_benchmarks_own(folder, pool):
    benchmark = few_shot(EasyVqa(folder), 2, pool, 7, shuffled=True)
    answers = [Answer(item.id, "circle") for item in benchmark.items()]
    result = benchmark.score(answers)
    assert result.score == EasyVqa(folder).score(answers).score == pytest.approx(100 / 3)
    assert {k: result.metrics[k] for k in ("shots", "shot_seed", "shot_answers")} == {
        "shots": 2,
        "shot_seed": 7,
        "shot_answers": "wrong",
    }
    assert benchmark.max_new_tokens == EasyVqa.max_new_tokens


def test_variants_by_number_with_true_and_with_wrong_answers(folder):
    benchmark = EasyVqa(folder)
    names = [variant.name for variant in few_shot_variants(benchmark, "easy_vqa", folder, [0, 2, 4])]
    assert names == [
        "easy_vqa",
        "easy_vqa_2shot",
        "easy_vqa_2shot_shuffled",
        "easy_vqa_4shot",
        "easy_vqa_4shot_shuffled",
    ]
    assert few_shot_variants(benchmark, "pope", folder, [0]) == [benchmark]
    with refused("easy_vqa", field="pope", hint="use --num-fewshot 0"):
        few_shot_variants(benchmark, "pope", folder, [0, 2])


def test_impossible_numbers_and_pools_are_refused(folder, pool):
    with refused(error=ConfigError, field="k", value=-1):
        few_shot(EasyVqa(folder), -1, pool)
    with refused(field="easy_vqa"):
        few_shot(EasyVqa(folder), 1, [Item("a", (Message.of("user", "q"),), " ", "a")])
    benchmark = EasyVqa(folder)
    assert few_shot(benchmark, 0, pool) is benchmark


def test_a_real_engine_sees_the_examples(folder, pool):
    engine = Engine(*tiny.vila(max_position_embeddings=1024))
    bare, seen = (
        engine.generate_batch([item.messages for item in few_shot(EasyVqa(folder), k, pool).items()], max_new_tokens=8)
        for k in (0, 2)
    )
    assert bare != seen
