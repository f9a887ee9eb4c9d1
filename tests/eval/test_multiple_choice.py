"""Parsers of multiple-choice answers: an example for every rule."""

import pytest

from vila.eval.metrics.multiple_choice import (
    parse_exact_letter,
    parse_first_letter,
    parse_mmbench_rules,
    parse_mmbench_static,
    parse_scienceqa_llava,
    parse_scienceqa_lmms,
    parse_scienceqa_vila,
)

# Answer, then the letter that VILA, LLaVA and lmms-eval read for ScienceQA.
SCIENCEQA = [
    ("B", "B", "B", "B", "the letter alone"),
    ("b", "", "", "B", "casing counts, but not for lmms-eval"),
    (" B", "", "", "B", "nothing is stripped, but by lmms-eval"),
    ("B\n", "", "", "B", "nor are line breaks"),
    ("B. blue", "B", "B", "B", "letter, full stop, space"),
    ("B.blue", "B", "", "B", "without the space VILA reads it, LLaVA does not"),
    ("B.", "B", "", "B", "nor without anything behind the full stop"),
    ("b. blue", "", "", "", "a small letter before a full stop is no letter"),
    ("B) blue", "", "", "", "a bracket is no full stop"),
    ("G", "", "", "G", "letters end at E; lmms-eval compares whatever stands there"),
    ("G. x", "", "", "G", "also before a full stop"),
    ("The answer is B.", "B", "B", "", "the sentence; lmms-eval has no such rule"),
    ("The answer is B", "", "", "", "the dot of the pattern wants a character"),
    ("The answer is B!", "B", "B", "", "which may be any"),
    ("The answer is B\n", "", "", "", "but a line break"),
    ("The answer is G.", "G", "G", "", "any capital"),
    ("the answer is B.", "", "", "", "with a capital T"),
    ("So: The answer is B, not C.", "B", "B", "", "anywhere in the answer"),
    ("The answer is A. The answer is A.", "", "", "", "exactly once"),
    ("C. No. The answer is B.", "C", "C", "C", "the first letter goes before the sentence"),
    ("C.\nThe answer is B.", "C", "B", "C", "where LLaVA does not read it, the sentence counts"),
    ("", "", "", "", "nothing"),
    ("blue", "", "", "", "the option's text is not read"),
]


@pytest.mark.parametrize(("text", "vila", "llava", "lmms", "rule"), SCIENCEQA, ids=[row[-1] for row in SCIENCEQA])
def test_scienceqa_is_parsed_in_three_ways(text, vila, llava, lmms, rule):
    assert parse_scienceqa_vila(text).letter == vila
    assert parse_scienceqa_llava(text).letter == llava
    assert parse_scienceqa_lmms(text).letter == lmms


COLOURS = {"A": "red", "B": "green", "C": "blue", "D": "dark green"}
# Answer, the letter by MMBench's rules alone, and with the search for letters behind them.
STATIC = [
    ("B", "B", "B", "one letter among the words"),
    ("The answer is B", "B", "B", "wherever it stands"),
    ("E", "E", "E", "E is a letter too, and never right"),
    ("A or B", "", "A", "two letters: the first opens the answer, which tells more than its end"),
    ("A", "A", "A", "an A of its own"),
    ("A nice red hat", "A", "A", "an A in more than three words is an article, but red names the same option"),
    ("A nice blue hat", "C", "C", "an A in more than three words is an article; the text decides"),
    ("A nice hat here", "", "A", "no text either: the answer opens with a letter"),
    ("B.", "B", "B", "a letter with a full stop"),
    ("(C)", "C", "C", "a letter in brackets"),
    ("C) blue", "C", "C", "a letter with a bracket"),
    ("It is (C).", "C", "C", "brackets and full stop"),
    ("Answer:B", "", "B", "no word is a letter; it stands at the end"),
    ("Answer :B", "B", "B", "a letter behind a colon"),
    ("A, B", "B", "B", "a letter alone goes before one with a comma"),
    ("A. B.", "", "A", "the same mark twice: the first opens the answer"),
    ("is it A. or B.", "", "B", "the same mark twice: the last ends the answer, once outer marks are off"),
    ("it is red", "A", "A", "one option's text"),
    ("RED", "A", "A", "in any case"),
    ("dark green", "", "", "two options' texts: green, dark green; small letters are no letters"),
    ("red and blue", "", "", "two options' texts"),
    ("b", "", "", "a small letter is no letter"),
    ("", "", "", "nothing"),
    ("...", "", "", "nothing but marks"),
    ("'C'", "", "C", "quotation marks come off"),
    ("\u7b54\u6848\u662fC", "", "C", "a phrase in Chinese"),
    ("I choose D because of A and C", "", "C", "three letters: the end tells more than a phrase"),
    ("I choose D, since A and C lie", "D", "D", "one letter with a comma"),
    ("I choose D since A and C lie", "", "C", "of letters after a phrase, the last"),
    ("Bat", "", "B", "any occurrence, when there is no better place"),
    ("F", "", "", "no such option"),
]


@pytest.mark.parametrize(("text", "protocol", "static", "why"), STATIC, ids=[row[-1] for row in STATIC])
def test_mmbench_is_parsed_by_rules_then_by_places(text, protocol, static, why):
    assert parse_mmbench_rules(text, COLOURS).letter == protocol
    assert parse_mmbench_static(text, COLOURS).letter == static


def test_an_option_that_is_not_there_is_not_searched_for():
    assert parse_mmbench_static("'C'", {"A": "red", "B": "green"}).letter == ""
    assert parse_mmbench_static("C", {"A": "red", "B": "green"}).letter == "C"  # MMBench's own rules know five letters


def test_seed_is_parsed_whole_or_by_its_first_character():
    assert [parse_exact_letter(text).letter for text in ("A", "a", "A. x")] == ["A", "a", "A. x"]
    assert [parse_first_letter(text).letter for text in ("A", " b", "c. x", "", "\n")] == ["A", "B", "C", "", ""]


def test_a_parsed_answer_names_its_rule():
    assert parse_scienceqa_vila("B.").rule == "letter and full stop"
    assert parse_mmbench_static("Bat", COLOURS).rule == "most likely letter"
    assert parse_mmbench_static("maybe", COLOURS) == ("", "names no option")
