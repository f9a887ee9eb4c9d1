"""VQA normalization and soft accuracy; expected values worked out from the public code."""

import pytest

from vila.eval.metrics.vqa import (
    lmms_accuracy,
    most_frequent,
    normalize_evalai,
    normalize_lmms,
    normalize_official,
    official_accuracy,
    soft_accuracy,
)

EVALAI = [
    ("Yes", "yes", "small letters"),
    ("yes.", "yes", "a period before no digit goes"),
    ("u.s.a.", "usa", "every such period goes"),
    ("5.99.", "5.99", "a period before a digit stays"),
    (".5", ".5", "also without a digit before it"),
    ("10.", "10", "the look-behind is mistyped: a digit before it does not keep it"),
    ("." * 40, "." * 8, "32 periods at most"),
    ("1,000", "1000", "commas go first"),
    ("hello,world", "helloworld", "also between words"),
    ("what?", "what", "question marks go first"),
    ("girl's", "girl 's", "'s becomes a word"),
    ("JOHN'S", "john 's", "after small letters"),
    ("two dogs", "2 dogs", "number words become digits"),
    ("None", "0", "none is zero"),
    ("Ten", "10", "up to ten"),
    ("eleven", "eleven", "and no further"),
    ("a cat and the dog", "cat and dog", "articles go"),
    ("the", "", "also when nothing else is left"),
    ("dont know", "don't know", "contractions get their apostrophe"),
    ("yall two", "y'all 2", "from the table"),
    ("Im here", "im here", "the table's capitals never meet small letters"),
    ("red/blue", "red blue", "punctuation between letters becomes a space"),
    ("red / blue", "red blue", "beside a space it goes"),
    ("a-b c- d", "ab c d", "beside a space anywhere, it goes everywhere"),
    ("t-shirt", "t shirt", "hyphens are punctuation"),
    ("12:30", "12:30", "colons are not"),
    ("$5 & 50%", "$5 & 50%", "nor are $, & and %"),
    ("\u201cyes\u201d", "\u201cyes\u201d", "nor what is not ASCII"),
    ("\u00fcber!", "\u00fcber", "letters of other alphabets stay"),
    ("line one\n\tline two", "line 1 line 2", "line breaks and tabs are spaces"),
    ("[x]", "x", "brackets become spaces, spaces at the ends go"),
    ("", "", "nothing stays nothing"),
]


@pytest.mark.parametrize(("text", "normal", "rule"), EVALAI, ids=[row[2] for row in EVALAI])
def test_the_processor_of_evalai(text, normal, rule):
    assert normalize_evalai(text) == normal, rule


OFFICIAL = [
    ("girl's", "girl's", "'s stays where it is"),
    ("hello,world", "hello world", "a comma between letters becomes a space"),
    ("hi, you", "hi you", "beside a space it goes"),
    ("1,000", "1000", "between digits it goes"),
    ("1,000-2", "10002", "and then so does all other punctuation"),
    ("1,,2", "1 2", "two commas are not between digits"),
    ("What?", "what", "a question mark becomes a space"),
]


@pytest.mark.parametrize(("text", "normal", "rule"), OFFICIAL, ids=[row[2] for row in OFFICIAL])
def test_the_official_steps(text, normal, rule):
    assert normalize_official(text) == normal, rule


def test_lmms_eval_takes_two_commas_for_one():
    assert normalize_lmms(" 1,,2\n") == "12"


@pytest.mark.parametrize(("same", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_by_how_many_of_ten_agree(same, value):
    answers = ["yes"] * same + ["no"] * (10 - same)
    assert soft_accuracy("yes", answers) == pytest.approx(value)
    rows = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
    assert official_accuracy("yes", rows) == pytest.approx(value)


def test_unanimous_answers_are_compared_as_they_are():
    same = [{"answer": "yes", "answer_id": number} for number in range(10)]
    other = [*same[1:], {"answer": "Yes!", "answer_id": 10}]
    assert official_accuracy("Yes", same) == 0
    assert official_accuracy(" yes\n", same) == 1
    assert official_accuracy("YES.", other) == 1
    assert lmms_accuracy("Yes", same) == 1


def test_equal_annotation_records_exclude_each_other():
    # The public code leaves out every row equal to this one: 3 of 10 then see no other yes.
    rows = [{"answer": "yes"}] * 3 + [{"answer": "no"}] * 7
    assert official_accuracy("yes", rows) == pytest.approx(7 / 10)


def test_the_first_of_equally_frequent_answers():
    assert most_frequent(["b", "a", "a", "b"]) == "b"
    assert most_frequent([]) == ""
