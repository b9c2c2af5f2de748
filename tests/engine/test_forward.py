"""A batch passes the tensors that each architecture takes, and gives the results of a direct call of the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB, tiny_model, tiny_tokenizer

from ptd.config import DataConfig, TaskConfig
from ptd.data.batches import Batches, packed_batch, padded_batch
from ptd.engine.forward import Forward
from ptd.inject import Attachment
from ptd.readouts import Ask
from ptd.readouts.language_model import LanguageModel
from ptd.tasks import make_task
from ptd.types import IGNORE_INDEX, DataReport, Examples

CPU, CLOSE = torch.device("cpu"), 2e-5
LENGTHS = (9, 4, 14)
draw = np.random.default_rng(0)
OFFSETS = np.concatenate(([0], np.cumsum(LENGTHS)))
TOKENS = draw.integers(5, VOCAB, OFFSETS[-1]).astype(np.int32)
TYPES = (draw.random(OFFSETS[-1]) < 0.5).astype(np.int8)
EXAMPLES = Examples(
    TOKENS,
    np.full_like(TOKENS, IGNORE_INDEX),
    OFFSETS,
    DataReport(len(LENGTHS), int(OFFSETS[-1]), 0),
    token_types=TYPES,
)
ROWS = np.array([2, 0, 1])


def by_hand(model, row):
    """Return the logits of the plain model for one row alone, without padding or packing."""
    piece = slice(OFFSETS[row], OFFSETS[row + 1])
    inputs = {"input_ids": torch.from_numpy(TOKENS[piece].astype(np.int64))[None]}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = torch.from_numpy(TYPES[piece].astype(np.int64))[None]
    with torch.no_grad():
        return model(**inputs).logits[0]


@pytest.mark.parametrize("make", [padded_batch, packed_batch])
@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_every_row_sees_itself_alone(family, make):
    model = tiny_model(family)
    want = [by_hand(model, row) for row in ROWS]
    attachment = Attachment(model)
    if make is packed_batch and not attachment.packable:
        return
    examples = EXAMPLES if family == "bert" else replace(EXAMPLES, token_types=None)
    batch, run = make(examples, ROWS), Forward(attachment, CPU)
    with torch.no_grad():
        whole = run(batch)
        for start, length, logits in zip(batch.starts, batch.lengths, want, strict=True):
            assert (whole[start : start + length] - logits).abs().max() < CLOSE
        last = batch.starts + batch.lengths - 1
        assert (run(batch, Ask(last)) - torch.stack([logits[-1] for logits in want])).abs().max() < CLOSE


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_loss_of_an_encoder_decoder_is_that_of_transformers(family):
    rows = [{"prompt": "ab" * n, "completion": "xyz"[:n] * 2} for n in (1, 3, 2)]
    task = make_task(TaskConfig(kind="seq2seq_lm"), DataConfig(), "encoder-decoder")
    examples = task.tokenize(Dataset.from_list(rows), tiny_tokenizer(), what="rows")
    batch = Batches(examples, rank=0, world_size=1, per_device_batch_size=3, packing=False).step(0)[0]
    model = tiny_model(family)
    labels = batch.labels
    if family == "mbart":  # mBART starts with the target's last token; our tokenizer writes no language code
        inputs = {"decoder_input_ids": batch.input_ids.clone()}
        inputs["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    else:
        inputs = {}
    with torch.no_grad():
        source = batch.source
        want = model(input_ids=source.input_ids, attention_mask=source.attention_mask.long(), labels=labels, **inputs)
        reading = LanguageModel()(Forward(Attachment(model), CPU), batch)
    assert reading.weight == (labels != IGNORE_INDEX).sum()
    assert abs(reading.loss / reading.weight - want.loss) < 1e-5 * want.loss


def test_a_language_code_stays_what_the_decoder_starts_with():
    model = tiny_model("mbart")
    batch = padded_batch(EXAMPLES, ROWS)
    run = Forward(Attachment(model), CPU)
    inputs = run.attachment.inputs.of(replace(batch, source=batch), 0)
    assert torch.equal(inputs["decoder_input_ids"], batch.input_ids)  # no padding in the first column
