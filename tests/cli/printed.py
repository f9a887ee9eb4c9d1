"""Values in printed text: words, counts and cells of tables."""

import re


def words(text):
    """Return the words of a text without surrounding punctuation: names, paths and numbers."""
    return {word.strip("()[]{},;:.?'\"`") for word in text.split()}


def counts(text):
    """Return the number before each word: {"samples": 1200} for "1,200 samples". Of equal words, the last counts."""
    return {word: int(number.replace(",", "")) for number, word in re.findall(r"(?<![\w.])(\d[\d,]*) ([a-z]\w*)", text)}


def cells(text):
    """Return the cells of each row of printed tables, without borders and without headers in heavy lines."""
    return [
        [cell.strip() for cell in re.split(r"[\u2502|]", line)[1:-1]]
        for line in text.splitlines()
        if re.match(r"\s*[\u2502|]", line)
    ]
