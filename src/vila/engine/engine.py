"""The engine: conversations in, text or log-probabilities out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vila.chat.render import render
from vila.chat.tokenize import IGNORE, Tokens, tokenize
from vila.core.errors import ContextOverflowError
from vila.core.types import Image, Message
from vila.engine.answer import Answer
from vila.engine.batch import BatchRun, Group, group_prompts
from vila.engine.request import Generation, Sampling, TokenEvent
from vila.families.card import find_family
from vila.model.load import load_model
from vila.model.precision import choose_dtype
from vila.model.processor import VilaProcessor
from vila.model.vila import VilaForConditionalGeneration

Conversation = Sequence[Message]

_KEPT_PICTURES = 256


class Engine:
    """Generates and scores text with one model. `generate`, `stream` and `score` take conversations as messages."""

    def __init__(self, model: VilaForConditionalGeneration, processor: VilaProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        self._stop_ids = _stop_ids(model, processor)
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    @staticmethod
    def load(path: str | Path, dtype: str = "auto", device: str = "cpu") -> Engine:
        """The engine of a checkpoint directory. dtype: `auto` is bfloat16 where the hardware computes it."""
        return Engine(*load_model(path, dtype=choose_dtype(dtype, device), device=device))

    def generate(
        self, conversations: Sequence[Conversation], sampling: Sampling | None = None, *, template: str = ""
    ) -> list[Generation]:
        """Answers to conversations that end with the user's turn, run as one batch.

        Conversations about the same pictures share the computation of their common prefix.
        Raises ContextOverflowError before any work when a prompt and its answer do not fit.
        """
        prompts = [self.processor.prompt(messages, template) for messages in conversations]
        answers = [self._answer(template) for _ in prompts]
        for _ in self._decode(prompts, answers, sampling or Sampling()):
            pass
        return [answer.generation(len(prompt.ids)) for answer, prompt in zip(answers, prompts, strict=True)]

    def stream(
        self, conversation: Conversation, sampling: Sampling | None = None, *, template: str = ""
    ) -> Iterator[TokenEvent]:
        """The answer piece by piece; the pieces joined and stripped are the text that `generate` gives.

        A character whose bytes are not complete yet, and what may become a stop string, wait for the next token.
        """
        answer = self._answer(template)
        shown = 0
        for _ in self._decode([self.processor.prompt(conversation, template)], [answer], sampling or Sampling()):
            text = answer.certain_text
            if answer.finish is None and len(text) > shown:
                yield TokenEvent(text[shown:])
                shown = len(text)
        yield TokenEvent(answer.text[shown:], answer.finish or "length")

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation], *, template: str = "") -> list[list[float]]:
        """Log-probabilities of the supervised tokens (answers and their ends) of whole conversations, one list each."""
        chosen = self.processor.find_template(template)
        rows = [
            tokenize(render(messages, chosen), self.processor.span_tokenizer, self.processor.count)
            for messages in conversations
        ]
        self._check_context(rows, 0)
        run = BatchRun(self.model, self._encode, max(len(row.ids) for row in rows))
        run.begin(len(rows))
        images = [item for row in rows for item in row.media if isinstance(item, Image)]
        states, _ = run.hidden([row.ids for row in rows], images)
        head = self.model.get_output_embeddings()
        out = []
        for state, row in zip(states, rows, strict=True):
            places = [i for i, label in enumerate(row.labels) if i and label != IGNORE]
            logits = head(state[torch.tensor(places) - 1]).float().log_softmax(-1)
            out.append(logits[range(len(places)), [row.labels[i] for i in places]].tolist())
        return out

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Tokens], answers: Sequence[Answer], sampling: Sampling) -> Iterator[None]:
        """Grow the answers, a token in each at every turn; rows leave when their answer has ended."""
        self._check_context(prompts, sampling.max_new_tokens)
        groups = group_prompts(prompts)
        run = BatchRun(self.model, self._encode, _capacity(prompts, groups) + sampling.max_new_tokens)
        generator = torch.Generator().manual_seed(sampling.seed)
        logits = run.prefill(prompts, groups)
        for count in range(sampling.max_new_tokens):
            ids = _choose(logits, sampling, generator)
            going = [row for row, index in enumerate(run.order) if answers[index].take(int(ids[row]))]
            yield
            if not going or count == sampling.max_new_tokens - 1:
                return
            if len(going) < len(ids):
                run.keep(torch.tensor(going))
            logits = run.step(ids[going])

    def _answer(self, template: str) -> Answer:
        special = self.processor.span_tokenizer.special_ids
        named = template or self.processor.template
        stops = self.processor.find_template(named).stop if named else ()
        ids = self._stop_ids | {special[stop] for stop in stops if stop in special}
        return Answer(self._text, ids, tuple(stop for stop in stops if stop not in special))

    def _check_context(self, prompts: Sequence[Tokens], new: int) -> None:
        limit = int(self.model.config.text_config.max_position_embeddings)
        for prompt in prompts:
            if len(prompt.ids) + new > limit:
                raise ContextOverflowError(
                    f"the prompt has {len(prompt.ids)} tokens and the answer may have {new}, "
                    f"but the model's context holds {limit}; shorten the prompt or lower max_new_tokens"
                )

    def _encode(self, images: Sequence[Image]) -> Tensor:
        """Tower features of pictures [N, P, C]; each distinct picture is computed once and kept for a while."""
        keys = [image.key() for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
        if missing:
            pixels = self.processor.pixels(list(missing.values())).to(self.model.device)
            for key, features in zip(missing, self.model.vision_features(pixels), strict=True):
                self._features[key] = features
        out = torch.stack([self._features[key] for key in keys])
        while len(self._features) > _KEPT_PICTURES:
            self._features.popitem(last=False)
        return out

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True))


def _capacity(prompts: Sequence[Tokens], groups: Sequence[Group]) -> int:
    tails = max(len(prompts[index].ids) - group.shared for group in groups for index in group.members)
    return max(group.shared for group in groups) + tails


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    probabilities = (logits_BV / sampling.temperature).softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _stop_ids(model: VilaForConditionalGeneration, processor: VilaProcessor) -> frozenset[int]:
    """The tokenizer's end of sequence, and the family's stop tokens that the tokenizer holds as special ones."""
    span = processor.span_tokenizer
    ids = {span.eos_id} if span.eos_id is not None else set()
    family = find_family(model.config.text_config.model_type)
    ids |= {span.special_ids[token] for token in family.stop_tokens if token in span.special_ids}
    return frozenset(ids)
