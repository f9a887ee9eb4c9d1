"""Conversation templates by name. The config of a checkpoint names the one that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vila.chat.template import Template
from vila.core.errors import UnknownNameError

# System texts of the published templates. Models were trained on them: keep every character.

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_HUMAN = VICUNA.replace("user", "human")

# Upstream has no space before the last sentence.
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)

LLAVA = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

# System text of Llama-2-chat; the two spaces after "safe." are Meta's.
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
HERMES = "Answer the questions."

# Example dialogue at the start of every conversation of the first Vicuna template.
V0_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
V0_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite "
    "and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)


# LLaVA's "TWO" style: "SYSTEM USER: question ASSISTANT: answer</s>USER: ...".
# "ASSISTANT: blue": the space is part of the answer, so that digit-first answers keep their own "_" token.
_VICUNA_V1 = Template(
    "vicuna_v1",
    system=VICUNA,
    system_after=" ",
    user_before="USER: ",
    user_after=" ",
    assistant_before="ASSISTANT:",
    answer_lead=" ",
    answer_after="</s>",
    stop=("</s>",),
)

# LLaVA's "SINGLE" style: every turn ends in "###". Upstream's training text differs from its prompts; this is the text
# of its prompts.
_LLAVA_V0 = Template(
    "llava_v0",
    system=VICUNA_HUMAN,
    system_after="###",
    user_before="Human: ",
    user_after="###",
    assistant_before="Assistant:",
    answer_lead=" ",
    answer_after="###",
    stop=("###",),
)

# Upstream's stop string is "<s>", which no answer contains.
_LLAMA_2 = Template(
    "llama_2",
    system=LLAMA_2,
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

# ChatML without a line break after the end of a turn.
_MPT = Template(
    "mpt",
    system=MPT,
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
    # VFLAN in stage 3 of VILA 1.0: without the system text, with the space after it.
    replace(_VICUNA_V1, name="vicuna_v1_nosys", system=""),
    replace(_VICUNA_V1, name="llava_v1", system=VICUNA_HUMAN),
    replace(_VICUNA_V1, name="v1_mmtag", system=MMTAG, media_before="<Image>", media_after="</Image>"),
    _LLAVA_V0,
    replace(_LLAVA_V0, name="v0_mmtag", system=MMTAG, media_before="<Image>", media_after="</Image>"),
    # With the example dialogue.
    replace(_LLAVA_V0, name="v0", system_after=f"###Human: {V0_QUESTION}###Assistant: {V0_ANSWER}###"),
    _LLAMA_2,
    replace(_LLAMA_2, name="llava_llama_2", system=LLAVA),
    # A literal <s> after the BOS that the tokenizer adds. Upstream's stop string is empty, which ends every answer
    # immediately. There is no default system text; a system message is placed as by Mistral's own template.
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
    replace(_MPT, name="hermes-2", system=HERMES),
    # As Llama-3-VILA1.5-8b was trained: turns end in <|end_of_text|>, not <|eot_id|>, and the header of the assistant
    # is "system".
    Template(
        "llama_3",
        document_before="<|begin_of_text|>",
        system=LLAVA,
        system_before="<|start_header_id|>system<|end_header_id|>\n\n",
        system_after="<|end_of_text|>",
        user_before="<|start_header_id|>user<|end_header_id|>\n\n",
        user_after="<|end_of_text|>",
        assistant_before="<|start_header_id|>system<|end_header_id|>\n\n",
        answer_after="<|end_of_text|>",
        stop=("<|end_of_text|>",),
    ),
    # Native template of SmolLM2, Qwen2 and many others; their tokenizers add no BOS.
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
    # Stage 1: an image and its caption. The question is dropped, the newline is supervised, there is no EOS.
    Template("caption", user_text=False, answer_after="\n", media_gap="", stop=("\n",)),
    # Stage 2: an interleaved page or an image-text pair; all text and EOS are supervised.
    Template("page", supervise="all", document_after="{eos}", media_gap=""),
    # Short questions and answers of the starter model: "<image>What shape is in the image? circle{eos}".
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
"""Further names of templates, most of them from upstream."""


def find_template(name: str) -> Template:
    """Return the template with this name or alias. Raises UnknownNameError with near matches."""
    known = ALIASES.get(name, name)
    if known not in TEMPLATES:
        raise UnknownNameError("template", name, [*TEMPLATES, *ALIASES])
    return TEMPLATES[known]
