"""Convert a `Template` to a Jinja chat template, as transformers, vLLM and llama.cpp use them.

The convention is Hugging Face's: variables `messages`, `add_generation_prompt`, `bos_token` and `eos_token`; the
content of a message is a string or a list of parts with a `type`.
"""

from __future__ import annotations

import json
import string

from vila.chat.template import Template, split_symbols

_NOTHING = "{{- '' -}}"

_CONTENT_MACRO = """\
{%- macro said(content, text=true) -%}
{%- for part in ([content] if content is string else content) -%}
{%- if part is string -%}
{{- part if text else '' -}}
{%- elif part.type == 'text' -%}
{{- part.text if text else '' -}}
{%- else -%}
$media_before
{{- $marker -}}
$media_after
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
$document_before
"""

_ALL_TEXT = """\
{%- for message in messages -%}
{{- said(message.content) -}}
{%- endfor -%}
{%- if not add_generation_prompt -%}
$document_after
{%- endif -%}
"""

_DIALOGUE = """\
{%- set system = $system -%}
{%- if messages[0].role == 'system' -%}
{%- set system = said(messages[0].content) -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
$system_first
{%- for message in messages -%}
{%- if message.role != ('user', 'assistant')[loop.index0 % 2] -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{%- if message.role == 'assistant' -%}
$assistant_before
$answer_lead
{{- said(message.content) -}}
$answer_after
$answer_tail
{%- else -%}
{%- if loop.first -%}
$first_user_before
$system_in_user
{%- else -%}
$user_before
{%- endif -%}
{{- said(message.content, $user_text) -}}
$user_after
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
$assistant_before
{%- else -%}
$document_after
{%- endif -%}
"""

_SYSTEM = """\
{%- if $condition -%}
$system_before
{{- system -}}
$system_after
{%- endif -%}
"""

# Upstream tokenizes each chunk between images on its own, with a leading space that is dropped before a special token.
# No chunk starts with the marker, so the marker replaces a BOS or EOS that the tokenizer lacks.
_SPACED = """\
{%- set text -%}
$text
{%- endset -%}
{%- for piece in text.split($marker) -%}
{%- if not loop.first -%}
{{- $marker -}}
{%- endif -%}
{%- if piece$unless_first and not piece.startswith((bos_token or $marker, eos_token or $marker)) -%}
{{- ' ' -}}
{%- endif -%}
{{- piece -}}
{%- endfor -%}
"""


def chat_template(
    template: Template, *, image_marker: str = "<image>", after_image_space: bool = False, bos: bool = False
) -> str:
    """Return the Jinja source that renders as `vila.chat.render.render`, with `image_marker` for every image.

    after_image_space: for LLaMA tokenizers (`legacy=False`) in programs that tokenize the whole text at once. Models
        were trained on chunks between images that were tokenized separately, each with a leading space; the template
        then writes those spaces, so that the ids are equal. Text that contains the marker counts as an image.
    bos: start with the tokenizer's BOS, for programs that add no special tokens when tokenizing
        (`tokenizer.apply_chat_template(tokenize=True)`).
    """
    strings = {
        name: _write(getattr(template, name))
        for name in (
            *("document_before", "system_before", "system_after", "user_before", "user_after", "assistant_before"),
            *("answer_lead", "answer_after", "answer_tail", "document_after", "media_before", "media_after"),
        )
    }
    strings["marker"] = _literal(image_marker)
    source = _fill(_CONTENT_MACRO, strings)
    source += _fill(_ALL_TEXT, strings) if template.supervise == "all" else _dialogue(template, strings)
    if after_image_space:
        # The tokenizer itself adds a space before the whole text, unless it starts with BOS or a space.
        unless_first = "" if bos else " and (not loop.first or piece.startswith(' '))"
        source = _fill(_SPACED, {**strings, "text": source, "unless_first": unless_first})
    return ("{{- bos_token -}}\n" if bos else "") + source


def _dialogue(template: Template, strings: dict[str, str]) -> str:
    condition = "system" if template.system_in_user else "system is not none"
    block = _fill(_SYSTEM, {**strings, "condition": condition})
    first = template.user_before if template.first_user_before is None else template.first_user_before
    return _fill(
        _DIALOGUE,
        {
            **strings,
            "system": "none" if template.system is None else _literal(template.system),
            "system_first": _NOTHING if template.system_in_user else block,
            "system_in_user": block if template.system_in_user else _NOTHING,
            "first_user_before": _write(first),
            "user_text": "true" if template.user_text else "false",
        },
    )


def _write(text: str) -> str:
    """Return a Jinja statement that writes a string of a template."""
    names = {"{bos}": "bos_token", "{eos}": "eos_token"}
    pieces = [names.get(piece) or _literal(piece) for piece, _ in split_symbols(text)]
    return "{{- " + " ~ ".join(pieces) + " -}}" if pieces else _NOTHING


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _fill(skeleton: str, strings: dict[str, str]) -> str:
    """Substitute the names in a skeleton and remove statements that write nothing."""
    lines = string.Template(skeleton).substitute(strings).split("\n")
    return "".join(f"{line}\n" for line in lines if line and line != _NOTHING)
