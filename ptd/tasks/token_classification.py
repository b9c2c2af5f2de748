"""``task.kind: token_classification``: label every word, with a trained head on the word's first sub-token."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ptd.config import DataConfig, TaskConfig
from ptd.data.collecting import Columns, InMemory, Pieces, collect
from ptd.data.fields import Column, cut_on_the_right, field_chunks
from ptd.readouts.tags import Tags
from ptd.tasks import register
from ptd.tasks.labels import Seen, name_at, names_of, number_of
from ptd.tasks.weights import check_weights, learn_weights
from ptd.types import IGNORE_INDEX, Architecture, DataReport, Examples, HeadSettings, Output, Sample, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CHUNKED = re.compile(r"[BIES]-.+")
OUTSIDE = "O"


class TokenClassification:
    """Reads the fields ``tokens`` (words) and ``tags``: one name per word, or one number (an index into the names).

    If the tags have no names, a number is its own name.
    """

    output: Output = "body"
    virtual_tokens = 0
    cloze = False
    generates: Literal[False] = False

    def __init__(
        self,
        config: TaskConfig,
        data: DataConfig,
        labels: tuple[str, ...] = (),
        class_weights: dict[str, float] | None = None,
    ) -> None:
        self.config, self.data, self.labels, self.class_weights = config, data, labels, class_weights
        holds = {"tokens": "a list of words", "tags": "a list of tags"}
        self.fields = {field: Column(data.columns.get(field, field), words) for field, words in holds.items()}

    def fit(self, rows: Dataset, what: str) -> TokenClassification:
        """Learn the label names unless they are given: from the data's ``ClassLabel``, or the distinct tags, sorted."""
        if self.config.labels is not None and self.config.class_weights != "balanced":
            return self._with(tuple(self.config.labels), self.config.class_weights)
        names = self._names_of_data(rows)
        column = self.fields["tags"]
        seen = Seen(column.name, what)
        for first, chunk in field_chunks(rows, {"tags": column}, what):
            for row, tags in enumerate(chunk["tags"], first):
                for tag in _list(tags, column.name, f"row {row} of {what}"):
                    seen.add(_name(tag, names, column.name, f"row {row} of {what}"), tag, row)
        labels = tuple(self.config.labels or names or seen.names())
        return self._with(labels, learn_weights(self.config.class_weights, labels, seen.counts))

    def _with(self, labels: tuple[str, ...], weights: dict[str, float] | None) -> TokenClassification:
        if len(labels) < 2:
            raise UserError(
                f"task.labels: {list(labels)} leaves nothing to choose from; give data with at least two different tags"
            )
        check_weights(weights, labels)
        return TokenClassification(self.config, self.data, labels, weights)

    def _names_of_data(self, rows: Dataset) -> tuple[str, ...]:
        """Return the names that numbers among the tags stand for; empty: a number is its own name."""
        column = self.fields["tags"].name
        own = names_of(getattr(rows.features.get(column), "feature", None), column, "the data")
        names = tuple(own or self.labels or self.config.labels or ())
        return () if any(name.isdecimal() for name in names) else names

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        """Tokenise each word as it would be in a text, and label its first sub-token; cut rows on the right.

        The limit is ``max_length``. Without ``labelled``, the same positions have labels without a meaning. The array
        ``seen`` has the index of the word of each label.
        """
        assert self.labels, "fit comes first"
        return collect(self._pieces(rows, tokenizer, what, labelled), columns)

    def _pieces(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str, labelled: bool) -> Pieces:
        index_of = {label: index for index, label in enumerate(self.labels)}
        fields = self.fields if labelled else {"tokens": self.fields["tokens"]}
        names = self._names_of_data(rows) if labelled else ()
        encode = word_encoder(tokenizer, self.data.max_length)
        for first, chunk in field_chunks(rows, fields, what):
            tokens, labels, offsets, seen = array("i"), array("i"), array("q", [0]), array("i")
            rows_words = [
                _words(value, self.fields["tokens"].name, f"row {row} of {what}")
                for row, value in enumerate(chunk["tokens"], first)
            ]
            for index, (ids, places) in enumerate(encode(rows_words)):
                words, place = rows_words[index], f"row {first + index} of {what}"
                if not places:
                    raise UserError(
                        f"{place}: no word of {words[:5]} has a token within data.max_length {self.data.max_length}; "
                        "remove the row or raise data.max_length"
                    )
                targets = [0] * len(words)
                if labelled:
                    column = self.fields["tags"].name
                    tags = _list(chunk["tags"][index], column, place)
                    if len(tags) != len(words):
                        raise UserError(f"{place} has {len(words)} words but {len(tags)} tags; give one tag per word")
                    targets = [
                        number_of(_name(tag, names, column, place), index_of, f"{place} has the tag") for tag in tags
                    ]
                row = [IGNORE_INDEX] * len(ids)
                for word, position in places.items():
                    row[position] = targets[word]
                tokens.extend(ids)
                labels.extend(row)
                offsets.append(len(tokens))
                seen.extend(places)
            yield Examples(
                np.frombuffer(tokens, dtype=np.int32),
                np.frombuffer(labels, dtype=np.int32),
                np.frombuffer(offsets, dtype=np.int64),
                DataReport(len(rows_words), len(tokens), len(seen)),
                aside={"seen": np.frombuffer(seen, dtype=np.int32)},
            )

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> Tags:
        if head.pooling != "auto":
            raise UserError(f"method.pooling: {head.pooling} has no effect on token_classification; remove it")
        weights = None
        if self.class_weights is not None:
            weights = [self.class_weights.get(label, 1.0) for label in self.labels]
        return Tags(hidden_size, len(self.labels), head.hidden_sizes, weights)

    def answers(self, scores: Sequence[Tensor], examples: Examples, rows: Dataset) -> list[dict[str, Any]]:
        """Return ``tags`` and ``probabilities``, one per word, and ``entities`` (words ``start:end``) if `chunked`.

        A word that the backbone did not read has the tag O (or else the first label), with probability None.
        """
        assert examples.aside is not None
        unseen = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        found, begin = [], 0
        for words, log_probs in zip(self._all_words(rows), scores, strict=True):
            best, choice = log_probs.max(dim=-1)
            seen = examples.aside["seen"][begin : begin + len(log_probs)].tolist()
            begin += len(seen)
            tags = [unseen] * len(words)
            probabilities: list[float | None] = [None] * len(words)
            for word, label, probability in zip(seen, choice.tolist(), best.exp().tolist(), strict=True):
                tags[word], probabilities[word] = self.labels[label], probability
            answer: dict[str, Any] = {"tags": tags, "probabilities": probabilities}
            if self.chunked:
                answer["entities"] = list(_entities(words, tags))
            found.append(answer)
        return found

    def metrics(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """Return ``accuracy`` over words and, if `chunked`, ``precision``, ``recall``, ``f1`` of spans (seqeval)."""
        gold = self._gold(rows)
        predicted = [answer["tags"] for answer in answers]
        pairs = [pair for row in zip(gold, predicted, strict=True) for pair in zip(*row, strict=True)]
        result = {"accuracy": 100 * sum(one == other for one, other in pairs) / len(pairs)}
        if self.chunked:
            from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

            precision, recall, f1, _ = precision_recall_fscore_support(
                gold, predicted, average="micro", zero_division=0
            )
            result |= {"precision": 100 * float(precision), "recall": 100 * float(recall), "f1": 100 * float(f1)}
        return result

    def samples(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> list[Sample]:
        """Return each row's words with their tags, or its entities.

        The score is the highest probability of a wrong tag (0 for a word that the backbone did not read); in a row
        without wrong tags, it is the lowest probability of a tag.
        """
        found = []
        for row, gold, answer in zip(self._all_words(rows), self._gold(rows), answers, strict=True):
            given, probabilities = answer["tags"], answer["probabilities"]
            wrong = [sure or 0.0 for sure, one, other in zip(probabilities, given, gold, strict=True) if one != other]
            score = max(wrong) if wrong else min(sure for sure in probabilities if sure is not None)
            found.append(Sample(" ".join(row), self._told(row, gold), self._told(row, given), score, not wrong))
        return found

    def _all_words(self, rows: Dataset) -> Iterator[list[str]]:
        column = {"tokens": self.fields["tokens"]}
        return (words for _, chunk in field_chunks(rows, column, "the data") for words in chunk["tokens"])

    def _told(self, words: Sequence[str], tags: list[str]) -> str:
        if not self.chunked:
            return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
        return "; ".join(f"{each['type']}: {each['text']}" for each in _entities(words, tags)) or "(nothing)"

    def _gold(self, rows: Dataset) -> list[list[str]]:
        names, column = self._names_of_data(rows), self.fields["tags"]
        return [
            [_name(tag, names, column.name, f"row {row} of the data") for tag in tags]
            for first, chunk in field_chunks(rows, {"tags": column}, "the data")
            for row, tags in enumerate(chunk["tags"], first)
        ]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "accuracy", *(("precision", "recall", "f1") if self.chunked else ()))

    @property
    def chunked(self) -> bool:
        """Whether the labels mark spans: B-, I-, E- or S- and a type, or O."""
        return all(label == OUTSIDE or _CHUNKED.fullmatch(label) for label in self.labels)

    def facts(self) -> dict[str, Any]:
        plain = self.config.model_dump(mode="json", exclude_unset=True)
        learned = {"labels": list(self.labels)} if self.labels else {}
        weights = {"class_weights": self.class_weights} if self.class_weights is not None else {}
        return {**plain, **learned, **weights}


WordPlaces = dict[int, int]
"""Index of a word -> position of its first sub-token, for the words that have tokens."""


def word_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    """Return ``encode(rows of words) -> [(token ids, WordPlaces)]``, which reads words as in a text with spaces.

    Byte-level tokenizers tokenise a word differently after a space, but add none to words that are given separately, so
    ``encode`` adds the space. Raises `UserError` for a tokenizer that cannot tell which word a token comes from.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} cannot tell which word a token comes from, which "
            "task.kind token_classification needs; add its tokenizer.json"
        )

    apart = tokenizer(["a", "b"], is_split_into_words=True)["input_ids"]
    spaced = tokenizer(["a", " b"], is_split_into_words=True)["input_ids"]
    needs_space = apart != spaced and spaced == tokenizer("a b")["input_ids"]

    def encode(rows: list[list[str]]) -> Iterator[tuple[list[int], WordPlaces]]:
        given = [[row[0], *(f" {word}" for word in row[1:])] for row in rows] if needs_space else rows
        with cut_on_the_right(tokenizer):
            encoded = tokenizer(
                given, is_split_into_words=True, truncation=True, max_length=max_length, return_attention_mask=False
            )
        for row, ids in enumerate(encoded["input_ids"]):
            places: WordPlaces = {}
            for position, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    places.setdefault(word, position)
            yield ids, places

    return encode


def _list(value: Any, column: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(
            f"{place}: {column!r} has to be a list, one item per word, but is {type(value).__name__} "
            f"({repr(value)[:60]})"
        )
    return value


def _words(value: Any, column: str, place: str) -> list[str]:
    words = _list(value, column, place)
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{place}: {column!r} has to be a list of words, but is {repr(value)[:60]}")
    return words


def _name(tag: Any, names: tuple[str, ...], column: str, place: str) -> str:
    name = name_at(tag, names, f"{place}: an item of {column!r}")
    if isinstance(tag, int | float) and name.startswith("-"):
        raise UserError(
            f"{place}: {column!r} has the tag {name}, but tags are numbered from 0 (negative numbers usually mark "
            "sub-tokens to ignore); give one tag per word, not per sub-token"
        )
    return name


def _entities(words: Sequence[str], tags: list[str]) -> Iterator[dict[str, Any]]:
    from seqeval.metrics.sequence_labeling import get_entities

    for kind, start, last in get_entities(tags):
        yield {"type": kind, "start": start, "end": last + 1, "text": " ".join(words[start : last + 1])}


@register("token_classification")
def build(config: TaskConfig, data: DataConfig, architecture: Architecture) -> TokenClassification:
    task = TokenClassification(config, data)
    if config.labels is not None and config.class_weights != "balanced":
        return task._with(tuple(config.labels), config.class_weights)
    return task
