"""The demo page (Gradio): one question to one or two models, their chats side by side, and its launch."""

from __future__ import annotations

import html
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, VilaError
from vila.core.optional import require
from vila.serve.admission import SameOrigin, parse_allowed_hosts
from vila.serve.demo.client import (
    IMAGE_TYPES,
    MAX_BYTES,
    VIDEO_TYPES,
    ApiClient,
    FewShotExample,
    Settings,
    StreamState,
    content_of,
    conversation,
)
from vila.serve.demo.gallery import gallery_for, save_images, worked_examples

Turns = list[dict[str, Any]]
NONE = "no second model"
_NUM_EXAMPLES = 4
_CARD_BYTES = 1 << 20


def run_side_by_side(sides: Mapping[str, Iterator[StreamState]]) -> Iterator[dict[str, StreamState]]:
    """Yield the growing answers of several models, each streamed in its own thread. Closing it stops them all."""
    updates: queue.SimpleQueue[tuple[str, StreamState | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def follow(name: str, answer: Iterator[StreamState]) -> None:
        try:
            for state in answer:
                if stop.is_set():
                    break
                updates.put((name, state))
        except Exception as error:  # noqa: BLE001 - the page shows any error of this side
            updates.put((name, StreamState(done=True, problem=str(error) or type(error).__name__)))
        finally:
            updates.put((name, None))

    for name, answer in sides.items():
        threading.Thread(target=follow, args=(name, answer), daemon=True).start()
    states: dict[str, StreamState] = {}
    running = set(sides)
    try:
        while running:
            name, state = updates.get()
            if state is None:
                running.discard(name)
            else:
                states[name] = state
                yield dict(states)
    finally:
        stop.set()


def with_answer(turns: Turns, state: StreamState) -> Turns:
    """Return the chat with the answer so far. Errors and empty answers become notices, which are never sent."""
    out = [*turns]
    if state.text:
        out.append({"role": "assistant", "content": state.text})
    if state.problem:
        text = html.escape(state.problem, quote=False)
        out.append({"role": "assistant", "content": text, "metadata": {"title": "Error"}})
    elif state.done and not state.text:
        text = "The answer is empty; the question is dropped."
        out.append({"role": "assistant", "content": text, "metadata": {"title": "Empty answer"}})
    return out


class Page:
    """Event handlers of the page; `build` creates its layout."""

    def __init__(self, client: ApiClient, words: str, folder: Path) -> None:
        """words: names and model cards of the served models, which select the gallery; folder: for its images."""
        self.client = client
        self.gallery = save_images(gallery_for(words), folder)
        self.examples = worked_examples(words, folder)

    def answer(
        self,
        question: Mapping[str, Any],
        one: Turns,
        two: Turns,
        names: tuple[str, str],
        shots: Sequence[FewShotExample],
        system: str,
        settings: Settings,
    ) -> Iterator[tuple[Turns, Turns, str, str]]:
        """Yield both chats and both speeds while the answers are streamed."""
        files = [str(file) for file in question.get("files") or ()]
        turns: Turns = [{"role": "user", "content": {"path": file}} for file in files]
        text = str(question.get("text") or "").strip()
        if text:
            turns.append({"role": "user", "content": text})
        if not turns:
            return
        chats = {"one": [*one, *turns]}
        if names[1] != NONE:
            chats["two"] = [*two, *turns]
        yield chats["one"], chats.get("two", two), "", ""
        sides: dict[str, Iterator[StreamState]] = {}
        for side, name in zip(chats, names, strict=False):
            try:
                messages = conversation(chats[side], shots, system)
            except (VilaError, OSError) as error:
                sides[side] = iter([StreamState(done=True, problem=str(error))])
            else:
                sides[side] = self.client.stream(name, messages, settings)
        for states in run_side_by_side(sides):
            shown = {side: with_answer(chat, states.get(side, StreamState())) for side, chat in chats.items()}
            speeds = [states.get(side, StreamState()).speed() for side in ("one", "two")]
            yield shown["one"], shown.get("two", two), speeds[0], speeds[1]

    def status(self) -> tuple[str, list[str]]:
        """Return the server's status line and the names of its models."""
        try:
            names = self.client.models()
        except ConfigError as error:
            return f"**Not ready.** {error}", []
        return self.client.status(), names


def shots_of(cells: Sequence[Any]) -> list[FewShotExample]:
    """Return the examples of the builder's fields (image, answer, question); those without an answer are skipped."""
    rows = zip(cells[::3], cells[1::3], cells[2::3], strict=True)
    return [
        FewShotExample(image or "", answer.strip(), (question or "").strip())
        for image, answer, question in rows
        if (answer or "").strip()
    ]


def cells_of(shots: Sequence[FewShotExample], rows: int) -> list[Any]:
    """Return the builder's fields for examples; remaining rows are cleared."""
    out: list[Any] = []
    for shot in [*shots, *[None] * rows][:rows]:
        out += [shot.image, shot.answer, shot.question] if shot else [None, "", ""]
    return out


def add_image(question: Mapping[str, Any] | None, image: str | None) -> dict[str, Any]:
    """Return the question with a further image."""
    files = [*((question or {}).get("files") or ()), *([image] if image else [])]
    return {"text": (question or {}).get("text") or "", "files": files}


def undo_question(one: Turns, two: Turns) -> tuple[dict[str, Any], Turns, Turns]:
    """Return the last question for editing, and both chats without it and its answers."""
    question = {"text": "", "files": []}
    start = last_question(one)
    for turn in one[start:]:
        if turn["role"] == "user":
            text, files = content_of(turn["content"])
            question = {"text": text or question["text"], "files": [*question["files"], *files]}
    return question, one[:start], two[: last_question(two)]


def last_question(turns: Turns) -> int:
    """Return the index of the first turn of the last question; the length of the chat if there is none."""
    places = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if not places:
        return len(turns)
    place = places[-1]
    while place and turns[place - 1]["role"] == "user":
        place -= 1
    return place


STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: 0; opacity: .75; }
#status { min-height: 1.4em; }
.speed { min-height: 1.3em; opacity: .8; font-size: .85rem; }
.shot-row { align-items: stretch; }
.message img, .message video { max-height: 180px; width: auto; }
#one button[title=Share], #two button[title=Share], button[aria-label=Share] { display: none; }
#gallery .caption-label { max-width: 94%; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } #title p { display: none; } }
"""
_TO_OTHER_THEME = "() => { document.body.classList.toggle('dark'); }"


def build(page: Page) -> Any:
    """Return the Gradio blocks of a page."""
    import gradio as gr

    line, names = page.status()
    kinds = sorted({*IMAGE_TYPES, *VIDEO_TYPES})
    with gr.Blocks(title="vila", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(equal_height=True):
            gr.Markdown("# vila\nAsk about images and videos.", elem_id="title")
            theme = gr.Button("◐ light / dark", size="sm", scale=0, min_width=120)
        status = gr.Markdown(line, elem_id="status")
        with gr.Row():
            first = gr.Dropdown(names, value=names[0] if names else None, label="Model", min_width=160)
            second = gr.Dropdown(
                [NONE, *names], value=names[1] if len(names) > 1 else NONE, label="Compare with", min_width=160
            )
        with gr.Row():
            with gr.Column(min_width=300):
                one = gr.Chatbot(
                    label="Answers", height=420, buttons=["copy"], placeholder="No question yet", elem_id="one"
                )
                speed_one = gr.Markdown("", elem_classes="speed", elem_id="speed-one")
            with gr.Column(min_width=300, visible=len(names) > 1) as beside:
                two = gr.Chatbot(
                    label="Answers of the second model", height=420, buttons=["copy"], placeholder="No question yet",
                    elem_id="two",
                )  # fmt: skip
                speed_two = gr.Markdown("", elem_classes="speed", elem_id="speed-two")
        box = gr.MultimodalTextbox(
            placeholder="Drop or paste images and videos here, and ask",
            file_count="multiple", file_types=kinds, sources=["upload"], show_label=False, lines=1, autofocus=True,
            stop_btn=True, elem_id="question",
        )  # fmt: skip
        with gr.Row():
            clear = gr.Button("New conversation", size="sm", min_width=120)
            again = gr.Button("Ask again", size="sm", min_width=120)
        with gr.Accordion("Try one of these", open=True):
            gallery = gr.Gallery(
                page.gallery, columns=6, height="auto", show_label=False, allow_preview=False, object_fit="contain",
                interactive=False, buttons=[], elem_id="gallery",
            )  # fmt: skip
        with gr.Accordion("Camera", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", format="png", show_label=False, height=260)
            take = gr.Button("Add this image to the question", size="sm")
        with gr.Accordion("Few-shot examples", open=False, elem_id="few-shot"):
            gr.Markdown(
                "Each example is an image with the expected answer. Examples are sent before your question. An example "
                "without a question uses yours."
            )
            with gr.Row():
                buttons = [gr.Button(name, size="sm", min_width=90) for name in page.examples]
                wipe = gr.Button("No examples", size="sm", min_width=90)
            cells: list[Any] = []
            for number in range(_NUM_EXAMPLES):
                with gr.Row(elem_classes="shot-row"):
                    cells += [
                        gr.Image(type="filepath", sources=["upload", "clipboard"], height=120, min_width=120,
                                 format="png", label=f"Image {number + 1}"),
                        gr.Textbox(label="Answer", lines=2, min_width=140, elem_id=f"shot-answer-{number}"),
                        gr.Textbox(label="Question (default: yours)", lines=2, min_width=140),
                    ]  # fmt: skip
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                max_tokens = gr.Slider(1, 1024, 256, step=1, label="Maximum new tokens", min_width=200)
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)", min_width=200)
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p", min_width=200)
                seed = gr.Number(0, precision=0, label="Seed", min_width=120)
            system = gr.Textbox(label="System prompt (empty: the template's)", lines=2)

        def ask(question: Any, one_: Turns, two_: Turns, name: str, other: str, *rest: Any) -> Iterator[Any]:
            max_tokens_, temperature_, top_p_, seed_, system_, *filled = rest
            if not name:
                raise gr.Error("No model is available yet; see the status line.")
            shots = shots_of(filled)
            settings = Settings(int(max_tokens_), float(temperature_), float(top_p_), int(seed_ or 0))
            yield gr.MultimodalTextbox(value=None, interactive=True), one_, two_, "", ""
            for shown in page.answer(question, one_, two_, (name, other or NONE), shots, system_ or "", settings):
                yield gr.skip(), *shown

        settings = [max_tokens, temperature, top_p, seed, system]
        sent = box.submit(
            ask, [box, one, two, first, second, *settings, *cells], [box, one, two, speed_one, speed_two],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        box.stop(None, None, None, cancels=[sent])
        clear.click(lambda: ([], [], "", ""), None, [one, two, speed_one, speed_two], cancels=[sent])
        again.click(undo_question, [one, two], [box, one, two])

        def pick(event: Any) -> dict[str, Any]:
            path, question = page.gallery[event.index]
            return {"text": question, "files": [path]}

        # Gradio selects the argument by its annotation, which must not be a string.
        pick.__annotations__["event"] = gr.SelectData
        gallery.select(pick, None, box)
        take.click(add_image, [box, camera], box)
        for button, shots in zip(buttons, page.examples.values(), strict=True):
            button.click(lambda shots=shots: cells_of(shots, _NUM_EXAMPLES), None, cells)
        wipe.click(lambda: cells_of((), _NUM_EXAMPLES), None, cells)
        second.change(lambda name: gr.Column(visible=name != NONE), second, beside)
        theme.click(None, None, None, js=_TO_OTHER_THEME)

        def refresh(name: str | None, other: str) -> tuple[Any, ...]:
            words, served = page.status()
            if name not in served:  # the server was not up yet when the page was built
                name, other = (served[0] if served else None), (served[1] if len(served) > 1 else NONE)
            return (
                words,
                gr.Dropdown(choices=served, value=name),
                gr.Dropdown(choices=[NONE, *served], value=other if other in served else NONE),
            )

        gr.Timer(5).tick(refresh, [first, second], [status, first, second], show_progress="hidden")
    return blocks


def card_words(models: Sequence[str]) -> str:
    """Return the names, configs and model cards of models as text, by which the gallery is selected."""
    words = []
    for model in models:
        words.append(model)
        for card in (Path(model) / "README.md", Path(model) / "config.json", Path(model).parent / "README.md"):
            if card.is_file():
                words.append(card.read_bytes()[:_CARD_BYTES].decode(errors="replace"))
    return "\n".join(words)


def launch(
    client: ApiClient, words: str, folder: Path, *, host: str, port: int, allowed_hosts: Sequence[str] = ()
) -> tuple[Any, str]:
    """Launch the page; return the Gradio blocks and the URL. It sends requests to the model server only.

    allowed_hosts: further host names accepted in the Host header, see `vila.serve.admission.parse_allowed_hosts`.
    Raises ConfigError if Gradio is missing or the port is in use.
    """
    from starlette.middleware import Middleware

    guard = Middleware(SameOrigin, hosts=parse_allowed_hosts(host, allowed_hosts))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = require("gradio", "vila demo", extra="demo")
    blocks = build(Page(client, words, folder)).queue(default_concurrency_limit=8)
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace"))
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port or _free_port(host), share=False, quiet=True, prevent_thread_lock=True,
            allowed_paths=[str(folder)], max_file_size=MAX_BYTES, theme=theme, css=STYLE, footer_links=[],
            ssr_mode=False, enable_monitoring=False, show_error=True, app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be opened ({error})", field="--port", value=port, hint="choose another port"
        ) from error
    return blocks, url


def run_page(
    client: ApiClient,
    words: str,
    folder: Path,
    *,
    host: str,
    port: int,
    browser: bool,
    check: Callable[[], None] | None,
    log: Callable[[str], None],
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve the page until Ctrl-C, or until `check` raises because the server has exited."""
    blocks, url = launch(client, words, folder, host=host, port=port, allowed_hosts=allowed_hosts)
    log(f"demo at {url} (Ctrl-C stops it)")
    if browser:
        import webbrowser

        webbrowser.open(url)
    try:
        while True:
            time.sleep(0.5)
            if check is not None:
                check()
    except KeyboardInterrupt:
        pass
    finally:
        blocks.close(verbose=False)


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
