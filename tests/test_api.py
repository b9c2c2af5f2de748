"""``ptd.attach`` and ``ptd.load``: a custom loop or the Hugging Face Trainer on a loaded model, and saved adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES, VOCAB, save_backbone, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ptd
from ptd.types import UserError

P = 4
CLOSE = 2e-5  # fp32 logits of size ~1 computed in a different order differ by about 3e-6 at most
IDS = torch.randint(3, VOCAB, (4, 10), generator=torch.Generator().manual_seed(0))
# Older releases of transformers call the option gradient_checkpointing; newer ones warn about that name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
FORMS = {"direct": {}, "mlp": {"prefix_projection": True, "encoder_hidden_size": 8}}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attached(family="llama", **settings):
    return ptd.attach(tiny_model(family), "prefix", num_virtual_tokens=P, **settings)


def train(tuned, steps):
    optimizer = torch.optim.AdamW([p for p in tuned.model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = tuned.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_lower_the_loss_and_change_the_encoder_only(family, form):
    tuned = attached(family, **FORMS[form])
    plain = dict(tiny_model(family).named_parameters())
    before = [p.detach().clone() for p in tuned.encoder.parameters()]
    losses = train(tuned, 20)
    assert losses[-1] < 0.8 * losses[0]
    assert all((now != then).any() for now, then in zip(tuned.encoder.parameters(), before, strict=True))
    backbone = {name: p for name, p in tuned.model.named_parameters() if not name.startswith("prompt_encoder.")}
    assert backbone.keys() == plain.keys()
    assert all(torch.equal(p, plain[name]) for name, p in backbone.items())
    assert all(p.grad is None and not p.requires_grad for p in backbone.values())


def test_a_forward_pass_sees_every_change_of_the_encoder():
    tuned = attached()
    first = logits(tuned.model)
    train(tuned, 1)
    second = logits(tuned.model)
    assert not torch.equal(second, first)
    assert torch.equal(logits(tuned.model), second)
    with torch.inference_mode():
        assert torch.equal(tuned.model(input_ids=IDS).logits, second)
    train(tuned, 1)  # after inference mode, whose tensors autograd refuses
    zeros = torch.zeros_like(tuned.encoder.embedding)
    tuned.encoder.load_state_dict({**tuned.encoder.state_dict(), "embedding": zeros})
    third = logits(tuned.model)
    tuned.attachment.encoder = None
    tuned.attachment.set(tuned.encoder.state(tuned.encoder.units(zeros)))
    assert torch.equal(logits(tuned.model), third)


def test_generate_uses_the_trained_prompt(tmp_path):
    tuned = attached()
    train(tuned, 30)
    tuned.save(tmp_path)
    options = {"input_ids": IDS[:, :3], "max_new_tokens": 6, "do_sample": False}
    want = tuned.model.generate(**options, attention_mask=torch.ones(4, 3, dtype=torch.long))
    loaded = ptd.load(tiny_model(), tmp_path)
    assert torch.equal(loaded.model.generate(**options, attention_mask=torch.ones(4, 3, dtype=torch.long)), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_hugging_face_trainer_trains_it(checkpointing, tmp_path):
    tuned = attached("llama")
    twin = attached("llama")
    rows = [{"input_ids": row, "labels": row, "not_a_model_input": 1} for row in IDS]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        **{CHECKPOINTING: checkpointing},
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=tuned.model, args=arguments, train_dataset=rows).train()
    train(twin, 3)  # the rows of a batch, and so the sums, have a different order
    assert torch.allclose(tuned.encoder(), twin.encoder(), atol=1e-3)
    assert not any(p.requires_grad for name, p in tuned.model.named_parameters() if "prompt_encoder" not in name)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_gives_the_same_logits(form, tmp_path):
    tuned = attached(**FORMS[form])
    train(tuned, 3)
    tuned.save(tmp_path)
    loaded = ptd.load(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded.model), logits(tuned.model))
    assert loaded.encoder is None
    assert loaded.method == {"name": "prefix", "num_virtual_tokens": P, **FORMS[form]}
    with pytest.raises(UserError, match="which is already saved"):
        loaded.save(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prompt", {}),
        ("p_tuning", {"encoder_hidden_size": 8}),
        ("prefix", {}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 8}),
    ],
    ids=["prompt", "p_tuning", "prefix", "prefix_mlp"],
)
@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "modernbert", *ENCODER_DECODERS])
def test_every_prompt_on_every_architecture(family, name, settings, tmp_path):
    """A prompt trained in a custom loop with the model's own labels gives the same logits when saved and loaded."""

    def output(model):
        # An encoder-decoder derives its decoder's input from the labels.
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)

    tuned = ptd.attach(tiny_model(family), name, num_virtual_tokens=P, **settings)
    optimizer = torch.optim.AdamW(tuned.encoder.parameters(), lr=0.03, weight_decay=0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = output(tuned.model).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]
    assert {n for n, p in tuned.model.named_parameters() if p.grad is not None} == {
        f"prompt_encoder.{n}" for n, _ in tuned.encoder.named_parameters()
    }
    tuned.save(tmp_path)
    with torch.no_grad():
        want = output(tuned.model).logits
        tuned.remove()
        plain = output(tuned.model).logits
        got = output(ptd.load(tiny_model(family), tmp_path).model).logits
    assert (got - want).abs().max() < CLOSE
    assert (plain - want).abs().max() > 100 * CLOSE


