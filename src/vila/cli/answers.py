"""Answers on their way out: streamed text, and the facts of one as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vila.engine.detokenize import Decode
    from vila.engine.request import Generation, Sampling, TokenEvent, TokenLogprob


def trimmed(events: Iterable[TokenEvent], ends: list[str] | None = None) -> Iterator[str]:
    """The pieces of a streamed answer without white space around the whole: joined they are what `generate` gives.

    ends: takes the reason why the answer ended.
    """
    held, begun = "", False
    for event in events:
        if event.finish is not None and ends is not None:
            ends.append(event.finish)
        text = held + event.text
        text = text if begun else text.lstrip()
        piece = text.rstrip()
        held = text[len(piece) :]
        if piece:
            begun = True
            yield piece


def answer_facts(answer: Generation, sampling: Sampling, tokenizer: Any) -> dict[str, Any]:
    """An answer as plain data: text, finish, prompt_tokens, tokens, and what the sampling asked for besides."""
    facts: dict[str, Any] = {
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.ids),
    }
    if sampling.overlong == "truncate":
        facts["dropped_messages"] = answer.dropped_messages
    if sampling.lookup:
        facts["tried"], facts["accepted"] = answer.tried, answer.accepted
    if sampling.logprobs:
        from vila.engine.detokenize import decoder_of

        decode = decoder_of(tokenizer, skip_special_tokens=False)
        facts["logprobs"] = [_logprob(report, decode) for report in answer.logprobs]
    return facts


def _logprob(report: TokenLogprob, decode: Decode) -> dict[str, Any]:
    top = [_token(token, logprob, decode) for token, logprob in report.top]
    return {**_token(report.id, report.logprob, decode), "top": top}


def _token(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    return {"id": token, "token": decode([token]), "logprob": round(logprob, 6)}
