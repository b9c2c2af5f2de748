"""``task.kind: classification``: predict a label for a text or a pair, with a head or with words at ``{mask}``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ptd.config import DataConfig, TaskConfig
from ptd.data import marks_of
from ptd.data.collecting import Columns, InMemory, Pieces, collect
from ptd.data.fields import Column, field_chunks
from ptd.data.templates import Mask, Text, parse_templates
from ptd.readouts import Readout
from ptd.readouts.cloze import Cloze, Word
from ptd.readouts.heads import Head, PooledClassifier, Pooling
from ptd.tasks import register
from ptd.tasks.cloze import Variant, plan_sequences
from ptd.tasks.labels import Seen, name_at, names_of, number_of
from ptd.tasks.layouts import Laid, pattern_sequences, text_sequences
from ptd.tasks.weights import check_weights, learn_weights
from ptd.types import IGNORE_INDEX, Architecture, DataReport, Examples, HeadSettings, Output, Sample, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_POOLING: dict[Architecture, Pooling] = {"decoder": "last", "encoder": "cls", "encoder-decoder": "mean"}


class Classification:
    """Reads the fields ``text``, ``pair`` (if the data has it) and ``label``.

    - Without ``task.patterns``, the tokenizer lays out the text or the pair, and a head is trained.
    - Patterns without ``{mask}`` lay out the columns that they name, and a head is trained.
    - Patterns with ``{mask}`` are a cloze (`ptd.readouts.cloze`): ``task.verbalizer`` gives the words for each label.

    ``labels`` come from ``task.labels``, else from the verbalizer, else (after `fit`) from the training rows, sorted.
    """

    generates: Literal[False] = False
    metric_names = ("loss", "accuracy", "macro_f1", "mcc")

    def __init__(self, config: TaskConfig, data: DataConfig, architecture: Architecture) -> None:
        self.config, self.data, self.architecture = config, data, architecture
        self.templates = parse_templates(config.patterns or (), ("text", "pair"), data, "task.patterns")
        self.virtual_tokens = marks_of(config.patterns or [], "task.patterns")
        self.cloze = any(template.masks for template in self.templates)
        self.labels = tuple(config.labels or config.verbalizer or ())
        self.label_column = data.columns.get("label", "label")
        _check_layout(self)
        _check_words(self)
        _check_labels(self)
        self.causal = self.cloze and architecture == "decoder"
        self.output: Output = "causal_lm" if self.causal else "masked_lm" if self.cloze else "body"

    def fit(self, rows: Dataset, what: str) -> Classification:
        """Return the task with the label names and balanced class weights learned, if the settings need them."""
        weights = self.config.class_weights
        labels = self.labels
        if not labels or weights == "balanced":
            seen = Seen(self.label_column, what)
            for row, name, value in self._names(rows, what):
                seen.add(name, value, row)
            labels = labels or seen.names()
            weights = learn_weights(weights, labels, seen.counts)
        learned = self.config.model_copy(update={"labels": list(labels), "class_weights": weights})
        return Classification(learned, self.data, self.architecture)

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        """Return the rows as sequences; over ``data.max_length`` tokens the longest field (or text) loses its end."""
        assert self.labels, "fit comes first"
        return collect(self._pieces(rows, tokenizer, what, labelled), columns)

    def _pieces(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str, labelled: bool) -> Pieces:
        targets = self._targets(rows, what) if labelled else repeat(0)
        for laid in self._layout(rows, tokenizer, what):
            offsets = np.cumsum([0, *map(len, laid.sequences)], dtype=np.int64)
            tokens = np.fromiter(chain.from_iterable(laid.sequences), dtype=np.int32, count=offsets[-1])
            labels = np.full_like(tokens, IGNORE_INDEX)
            group = len(laid.sequences) // laid.rows
            target = 0
            for number, (begin, read) in enumerate(zip(offsets[:-1], laid.read, strict=True)):
                target = target if number % group else next(targets)
                labels[begin + read.start : begin + read.stop] = target
            report = DataReport(laid.rows, len(tokens), sum(map(len, laid.read)), texts_cut=laid.cut)
            types = None
            if laid.types is not None:
                types = np.fromiter(chain.from_iterable(laid.types), dtype=np.int8, count=len(tokens))
            yield Examples(tokens, labels, offsets, report, group, types)

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> Readout:
        given = self.config.class_weights
        weights = None
        if given is not None:
            assert given != "balanced", "fit comes first"
            weights = torch.tensor([given.get(label, 1.0) for label in self.labels])
        if self.cloze:
            return Cloze(self._plan(tokenizer)[1], len(self.labels), weights)
        pooling = _POOLING[self.architecture] if head.pooling == "auto" else head.pooling
        return PooledClassifier(Head(hidden_size, len(self.labels), head.hidden_sizes), pooling, weights)

    def answers(self, scores: Sequence[Tensor], examples: Examples, rows: Dataset) -> list[dict[str, Any]]:
        """Return each row's ``label`` and the ``probabilities`` of all labels."""
        found = []
        for row in scores:
            probabilities = dict(zip(self.labels, row.exp().tolist(), strict=True))
            found.append({"label": self.labels[int(row.argmax())], "probabilities": probabilities})
        return found

    def metrics(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """Return ``accuracy``, ``macro_f1`` (mean over labels that occur), 0–100, and Matthews' ``mcc``, −100–100."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        gold = [self.labels[target] for target in self._targets(rows, "the evaluated data")]
        given = [answer["label"] for answer in answers]
        one = len({*gold, *given}) == 1  # the correlation is undefined, and scikit-learn would warn
        return {
            "accuracy": 100 * float(accuracy_score(gold, given)),
            "macro_f1": 100 * float(f1_score(gold, given, average="macro", zero_division=0)),
            "mcc": 0.0 if one else 100 * float(matthews_corrcoef(gold, given)),
        }

    def samples(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> list[Sample]:
        """Return each row as a sample: its text (and pair), or the columns of the patterns, one per line.

        The score is the probability of the predicted label.
        """
        named = [field for template in self.templates for field in template.fields]
        columns = list(dict.fromkeys(named)) or [self.data.columns.get("text", "text")]
        if not named and "pair" in self.data.columns:
            columns.append(self.data.columns["pair"])
        found = []
        labels = (label for _, label, _ in self._names(rows, "the evaluated data"))
        for row, label, answer in zip(rows.with_format(None), labels, answers, strict=True):
            text = "\n".join(str(row[column]) for column in columns if row[column] is not None)
            given = answer["label"]
            found.append(Sample(text, label, given, answer["probabilities"][given], given == label))
        return found

    def facts(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_unset=True)

    def _names(self, rows: Dataset, what: str) -> Iterator[tuple[int, str, Any]]:
        """Yield each row's number (from 1), its label, and the label's value in the data."""
        column = self.label_column
        names = names_of(rows.features.get(column), column, what)
        for first, chunk in field_chunks(rows, {"label": Column(column, "a label")}, what):
            for row, value in enumerate(chunk["label"], first):
                yield row, name_at(value, names, f"row {row} of {what}: {column!r}"), value

    def _targets(self, rows: Dataset, what: str) -> Iterator[int]:
        """Yield the number of each row's label."""
        index = {label: number for number, label in enumerate(self.labels)}
        for row, name, _ in self._names(rows, what):
            yield number_of(name, index, f"row {row} of {what} has the label")

    def _layout(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str) -> Iterator[Laid]:
        limit = self.data.max_length
        if self.templates:
            variants = self._plan(tokenizer)[0] if self.cloze else None
            return pattern_sequences(rows, self.templates, variants, tokenizer, limit, what, cut_tail=self.causal)
        fields = {field: self.data.columns.get(field, field) for field in ("text", "pair")}
        return text_sequences(rows, fields, "pair" in self.data.columns, tokenizer, limit, what)

    def _plan(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Variant], list[Word]]:
        assert self.config.verbalizer is not None
        return plan_sequences(self.templates, self.config.verbalizer, self.labels, tokenizer, causal=self.causal)


