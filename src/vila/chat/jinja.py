"""A template as a Jinja chat template, so that programs which know only those write the same prompts.

The convention is Hugging Face's: variables `messages`, `add_generation_prompt`, `bos_token` and `eos_token`; a
message's content is a string or a list of parts with a `type`.
"""

from __future__ import annotations

import json
import string

from vila.chat.template import Template, split_symbols

_NOTHING = "{{- '' -}}"

_SAID = """\
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

_PAGE = """\
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

# The original tokenizes each piece between pictures on its own, with a space in front that vanishes before a special
# token. No piece starts with the marker, so it stands in for a token that the tokenizer lacks.
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
    """The Jinja source that writes what `vila.chat.render.render` writes, with `image_marker` for every medium.

    after_image_space: for tokenizers of the LLaMA kind (`legacy=False`) in programs that tokenize the whole text at
        once. Models were trained on pieces between pictures that were tokenized one by one, each with a space of its
        own in front; this writes those spaces that the tokenizer leaves out, so that the ids are the same. Text that
        holds the marker counts as a picture.
    bos: write the tokenizer's BOS first, for programs that ask the tokenizer to add nothing
        (`tokenizer.apply_chat_template(tokenize=True)`). Without it the text is for tokenizers that add their own.
    """
    strings = {
        name: _written(getattr(template, name))
        for name in (
            *("document_before", "system_before", "system_after", "user_before", "user_after", "assistant_before"),
            *("answer_lead", "answer_after", "answer_tail", "document_after", "media_before", "media_after"),
        )
    }
    strings["marker"] = _literal(image_marker)
    source = _filled(_SAID, strings)
    source += _filled(_PAGE, strings) if template.supervise == "all" else _dialogue(template, strings)
    if after_image_space:
        # A tokenizer puts a space before the whole text itself, unless BOS or a space stands there.
        unless_first = "" if bos else " and (not loop.first or piece.startswith(' '))"
        source = _filled(_SPACED, {**strings, "text": source, "unless_first": unless_first})
    return ("{{- bos_token -}}\n" if bos else "") + source


def _dialogue(template: Template, strings: dict[str, str]) -> str:
    condition = "system" if template.system_in_user else "system is not none"
    block = _filled(_SYSTEM, {**strings, "condition": condition})
    first = template.user_before if template.first_user_before is None else template.first_user_before
    return _filled(
        _DIALOGUE,
        {
            **strings,
            "system": "none" if template.system is None else _literal(template.system),
            "system_first": _NOTHING if template.system_in_user else block,
            "system_in_user": block if template.system_in_user else _NOTHING,
            "first_user_before": _written(first),
            "user_text": "true" if template.user_text else "false",
        },
    )


def _written(text: str) -> str:
    """A Jinja statement that writes a string of a template."""
    names = {"{bos}": "bos_token", "{eos}": "eos_token"}
    pieces = [names.get(piece) or _literal(piece) for piece, _ in split_symbols(text)]
    return "{{- " + " ~ ".join(pieces) + " -}}" if pieces else _NOTHING


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _filled(skeleton: str, strings: dict[str, str]) -> str:
    """The skeleton with its names replaced, one statement a line, without the lines that write nothing."""
    lines = string.Template(skeleton).substitute(strings).split("\n")
    return "".join(f"{line}\n" for line in lines if line and line != _NOTHING)
