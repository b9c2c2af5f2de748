"""Adapter folders: every kind is loaded as it was saved, what PEFT cannot hold is refused, and damage is reported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_config, tiny_model
from peft import (
    CartridgeConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import ptd
from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.checkpoint.adapter import CONFIG, EXTRA, HEAD, KEY, WEIGHTS
from ptd.checkpoint.card import NAME as CARD
from ptd.types import BackboneShape, EmptyLayout, LayerShape, PrefixLayout, SoftLayout, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT

P = 4
CLOSE = 1e-4  # the bound that the task sets; the measured difference is about 3e-6
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
UNIFORM = (LayerShape(2, 8, 8),) * 2
MIXED = (LayerShape(2, 8, 8), LayerShape(2, 8, 6))
TWO_STACKS = tuple(LayerShape(2, 8, 8, kind) for kind in ("encoder", "decoder", "cross"))


def outputs(model):
    """Return the logits and the mean loss."""
    with torch.no_grad():
        result = model(input_ids=IDS, labels=IDS)
    return result.logits, result.loss


def assert_equal_outputs(one, other):
    for a, b in zip(outputs(one), outputs(other), strict=True):
        assert (a - b).abs().max() < CLOSE


def random_adapter(layers=UNIFORM, **facts):
    flat = torch.randn(P, sum(layer.numel for layer in layers), generator=torch.Generator().manual_seed(1))
    return Adapter(
        flat, PrefixLayout(layers), "some/backbone", task_type="CAUSAL_LM", peft_type="PREFIX_TUNING", facts=facts
    )


def random_head():
    generator = torch.Generator().manual_seed(2)
    return {"weight": torch.randn(3, 8, generator=generator), "bias": torch.randn(3, generator=generator)}


def soft_adapter(in_front=True, task_type="FEATURE_EXTRACTION", peft_type="PROMPT_TUNING", **rest):
    flat = torch.randn(P, 8, generator=torch.Generator().manual_seed(1))
    return Adapter(flat, SoftLayout(8, in_front), "some/backbone", "main", task_type, peft_type, **rest)


def head_adapter(**rest):
    return Adapter(torch.empty(0, 0), EmptyLayout(), "some/backbone", head=random_head(), **rest)


ADAPTERS = {
    "prefix": random_adapter,
    "prefix, layers of different size": lambda: random_adapter(MIXED),
    "prefix, encoder-decoder": lambda: random_adapter(TWO_STACKS),
    "soft, in front": soft_adapter,
    "soft, at marks": lambda: soft_adapter(in_front=False, peft_type="P_TUNING"),
    "soft, with a head": lambda: soft_adapter(head=random_head(), facts={"fingerprint": "abc"}),
    "head": head_adapter,
    "nothing": lambda: Adapter(torch.empty(0, 0), EmptyLayout(), "some/backbone", facts={"task": {"kind": "x"}}),
}
FILES = {
    "prefix": {CONFIG, WEIGHTS, EXTRA, CARD},
    "prefix, layers of different size": {WEIGHTS, EXTRA, CARD},
    "prefix, encoder-decoder": {WEIGHTS, EXTRA, CARD},
    "soft, in front": {CONFIG, WEIGHTS, EXTRA, CARD},
    "soft, at marks": {WEIGHTS, EXTRA, CARD},
    "soft, with a head": {CONFIG, WEIGHTS, EXTRA, HEAD, CARD},
    "head": {EXTRA, HEAD, CARD},
    "nothing": {EXTRA, CARD},
}


def assert_equal(found, adapter):
    assert torch.equal(found.flat, adapter.flat)
    assert found.head.keys() == adapter.head.keys()
    assert all(torch.equal(found.head[name], tensor) for name, tensor in adapter.head.items())
    plain = ("layout", "backbone", "revision", "task_type", "peft_type", "facts")
    assert [getattr(found, name) for name in plain] == [getattr(adapter, name) for name in plain]


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "adapter", random_adapter(fingerprint="abc"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_ptd_saved(family, tmp_path):
    model = tiny_model(family)
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8)
    tuned.save(tmp_path)
    assert_equal_outputs(model, PeftModel.from_pretrained(tiny_model(family), tmp_path).eval())


@pytest.mark.parametrize("make", ["prefix", "prefix with projection", "cartridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ptd_loads_what_peft_saved(family, make, tmp_path):
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    config = {
        "prefix": PrefixTuningConfig(**common),
        "prefix with projection": PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=8),
        "cartridge": CartridgeConfig(**common, num_frozen_tokens=1),
    }[make]
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model(family), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_model(family)
    ptd.load(model, tmp_path)
    assert_equal_outputs(model, theirs)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_round_trip(kind, tmp_path):
    adapter = ADAPTERS[kind]()
    save_adapter(tmp_path, adapter)
    assert names(tmp_path) == FILES[kind]
    assert_equal(load_adapter(tmp_path), adapter)


@pytest.mark.parametrize("before", ADAPTERS)
@pytest.mark.parametrize("after", ADAPTERS)
def test_a_folder_written_again_keeps_nothing_of_the_adapter_before(before, after, tmp_path):
    save_adapter(tmp_path, ADAPTERS[before]())
    save_adapter(tmp_path, ADAPTERS[after]())
    assert names(tmp_path) == FILES[after]
    assert_equal(load_adapter(tmp_path), ADAPTERS[after]())


@pytest.mark.parametrize("kind", [kind for kind, files in FILES.items() if CONFIG in files])
def test_round_trip_through_peft(kind, tmp_path):
    adapter = ADAPTERS[kind]()
    save_adapter(tmp_path, adapter, peft_only=True)
    assert names(tmp_path) == {CONFIG, WEIGHTS, CARD}
    assert_equal(load_adapter(tmp_path), replace(adapter, head={}, facts={}))


REASONS = {
    "prefix, layers of different size": "layers differ in their key/value sizes",
    "prefix, encoder-decoder": "a prefix over an encoder-decoder",
    "soft, at marks": "at marks inside the text",
    "head": "it has no prompt",
    "nothing": "it has no prompt",
    "no task type": "it has no task type",
    "no type": "PEFT has no type for its method",
    "another type": "PEFT has no type for its method",
}
UNKNOWN = {
    "no task type": lambda: soft_adapter(task_type=None),
    "no type": lambda: soft_adapter(peft_type=None),
    "another type": lambda: soft_adapter(peft_type="PREFIX_TUNING"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_peft_cannot_hold_is_not_exported(kind, tmp_path):
    with pytest.raises(UserError, match=rf"cannot be exported to PEFT: .*{REASONS[kind]}.*; use it with ptd"):
        save_adapter(tmp_path / "peft", (ADAPTERS | UNKNOWN)[kind](), peft_only=True)
    assert not (tmp_path / "peft").exists()


def test_the_prompt_as_the_injection_takes_it():
    adapter = soft_adapter(in_front=False)
    assert adapter.state().embeddings is adapter.flat
    assert adapter.state().in_front is False
    assert random_adapter().state().keys[1].shape == (P, 2, 8)
    assert list(head_adapter().state().tensors()) == []


def test_the_file_is_pefts(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(tensors) == [KEY]
    assert tensors[KEY].shape == (P, 2 * 2 * 16)
    assert tensors[KEY].dtype == torch.float32
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    assert config["inference_mode"] is True
    assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (16, 2, 2)


def test_a_run_folder_stands_for_its_adapter(folder):
    assert torch.equal(load_adapter(folder.parent).flat, load_adapter(folder).flat)


def shape(layers=UNIFORM, hidden=8):
    return BackboneShape("llama", hidden, VOCAB, 64, layers)


def test_a_backbone_it_was_not_made_for_is_refused():
    adapter = random_adapter(fingerprint="abc")
    adapter.check_fits(shape(), "abc", path="here")
    adapter.check_fits(shape(), None, path="here")
    random_adapter().check_fits(shape(), "abc", path="here")  # PEFT writes no fingerprint
    head_adapter(facts={"fingerprint": "abc"}).check_fits(shape(MIXED, 16), "abc", path="here")
    soft_adapter().check_fits(shape(MIXED), "abc", path="here")
    for one in (adapter, soft_adapter(facts={"fingerprint": "abc"}), head_adapter(facts={"fingerprint": "abc"})):
        with pytest.raises(UserError, match=r"another backbone .*some/backbone"):
            one.check_fits(shape(), "abd", path="here")
    with pytest.raises(UserError, match=r"embeddings of size 8, but the backbone here has input embeddings of size 16"):
        soft_adapter().check_fits(shape(hidden=16), "abc", path="here")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (UNIFORM[:1], r"2 decoder layers of 2 kv heads × 8, but the backbone here has 1 decoder layers"),
        (MIXED, r"has 1 decoder layers of 2 kv heads × 8, 1 decoder layers of 2 kv heads × 8/6"),
        ((LayerShape(2, 8, 8, "encoder"),) * 2, r"has 2 encoder layers"),
        ((*UNIFORM[:1], LayerShape(2, 8, 8, "cross")), r"has 1 decoder layers of 2 kv heads × 8, 1 cross layers"),
    ],
)
def test_layers_it_was_not_made_for_are_refused(layers, message):
    with pytest.raises(UserError, match=message):
        random_adapter(fingerprint="abc").check_fits(shape(layers), None, path="here")


def test_the_order_of_layers_matters():
    with pytest.raises(UserError, match="was made for"):
        random_adapter(MIXED).check_fits(shape(MIXED[::-1]), None, path="here")


def test_layers_of_a_peft_adapter_fit_a_decoder_or_an_encoder_but_not_both_at_once():
    adapter = random_adapter((LayerShape(2, 8, 8),) * len(TWO_STACKS))  # without a fingerprint, as PEFT writes it
    adapter.check_fits(shape((LayerShape(2, 8, 8, "encoder"),) * len(TWO_STACKS)), "abc", path="here")
    with pytest.raises(UserError, match=r"1 encoder layers of 2 kv heads × 8, 1 decoder layers .*, 1 cross layers"):
        adapter.check_fits(shape(TWO_STACKS), "abc", path="here")


def weights(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


def plain(folder):
    """Leave only the files that PEFT would have written."""
    (folder / "ptd.json").unlink()


def config(folder, **changes):
    plain(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def facts(folder, **changes):
    path = folder / "ptd.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prompt(folder, **changes):
    facts(folder, prompt={**json.loads((folder / "ptd.json").read_text())["prompt"], **changes})


def without_config(folder):
    plain(folder)
    (folder / "adapter_config.json").unlink()


def cut_config(folder, content="{"):
    plain(folder)
    (folder / "adapter_config.json").write_text(content)


FLAT = torch.zeros(P, 64)
DAMAGES = {
    "weights missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot read .*safetensors"),
    "weights corrupted": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 100), "cannot read"),
    "weights cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "cannot read",
    ),
    "weights empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "cannot read"),
    "another key": (lambda f: weights(f, {"lora_A": FLAT}), r"\['lora_A'\] but no 'prompt_embeddings'"),
    "wrong width": (
        lambda f: weights(f, {KEY: FLAT[:, 1:].contiguous()}),
        r"has shape \(4, 63\), but its configuration says \[4, 64\]",
    ),
    "no matrix": (lambda f: weights(f, {KEY: FLAT[0].clone()}), r"has shape \(64,\)"),
    "no tokens": (lambda f: weights(f, {KEY: FLAT[:0].clone()}), r"has shape \(0, 64\)"),
    "NaN": (lambda f: weights(f, {KEY: FLAT.clone().fill_(float("nan"))}), "not finite"),
    "infinity": (lambda f: weights(f, {KEY: FLAT.clone().fill_(float("inf"))}), "not finite"),
    "no configuration": (without_config, r"cannot read .*adapter_config\.json"),
    "configuration cut": (cut_config, r"cannot read .*adapter_config\.json"),
    "configuration a list": (lambda f: cut_config(f, "[]"), "has to hold a JSON object"),
    "facts cut": (lambda f: (f / "ptd.json").write_text("{"), r"cannot read .*ptd\.json"),
    "facts empty": (lambda f: (f / "ptd.json").write_text("{}"), "incomplete or damaged: KeyError"),
    "prompt no object": (lambda f: facts(f, prompt=3), "incomplete or damaged"),
    "prompt of another kind": (lambda f: prompt(f, kind="x"), "incomplete or damaged"),
    "layers no list": (lambda f: prompt(f, layers=3), "incomplete or damaged"),
    "layers too short": (lambda f: prompt(f, layers=[[2, 8, 8]]), "incomplete or damaged"),
    "layers of another kind": (lambda f: prompt(f, layers=[[2, 8, 8, "x"]] * 2), "incomplete or damaged"),
    "no layers": (lambda f: prompt(f, layers=[]), r"has shape \(4, 64\), but its configuration says \[4, 0\]"),
    "layers of other sizes": (lambda f: prompt(f, layers=[[2, 8, 8, "decoder"]] * 3), r"configuration says \[4, 96\]"),
    "number of tokens missing": (lambda f: prompt(f, num_virtual_tokens=None), "incomplete or damaged"),
    "other number of tokens": (lambda f: prompt(f, num_virtual_tokens=5), r"configuration says \[5, 64\]"),
    "backbone a number": (lambda f: facts(f, backbone=3), "incomplete or damaged: TypeError.*backbone is 3"),
    "PEFT's backbone a number": (lambda f: config(f, base_model_name_or_path=3), "incomplete or damaged"),
    "task type a list": (lambda f: config(f, task_type=[]), "incomplete or damaged"),
    "PEFT's number of tokens": (lambda f: config(f, num_virtual_tokens=5), r"configuration says \[5, 64\]"),
    "sizes missing": (lambda f: config(f, num_attention_heads=None), "incomplete or damaged"),
    "no heads": (lambda f: config(f, num_attention_heads=0), "incomplete or damaged"),
    "a LoRA": (
        lambda f: config(f, peft_type="LORA"),
        "PEFT adapter of type LORA; ptd reads the types PREFIX_TUNING, CARTRIDGE, ",
    ),
    "a prefix over an encoder-decoder": (
        lambda f: config(f, task_type="SEQ_2_SEQ_LM"),
        "cannot be used: it is a PREFIX_TUNING adapter of an encoder-decoder: .*tune a prefix with ptd instead",
    ),
    "trained layers beside it": (
        lambda f: weights(f, {KEY: FLAT, "base_model.classifier.weight": FLAT[0].clone()}),
        "holds base_model.classifier.weight as well as the prompt",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=rf"--adapter: .*{message}"):
        load_adapter(folder)


SOFT_FLAT = torch.zeros(P, 8)
HEAD_DAMAGES = {
    "prompt missing": (lambda f: (f / WEIGHTS).unlink(), "cannot read .*safetensors"),
    "wrong width": (lambda f: weights(f, {KEY: torch.zeros(P, 7)}), r"\(4, 7\), but its configuration says \[4, 8\]"),
    "NaN": (lambda f: weights(f, {KEY: SOFT_FLAT.clone().fill_(float("nan"))}), "not finite"),
    "in front or not": (lambda f: prompt(f, in_front=None), "incomplete or damaged"),
    "hidden size missing": (lambda f: prompt(f, hidden_size=None), "incomplete or damaged"),
    "wrong hidden size": (lambda f: prompt(f, hidden_size=16), r"configuration says \[4, 16\]"),
    "no token": (lambda f: prompt(f, num_virtual_tokens=0), "incomplete or damaged"),
    "token_dim missing": (lambda f: config(f, token_dim=None), "incomplete or damaged"),
    "other token_dim": (lambda f: config(f, token_dim=16), r"configuration says \[4, 16\]"),
    "two sets without a decoder": (lambda f: config(f, num_transformer_submodules=2), "incomplete or damaged"),
    "no set": (lambda f: config(f, num_transformer_submodules=0), "incomplete or damaged"),
    "one set of two": (
        lambda f: config(f, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2),
        r"has shape \(4, 8\), but its configuration says \[8, 8\]",
    ),
    "head missing": (lambda f: (f / HEAD).unlink(), r"cannot read .*head\.safetensors"),
    "head corrupted": (lambda f: (f / HEAD).write_bytes(b"\xff" * 100), r"cannot read .*head\.safetensors"),
    "head cut": (lambda f: (f / HEAD).write_bytes((f / HEAD).read_bytes()[:-3]), r"cannot read .*head\.safetensors"),
    "head not finite": (
        lambda f: save_file({**random_head(), "bias": torch.full((3,), float("inf"))}, f / HEAD),
        r"head\.safetensors holds values that are not finite",
    ),
    "another head": (
        lambda f: save_file({**random_head(), "bias": torch.zeros(4)}, f / HEAD),
        r"head\.safetensors holds .*'bias': \(4,\).* ptd\.json in the same folder says .*'bias': \(3,\)",
    ),
    "part of the head": (lambda f: save_file({"bias": torch.zeros(3)}, f / HEAD), "the head is damaged"),
    "head no object": (lambda f: facts(f, head=3), "incomplete or damaged"),
    "head's shape no list": (lambda f: facts(f, head={"bias": 3}), "incomplete or damaged"),
}


@pytest.mark.parametrize("name", HEAD_DAMAGES)
def test_damage_of_soft_prompts_and_heads_is_refused(name, tmp_path):
    save_adapter(tmp_path, soft_adapter(head=random_head()))
    damage, message = HEAD_DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(UserError, match=rf"--adapter: .*{message}"):
        load_adapter(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--adapter: there is no folder"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "type LORA"),
        (
            MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=2),
            "type MULTITASK_PROMPT_TUNING",
        ),
        (PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P), "PREFIX_TUNING adapter of an encoder-dec"),
    ],
    ids=["LORA", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING of an encoder-decoder"],
)
def test_adapters_that_peft_wrote_and_ptd_does_not_know(foreign, message, tmp_path):
    family = "t5" if foreign.task_type == "SEQ_2_SEQ_LM" else "llama"
    get_peft_model(tiny_model(family), foreign).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path)


def test_a_layer_that_peft_trained_beside_the_prompt_is_not_dropped_silently(tmp_path):
    get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match=r"lm_head.weight as well as the prompt; .*without modules_to_save"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_adapters_with_other_heads_of_peft_are_named_as_such(tmp_path, task_type):
    config = {"peft_type": "PREFIX_TUNING", "task_type": task_type, "num_virtual_tokens": P, "token_dim": 8}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "num_attention_heads": 2, "num_layers": 2}))
    with pytest.raises(UserError, match=rf"task type {task_type}: .*train again with task.kind: "):
        load_adapter(tmp_path)


def test_a_classifier_that_peft_trained_beside_the_prompt_is_not_dropped_silently(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"task type SEQ_CLS: .*the head of .*or train again with task.kind: classification"
    ):
        load_adapter(tmp_path)
