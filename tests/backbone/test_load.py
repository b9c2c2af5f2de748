"""A loaded backbone is frozen and has no dropout; if it cannot be read, the error names the key."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import VOCAB, save_backbone, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from ptd.backbone import architecture_of, fingerprint, load_model, load_tokenizer
from ptd.backbone.load import checkpoint_layers
from ptd.config import BackboneConfig
from ptd.inject import Attachment, check_supported
from ptd.inject.attach import WRONG_UPSTREAM
from ptd.methods.prefix import PrefixEncoder
from ptd.types import UserError

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def load(path, **settings):
    return load_model(BackboneConfig(path=str(path), **settings), device=CPU, check=check_supported)


@pytest.fixture
def damaged(backbone_dir, tmp_path):
    """Copy the saved backbone, so that a test can damage it."""
    return shutil.copytree(backbone_dir, tmp_path / "damaged")


def test_the_model_is_the_saved_one_in_eval_mode_and_frozen(backbone_dir):
    model, saved = load(backbone_dir), tiny_model("llama")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert {p.dtype for p in load(backbone_dir, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_the_tokenizer_comes_along(backbone_dir):
    tokenizer = load_tokenizer(BackboneConfig(path=str(backbone_dir)))
    assert tokenizer.decode(tokenizer("grüße")["input_ids"]) == "grüße"


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("opt", {"dropout": 0.1, "attention_dropout": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        ("phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_dropout_is_gone_even_where_layers_are_recomputed(family, dropout, tmp_path):
    model = load(save_backbone(tmp_path, family, **dropout), gradient_checkpointing=True)
    assert all(getattr(model.config, name) == 0 for name in dropout)
    attachment = Attachment(model)
    encoder = PrefixEncoder(attachment.shape.layers, 4)

    def run():
        attachment.set(encoder.state(encoder()))
        encoder.zero_grad()
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        loss.backward()
        return loss.item(), encoder.embedding.grad.clone()

    (loss, gradient), (again, gradient_again) = run(), run()
    assert loss == again
    assert torch.equal(gradient, gradient_again)


OUTPUTS = {"llama": "causal_lm", "t5": "seq2seq_lm", "bert": "masked_lm"}
TEXT = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}


def with_prefix(folder, family, checkpointing):
    """Return a model with a trainable prefix, the prefix's encoder, and lists of the tokens in each layer's runs."""
    config = BackboneConfig(path=str(folder), gradient_checkpointing=checkpointing)
    model = load_model(config, OUTPUTS[family], device=CPU, check=check_supported)
    attachment = Attachment(model)
    torch.manual_seed(3)
    encoder = PrefixEncoder(attachment.shape.layers, 4)
    attachment.set(encoder.state(encoder()))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == (4 if family == "t5" else 2)
    runs = {number: [] for number in range(len(layers))}
    for layer, tokens in zip(layers, runs.values(), strict=True):
        assert not any(module.training for module in layer.children())
        inside = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        inside.register_forward_pre_hook(lambda module, args, tokens=tokens: tokens.append(args[0].shape[1]))
    return model, encoder, runs


def run(model, encoder=None):
    """Return the logits of a forward pass; with ``encoder``, also run backward and return the gradient."""
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=IDS, **given).logits  # with a cache if the model's config says so
    if encoder is None:
        return logits
    logits.square().mean().backward(inputs=[encoder.embedding], retain_graph=True)
    gradient, encoder.embedding.grad = encoder.embedding.grad, None
    return logits.detach(), gradient


@pytest.mark.parametrize("family", OUTPUTS)
def test_gradient_checkpointing_runs_every_layer_twice_in_every_training_pass(family, tmp_path):
    folder = save_backbone(tmp_path, family)
    plain, checkpointed = (with_prefix(folder, family, checkpointing) for checkpointing in (False, True))
    for number in range(3):
        found = []
        for model, encoder, runs in (plain, checkpointed):
            if number:  # an evaluation in between
                with torch.no_grad():
                    found.append(run(model))
                assert [len(tokens) for tokens in runs.values()] == [1] * len(runs)
                [tokens.clear() for tokens in runs.values()]
            found += run(model, encoder)
            assert [len(tokens) for tokens in runs.values()] == [1 + (runs is checkpointed[2])] * len(runs), number
            [tokens.clear() for tokens in runs.values()]
        for want, got in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_generation_behind_a_training_pass_is_the_plain_one(family, tmp_path):
    folder = save_backbone(tmp_path, family)
    plain, checkpointed = (with_prefix(folder, family, checkpointing) for checkpointing in (False, True))
    texts = []
    for model, encoder, runs in (plain, checkpointed):
        run(model, encoder)
        [tokens.clear() for tokens in runs.values()]
        texts.append(model.generate(IDS, **TEXT))
        first = IDS.shape[1] if family == "llama" else 1
        assert runs[len(runs) - 1][:6] == [first, 1, 1, 1, 1, 1]
        if family == "t5":
            assert runs[0] == [IDS.shape[1]], "the encoder runs once"
        assert torch.equal(model.generate(IDS, use_cache=False, **TEXT), texts[-1]), "what is cached is what was seen"
    assert torch.equal(*texts)


def test_gradient_checkpointing_is_refused_where_the_model_has_none():
    model = tiny_model("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"backbone\.gradient_checkpointing: LlamaForCausalLM does not support"):
        checkpoint_layers(model)


def test_the_fingerprint_tells_weights_apart_and_not_dtypes(backbone_dir, tmp_path):
    prints = [fingerprint(load(backbone_dir, dtype=dtype)) for dtype in ("float32", "bfloat16", "auto")]
    assert len(set(prints)) == 1
    assert fingerprint(load(save_backbone(tmp_path, seed=1))) != prints[0]
    assert fingerprint(tiny_model("mistral")) != fingerprint(tiny_model("llama"))  # the same weights, another family
    model = tiny_model("llama")
    assert fingerprint(model) == fingerprint(model.model) == prints[0]  # with and without the language-model head
    model.model.add_module("extra", torch.nn.Linear(2, 2))
    assert fingerprint(model) != fingerprint(model.model, without="extra") == prints[0]


class OnTheHost(TorchDispatchMode):
    """Counts the numbers of one dtype that are created in host memory."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.made = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device == CPU and tensor.dtype is self.dtype:
                self.made += tensor.numel()
        return out


