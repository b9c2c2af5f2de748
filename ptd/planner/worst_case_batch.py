"""Make the largest micro-batch that a run can have from its settings: every row is ``data.max_length`` long."""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from ptd.config import RunConfig
from ptd.data.batches import packed_batch, padded_batch
from ptd.readouts import Readout
from ptd.readouts.cloze import Cloze
from ptd.readouts.heads import PooledClassifier
from ptd.readouts.spans import CANDIDATE, END, START, Spans
from ptd.readouts.tags import Tags
from ptd.tasks import Task
from ptd.types import IGNORE_INDEX, Batch, DataReport, Examples, virtual_id


def rows_of(config: RunConfig) -> int:
    """Return the rows per micro-batch: ``per_device_train_batch_size``, or as many as fit into ``data.max_tokens``."""
    if config.data.max_tokens is not None:
        return max(1, config.data.max_tokens // config.data.max_length)
    return config.train.per_device_train_batch_size


def sample_batch(
    config: RunConfig, task: Task, readout: Readout, rows: int, *, packed: bool, supervised: float = 1.0
) -> Batch:
    """Return ``rows`` rows of ``data.max_length`` tokens, with the labels that ``readout`` expects.

    ``supervised``: share of the tokens of a text that carry loss. An ensemble of patterns has one sequence per pattern;
    a cloze has one per pattern and word length.
    """
    data = config.data
    group = _group(readout) if readout.__class__ is Cloze else max(1, len(config.task.patterns or ()))
    length = data.max_target_length or data.max_length if task.output == "seq2seq_lm" else data.max_length
    labels = _labels(readout, length, group, max(1, round(supervised * length)))
    marks = 0 if task.output == "seq2seq_lm" else task.virtual_tokens
    examples = _examples(np.tile(labels, rows), length, rows, group, marks)
    if task.output == "seq2seq_lm":
        source = _examples(np.full(rows * data.max_length, IGNORE_INDEX), data.max_length, rows, 1, task.virtual_tokens)
        examples = Examples(
            examples.tokens, examples.labels, examples.offsets, examples.report, examples.group, source=source
        )
    return (packed_batch if packed else padded_batch)(examples, np.arange(rows))


def _examples(labels: np.ndarray, length: int, rows: int, group: int, marks: int) -> Examples:
    tokens = np.zeros((rows * group, length), dtype=np.int32)
    tokens[:, :marks] = [virtual_id(index) for index in range(min(marks, length))]
    offsets = np.arange(rows * group + 1, dtype=np.int64) * length
    return Examples(tokens.reshape(-1), labels.astype(np.int32), offsets, DataReport(rows, tokens.size, 0), group)


def _group(readout: Readout) -> int:
    assert isinstance(readout, Cloze)
    return int(readout.positions.max()) + 1


@singledispatch
def _labels(readout: Readout, length: int, group: int, supervised: int) -> np.ndarray:
    """Return the labels of the ``group`` sequences of one row, concatenated; a language model supervises the last ones.

    ``supervised``: number of labels with a loss, for a language model.
    """
    labels = np.full(length * group, IGNORE_INDEX)
    labels[-supervised:] = 0
    return labels


@_labels.register(Cloze)
@_labels.register(PooledClassifier)
def _(readout: Readout, length: int, group: int, supervised: int) -> np.ndarray:
    labels = np.full((group, length), IGNORE_INDEX)
    labels[:, 0] = 0
    return labels.reshape(-1)


@_labels.register(Tags)
def _(readout: Tags, length: int, group: int, supervised: int) -> np.ndarray:
    return np.zeros(length * group, dtype=np.int64)


@_labels.register(Spans)
def _(readout: Spans, length: int, group: int, supervised: int) -> np.ndarray:
    labels = np.full(length * group, CANDIDATE)
    labels[0] |= START | END
    return labels
