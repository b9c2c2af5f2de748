"""Every kind of prompt that PEFT and ptd share gives equal outputs and text after conversion in either direction."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from families import PAD, VOCAB, tiny_config, tiny_model, tiny_tokenizer
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModel

from ptd.checkpoint import load_adapter, save_adapter
from ptd.checkpoint.peft_format import PEFT_FORMAT
from ptd.inject import Attachment
from ptd.types import NoPrompt, PrefixLayout, SoftLayout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # by PEFT, in its own generate()
]

P = 4
CLOSE = 1e-5
"""Largest difference relative to the largest value; fp32 rounding in two orders of summation causes about 1e-6."""
LENGTHS = (9, 6)

SOFT = {
    "prompt": lambda **k: PromptTuningConfig(num_virtual_tokens=P, **k),
    "p_tuning MLP": lambda **k: PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=8, **k),
    "p_tuning LSTM": lambda **k: PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **k
    ),
}
PREFIX = {
    "prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=P, **k),
    "prefix MLP": lambda **k: PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8, **k
    ),
    "cartridge": lambda **k: CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=1, **k),
}
TASK_TYPES = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "bert": "FEATURE_EXTRACTION",  # a masked language model: PEFT has no type for it, and this type returns its logits
    "bert body": "FEATURE_EXTRACTION",
    "llama body": "FEATURE_EXTRACTION",
}
SEQ2SEQ = ("t5", "bart")
CASES = [(family, kind) for family in TASK_TYPES for kind in SOFT]
CASES += [(family, kind) for family in TASK_TYPES if family not in SEQ2SEQ for kind in PREFIX]
GENERATING = [(family, kind) for family, kind in CASES if TASK_TYPES[family] != "FEATURE_EXTRACTION"]

rng = torch.Generator().manual_seed(0)
ROWS = [torch.randint(5, VOCAB, (length,), generator=rng) for length in LENGTHS]
ANSWERS = torch.randint(5, VOCAB, (2, 5), generator=rng)


def backbone(family):
    """Return a language model or, if the name ends in ``body``, only its body, whose output a trained head reads."""
    if not family.endswith(" body"):
        return tiny_model(family)
    name = family.removesuffix(" body")
    body = AutoModel.from_config(tiny_config(name), dtype=torch.float32)
    body.load_state_dict(tiny_model(name).base_model.state_dict(), strict=False)
    return body.eval()


def peft_adapter(family, kind, folder, **changes):
    """Save a PEFT model with a random prompt to ``folder`` and return it; the weights are large enough to matter."""
    torch.manual_seed(1)
    config = (SOFT | PREFIX)[kind](task_type=TASK_TYPES[family], **changes)
    model = get_peft_model(backbone(family), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def inputs(side, family=None):
    """Return two rows of different lengths, padded on ``side``; None: one row without padding."""
    if side is None:
        batch = {"input_ids": ROWS[0][None]}
    else:
        width = max(LENGTHS)
        ids, mask = torch.full((2, width), PAD), torch.zeros(2, width, dtype=torch.long)
        for row, tokens in enumerate(ROWS):
            place = slice(None, len(tokens)) if side == "right" else slice(width - len(tokens), None)
            ids[row, place], mask[row, place] = tokens, 1
        batch = {"input_ids": ids, "attention_mask": mask}
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = ANSWERS[: len(batch["input_ids"])]
    return batch


def outputs(model, family, side):
    """Return logits or last hidden states at the rows' own tokens (the decoder's tokens in an encoder-decoder)."""
    batch = inputs(side, family)
    with torch.no_grad():
        result = model(**batch)
    values = result.last_hidden_state if family.endswith(" body") else result.logits
    if family in SEQ2SEQ:
        return values.flatten(0, 1)
    values = values[:, values.shape[1] - batch["input_ids"].shape[1] :]
    return values[batch["attention_mask"].bool()] if side else values[0]


def assert_same(one, other, family):
    """Assert that ``one`` (ptd's model or PEFT's) and ``other`` (PEFT's model) have the same outputs.

    If a row is padded on the left, PEFT puts the tokens of a soft prompt before the padding, so that the row's outputs
    depend on its batch. ptd's outputs for such a row equal those of PEFT for the row without padding.
    """
    in_front = not isinstance(one, PeftModel) and other.peft_config["default"].peft_type in (
        "PROMPT_TUNING",
        "P_TUNING",
    )
    for side in (None, "right", *([] if in_front else ["left"])):
        got, want = outputs(one, family, side), outputs(other, family, side)
        assert (got - want).abs().max() < CLOSE * want.abs().max(), side
    if in_front and family != "bart":  # BART counts positions from the left edge, with or without a prompt
        got, want = left_padded(one, family), each_alone(other, family)
        assert (got - want).abs().max() < CLOSE * want.abs().max()


def left_padded(model, family):
    batch = inputs("left", family)
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        values = model(**batch)
    values = values.last_hidden_state if family.endswith(" body") else values.logits
    return values.flatten(0, 1) if family in SEQ2SEQ else values[batch["attention_mask"].bool()]


def each_alone(model, family):
    found = []
    for row, tokens in enumerate(ROWS):
        batch = {"input_ids": tokens[None]}
        if family in SEQ2SEQ:
            batch["decoder_input_ids"] = ANSWERS[row : row + 1]
        with torch.no_grad():
            values = model(**batch)
        values = values.last_hidden_state if family.endswith(" body") else values.logits
        found.append(values[0] if family in SEQ2SEQ else values[0, -len(tokens) :])
    return torch.cat(found)


def attached(family, adapter):
    model = backbone(family)
    attachment = Attachment(model)
    adapter.check_fits(attachment.shape, None, path="here")
    attachment.set(adapter.state())
    return model, attachment


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_from_peft_and_back(family, kind, tmp_path):
    theirs = peft_adapter(family, kind, tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert adapter.flat.shape[0] == P
    assert adapter.task_type == TASK_TYPES[family]
    assert isinstance(adapter.layout, SoftLayout if kind in SOFT else PrefixLayout)

    model, attachment = attached(family, adapter)
    assert_same(model, theirs, family)
    attachment.set(NoPrompt())
    plain, tuned = outputs(model, family, None), outputs(theirs, family, None)
    assert (plain - tuned).abs().max() > 1000 * CLOSE * tuned.abs().max()  # the prompt has an effect: the test can fail

    save_adapter(tmp_path / "ours", adapter)
    again = PeftModel.from_pretrained(backbone(family), tmp_path / "ours").eval()
    assert_same(again, theirs, family)
    assert torch.equal(load_adapter(tmp_path / "ours").flat, adapter.flat)


def text(model, batch):
    """Return eight greedily generated tokens per row, without the prompt, which a decoder repeats."""
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=PAD)
    return tokens[:, -8:].tolist()


@pytest.mark.parametrize(("family", "kind"), GENERATING)
def test_the_same_text(family, kind, tmp_path):
    theirs = peft_adapter(family, kind, tmp_path)
    model, _ = attached(family, load_adapter(tmp_path))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ROWS]
    want = [text(theirs, row)[0] for row in rows]
    assert [text(model, row)[0] for row in rows] == want
    padded = inputs("right" if family in SEQ2SEQ else "left")
    assert text(model, padded) == want
    # With virtual tokens before those of a decoder, PEFT drops the position ids that generate() computes from the
    # mask, so its text depends on the padding.
    if kind in PREFIX or family in SEQ2SEQ:
        assert text(theirs, padded) == want


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("submodules", [None, 1, 2])
def test_rows_that_peft_stores_for_a_decoder_and_never_uses(family, submodules, tmp_path):
    theirs = peft_adapter(family, "prompt", tmp_path, num_transformer_submodules=submodules)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.shape[0] == (submodules or 2) * P
    adapter = load_adapter(tmp_path)
    assert torch.equal(adapter.flat, stored[:P])
    assert_same(attached(family, adapter)[0], theirs, family)


@pytest.mark.parametrize("kind", SOFT)
def test_peft_stores_what_the_reparameterisation_puts_out(kind, tmp_path):
    theirs = peft_adapter("llama", kind, tmp_path)
    with torch.no_grad():
        put_out = theirs.prompt_encoder["default"](torch.arange(P)[None])[0]
    torch.testing.assert_close(load_adapter(tmp_path).flat, put_out, rtol=0, atol=1e-6)


def test_prompts_that_peft_initialised_from_text(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    theirs = peft_adapter(
        "llama",
        "prompt",
        tmp_path,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="is it good?",
        tokenizer_name_or_path=str(tokenizer),
    )
    assert_same(attached("llama", load_adapter(tmp_path))[0], theirs, "llama")


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning LSTM", "prefix MLP", "cartridge"])
def test_an_adapter_that_peft_loaded_and_saved_again(kind, inference_mode, tmp_path):
    theirs = peft_adapter("llama", kind, tmp_path / "first")
    PeftModel.from_pretrained(backbone("llama"), tmp_path / "first").save_pretrained(tmp_path / "second")
    path = tmp_path / "second" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "inference_mode": inference_mode}))
    assert_same(attached("llama", load_adapter(tmp_path / "second"))[0], theirs, "llama")


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[0] in ("llama", "t5", "bert body")])
def test_the_configuration_is_pefts(family, kind, tmp_path):
    """ptd writes all fields of a prompt as PEFT writes them, except the fields of a re-parameterisation."""
    changes = {"num_transformer_submodules": 1} if family == "t5" else {}
    peft_adapter(family, kind, tmp_path / "theirs", **changes)
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "theirs"))
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    known = {"peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules"}
    assert known < set(ours) <= set(theirs)
    free = {"encoder_hidden_size", "prefix_projection"}
    assert {k: v for k, v in ours.items() if k not in free} == {k: theirs[k] for k in ours if k not in free} | {
        "base_model_name_or_path": theirs["base_model_name_or_path"] or "",
        "peft_version": PEFT_FORMAT,
    }
