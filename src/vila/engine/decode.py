"""The one loop that generates: a token in every answer at each turn, until all have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.answer import Answer
from vila.engine.batch import Run, columns_needed, group_prompts
from vila.engine.pictures import Prompt
from vila.engine.request import Sampling, TokenLogprob
from vila.engine.sampling import draw, report_logprobs, row_generator, shape_logits

# B rows  V vocab


class Chooser:
    """Chooses the next token of every row: its random numbers, and the tokens that a penalty looks back on."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Prompt], order: Sequence[int], logits_BV: Tensor) -> None:
        """order: index in the batch of the prompt in each row; logits_BV: any logits of these rows, for their shape."""
        self.sampling = sampling
        self._generators = [row_generator(sampling.seed, index) for index in order] if sampling.temperature else []
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for row, index in zip(self._seen_BV, order, strict=True):
                row[_text_ids(prompts[index])] = True

    def choose(self, logits_BV: Tensor) -> tuple[Tensor, Sequence[TokenLogprob | None]]:
        """Token ids [B], and what is to be reported of each."""
        shaped_BV = shape_logits(logits_BV, self._seen_BV, self.sampling)
        ids_B = draw(shaped_BV, self._uniform(logits_BV.device)) if self._generators else shaped_BV.argmax(-1)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, ids_B[:, None], True)
        if self.sampling.logprobs:
            return ids_B, report_logprobs(logits_BV, ids_B, self.sampling.logprobs)
        return ids_B, [None] * len(ids_B)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._generators = [self._generators[row] for row in rows] if self._generators else []
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[list(rows)]

    def _uniform(self, device: torch.device) -> Tensor:
        numbers = [torch.rand((), dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.stack(numbers).to(device)


def _text_ids(prompt: Prompt) -> list[int]:
    """The ids of a prompt without the placeholders of its pictures."""
    slots = {place for start, count in prompt.runs for place in range(start, start + count)}
    return [token for place, token in enumerate(prompt.ids) if place not in slots]


@torch.inference_mode()
def decode(
    new_run: Callable[[int], Run],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    sampling: Sampling,
) -> Iterator[None]:
    """Grow the answers, a token in each at every turn; rows leave when their answer has ended.

    new_run: makes the run of this batch, for so many columns.
    """
    groups = group_prompts(prompts)
    run = new_run(columns_needed(prompts, groups) + sampling.max_new_tokens)
    logits_BV = run.prefill(prompts, groups)
    chooser = Chooser(sampling, prompts, run.order, logits_BV)
    for count in range(sampling.max_new_tokens):
        ids_B, reports = chooser.choose(logits_BV)
        tokens = zip(run.order, ids_B.tolist(), reports, strict=True)
        going = [row for row, (index, token, report) in enumerate(tokens) if answers[index].take(token, report)]
        yield
        if not going or count == sampling.max_new_tokens - 1:
            return
        if len(going) < len(ids_B):
            rows = torch.tensor(going)
            run.keep(rows)
            chooser.keep(going)
            ids_B = ids_B[rows.to(ids_B.device)]
        logits_BV = run.step(ids_B)