@pytest.mark.parametrize(("family", "output"), [("llama", "causal_lm"), ("bert", "masked_lm"), ("t5", "seq2seq_lm")])
def test_weights_go_straight_to_the_device(family, output, tmp_path, monkeypatch):
    """Weights in the requested dtype are never in host memory; ``meta`` represents a GPU."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # load in this thread, the only one that is watched
    config = BackboneConfig(path=str(save_backbone(tmp_path, family)), dtype="bfloat16")
    made = {}
    for device in (CPU, META):
        with OnTheHost(torch.bfloat16) as host:
            model = load_model(config, output, device=device, check=check_supported)
        made[device] = host.made
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device for tensor in tensors} == {device}
    assert made[CPU] >= sum(parameter.numel() for parameter in model.parameters())
    assert made[META] == 0


def test_every_output_of_a_checkpoint_is_the_same_backbone(tmp_path):
    folder = save_backbone(tmp_path, "bert")
    config = BackboneConfig(path=str(folder))
    masked, body = (load_model(config, output, device=CPU) for output in ("masked_lm", "body"))
    assert fingerprint(masked) == fingerprint(body)
    assert "pooler" not in dict(body.named_children()) or body.pooler is None
    with pytest.raises(UserError, match=r"no model of type .bert."):
        load_model(config, "seq2seq_lm", device=CPU, check=check_supported)


@pytest.mark.parametrize(
    ("family", "architecture"), [("llama", "decoder"), ("bert", "encoder"), ("t5", "encoder-decoder")]
)
def test_the_architecture_is_read_from_the_config(family, architecture, tmp_path):
    config = BackboneConfig(path=str(save_backbone(tmp_path, family)))
    assert architecture_of(config) == architecture
    body = load_model(config, "body", device=CPU)
    assert body(input_ids=IDS).last_hidden_state.shape == (*IDS.shape, 32)
    assert not any("decoder" in name.split(".")[0] for name, _ in body.named_parameters())


@pytest.mark.parametrize("loader", [load, lambda path: load_tokenizer(BackboneConfig(path=str(path)))])
def test_a_folder_that_is_no_model_is_named(loader, tmp_path):
    with pytest.raises(UserError, match=r"backbone\.path: there is no model folder .*nowhere"):
        loader(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"backbone\.path: the folder .* has no config\.json"):
        loader(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"backbone\.path: there is no model folder"):
        loader(tmp_path / "file")
    with pytest.raises(UserError, match=r"backbone\.path: cannot load 'nobody/nothing'"):
        loader("nobody/nothing")  # HF_HUB_OFFLINE


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def not_json(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))


def other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def one_tensor_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [cut, no_weights, not_json, unknown_type, other_sizes, one_tensor_missing])
def test_a_damaged_checkpoint_is_refused(damage, damaged):
    damage(damaged)
    with pytest.raises(UserError, match=r"backbone\.path: cannot load"):
        load(damaged)


def test_pickled_weights_are_read_only_on_demand(damaged):
    file = damaged / "model.safetensors"
    torch.save(load_file(file), damaged / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match=r"\.bin files are pickles: .* set backbone\.allow_pickle: true"):
        load(damaged)
    assert fingerprint(load(damaged, allow_pickle=True)) == fingerprint(tiny_model("llama"))


@pytest.mark.parametrize("family", ["bloom", "falcon", "jamba"])
def test_an_unsupported_family_is_refused_before_its_weights_are_read(family, tmp_path, monkeypatch):
    monkeypatch.setitem(WRONG_UPSTREAM, family, "for this test")
    tiny_config(family).save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(UserError, match=rf"backbone\.path: model type '{family}'"):
        load(tmp_path)
