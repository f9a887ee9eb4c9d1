"""From what a page of the demo holds to messages of the chat protocol: pure functions over text and files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import MediaError

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
CLIPS = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska"}
MOST_BYTES = 20 << 20
"""Of one file; the server has limits of its own, and says so itself."""


@dataclass(frozen=True, slots=True)
class Shot:
    """A worked example. An empty `question` stands for the one that is asked after the examples."""

    picture: str
    answer: str
    question: str = ""


def data_url(path: str | Path) -> str:
    """A file as a `data:` URL. Raises MediaError for a kind of file that is no picture or clip, or one too large."""
    file = Path(path)
    kind = (PICTURES | CLIPS).get(file.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(suffix[1:] for suffix in PICTURES | CLIPS))
        raise MediaError(f"{file.name}: neither a picture nor a clip; upload one of {known}")
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise MediaError(f"{file.name}: {size / 2**20:.0f} MiB; upload at most {MOST_BYTES >> 20} MiB")
    if size == 0:
        raise MediaError(f"{file.name}: the file is empty")
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def user_message(text: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """A question: its pictures and clips, in their order, then the text."""
    parts: list[dict[str, Any]] = []
    for file in files:
        kind = "video_url" if Path(file).suffix.lower() in CLIPS else "image_url"
        parts.append({"type": kind, kind: {"url": data_url(file)}})
    if text or not parts:
        parts.append({"type": "text", "text": encodable(text)})
    return {"role": "user", "content": parts}


def shot_messages(shots: Sequence[Shot], question: str) -> list[dict[str, Any]]:
    """Examples as earlier turns, as `vila run --shot` writes them."""
    out: list[dict[str, Any]] = []
    for shot in shots:
        out.append(user_message(shot.question or question, [shot.picture] if shot.picture else []))
        out.append({"role": "assistant", "content": encodable(shot.answer)})
    return out


def conversation(
    turns: Sequence[Mapping[str, Any]], shots: Sequence[Shot] = (), system: str = ""
) -> list[dict[str, Any]]:
    """What is sent for a chat that ends with the user's turn.

    turns: the chat as the page shows it; each has `role` and `content`, a text or a list of texts and files. Turns of
           one role that follow each other are one message. Turns of the page itself, with a `metadata` title, are
           notices: a question that has no answer but one was refused or left without an answer, and is left out too.
    """
    told: list[tuple[str, str, list[str]]] = []
    for turn in turns:
        if (turn.get("metadata") or {}).get("title"):
            if told and told[-1][0] == "user":
                told.pop()
            continue
        text, files = content_of(turn["content"])
        if told and told[-1][0] == turn["role"]:
            role, before, earlier = told.pop()
            text, files = "\n".join(part for part in (before, text) if part), earlier + files
        told.append((str(turn["role"]), text, files))
    messages: list[dict[str, Any]] = [{"role": "system", "content": encodable(system)}] if system.strip() else []
    question = next((text for role, text, _ in told if role == "user"), "")
    messages += shot_messages(shots, question)
    for role, text, files in told:
        messages.append(user_message(text, files) if role == "user" else {"role": role, "content": encodable(text)})
    return messages


def encodable(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no request can carry; whole pairs are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_of(content: Any) -> tuple[str, list[str]]:
    """Text and files of a turn, in whichever of its forms the page hands it over."""
    if isinstance(content, str):
        return content, []
    parts = content if isinstance(content, Sequence) else [content]
    texts, files = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(str(part["text"]))
        else:
            files.append(str((part.get("file") or part)["path"]))
    return "\n".join(text for text in texts if text), files
