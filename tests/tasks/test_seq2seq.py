"""Text from text: the tokens of both sides, transformers' own loss, truncation, virtual tokens, generation prompts."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_model
from torch.nn.functional import cross_entropy

from ptd.config import DataConfig, TaskConfig
from ptd.data.batches import padded_batch
from ptd.tasks import make_task
from ptd.tasks.seq2seq_lm import target_language, target_opening
from ptd.types import IGNORE_INDEX, HeadSettings, UserError, virtual_id

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))

ROWS = [
    {"prompt": "anna lives", "completion": "in york."},
    {"prompt": "a", "completion": "b"},
    {"prompt": "in the old town", "completion": "12"},
]
TOKENIZERS = {"t5": support.t5, "bart": support.roberta, "mbart": support.mbart}


def make(**data: Any):
    settings = {"max_length": 64, **data}
    return make_task(TaskConfig(kind="seq2seq_lm"), DataConfig(**settings), "encoder-decoder")


def tokenized(task, tokenizer, rows=ROWS, **options):
    return task.tokenize(Dataset.from_list(rows), tokenizer, what="rows.jsonl", **options)


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_both_sides_are_as_the_tokenizer_writes_them(family):
    tokenizer = TOKENIZERS[family]()
    examples = tokenized(make(), tokenizer)
    assert len(examples) == len(examples.source) == 3
    for index, row in enumerate(ROWS):
        tokens, labels = examples[index]
        target = tokenizer(text_target=row["completion"])["input_ids"]
        assert labels.tolist() == target
        assert tokens[1:].tolist() == target[:-1]
        assert tokens[0] == (target[-1] if family == "mbart" else tokenizer.pad_token_id)
        source, nothing = examples.source[index]
        assert source.tolist() == tokenizer(row["prompt"])["input_ids"]
        assert set(nothing.tolist()) == {IGNORE_INDEX}
    code = tokenizer.convert_tokens_to_ids("ro_RO") if family == "mbart" else None
    assert target_language(tokenizer) == code
    assert examples.report.supervised_tokens == len(examples.labels)
    assert examples.report.tokens == len(examples.tokens) + len(examples.source.tokens)
    assert tokenizer(ROWS[0]["prompt"])["input_ids"] == examples.source[0][0].tolist(), "back in source mode"


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_loss_is_that_of_transformers(family):
    tokenizer = TOKENIZERS[family]()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    start = tokenizer.pad_token_id if family == "t5" else tokenizer.eos_token_id
    model = tiny_model(family, vocab_size=len(tokenizer), decoder_start_token_id=start, **special)
    task = make()
    batch = padded_batch(tokenized(task, tokenizer), np.arange(3), tokenizer.pad_token_id)
    # In a run, the code that holds the model does this: only the model knows the decoder's start token.
    batch.input_ids[:, 0] = batch.input_ids[:, 0].where(batch.input_ids[:, 0] != tokenizer.pad_token_id, start)

    def run(batch, ask):
        logits = model(
            input_ids=batch.source.input_ids,
            attention_mask=batch.source.attention_mask.long(),
            decoder_input_ids=batch.input_ids,
        ).logits
        return cross_entropy(logits.flatten(0, 1)[ask.positions], ask.targets, reduction="none")

    with torch.no_grad():
        reading = task.readout(tokenizer, 32, HeadSettings())(run, batch)
        expected = model(
            input_ids=batch.source.input_ids, attention_mask=batch.source.attention_mask.long(), labels=batch.labels
        ).loss
    assert reading.weight == batch.supervised_tokens
    torch.testing.assert_close(reading.loss / reading.weight, expected)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_cuts_keep_the_special_tokens(family):
    tokenizer = TOKENIZERS[family]()
    examples = tokenized(make(max_length=6, max_target_length=5), tokenizer)
    assert examples.report.prompts_cut == 2
    assert examples.report.completions_cut == 1
    for index, row in enumerate(ROWS):
        whole = tokenizer(row["prompt"], truncation=True, max_length=6)["input_ids"]
        assert examples.source[index][0].tolist() == whole
        target = tokenizer(text_target=row["completion"], truncation=True, max_length=5)["input_ids"]
        assert examples[index][1].tolist() == target
    assert examples.source.longest == 6
    assert np.diff(examples.offsets).max() == 5


def test_completions_are_cut_to_max_length_without_another_limit():
    examples = tokenized(make(max_length=6), support.t5())
    assert np.diff(examples.offsets).max() == 6


def test_a_tokenizer_that_adds_nothing_gets_an_end():
    tokenizer = support.byte_level()
    examples = tokenized(make(max_length=6), tokenizer)
    assert examples[1][1].tolist() == [*tokenizer("b")["input_ids"], tokenizer.eos_token_id]
    assert examples[0][1].tolist() == [*tokenizer("in yo")["input_ids"], tokenizer.eos_token_id]
    assert examples[1][0].tolist() == [tokenizer.pad_token_id, *tokenizer("b")["input_ids"]]
    assert examples.source[0][0].tolist() == tokenizer("anna l")["input_ids"]


def test_virtual_tokens_stand_in_the_encoders_text():
    tokenizer = support.t5()
    task = make(prompt_template="{v:2} old {a} {v:1}", columns={"completion": "b"}, max_length=14)
    assert task.virtual_tokens == 3
    rows = [{"a": "york", "b": "in"}, {"a": "newyorktown", "b": "in"}]
    examples = tokenized(task, tokenizer, rows)
    first, second, third = (virtual_id(index) for index in range(3))
    for index, kept in enumerate(["york", "ne"]):
        source = examples.source[index][0].tolist()
        assert (source[:2], source[-2:]) == ([first, second], [third, tokenizer.eos_token_id])
        text = tokenizer.decode(source[2:-2]).strip()
        assert text.startswith("old ")
        assert kept in text
    assert examples.source.longest == 14
    assert examples.report.prompts_cut == 1
    assert (examples.tokens >= 0).all()


def test_prompts_for_generation_are_those_of_training():
    for family, build in TOKENIZERS.items():
        tokenizer = build()
        task = make()
        prompts, references = task.prompts_and_references(
            Dataset.from_list(ROWS), tokenizer, max_length=64, what="rows.jsonl"
        )
        examples = tokenized(task, tokenizer)
        assert prompts == [examples.source[index][0].tolist() for index in range(3)], family
        assert references == [row["completion"] for row in ROWS]
        assert task.prompts([row["prompt"] for row in ROWS], tokenizer) == prompts


def test_a_typed_prompt_fills_the_only_field():
    tokenizer = support.t5()
    task = make(prompt_template="old {a} {v:2}")
    rows = [{"a": "york", "completion": "in"}]
    assert task.prompts(["york"], tokenizer) == [tokenized(task, tokenizer, rows).source[0][0].tolist()]
    two = make(prompt_template="{a} and {b}")
    assert two.prompts(["york"], tokenizer) == [tokenizer("york")["input_ids"]]
    said = refusal(make(prompt_template="{a} {b} {v:1}").prompts, ["york"], tokenizer)
    assert "places virtual tokens and has 2 fields" in said


def test_without_labels_completions_are_not_needed():
    tokenizer = support.t5()
    examples = tokenized(make(), tokenizer, [{"prompt": row["prompt"]} for row in ROWS], labelled=False)
    whole = tokenized(make(), tokenizer)
    assert examples.source.tokens.tolist() == whole.source.tokens.tolist()
    assert examples.tokens.tolist() == [tokenizer.pad_token_id] * 3
    assert examples.labels.tolist() == [IGNORE_INDEX] * 3


def test_columns_of_any_name():
    tokenizer = support.t5()
    rows = [{"completion": "anna", "target": "york"}]
    plain = make(columns={"prompt": "completion", "completion": "target"})
    filled = make(prompt_template="{completion}", columns={"completion": "target"})
    for task in (plain, filled):
        examples = tokenized(task, tokenizer, rows)
        assert examples.source[0][0].tolist() == tokenizer("anna")["input_ids"]
        assert examples[0][1].tolist() == tokenizer("york")["input_ids"]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_special_tokens_that_a_text_writes_itself_stand_once(family):
    tokenizer = TOKENIZERS[family]()
    begin, end = (tokenizer.bos_token if family == "bart" else ""), tokenizer.eos_token
    plain = [{"prompt": "anna lives", "completion": "in york."}]
    written = [{"prompt": f"{begin}anna lives", "completion": f"{begin}in york.{end}"}]
    expected, examples = tokenized(make(), tokenizer, plain), tokenized(make(), tokenizer, written)
    assert examples.source[0][0].tolist() == expected.source[0][0].tolist()
    assert examples[0][1].tolist() == expected[0][1].tolist()
    assert make().prompts([written[0]["prompt"]], tokenizer) == make().prompts(["anna lives"], tokenizer)
    _, references = make().prompts_and_references(Dataset.from_list(written), tokenizer, max_length=9, what="rows")
    assert references == ["in york."]


def test_what_a_decoder_writes_first_and_last():
    openings = {family: target_opening(build()) for family, build in TOKENIZERS.items()}
    assert openings == {"t5": None, "bart": support.roberta().bos_token_id, "mbart": None}
    assert target_opening(support.byte_level(specials=True)) == 1
    for build in TOKENIZERS.values():
        tokenizer = build()
        assert make().ends(tokenizer) == (tokenizer.eos_token_id,) == tokenized(make(), tokenizer).report.ends


def test_what_the_tokenizer_cannot_write_is_said():
    rows = [{"prompt": "a", "completion": "in york"}, {"prompt": "a", "completion": "in  york\n"}]
    report = tokenized(make(), support.t5(), rows).report
    assert report.notes == (
        "the tokenizer cannot reproduce 1 of the first 2 completions, so generated text cannot match them exactly "
        "(row 2: 'in  york' becomes 'in york')",
    )
    said = refusal(tokenized, make(), support.t5(), [{"prompt": "a", "completion": "東"}])
    assert "knows none of the text to be learned in the first 1 rows" in said


def test_raw_texts_are_whole_prompts():
    tokenizer = support.t5()
    task = make(prompt_template="old {a}")
    assert task.prompts(["york"], tokenizer, raw=True) == [tokenizer("york")["input_ids"]]
    marked = make(prompt_template="old {a} {v:2}")
    assert "and has 1 fields, which --raw leaves no place for" in refusal(marked.prompts, ["york"], tokenizer, raw=True)
    assert "2 fields, so each text is sent as a complete prompt" in make(prompt_template="{a} {b}").how_typed(raw=False)
    assert task.how_typed(raw=False) is None


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_the_decoder_starts_alike_in_training_and_generation(tmp_path, where):
    """The start token is the same for any padding token of the config, and whichever config of the model names it."""
    from ptd.distributed.ranks import Ranks
    from ptd.runs.generation import tokens_of
    from ptd.runs.scores import held_out_metrics
    from ptd.runs.tuned import load_tuned
    from ptd.types import Reporter

    tokenizer = support.roberta()
    model = tiny_model("bart", vocab_size=len(tokenizer), pad_token_id=3, decoder_start_token_id=2, eos_token_id=2)
    assert tokenizer.pad_token_id == 1
    if where == "generation_config":
        model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = None, 2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ranks = Ranks.start()
    tuned = load_tuned(None, str(tmp_path), ranks)
    assert tokens_of(tuned)[0].start == 2
    found = held_out_metrics(tuned, Dataset.from_list(ROWS), ranks, batch_size=2, reporter=Reporter())
    total = count = 0.0
    for row in ROWS:
        target = torch.tensor([tokenizer(text_target=row["completion"])["input_ids"]])
        decoder = torch.cat([torch.tensor([[2]]), target[:, :-1]], 1)
        source = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=decoder).logits
        total += float(cross_entropy(logits[0], target[0], reduction="sum"))
        count += target.numel()
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)


def test_refusals():
    tokenizer = support.t5()
    said = refusal(tokenized, make(), tokenizer, [ROWS[0], {"prompt": "a", "completion": ""}])
    assert "row 2 of rows.jsonl has an empty 'completion'" in said
    said = refusal(tokenized, make(), tokenizer, [ROWS[0], {"prompt": "a", "completion": None}])
    assert "row 2 of rows.jsonl has no 'completion'" in said
    assert "has no column 'prompt'" in refusal(tokenized, make(), tokenizer, [{"text": "a", "completion": "b"}])
    assert "'prompt' has to be text, but is int" in refusal(
        tokenized, make(), tokenizer, [{"prompt": 3, "completion": "b"}]
    )
    said = refusal(tokenized, make(), support.byte_level(), [{"prompt": "", "completion": "b"}])
    assert "row 1 of rows.jsonl has a prompt without tokens" in said
    assert "{x} is not a column" in refusal(tokenized, make(prompt_template="{x}"), tokenizer)
    assert "{mask} has no meaning" in refusal(tokenized, make(prompt_template="{prompt} {mask}"), tokenizer)
    both = make(prompt_template="{completion}", columns={"prompt": "prompt"})
    assert "data.columns.prompt: has no effect" in refusal(tokenized, both, tokenizer)
    said = refusal(make_task, TaskConfig(kind="seq2seq_lm"), DataConfig(), "encoder")
    assert "the backbone is an encoder; set task.kind: classification" in said
