"""The conversation templates, as data. A checkpoint names the one it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vila.chat import systems
from vila.chat.template import Template
from vila.core.errors import UnknownNameError

# LLaVA's "TWO" style: "SYSTEM USER: question ASSISTANT: answer</s>USER: ...".
# "ASSISTANT: blue": the space is part of the answer, so that digit-first answers keep their own "_" token.
_VICUNA_V1 = Template(
    "vicuna_v1",
    system=systems.VICUNA,
    system_after=" ",
    user_before="USER: ",
    user_after=" ",
    assistant_before="ASSISTANT:",
    answer_lead=" ",
    answer_after="</s>",
    stop=("</s>",),
)

# LLaVA's "SINGLE" style: every turn ends in "###". The original trains it on another text than it asks with; ours is
# the one it asks with.
_LLAVA_V0 = Template(
    "llava_v0",
    system=systems.VICUNA_HUMAN,
    system_after="###",
    user_before="Human: ",
    user_after="###",
    assistant_before="Assistant:",
    answer_lead=" ",
    answer_after="###",
    stop=("###",),
)

# The original's stop string here is "<s>", which no answer ever holds.
_LLAMA_2 = Template(
    "llama_2",
    system=systems.LLAMA_2,
    system_before="<<SYS>>\n",
    system_after="\n<</SYS>>\n\n",
    system_in_user=True,
    first_user_before="[INST] ",
    user_before="<s>[INST] ",
    user_after=" [/INST]",
    answer_lead=" ",
    answer_after=" </s>",
    stop=("</s>",),
)

# ChatML without the line break after the end of a turn.
_MPT = Template(
    "mpt",
    system=systems.MPT,
    system_before="<|im_start|>system\n",
    system_after="<|im_end|>",
    user_before="<|im_start|>user\n",
    user_after="<|im_end|>",
    assistant_before="<|im_start|>assistant\n",
    answer_after="<|im_end|>",
    stop=("<|im_end|>",),
)

_TEMPLATES = (
    _VICUNA_V1,
    # Stage 3 of VILA 1.0 renders VFLAN without the system text; the space that followed it stays.
    replace(_VICUNA_V1, name="vicuna_v1_nosys", system=""),
    replace(_VICUNA_V1, name="llava_v1", system=systems.VICUNA_HUMAN),
    replace(_VICUNA_V1, name="v1_mmtag", system=systems.MMTAG, media_before="<Image>", media_after="</Image>"),
    _LLAVA_V0,
    replace(_LLAVA_V0, name="v0_mmtag", system=systems.MMTAG, media_before="<Image>", media_after="</Image>"),
    # Every conversation follows an example dialogue.
    replace(
        _LLAVA_V0,
        name="v0",
        system_after=f"###Human: {systems.V0_QUESTION}###Assistant: {systems.V0_ANSWER}###",
    ),
    _LLAMA_2,
    replace(_LLAMA_2, name="llava_llama_2", system=systems.LLAVA),
    # A literal <s> on top of the one that the tokenizer adds. The original's stop string is empty, which ends every
    # answer at once. It has no system text; one that a conversation brings goes where Mistral's own template puts it.
    Template(
        "mistral",
        document_before="<s>",
        system_after="\n\n",
        system_in_user=True,
        user_before="[INST] ",
        user_after=" [/INST]",
        answer_after="</s>",
        stop=("</s>",),
    ),
    _MPT,
    replace(_MPT, name="hermes-2", system=systems.HERMES),
    # Llama-3-VILA1.5-8b was trained so: turns end in <|end_of_text|>, not <|eot_id|>, and the assistant speaks under
    # the header "system".
    Template(
        "llama_3",
        document_before="<|begin_of_text|>",
        system=systems.LLAVA,
        system_before="<|start_header_id|>system<|end_header_id|>\n\n",
        system_after="<|end_of_text|>",
        user_before="<|start_header_id|>user<|end_header_id|>\n\n",
        user_after="<|end_of_text|>",
        assistant_before="<|start_header_id|>system<|end_header_id|>\n\n",
        answer_after="<|end_of_text|>",
        stop=("<|end_of_text|>",),
    ),
    # What SmolLM2, Qwen2 and many others speak natively; their tokenizers add no BOS.
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
    # Stage 1: the picture and its caption; the question is dropped, the newline is supervised, no end of sequence.
    Template("caption", user_text=False, answer_after="\n", media_gap="", stop=("\n",)),
    # Stage 2: an interleaved page or a pair; all text and the end of sequence are supervised.
    Template("page", supervise="all", document_after="{eos}", media_gap=""),
    # The starter's compact question and answer: "<image>What shape is in the image? circle{eos}".
    Template("starter_qa", answer_lead=" ", answer_after="{eos}", media_gap=""),
)

TEMPLATES: Mapping[str, Template] = {template.name: template for template in _TEMPLATES}

ALIASES: Mapping[str, str] = {
    "v1": "vicuna_v1",
    "default": "v0",
    "plain": "caption",
    "v0_plain": "caption",
    "hermes_2": "hermes-2",
}
"""Further names of templates, most of them the original's."""


def find_template(name: str) -> Template:
    """The template called `name`, or of which `name` is an alias. Raises UnknownNameError with near matches."""
    known = ALIASES.get(name, name)
    if known not in TEMPLATES:
        raise UnknownNameError("template", name, [*TEMPLATES, *ALIASES])
    return TEMPLATES[known]
