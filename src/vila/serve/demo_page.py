"""The demo's page: how it is laid out, and which of its parts calls what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vila.serve.demo_client import Settings
from vila.serve.demo_messages import CLIPS, PICTURES
from vila.serve.demo_talk import NONE, Page, Turns, add_picture, cells_of, shots_of, take_back

_ROWS = 4
STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: 0; opacity: .75; }
#status { min-height: 1.4em; }
.pace { min-height: 1.3em; opacity: .8; font-size: .85rem; }
.shot-row { align-items: stretch; }
.message img, .message video { max-height: 180px; width: auto; }
#one button[title=Share], #two button[title=Share], button[aria-label=Share] { display: none; }
#gallery .caption-label { max-width: 94%; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } #title p { display: none; } }
"""
_TO_OTHER_THEME = "() => { document.body.classList.toggle('dark'); }"


def build(page: Page) -> Any:
    """The Gradio blocks of a page."""
    import gradio as gr

    line, names = page.status()
    kinds = sorted({*PICTURES, *CLIPS})
    with gr.Blocks(title="vila", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(equal_height=True):
            gr.Markdown("# vila\nAsk about pictures and clips.", elem_id="title")
            theme = gr.Button("◐ light / dark", size="sm", scale=0, min_width=120)
        status = gr.Markdown(line, elem_id="status")
        with gr.Row():
            first = gr.Dropdown(names, value=names[0] if names else None, label="Model", min_width=160)
            second = gr.Dropdown(
                [NONE, *names], value=names[1] if len(names) > 1 else NONE, label="Beside it", min_width=160
            )
        with gr.Row():
            with gr.Column(min_width=300):
                one = gr.Chatbot(
                    label="Answers", height=420, buttons=["copy"], placeholder="No question yet", elem_id="one"
                )
                pace_one = gr.Markdown("", elem_classes="pace", elem_id="pace-one")
            with gr.Column(min_width=300, visible=len(names) > 1) as beside:
                two = gr.Chatbot(
                    label="Answers of the second model", height=420, buttons=["copy"], placeholder="No question yet",
                    elem_id="two",
                )  # fmt: skip
                pace_two = gr.Markdown("", elem_classes="pace", elem_id="pace-two")
        box = gr.MultimodalTextbox(
            placeholder="Drop or paste pictures and clips here, and ask",
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
            take = gr.Button("Add this picture to the question", size="sm")
        with gr.Accordion("Examples to learn from (few-shot)", open=False, elem_id="few-shot"):
            gr.Markdown(
                "Each example is a picture and the answer that you would like to such a picture. They are put before "
                "your question. Without a question of its own, an example answers yours."
            )
            with gr.Row():
                buttons = [gr.Button(name, size="sm", min_width=90) for name in page.examples]
                wipe = gr.Button("No examples", size="sm", min_width=90)
            cells: list[Any] = []
            for number in range(_ROWS):
                with gr.Row(elem_classes="shot-row"):
                    cells += [
                        gr.Image(type="filepath", sources=["upload", "clipboard"], height=120, min_width=120,
                                 format="png", label=f"Picture {number + 1}"),
                        gr.Textbox(label="Answer", lines=2, min_width=140, elem_id=f"shot-answer-{number}"),
                        gr.Textbox(label="Question, if another", lines=2, min_width=140),
                    ]  # fmt: skip
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                longest = gr.Slider(1, 1024, 256, step=1, label="Most new tokens", min_width=200)
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature (0: the likeliest answer)", min_width=200
                )
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p", min_width=200)
                seed = gr.Number(0, precision=0, label="Seed", min_width=120)
            system = gr.Textbox(label="System prompt (empty: the model's own)", lines=2)

        def ask(question: Any, one_: Turns, two_: Turns, name: str, other: str, *rest: Any) -> Iterator[Any]:
            longest_, temperature_, top_p_, seed_, system_, *filled = rest
            if not name:
                raise gr.Error("No model is served yet; see the line on top.")
            shots = shots_of(filled)
            settings = Settings(int(longest_), float(temperature_), float(top_p_), int(seed_ or 0))
            yield gr.MultimodalTextbox(value=None, interactive=True), one_, two_, "", ""
            for shown in page.answer(question, one_, two_, (name, other or NONE), shots, system_ or "", settings):
                yield gr.skip(), *shown

        settings = [longest, temperature, top_p, seed, system]
        sent = box.submit(
            ask, [box, one, two, first, second, *settings, *cells], [box, one, two, pace_one, pace_two],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        box.stop(None, None, None, cancels=[sent])
        clear.click(lambda: ([], [], "", ""), None, [one, two, pace_one, pace_two], cancels=[sent])
        again.click(take_back, [one, two], [box, one, two])

        def pick(event: Any) -> dict[str, Any]:
            path, question = page.gallery[event.index]
            return {"text": question, "files": [path]}

        # Gradio finds out by the annotation what to hand over, and cannot read one that is text.
        pick.__annotations__["event"] = gr.SelectData
        gallery.select(pick, None, box)
        take.click(add_picture, [box, camera], box)
        for button, shots in zip(buttons, page.examples.values(), strict=True):
            button.click(lambda shots=shots: cells_of(shots, _ROWS), None, cells)
        wipe.click(lambda: cells_of((), _ROWS), None, cells)
        second.change(lambda name: gr.Column(visible=name != NONE), second, beside)
        theme.click(None, None, None, js=_TO_OTHER_THEME)

        def refresh(name: str | None, other: str) -> tuple[Any, ...]:
            words, served = page.status()
            known = name if name in served else (served[0] if served else None)
            return (
                words,
                gr.Dropdown(choices=served, value=known),
                gr.Dropdown(choices=[NONE, *served], value=other if other in served else NONE),
            )

        gr.Timer(5).tick(refresh, [first, second], [status, first, second], show_progress="hidden")
    return blocks
