"""What the demo's page does: one question to one or two models, and what stands in their chats while they answer."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, VilaError
from vila.serve.demo_client import ApiClient, Settings, Told
from vila.serve.demo_gallery import gallery_for, hang, worked_examples
from vila.serve.demo_messages import Shot, content_of, conversation

Turns = list[dict[str, Any]]
NONE = "no second model"


def run_side_by_side(sides: Mapping[str, Iterator[Told]]) -> Iterator[dict[str, Told]]:
    """The answers of several models as they grow, each made in a thread of its own. Closing it stops them all."""
    news: queue.SimpleQueue[tuple[str, Told | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def follow(name: str, answer: Iterator[Told]) -> None:
        try:
            for told in answer:
                if stop.is_set():
                    break
                news.put((name, told))
        except Exception as error:  # noqa: BLE001 - whatever it is, the page must hear that this side has ended
            news.put((name, Told(done=True, problem=str(error) or type(error).__name__)))
        finally:
            news.put((name, None))

    for name, answer in sides.items():
        threading.Thread(target=follow, args=(name, answer), daemon=True).start()
    now: dict[str, Told] = {}
    going = set(sides)
    try:
        while going:
            name, told = news.get()
            if told is None:
                going.discard(name)
            else:
                now[name] = told
                yield dict(now)
    finally:
        stop.set()


def with_answer(turns: Turns, told: Told) -> Turns:
    """The chat with an answer as far as it has come; a refusal or an empty answer is a notice, which is not sent."""
    out = [*turns]
    if told.text:
        out.append({"role": "assistant", "content": told.text})
    if told.problem:
        words = html.escape(told.problem, quote=False)
        out.append({"role": "assistant", "content": words, "metadata": {"title": "The server refused"}})
    elif told.done and not told.text:
        words = "The model ended at once; the question is not kept."
        out.append({"role": "assistant", "content": words, "metadata": {"title": "Empty answer"}})
    return out


class Page:
    """What the page does; `build` lays it out."""

    def __init__(self, client: ApiClient, words: str, folder: Path) -> None:
        """words: names and cards of the served models, by which the gallery is chosen; folder: for its pictures."""
        self.client = client
        self.gallery = hang(gallery_for(words), folder)
        self.examples = worked_examples(words, folder)

    def answer(
        self,
        question: Mapping[str, Any],
        one: Turns,
        two: Turns,
        names: tuple[str, str],
        shots: Sequence[Shot],
        system: str,
        settings: Settings,
    ) -> Iterator[tuple[Turns, Turns, str, str]]:
        """Both chats and both paces, again and again while the answers grow."""
        files = [str(file) for file in question.get("files") or ()]
        asked: Turns = [{"role": "user", "content": {"path": file}} for file in files]
        text = str(question.get("text") or "").strip()
        if text:
            asked.append({"role": "user", "content": text})
        if not asked:
            return
        chats = {"one": [*one, *asked]}
        if names[1] != NONE:
            chats["two"] = [*two, *asked]
        yield chats["one"], chats.get("two", two), "", ""
        sides: dict[str, Iterator[Told]] = {}
        for side, name in zip(chats, names, strict=False):
            try:
                messages = conversation(chats[side], shots, system)
            except (VilaError, OSError) as error:
                sides[side] = iter([Told(done=True, problem=str(error))])
            else:
                sides[side] = self.client.ask(name, messages, settings)
        for now in run_side_by_side(sides):
            shown = {side: with_answer(chat, now.get(side, Told())) for side, chat in chats.items()}
            paces = [now.get(side, Told()).pace() for side in ("one", "two")]
            yield shown["one"], shown.get("two", two), paces[0], paces[1]

    def status(self) -> tuple[str, list[str]]:
        """A line on the server, and the names of its models."""
        try:
            names = self.client.models()
        except ConfigError as error:
            return f"**Not ready.** {error}", []
        return self.client.waiting_for(), names


def shots_of(cells: Sequence[Any]) -> list[Shot]:
    """Examples from the builder's fields, three to an example: picture, answer, question. Unanswered ones are none."""
    rows = zip(cells[::3], cells[1::3], cells[2::3], strict=True)
    return [
        Shot(picture or "", answer.strip(), (question or "").strip())
        for picture, answer, question in rows
        if (answer or "").strip()
    ]


def cells_of(shots: Sequence[Shot], rows: int) -> list[Any]:
    """The builder's fields from examples; the other rows are emptied."""
    out: list[Any] = []
    for shot in [*shots, *[None] * rows][:rows]:
        out += [shot.picture, shot.answer, shot.question] if shot else [None, "", ""]
    return out


def add_picture(question: Mapping[str, Any] | None, picture: str | None) -> dict[str, Any]:
    """The question with one more picture."""
    files = [*((question or {}).get("files") or ()), *([picture] if picture else [])]
    return {"text": (question or {}).get("text") or "", "files": files}


def take_back(one: Turns, two: Turns) -> tuple[dict[str, Any], Turns, Turns]:
    """The last question, to be asked again, and both chats without it and its answers."""
    question = {"text": "", "files": []}
    asked = last_question(one)
    for turn in one[asked:]:
        if turn["role"] == "user":
            text, files = content_of(turn["content"])
            question = {"text": text or question["text"], "files": [*question["files"], *files]}
    return question, one[:asked], two[: last_question(two)]


def last_question(turns: Turns) -> int:
    """Where the last run of the user's turns begins; the length of a chat that has none."""
    places = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if not places:
        return len(turns)
    place = places[-1]
    while place and turns[place - 1]["role"] == "user":
        place -= 1
    return place
