"""Parsers of multiple-choice answers, one per scorer.

A parser returns the letter and the rule that found it. The letter is "" if no rule applies; the answer is wrong then.
White space and case are only ignored where the docstring says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class ParsedChoice(NamedTuple):
    """The letter, or "", and the rule that found it."""

    letter: str
    rule: str


NO_CHOICE = ParsedChoice("", "names no option")
_SCIENCEQA = "ABCDE"
_SENTENCE = re.compile("The answer is ([A-Z]).")


def parse_scienceqa_llava(text: str) -> ParsedChoice:
    """Parse like LLaVA for ScienceQA: `B`, `B. text`, or `The answer is B` followed by any character, once."""
    if _is_letter(text):
        return ParsedChoice(text, "the letter alone")
    if len(text) >= 3 and _is_letter(text[0]) and text[1:3] == ". ":
        return ParsedChoice(text[0], "letter, full stop, space")
    return _sentence(text)


def parse_scienceqa_vila(text: str) -> ParsedChoice:
    """Parse like VILA for ScienceQA: like LLaVA, and also `B.` followed by anything."""
    if len(text) >= 2 and _is_letter(text[0]) and text[1] == ".":
        return ParsedChoice(text[0], "letter and full stop")
    return parse_scienceqa_llava(text)


def parse_scienceqa_lmms(text: str) -> ParsedChoice:
    """Parse like lmms-eval for ScienceQA: the letter in any case, or a capital and a full stop; ends are stripped."""
    text = text.strip()
    if len(text) == 1:
        return ParsedChoice(text.upper(), "the letter alone, in any case")
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return ParsedChoice(text[0], "capital and full stop")
    return NO_CHOICE


def parse_first_letter(text: str) -> ParsedChoice:
    """Parse like lmms-eval for SEED-Bench: the first character in any case, after white space."""
    first = text.strip()[:1].upper()
    return ParsedChoice(first, "first character, in any case") if first else NO_CHOICE


def parse_exact_letter(text: str) -> ParsedChoice:
    """Parse like the original SEED-Bench script: the whole answer, unchanged."""
    return ParsedChoice(text, "the whole answer")


def parse_mmbench_static(text: str, options: Mapping[str, str]) -> ParsedChoice:
    """Approximate MMBench's server: its rules, then a search for letters where the server asks ChatGPT.

    options: texts of the existing options by letter. Source: lmms-eval's MMBench scoring without an API key.
    """
    found = parse_mmbench_rules(text, options)
    if found.letter:
        return found
    letter = _most_likely_letter(text, sorted(options) or list("ABCDEFGH"))
    return ParsedChoice(letter, "most likely letter") if letter else NO_CHOICE


_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def parse_mmbench_rules(text: str, options: Mapping[str, str]) -> ParsedChoice:
    """Parse by MMBench's rules (Liu et al., ECCV 2024): one letter among the words, or the text of one option."""
    words = text.split()
    alone = [letter for letter in _SCIENCEQA if letter in words]
    # In more than three words, A may be the article.
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return ParsedChoice(alone[0], "one letter among the words")
    for before, after in _AROUND:
        marked = [letter for letter in _SCIENCEQA if f"{before}{letter}{after}" in words]
        if len(marked) == 1:
            return ParsedChoice(marked[0], f"one letter as {before}X{after}")
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return ParsedChoice(named[0], "one option's text in the answer") if len(named) == 1 else NO_CHOICE


def _is_letter(text: str) -> bool:
    return len(text) == 1 and text in _SCIENCEQA


def _sentence(text: str) -> ParsedChoice:
    found = _SENTENCE.findall(text)
    return ParsedChoice(found[0], "'The answer is X' once") if len(found) == 1 else NO_CHOICE


_PHRASES = (
    *(f"{lead}answer is" for lead in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
    *(f"{lead}option is" for lead in ("correct ", "the correct ", "best ", "the best ")),
    *(f"{lead}choice is" for lead in ("", "the ", "correct ", "the correct ", "my ")),
    *(f"i {verb}" for verb in ("choose", "select", "pick")),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def _most_likely_letter(text: str, letters: Sequence[str]) -> str:
    """Return the letter at the position with the highest weight, the last of ties; "" if there is no letter."""
    text = text.strip()
    for char in ",.!?;:'\"":
        text = text.strip(char)
    if not text.strip():
        return ""
    text = f" {text} "
    positions = list(_positions(text, letters)) or [(0, text.rfind(x), x) for x in letters if x in text]
    return max(positions, key=lambda position: position[:2])[2] if positions else ""


def _positions(text: str, letters: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield weight, position and letter of every occurrence that a rule knows."""
    inner, lowered = text.strip(), text.lower()
    for letter in letters:
        for weight, shape in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            if shape in text:
                yield weight, text.rfind(shape), letter
        for phrase in _PHRASES:
            start = lowered.find(phrase)
            if start >= 0 and (position := text.find(letter, start + len(phrase))) >= 0:
                yield 7, position, letter
        if inner.startswith(letter) and not inner[1:2].isalpha():
            yield 10, 0, letter
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            yield 9, len(text) - 1, letter