def test_an_adapter_serves_another_dtype_of_the_same_checkpoint(tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    exact, half = (
        AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    tuned = ptd.attach(exact, "prefix", num_virtual_tokens=P)
    tuned.save(tmp_path / "exact")
    assert (tmp_path / "exact" / "adapter_config.json").read_text().count(str(backbone)) == 1
    loaded = ptd.load(half, tmp_path / "exact")
    difference = logits(half).float() - logits(exact)
    assert difference.norm() / logits(exact).norm() < 0.03  # bfloat16 has 8 significant bits
    loaded.remove()

    tuned_half = ptd.attach(half, "prefix", num_virtual_tokens=P)
    assert tuned_half.encoder.embedding.dtype == torch.float32
    train(tuned_half, 1)
    tuned_half.save(tmp_path / "half")
    tuned.remove()
    ptd.load(exact, tmp_path / "half")
    difference = logits(half).float() - logits(exact)
    assert difference.norm() / logits(exact).norm() < 0.03


def test_removing_restores_the_model():
    model = tiny_model()
    before, keys = logits(model), list(model.state_dict())
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P)
    assert len(model.state_dict()) == len(keys) + 3  # the trained tensor, its initial value and its unit
    tuned.remove()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    again = ptd.attach(model, "prefix", num_virtual_tokens=P)
    again.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: tiny_model("llama", num_hidden_layers=3), "3 decoder layers of 2 kv heads"),
        (lambda: tiny_model("llama", num_key_value_heads=4), "4 kv heads"),
        (lambda: tiny_model("gpt2"), "4 kv heads"),
        (lambda: tiny_model("llama", seed=1), "another backbone .fingerprint"),
        (lambda: tiny_model("mistral"), "another backbone .fingerprint"),
    ],
)
def test_an_adapter_of_another_backbone_is_refused_and_the_model_left_alone(other, reason, tmp_path):
    attached().save(tmp_path)
    model = other()
    before = logits(model)
    with pytest.raises(UserError, match=reason):
        ptd.load(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {}, "there is no method 'lora'"),
        ("prefix", {"num_virtual_tokens": 0}, "at least 1"),
        ("prefix", {"nonsense": 1}, "unknown key"),
        ("head", {}, "'head' has no prompt to attach to a model"),
        ("p_tuning", {}, "num_virtual_tokens"),
    ],
)
def test_wrong_settings_leave_the_model_alone(name, settings, message):
    model = tiny_model()
    before = logits(model)
    with pytest.raises(UserError, match=message):
        ptd.attach(model, name, **settings)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_attention_backend_is_refused():
    with pytest.raises((UserError, ValueError), match="nonsense"):
        logits(ptd.attach(tiny_model(), "prefix", attention="nonsense").model)


@pytest.mark.parametrize("family", ["llama", *ENCODER_DECODERS[:1]])
def test_texts_are_what_a_prompt_starts_from(family):
    """A prompt starts from the last P tokens of the last text drawn, if that text has P tokens or more.

    A decoder then starts conditioned on that text.
    """
    tokenizer = tiny_tokenizer()
    texts = ["the film was good and the inn was dull", "the inn is in the city centre and the film is there"]
    model = tiny_model(family)
    tuned = ptd.attach(model, "prompt", num_virtual_tokens=P, tokenizer=tokenizer, texts=texts)
    embeddings = model.get_input_embeddings().weight
    ends = [tokenizer(text)["input_ids"][-P:] for text in texts]
    assert any(torch.equal(tuned.encoder(), embeddings[ids]) for ids in ends)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": ["the film"]}, "needs the model's tokenizer"),
        ({"texts": "the film", "tokenizer": tiny_tokenizer()}, "got a single string"),
        ({"texts": [""], "tokenizer": tiny_tokenizer()}, "none of the texts has a token"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(given, message):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        ptd.attach(model, "prompt", num_virtual_tokens=P, **given)
    ptd.attach(model, "prompt", num_virtual_tokens=P)


def test_one_prompt_at_a_time(tmp_path):
    tuned = attached()
    tuned.save(tmp_path)
    for again in (lambda: ptd.attach(tuned.model, "prefix"), lambda: ptd.load(tuned.model, tmp_path)):
        before = logits(tuned.model)
        with pytest.raises(UserError, match="already has a prompt"):
            again()
        assert torch.equal(logits(tuned.model), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_a_model_with_lora_layers_takes_a_prompt_and_keeps_them():
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    before = logits(model)
    assert not torch.allclose(before, logits(tiny_model("llama")))
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P)
    assert not torch.allclose(logits(model), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.prompt_encoder.embedding"
    ]
    train(tuned, 2)
    tuned.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_wrapped_models_are_refused_with_what_to_do():
    import peft

    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    with pytest.raises(UserError, match="already has a PEFT prompt"):
        ptd.attach(peft.get_peft_model(tiny_model("llama"), settings), "prefix", num_virtual_tokens=P)
    with pytest.raises(UserError, match="attach it before you wrap"):
        ptd.attach(torch.nn.DataParallel(tiny_model("llama")), "prefix", num_virtual_tokens=P)


def test_a_head_that_is_frozen_and_not_saved_is_said():
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    with pytest.warns(UserWarning, match="the head of .* is frozen and is not saved"):
        ptd.attach(model, "prompt", num_virtual_tokens=P)


def test_what_the_package_exports_exists_and_is_imported_only_when_used() -> None:
    assert all(callable(getattr(ptd, name)) for name in ptd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        ptd.tune  # noqa: B018
    said = "import sys, ptd; ptd.UserError; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
