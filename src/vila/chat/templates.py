"""The conversation templates, as data. A checkpoint names the one it was trained with."""

from __future__ import annotations

from vila.chat.template import Template
from vila.core.errors import UnknownNameError

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _vicuna(name: str, system: str) -> Template:
    # "ASSISTANT: blue": the space is part of the answer, so that digit-first answers keep their own "_" token.
    return Template(
        name,
        system=system,
        system_after=" ",
        user_before="USER: ",
        user_after=" ",
        assistant_before="ASSISTANT:",
        answer_lead=" ",
        answer_after="</s>",
        stop=("</s>",),
    )


_TEMPLATES = (
    _vicuna("vicuna_v1", _VICUNA_SYSTEM),
    # Stage 3 of VILA 1.0 renders VFLAN without the system text; the space that followed it stays.
    _vicuna("vicuna_v1_nosys", ""),
    # Stage 1: the picture and its caption; the question is dropped, the newline is supervised, no end of sequence.
    Template("caption", user_text=False, answer_after="\n", stop=("\n",)),
    # Stage 2: an interleaved page or a pair; all text and the end of sequence are supervised.
    Template("page", supervise="all", document_after="{eos}"),
    Template(
        "chatml",
        system_before="<|im_start|>system\n",
        system_after="<|im_end|>\n",
        user_before="<|im_start|>user\n",
        user_after="<|im_end|>\n",
        assistant_before="<|im_start|>assistant\n",
        answer_after="<|im_end|>",
        answer_tail="\n",
        stop=("<|im_end|>",),
    ),
    # The starter's compact question and answer: "<image>What shape is in the image? circle{eos}".
    Template("starter_qa", answer_lead=" ", answer_after="{eos}"),
)

TEMPLATES: dict[str, Template] = {template.name: template for template in _TEMPLATES}


def find_template(name: str) -> Template:
    """The template called `name`. Raises UnknownNameError with near matches."""
    if name not in TEMPLATES:
        raise UnknownNameError("template", name, TEMPLATES)
    return TEMPLATES[name]
