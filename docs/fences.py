"""An mkdocs hook: takes our tests' tags off the fences, as in `bash run slow`; mkdocs would not see such a fence."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"^```(\w+) [^\n`]*$", r"```\1", markdown, flags=re.MULTILINE)
