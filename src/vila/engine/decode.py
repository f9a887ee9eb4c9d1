"""Decode loop of a batch: samples a token per answer and step, or verifies draft tokens of a single answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.answer import Answer
from vila.engine.batch import Group, Run, columns_needed, group_prompts
from vila.engine.prompt_lookup import PromptLookup
from vila.engine.request import SamplingParams, TokenLogprob
from vila.engine.sampling import draw, report_logprobs, row_generator, shape_logits
from vila.engine.vision_cache import Prompt

# B batch rows  N positions  V vocab

_NO_TOKEN = -1


class TokenSampler:
    """Samples the next token of every row; holds the random generators and the tokens for the repetition penalty."""

    def __init__(
        self, sampling: SamplingParams, prompts: Sequence[Prompt], order: Sequence[int], logits_BV: Tensor
    ) -> None:
        """order: index in the batch of the prompt in each row; logits_BV: logits, used for their shape."""
        self.sampling = sampling
        self._generators = [row_generator(sampling.seed, index) for index in order] if sampling.temperature else []
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for row, index in zip(self._seen_BV, order, strict=True):
                row[[token for token in text_of(prompts[index]) if token != _NO_TOKEN]] = True

    def sample(self, logits_BV: Tensor) -> tuple[Tensor, Sequence[TokenLogprob | None]]:
        """Return token ids [B] and the log-probability reports, None where not requested."""
        shaped_BV = shape_logits(logits_BV, self._seen_BV, self.sampling)
        ids_B = draw(shaped_BV, self._uniform(logits_BV.device)) if self._generators else shaped_BV.argmax(-1)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, ids_B[:, None], True)
        if self.sampling.logprobs:
            return ids_B, report_logprobs(logits_BV, ids_B, self.sampling.logprobs)
        return ids_B, [None] * len(ids_B)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self._generators = [self._generators[row] for row in rows] if self._generators else []
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[list(rows)]

    def _uniform(self, device: torch.device) -> Tensor:
        numbers = [torch.rand((), dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.stack(numbers).to(device)


def text_of(prompt: Prompt) -> list[int]:
    """Return the ids of a prompt, with -1 at image placeholders."""
    ids = list(prompt.ids)
    for start, count in prompt.runs:
        ids[start : start + count] = [_NO_TOKEN] * count
    return ids


@torch.inference_mode()
def decode(
    new_run: Callable[[int], Run],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    sampling: SamplingParams,
) -> Iterator[None]:
    """Generate the answers; yields after every step, which adds one token per answer, or several with prompt lookup.

    new_run: creates the run of this batch for a number of columns.
    """
    groups = group_prompts(prompts)
    run = new_run(columns_needed(prompts, groups) + sampling.max_new_tokens)
    # Tokens appended to a single row after its prompt.
    fed: list[int] = []
    try:
        if sampling.prompt_lookup_tokens and len(prompts) == 1:
            yield from _decode_with_lookup(run, prompts[0], answers[0], sampling, fed)
        else:
            yield from _decode(run, prompts, groups, answers, sampling, fed)
    finally:
        run.close(fed)


def _decode(
    run: Run,
    prompts: Sequence[Prompt],
    groups: Sequence[Group],
    answers: Sequence[Answer],
    sampling: SamplingParams,
    fed: list[int],
) -> Iterator[None]:
    """Add one token per answer and step; rows of finished answers are dropped."""
    logits_BV = run.prefill(prompts, groups)
    sampler = TokenSampler(sampling, prompts, run.order, logits_BV)
    for count in range(sampling.max_new_tokens):
        ids_B, reports = sampler.sample(logits_BV)
        ids = ids_B.tolist()
        tokens = zip(run.order, ids, reports, strict=True)
        going = [row for row, (index, token, report) in enumerate(tokens) if answers[index].take(token, report)]
        yield
        if not going or count == sampling.max_new_tokens - 1:
            return
        if len(going) < len(ids_B):
            rows = torch.tensor(going)
            run.keep(rows)
            sampler.keep(going)
            ids_B = ids_B[rows.to(ids_B.device)]
        logits_BV = run.step(ids_B)
        fed.append(ids[0])


def _decode_with_lookup(
    run: Run, prompt: Prompt, answer: Answer, sampling: SamplingParams, fed: list[int]
) -> Iterator[None]:
    """Decode one answer with prompt lookup: each step verifies a draft of several tokens.

    Every token is sampled from the model's own logits in order, so the answer equals that of single steps.
    """
    logits_NV = run.prefill([prompt], [Group(0, (0,))])
    sampler = TokenSampler(sampling, [prompt], run.order, logits_NV)
    lookup = PromptLookup(text_of(prompt), sampling.prompt_lookup_tokens)
    draft: list[int] = []
    while True:
        for place in range(len(draft) + 1):
            ids_1, reports = sampler.sample(logits_NV[place : place + 1])
            token = int(ids_1)
            is_open = answer.take(token, reports[0])
            lookup.append(token)
            is_match = place < len(draft) and draft[place] == token
            answer.accepted_tokens += is_match
            if not is_open or len(answer.ids) == sampling.max_new_tokens:
                yield
                return
            if not is_match:
                break
        run.rewind(len(draft) - place)
        fed += draft[:place]
        lookup.update(len(draft), place)
        yield
        # No logits are needed after the last token.
        draft = lookup.draft(sampling.max_new_tokens - len(answer.ids) - 1)
        answer.draft_tokens += len(draft)
        logits_NV = run.verify([token, *draft])
        fed.append(token)
