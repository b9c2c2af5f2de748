"""``task.kind: question_answering``: find the span of a context that answers a question, as in SQuAD 1.1 and 2.0.

The fields are ``question``, ``context`` and ``answers``. ``answers`` is SQuAD's ``{"text": […], "answer_start": […]}``,
a list of ``{"text", "answer_start"}``, or the text itself, which then starts at its first occurrence in the context. If
``answers`` is empty, the context has no answer. Training uses the first answer; the metrics use all answers.

A context that is too long is split into windows that overlap by ``task.doc_stride`` tokens, so a row of the data may
become several rows of the examples. The target of a window without the answer is its first token (Devlin et al. 2019,
§4.3).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ptd.config import DataConfig, TaskConfig
from ptd.data.collecting import Columns, InMemory, Pieces, collect
from ptd.data.fields import Column, cut_on_the_right, field_chunks
from ptd.readouts.spans import CANDIDATE, END, START, Spans
from ptd.tasks import register
from ptd.types import IGNORE_INDEX, Architecture, DataReport, Examples, HeadSettings, Output, Sample, UserError
from ptd.values import is_blank

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Answer = tuple[str, int]
"""The answer's text and the index of the context's character at which it starts."""
BEFORE = 120
"""Number of characters of the context that a sample shows before the answer."""
NONE = "(no answer)"


@dataclass(frozen=True)
class ContextWindow:
    """A row of the examples: its row of the data (from 0), the context, and the context's tokens in the window.

    ``characters`` int32 ``[candidates, 2]``: the range of characters of each candidate; the range of the first
    candidate, which stands for "no answer", is empty.
    """

    row: int
    context: str
    characters: np.ndarray


class QuestionAnswering:
    """Answers questions with spans of the context, predicted by a trained head on the last hidden states."""

    output: Output = "body"
    labels: tuple[str, ...] = ()
    virtual_tokens = 0
    cloze = False
    generates: Literal[False] = False
    metric_names = ("loss", "exact_match", "f1")

    def __init__(self, config: TaskConfig, data: DataConfig) -> None:
        self.config, self.data = config, data
        names = {field: data.columns.get(field, field) for field in ("question", "context", "answers")}
        self.fields = {
            field: Column(name, "an answer, or a list of answers", may_be_blank=True)
            if field == "answers"
            else Column(name)
            for field, name in names.items()
        }

    def fit(self, rows: Dataset, what: str) -> QuestionAnswering:
        return self

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        """Return windows ``question, context`` of up to ``max_length`` tokens, with the tokenizer's special tokens.

        Labels: ``CANDIDATE``, ``START`` and ``END`` (`ptd.readouts.spans`) at the window's first token and at the
        tokens of the context. Without ``labelled``, the answer of every window is its first token. The arrays ``row``
        (per window), ``begin`` and ``end`` (per candidate) are those of `windows`.
        """
        return collect(self._pieces(rows, tokenizer, what, labelled), columns)

    def _pieces(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str, labelled: bool) -> Pieces:
        split = window_splitter(tokenizer, self.data.max_length, self.config.doc_stride)
        fields = self.fields if labelled else {name: self.fields[name] for name in ("question", "context")}
        takes_types = "token_type_ids" in tokenizer.model_input_names
        for first, chunk in field_chunks(rows, fields, what):
            tokens, types, labels, offsets = array("i"), array("b"), array("i"), array("q", [0])
            row_of, begins, ends = array("i"), array("i"), array("i")
            places = [f"row {row} of {what}" for row in range(first, first + len(chunk["context"]))]
            for index, ids, type_ids, in_context, spans in split(chunk["question"], chunk["context"], places):
                context = chunk["context"][index]
                targets = np.full(len(ids), IGNORE_INDEX)
                targets[[0, *in_context]] = CANDIDATE
                found = None
                if labelled and (answers := parse_answers(chunk["answers"][index], context, places[index])):
                    found = _span(answers[0], spans)
                start, end = (0, 0) if found is None else (in_context[found[0]], in_context[found[1]])
                targets[start] |= START
                targets[end] |= END
                tokens.extend(ids)
                types.extend(type_ids)
                labels.extend(targets.tolist())
                offsets.append(len(tokens))
                row_of.append(first - 1 + index)
                begins.extend([0, *(begin for begin, _ in spans)])
                ends.extend([0, *(end for _, end in spans)])
            label_array = np.frombuffer(labels, dtype=np.int32)
            type_array = np.frombuffer(types, dtype=np.int8)
            aside = {"row": row_of, "begin": begins, "end": ends}
            yield Examples(
                np.frombuffer(tokens, dtype=np.int32),
                label_array,
                np.frombuffer(offsets, dtype=np.int64),
                DataReport(len(places), len(tokens), int((label_array != IGNORE_INDEX).sum())),
                token_types=type_array if takes_types and type_array.any() else None,
                aside={name: np.frombuffer(values, dtype=np.int32) for name, values in aside.items()},
            )

    def windows(self, examples: Examples, rows: Dataset) -> Iterator[ContextWindow]:
        """Yield the window of each row of the examples; ``rows``: the rows of the data."""
        assert examples.aside is not None
        row_of, begins, ends = (examples.aside[name] for name in ("row", "begin", "end"))
        stops = np.cumsum(examples.summary.supervised, dtype=np.int64)
        column = {"context": self.fields["context"]}
        contexts = (context for _, chunk in field_chunks(rows, column, "the data") for context in chunk["context"])
        context, current, start = "", -1, 0
        for row, stop in zip(row_of.tolist(), stops.tolist(), strict=True):
            while current < row:
                context, current = next(contexts), current + 1
            yield ContextWindow(row, context, np.stack([begins[start:stop], ends[start:stop]], axis=1))
            start = stop

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> Spans:
        if head.pooling != "auto":
            raise UserError(f"method.pooling: {head.pooling} has no effect on task.kind question_answering; remove it")
        return Spans(hidden_size, head.hidden_sizes)

    def answers(self, scores: Sequence[Tensor], examples: Examples, rows: Dataset) -> list[dict[str, Any]]:
        """Return one answer per row of the *data*: ``answer`` ("" for none) and ``score``, its probability.

        The probability is that within a window. The most probable span of all windows is the answer, unless "no answer"
        is more probable in every window: its score is the lowest over the windows (the official evaluation of SQuAD
        2.0, with probabilities instead of logits).
        """
        best: dict[int, tuple[float, str]] = {}
        null: dict[int, float] = {}
        for window, logits in zip(self.windows(examples, rows), scores, strict=True):
            log_probs = logits.double().log_softmax(dim=0)
            null[window.row] = min(null.get(window.row, 0.0), float(log_probs[0].sum()))
            score, start, end = best_span(log_probs[1:], self.config.max_answer_length)
            if score > best.get(window.row, (-np.inf, ""))[0]:
                begin, stop = window.characters[start + 1][0], window.characters[end + 1][1]
                best[window.row] = score, window.context[begin:stop]
        found = []
        for row, without in null.items():
            score, text = max(best.get(row, (-np.inf, "")), (without, ""), key=lambda choice: choice[0])
            found.append({"answer": text, "score": float(np.exp(score))})
        return found

    def metrics(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """Return SQuAD's ``exact_match`` and ``f1`` (0–100): the best over a row's answers, averaged over rows."""
        return _squad([answer["answer"] for answer in answers], [gold for *_, gold in self._gold(rows)])

    def samples(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> list[Sample]:
        """Return each row's question, and its context from `BEFORE` characters before the answer.

        An answer is right if it matches one of the row's answers exactly.
        """
        found = []
        for (question, context, gold), answer in zip(self._gold(rows), answers, strict=True):
            begin = max(0, gold[0][1] - BEFORE)
            text = f"{question}\n{'…' if begin else ''}{context[begin:]}"
            wanted = " / ".join(dict.fromkeys(each for each, _ in gold))
            right = _squad([answer["answer"]], [gold])["exact_match"] == 100
            found.append(Sample(text, wanted or NONE, answer["answer"] or NONE, answer["score"], right))
        return found

    def _gold(self, rows: Dataset) -> list[tuple[str, str, list[Answer]]]:
        """Return the question, context and answers of each row; a row without an answer has one empty answer."""
        return [
            (question, context, parse_answers(value, context, f"row {row}") or [("", 0)])
            for first, chunk in field_chunks(rows, self.fields, "the data")
            for row, (question, context, value) in enumerate(
                zip(chunk["question"], chunk["context"], chunk["answers"], strict=True), first
            )
        ]

    def facts(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_unset=True)


def _squad(answers: Sequence[str], gold: Sequence[list[Answer]]) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    predictions = [{"id": str(row), "prediction_text": answer} for row, answer in enumerate(answers)]
    targets = [
        {"id": str(row), "answers": {"text": [text for text, _ in texts], "answer_start": [at for _, at in texts]}}
        for row, texts in enumerate(gold)
    ]
    return {name: float(value) for name, value in squad(predictions, targets).items()}


def parse_answers(value: Any, context: str, place: str) -> list[Answer]:
    """Parse any of the forms that ``answers`` may have.

    Raises `UserError` for another form, or if the context does not have an answer's text at its position.
    """
    if isinstance(value, str):
        value = [] if is_blank(value) else [value]
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start") or [None] * len(value["text"])
        if not isinstance(starts, list):
            raise UserError(
                f"{place}: text in answers is a list, so answer_start has to be a list as well, not {starts!r:.60}"
            )
        if len(starts) != len(value["text"]):
            raise UserError(
                f"{place}: answers has {len(value['text'])} texts but {len(starts)} values of answer_start; give one "
                "answer_start per text"
            )
        value = [{"text": text, "answer_start": start} for text, start in zip(value["text"], starts, strict=True)]
    if not isinstance(value, list):
        raise UserError(
            f"{place}: answers has to be {{text: […], answer_start: […]}}, a list of {{text, answer_start}} or text, "
            f"but is {repr(value)[:60]}; an empty list means that there is no answer"
        )
    return [_answer(item if isinstance(item, dict) else {"text": item}, context, place) for item in value]


def _answer(item: dict[str, Any], context: str, place: str) -> Answer:
    text, start = item.get("text"), item.get("answer_start")
    if not isinstance(text, str) or is_blank(text):
        raise UserError(f"{place}: an answer's text is {text!r}; give a piece of the context, or an empty list")
    if start is None:
        start = context.find(text)
        if start < 0:
            raise UserError(f"{place}: the context does not contain the answer {text!r}; give a piece of the context")
    elif type(start) is not int or start < 0:
        raise UserError(f"{place}: answer_start is {repr(start)[:60]}; give the index of a character, from 0")
    elif context[start : start + len(text)] != text:
        there = context[start : start + len(text)]
        raise UserError(
            f"{place}: at answer_start {start} the context has {there!r}, not the answer {text!r}; "
            "correct answer_start, or leave it out to use the first occurrence of the text"
        )
    bare = text.lstrip()
    return bare.rstrip(), start + len(text) - len(bare)


_Split = tuple[int, list[int], list[int], list[int], list[tuple[int, int]]]
# row of the chunk, ids, token types, positions of the context's tokens, and their characters


def window_splitter(
    tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> Callable[[list[str], list[str], list[str]], Iterator[_Split]]:
    """Return ``split(questions, contexts, places)``, which yields the windows of each row, in order.

    Raises `UserError` for a tokenizer without offsets; ``split`` raises it, naming the row, for a question that leaves
    too little room.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} cannot tell which characters a token covers, which "
            "task.kind question_answering needs; add its tokenizer.json"
        )
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    # If no special token separates question and context, a line break marks the end of the question.
    separator = "" if specials > tokenizer.num_special_tokens_to_add(pair=False) else "\n"

    def split(questions: list[str], contexts: list[str], places: list[str]) -> Iterator[_Split]:
        firsts = [question.strip() + separator for question in questions]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        asked = [len(ids) for ids in tokenizer(firsts, **options)["input_ids"]]
        told = [len(ids) for ids in tokenizer(contexts, **options)["input_ids"]]
        for length, rest, place in zip(asked, told, places, strict=True):
            room = max_length - specials - length
            if rest > room and room <= doc_stride:
                raise UserError(
                    f"{place}: the question ({length} tokens) leaves room for {max(room, 0)} tokens of the context, "
                    f"but windows that overlap by task.doc_stride ({doc_stride}) tokens need more; "
                    "raise data.max_length or lower task.doc_stride"
                )
        with cut_on_the_right(tokenizer):
            encoded = tokenizer(
                firsts,
                contexts,
                truncation="only_second",
                max_length=max_length,
                # The limit of the tokenizer. Where it is lower than doc_stride, no context is split (see the check).
                stride=max(0, min(doc_stride, max_length - specials - 1)),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            places_of_context = [at for at, part in enumerate(encoded.sequence_ids(window)) if part == 1]
            characters = encoded["offset_mapping"][window]
            yield (
                row,
                encoded["input_ids"][window],
                encoded["token_type_ids"][window],
                places_of_context,
                [characters[at] for at in places_of_context],
            )

    return split


def _span(answer: Answer, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first and last token that share characters with the answer; None if part of it is outside."""
    text, start = answer
    stop = start + len(text)
    if not spans or spans[0][0] > start or spans[-1][1] < stop:
        return None
    touched = [index for index, (begin, end) in enumerate(spans) if begin < stop and end > start]
    return (touched[0], touched[-1]) if touched else None


def best_span(log_probs: Tensor, max_answer_length: int) -> tuple[float, int, int]:
    """Return score, start and end of the best span: start ≤ end < start + ``max_answer_length``.

    ``log_probs`` ``[tokens, 2]``: of the start and of the end; the score of a span is their sum.
    """
    if len(log_probs) == 0:
        return -np.inf, 0, 0
    joint = log_probs[:, :1] + log_probs[:, 1]
    allowed = torch.ones_like(joint, dtype=torch.bool).triu().tril(max_answer_length - 1)
    flat = int(joint.where(allowed, torch.tensor(-torch.inf, dtype=joint.dtype, device=joint.device)).argmax())
    start, end = divmod(flat, len(log_probs))
    return float(joint[start, end]), start, end


@register("question_answering")
def build(config: TaskConfig, data: DataConfig, architecture: Architecture) -> QuestionAnswering:
    return QuestionAnswering(config, data)