def _check_layout(task: Classification) -> None:
    """Raise `UserError` for patterns that cannot lay out a sequence, or not for this backbone."""
    if task.config.patterns is None:
        return
    if not task.templates:
        raise UserError("task.patterns: the list is empty; give at least one pattern, or remove the key")
    for template in task.templates:
        if not template.fields:
            raise UserError(
                f"task.patterns: {template.source!r} has no {{column}} field, so all rows would look alike; add one"
            )
        if template.masks > 1 or (task.cloze and not template.masks):
            raise UserError(
                f"task.patterns: {template.source!r} has {{mask}} {template.masks} times; every pattern needs it "
                "exactly once (or, to train a head, no pattern may have it)"
            )
    if task.cloze and task.architecture == "encoder-decoder":
        raise UserError(
            "task.patterns: {mask} needs an encoder that fills masks or a decoder, but the backbone is an "
            "encoder-decoder; set task.kind: seq2seq_lm with the label's word as completion, or train a head with "
            "patterns without {mask}"
        )
    if task.cloze and task.architecture == "decoder":
        for template in task.templates:
            behind = template.parts[template.parts.index(Mask()) + 1 :]
            if any(not isinstance(part, Text) for part in behind):
                raise UserError(
                    f"task.patterns: {template.source!r} has a field or virtual tokens after {{mask}}, which a "
                    "decoder does not see when it predicts the word; put {mask} at the end"
                )


def _check_words(task: Classification) -> None:
    verbalizer = task.config.verbalizer
    if task.cloze and verbalizer is None:
        raise UserError(
            "task.patterns: {mask} is the position of a label's word, but task.verbalizer gives no words; "
            "set it, e.g. to {positive: [great], negative: [terrible]}, or remove {mask}"
        )
    if verbalizer is None:
        return
    if not task.cloze:
        raise UserError(
            "task.verbalizer: has no effect without a {mask} in task.patterns, which its words replace; "
            'set task.patterns, e.g. ["{text} It was {mask}."], or remove task.verbalizer'
        )
    for label in task.labels:
        if not verbalizer.get(label):
            raise UserError(f"task.verbalizer: has no word for the label {label!r}; give it at least one")
    for label in verbalizer:
        if label not in task.labels:
            raise UserError(f"task.verbalizer: {label!r} is not a label; the labels are {', '.join(task.labels)}")


def _check_labels(task: Classification) -> None:
    if task.labels and len(task.labels) < 2:
        raise UserError(f"task.labels: {list(task.labels)} leaves nothing to choose from; give at least two labels")
    check_weights(task.config.class_weights, task.labels)


@register("classification")
def build(config: TaskConfig, data: DataConfig, architecture: Architecture) -> Classification:
    return Classification(config, data, architecture)
