"""The stages as a small Python API: attach a prompt to a model you loaded, train it your way, save, load, generate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ptd.backbone import TextConditioner, fingerprint
from ptd.checkpoint import Adapter, backbone_reference, load_adapter, save_adapter
from ptd.config import parse_method
from ptd.inject import Attachment
from ptd.methods import method
from ptd.types import DataReport, EmptyLayout, Examples, PromptEncoder, UserError

SUBMODULE = "prompt_encoder"


class TunedModel:
    """A prompt on a Hugging Face model, made by `attach` or `load`.

    The model itself is used as before (``model(...)``, ``model.generate(...)``, HF ``Trainer``); its own parameters
    are frozen, and `encoder`, registered as its submodule ``prompt_encoder``, holds the only trainable ones.
    """

    def __init__(self, model: PreTrainedModel, attachment: Attachment, method: dict[str, Any]) -> None:
        self.model, self.attachment, self.method = model, attachment, method

    @property
    def encoder(self) -> PromptEncoder | None:
        """The trained module; None on a loaded adapter, which is fixed."""
        return getattr(self.model, SUBMODULE, None)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What an optimizer of yours is to be given, as ``torch.optim.AdamW(tuned.parameter_groups(2e-2))``.

        Every parameter of the prompt has the learning rate that makes its output move alike at every width; of a prompt
        that is trained directly, without a network, all have the one that is given.
        """
        encoder = self.encoder
        if encoder is None:
            raise UserError("there is nothing to train: this model carries a loaded adapter, which is fixed")
        groups: dict[float, list[Any]] = {}
        rates = encoder.rates()
        for name, parameter in encoder.named_parameters():
            groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        return [{"params": found, "lr": learning_rate * scale} for scale, found in groups.items()]

    def save(self, folder: str | Path) -> None:
        """Write the prompt as it stands as an adapter folder that ptd and, where it has the like, PEFT load."""
        encoder = self.encoder
        if encoder is None:
            raise UserError("there is nothing to save: this model carries a loaded adapter, which is saved already")
        with torch.no_grad():
            flat = encoder()
        adapter = Adapter(
            flat,
            encoder.layout,
            backbone_reference(self.model.name_or_path),
            task_type=_peft_task(self.model),
            peft_type=encoder.peft_type,
            facts={"fingerprint": self._fingerprint(), "method": self.method},
        )
        save_adapter(folder, adapter)

    def remove(self) -> None:
        """Take the prompt off; the model is as it was (but for its parameters, which stay frozen)."""
        self.attachment.remove()
        if self.encoder is not None:
            delattr(self.model, SUBMODULE)

    def _fingerprint(self) -> str:
        return fingerprint(self.model, without=SUBMODULE)


def attach(
    model: PreTrainedModel,
    name: str = "prefix",
    *,
    tokenizer: Any = None,
    texts: Sequence[str] = (),
    seed: int = 0,
    attention: str = "auto",
    **settings: Any,
) -> TunedModel:
    """Freeze ``model`` and put a trainable prompt of method ``name`` on it, in place.

    A model with LoRA layers of PEFT keeps them, frozen like the rest; the result is then about the model inside.

    Args:
        tokenizer: the model's, for a start from text.
        texts: rows of your data, each as the model is to read it (prompt and completion). The method's default,
            ``init="rows"``, starts from a sample of them; without any it starts from frequent tokens.
        seed: of the prompt's initial values.
        attention: backend of `ptd_kernels.prefix_attention`.
        settings: the method's own keys, as in the ``method`` section of RUN.yaml (``num_virtual_tokens=16`` …).

    Raises:
        UserError: unknown method or setting, a method without a prompt, or a model family a prompt cannot be injected
            into; ``texts`` without a tokenizer, or without a token.
    """
    section = {"name": name, **settings}
    config = parse_method(section)
    model = _transformers_model(model)
    attachment = Attachment(model, backend=attention)
    try:
        conditioner = TextConditioner(attachment, tokenizer, _rows_of(texts, tokenizer, model), seed=seed)
        encoder = method(name).build(config, attachment.shape, conditioner, seed=seed)
        if isinstance(encoder.layout, EmptyLayout):
            raise UserError(f"method {name!r} puts no prompt on a model; use it through ptd train")
    except BaseException:
        attachment.remove()
        raise
    if type(model).__name__.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
        warnings.warn(
            f"{type(model).__name__} has a head of its own, which is frozen as it is and not saved with the prompt; "
            "to train a head use ptd train with task.kind: classification, token_classification or question_answering",
            stacklevel=2,
        )
    model.requires_grad_(False)
    model.add_module(SUBMODULE, encoder.to(model.device))
    attachment.encoder = encoder
    return TunedModel(model, attachment, section)


def _rows_of(texts: Sequence[str], tokenizer: Any, model: PreTrainedModel) -> Examples | None:
    """The texts as rows to start from, for both stacks of an encoder-decoder; None: there are none."""
    if not texts:
        return None
    if isinstance(texts, str):
        raise UserError("texts: got one text; give a list of texts, rows of your data")
    if tokenizer is None:
        raise UserError("texts: a start from texts needs the backbone's tokenizer; pass tokenizer=… as well")
    ids = [found for text in texts if (found := tokenizer(text)["input_ids"])]
    if not ids:
        raise UserError("texts: none of them has a token")
    tokens, offsets = np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)])
    rows = Examples.of_text(tokens, np.ones(len(tokens), dtype=bool), offsets, DataReport(len(ids), len(tokens), 0))
    return replace(rows, source=rows) if model.config.is_encoder_decoder else rows


def load(model: PreTrainedModel, adapter: str | Path, *, attention: str = "auto") -> TunedModel:
    """Put a saved adapter's prompt (ptd's or PEFT's) on ``model``, in place, for evaluation and generation.

    Raises `UserError` if the folder holds no prompt or was made for another backbone.
    """
    found = load_adapter(adapter)
    model = _transformers_model(model)
    attachment = Attachment(model, backend=attention)
    try:
        if isinstance(found.layout, EmptyLayout):
            raise UserError(f"the adapter {adapter} holds no prompt but a trained head; use it through ptd predict")
        found.check_fits(attachment.shape, fingerprint(model), path=model.name_or_path)
    except BaseException:
        attachment.remove()
        raise
    attachment.set(found.layout.state(found.flat.to(model.device)))
    return TunedModel(model, attachment, dict(found.facts.get("method", {})))


def _transformers_model(model: Any) -> PreTrainedModel:
    """The model itself, or the one that PEFT has put its layers into (LoRA and the like), with these.

    Raises `UserError` for anything else that wraps a model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else None  # a PeftModel
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"a prompt is attached to a transformers model, not to a {type(model).__name__}; attach before wrapping "
            "the model (DistributedDataParallel, torch.compile, FSDP), or pass the model inside"
        )
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UserError(
            "this PEFT model carries a prompt of PEFT's own, which ptd would leave out; export it to ptd (ptd import "
            "FOLDER NEW_FOLDER), or pass model.get_base_model() to go without it"
        )
    return inner


def _peft_task(model: PreTrainedModel) -> str:
    if not model.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
