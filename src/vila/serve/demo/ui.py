"""The demo page (Gradio): one question to one or two models, their chats side by side, and its launch."""

from __future__ import annotations

import html
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError
from vila.core.optional import require
from vila.serve.admission import SameOrigin, parse_allowed_hosts
from vila.serve.demo.client import (
    IMAGE_TYPES,
    MAX_BYTES,
    VIDEO_TYPES,
    ApiClient,
    StreamState,
    Turns,
    sampling_parameters,
    side_by_side,
)
from vila.serve.demo.gallery import few_shot_turns, gallery_for

NONE = "no second model"
_CARD_BYTES = 1 << 20
_CHAT = {"height": 420, "buttons": ["copy"], "editable": "all", "placeholder": "No question yet"}
# Hidden: sharing on another site, Gradio's editing of questions (it has no effect on a question with an image), and the
# "Error" that Gradio shows on outputs of a stopped answer.
STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto; }
.speed { min-height: 1.3em; opacity: .8; font-size: .85rem; }
.message img, .message video { max-height: 180px; width: auto; }
#examples img { width: 56px; height: 56px; }
button[title=Share], .message-buttons-right button[title=Edit], .speed [data-testid=status-tracker],
#two > [data-testid=status-tracker] { display: none; }
@media (max-width: 640px) { #one, #two { height: 300px !important; } }
"""


def answer_turns(state: StreamState) -> list[dict[str, Any]]:
    """Return the turns of an answer. Errors and empty answers become notices, which are never sent."""
    title, text = ("Error", state.problem) if state.problem else ("", "")
    if state.done and not (state.problem or state.text):
        title, text = "Empty answer", "The answer is empty; the question is dropped."
    turns: list[dict[str, Any]] = [{"content": state.text}] if state.text else []
    if title:
        turns.append({"content": html.escape(text, quote=False), "metadata": {"title": title}})
    return [{"role": "assistant", **turn} for turn in turns]


def before_question(turns: Turns, number: int) -> list[Mapping[str, Any]]:
    """Return the turns before question `number` (from 0) of a chat."""
    starts = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return [*turns[: starts[number]]] if number < len(starts) else [*turns]


def num_questions(turns: Turns) -> int:
    """Return the number of questions in a chat."""
    return sum(turn["role"] == "user" for turn in turns)


async def answer(
    client: ApiClient, prompt: Mapping[str, Any], chats: Sequence[Turns], names: Sequence[str], system: str,
    parameters: Mapping[str, Any],
) -> AsyncGenerator[tuple[Any, ...], None]:  # fmt: skip
    """Ask the models `names` in their `chats`; yield the outputs of the page while the answers are streamed.

    Outputs: the answer of the first model, the chat of the second model, and the speed of both.
    """
    number = num_questions(chats[0])
    files = [{"path": file["path"] if isinstance(file, Mapping) else file} for file in prompt["files"]]
    question = {"role": "user", "content": [*files, *([prompt["text"]] if prompt["text"] else [])]}
    # Undo and retry change the first chat only; the second chat gets every question, even if no model answers it.
    asked = [[*before_question(chat, number), question] for chat in chats]
    names = [name for name in names if name != NONE]
    yield [], asked[1], "", ""
    answers = [client.stream(name, turns, system, parameters) for name, turns in zip(names, asked, strict=False)]
    async with aclosing(side_by_side(answers)) as updates:
        async for states in updates:
            one, two = [*states, StreamState()][:2]
            yield answer_turns(one), [*asked[1], *answer_turns(two)], one.speed(), two.speed()


def build(client: ApiClient, names: Sequence[str], words: str, folder: Path) -> Any:
    """Return the Gradio blocks of the page, see `launch`."""
    import gradio as gr

    gallery = gallery_for(words)

    async def ask(
        prompt: Any, one: Turns, two: Turns, first: str, second: str, system: str, *numbers: float
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        parameters = sampling_parameters(*numbers)
        async with aclosing(answer(client, prompt, (one, two), (first, second), system or "", parameters)) as outputs:
            async for output in outputs:
                yield output

    with gr.Blocks(title="vila", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown("# vila\nAsk about images and videos.")
        with gr.Row():
            first = gr.Dropdown(names, label="Model")
            second = gr.Dropdown([NONE, *names], value=names[1] if names[1:] else NONE, label="Compare with")
        with gr.Row():
            with gr.Column(min_width=300) as left:
                one = gr.Chatbot(label="Answers", elem_id="one", **_CHAT)
            with gr.Column(min_width=300, visible=len(names) > 1) as right:
                two = gr.Chatbot(label="Answers of the second model", elem_id="two", **_CHAT)
                speed_two = gr.Markdown(elem_classes="speed", elem_id="speed-two")
        middle = gr.Column()
        box = gr.MultimodalTextbox(
            placeholder="Drop or paste images and videos here, and ask", label="Question", show_label=False,
            file_count="multiple", file_types=sorted({*IMAGE_TYPES, *VIDEO_TYPES}), autofocus=True, stop_btn=True,
            max_plain_text_length=1 << 20, elem_id="question", render=False,
        )  # fmt: skip
        prompts = [[example.prompt(folder)] for example in gallery.examples]
        gr.Examples(prompts, box, label="Examples", elem_id="examples", api_visibility="private")
        few_shot = gr.Dataset(
            components=[box], samples=[[shots[-1].prompt(folder)] for shots in gallery.few_shot.values()],
            sample_labels=[*gallery.few_shot], type="index", label="Few-shot examples", elem_id="few-shot",
        )  # fmt: skip
        with gr.Accordion("Generation settings", open=False):
            with gr.Row():
                settings = [
                    gr.Slider(1, 1024, 256, step=1, label="Maximum new tokens"),
                    gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="top_p"),
                    gr.Number(0, precision=0, label="Seed"),
                ]
            system = gr.Textbox(label="System prompt (empty: the template's)", lines=2)
        speed_one = gr.Markdown(elem_classes="speed", elem_id="speed-one", render=False)
        with middle:
            chat = gr.ChatInterface(
                ask, multimodal=True, chatbot=one, textbox=box,
                additional_inputs=[two, first, second, system, *settings],
                additional_outputs=[two, speed_one, speed_two],
                show_progress="hidden", analytics_enabled=False, api_visibility="private",
            )  # fmt: skip
        one.unrender()  # ChatInterface placed this chat above the text box; it belongs beside the second chat
        with left:
            one.render()
            speed_one.render()

        def show_few_shot(index: int) -> tuple[Any, ...]:
            *shots, last = [*gallery.few_shot.values()][index]
            turns = few_shot_turns(shots, folder)
            return turns, turns, last.prompt(folder)

        few_shot.click(show_few_shot, few_shot, [chat.chatbot_value, two, box])
        one.undo(lambda turns: before_question(turns, num_questions(turns) - 1), two, two)
        gr.on([one.clear, two.clear], lambda: ([], [], "", ""), None, [chat.chatbot_value, two, speed_one, speed_two])
        one.edit(lambda turns: turns, one, chat.chatbot_value)
        second.change(lambda name: gr.Column(visible=name != NONE), second, right)
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
    client: ApiClient, names: Sequence[str], words: str, folder: Path, *, host: str, port: int,
    allowed_hosts: Sequence[str] = (), browser: bool = False,
) -> tuple[Any, str]:  # fmt: skip
    """Launch the page; return the Gradio blocks and the URL. It sends requests to the model server only.

    names, words:  names of the served models; text about them, which selects the gallery.
    folder:        directory for the gallery's images.
    port:          0 selects a free port from 7860.
    browser:       open the page in a browser.
    allowed_hosts: further host names accepted in the Host header, see `vila.serve.admission.parse_allowed_hosts`.
    Raises ConfigError if Gradio is missing or the port is in use.
    """
    from starlette.middleware import Middleware

    guard = Middleware(SameOrigin, hosts=parse_allowed_hosts(host, allowed_hosts))
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    gr = require("gradio", "vila demo", extra="demo")
    blocks = build(client, names, words, folder).queue(default_concurrency_limit=8)
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace"))
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port or None, share=False, inbrowser=browser, quiet=True,
            prevent_thread_lock=True, allowed_paths=[str(folder)], max_file_size=MAX_BYTES, theme=theme, css=STYLE,
            footer_links=["settings"], ssr_mode=False, enable_monitoring=False, show_error=True,
            app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be opened ({error})", field="--port", value=port, hint="choose another port"
        ) from error
    return blocks, url


def run_page(blocks: Any, check: Callable[[], None] | None) -> None:
    """Keep a launched page until Ctrl-C, or until `check` raises because the server has exited."""
    try:
        while True:
            time.sleep(0.5)
            if check is not None:
                check()
    except KeyboardInterrupt:
        pass
    finally:
        blocks.close(verbose=False)
