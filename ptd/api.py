"""A small Python API: attach a prompt to a model that you loaded, train it in your own loop, save it and load it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ptd.types import NO_MEMBER, DataReport, EmptyLayout, Examples, PromptEncoder, Prompts, UserError

SUBMODULE = "prompt_encoder"


class TunedModel:
    """A Hugging Face model with a prompt, or with several by name, made by `attach` or `load`.

    Use the model as before (``model(...)``, ``model.generate(...)``, HF ``Trainer``). Its own parameters are frozen.
    The only trainable parameters belong to `encoder`, which is the model's submodule ``prompt_encoder``.
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, method: dict[str, Any], names: Sequence[str] = ()
    ) -> None:
        self.model, self.attachment, self.method, self.names = model, attachment, method, tuple(names)

    @property
    def encoder(self) -> PromptEncoder | None:
        """The trainable prompt encoder; None for a loaded adapter, which cannot be trained."""
        return getattr(self.model, SUBMODULE, None)

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let the rows of every batch in this block read these adapters, one name per row; None: the backbone alone.

        For ``model.generate`` they are the names of the prompts; beams and several answers of a prompt read its
        adapter. Raises `UserError` for an unknown name, and in a pass over another number of rows.
        """
        if not self.names:
            raise UserError("use: this model has a single prompt; load several adapters as load(model, {name: folder})")
        if isinstance(names, str):
            raise UserError(f"use: got the string {names!r}; give a list with one name for each row of the batch")
        unknown = [name for name in names if name is not None and name not in self.names]
        if unknown:
            raise UserError(f"use: there is no adapter {unknown[0]!r}; the adapters are {', '.join(self.names)}")
        with self.attachment.reading([NO_MEMBER if name is None else self.names.index(name) for name in names]):
            yield

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups for your optimizer, as in ``torch.optim.AdamW(tuned.parameter_groups(2e-2))``.

        Each group scales ``learning_rate`` so that the prompt changes equally fast at every width of its network. A
        prompt that is trained directly, without a network, uses ``learning_rate`` itself. Raises `UserError` for a
        loaded adapter.
        """
        encoder = self.encoder
        if encoder is None:
            raise UserError("this model has a loaded adapter, which cannot be trained; use attach(…) to train a prompt")
        groups: dict[float, list[Any]] = {}
        rates = encoder.rates()
        for name, parameter in encoder.named_parameters():
            groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        return [{"params": found, "lr": learning_rate * scale} for scale, found in groups.items()]

    def save(self, folder: str | Path) -> None:
        """Write the prompt's current values as an adapter folder.

        ptd can load the folder, and so can PEFT if it has an equivalent of the method. Raises `UserError` for a loaded
        adapter.
        """
        encoder = self.encoder
        if encoder is None:
            raise UserError("this model has a loaded adapter, which is already saved; copy the adapter's folder")
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
        """Remove the prompt. The model then computes the same as before `attach`; its parameters stay frozen."""
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
    """Freeze ``model`` and attach a trainable prompt of method ``name`` to it, in place.

    PEFT's LoRA layers stay in the model, frozen like its other weights. The result's ``model`` is then the transformers
    model inside the PEFT model.

    Args:
        tokenizer: the model's tokenizer, needed to initialise the prompt from text.
        texts: rows of your data, each written as the model reads it (prompt and completion). The method's default,
            ``init="rows"``, initialises the prompt from a sample of them; without ``texts`` it uses frequent tokens.
        seed: seed of the prompt's initial values.
        attention: backend of `ptd_kernels.prefix_attention`, or ``cache``: put a prefix into the model's own cache.
        settings: the method's own keys, as in the ``method`` section of RUN.yaml (``num_virtual_tokens=16`` …).

    Raises:
        UserError: the method or a setting is unknown; the method has no prompt; ptd cannot inject a prompt into this
            model family; ``texts`` is given without ``tokenizer``, or none of the texts has a token.
    """
    section = {"name": name, **settings}
    config = parse_method(section)
    model = _transformers_model(model)
    attachment = _attached(model, attention)
    try:
        conditioner = TextConditioner(attachment, tokenizer, _rows_of(texts, tokenizer, model), seed=seed)
        encoder = method(name).build(config, attachment.shape, conditioner, seed=seed)
        if isinstance(encoder.layout, EmptyLayout):
            raise UserError(f"method {name!r} has no prompt to attach to a model; use it with ptd train")
    except BaseException:
        attachment.remove()
        raise
    if type(model).__name__.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
        warnings.warn(
            f"the head of {type(model).__name__} is frozen and is not saved with the prompt; to train a head, use "
            "ptd train with task.kind: classification, token_classification or question_answering",
            stacklevel=2,
        )
    model.requires_grad_(False)
    model.add_module(SUBMODULE, encoder.to(model.device))
    attachment.encoder = encoder
    return TunedModel(model, attachment, section)


def _attached(model: PreTrainedModel, attention: str) -> Attachment:
    attachment = Attachment(model, backend=attention)
    if attachment.notice is not None:
        warnings.warn(attachment.notice, stacklevel=3)
    return attachment


def _rows_of(texts: Sequence[str], tokenizer: Any, model: PreTrainedModel) -> Examples | None:
    """Return the texts as tokenised rows, for an encoder-decoder on both sides; None if there are no texts."""
    if not texts:
        return None
    if isinstance(texts, str):
        raise UserError("texts: got a single string; give a list of strings, one per row of your data")
    if tokenizer is None:
        raise UserError("texts: ptd needs the model's tokenizer to read the texts; pass tokenizer=… as well")
    ids = [found for text in texts if (found := tokenizer(text)["input_ids"])]
    if not ids:
        raise UserError("texts: none of the texts has a token; give texts that are not empty")
    tokens, offsets = np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)])
    rows = Examples.of_text(tokens, np.ones(len(tokens), dtype=bool), offsets, DataReport(len(ids), len(tokens), 0))
    return replace(rows, source=rows) if model.config.is_encoder_decoder else rows


def load(
    model: PreTrainedModel, adapter: str | Path | Mapping[str, str | Path], *, attention: str = "auto"
) -> TunedModel:
    """Attach the prompt of a saved adapter (ptd's or PEFT's) to ``model``, in place, for evaluation and generation.

    Several adapters (name -> folder) are attached at once; `TunedModel.use` says which one each row of a batch reads.
    They may differ in everything but the backbone and the kind of prompt.

    Raises `UserError` if an adapter has no prompt or was made for another backbone, or if some have keys and values and
    others soft tokens.
    """
    named = isinstance(adapter, Mapping)
    folders = dict(adapter) if isinstance(adapter, Mapping) else {"": adapter}
    if not folders:
        raise UserError("load: got no adapter; give at least one folder")
    found = {name: load_adapter(folder) for name, folder in folders.items()}
    for name, one in found.items():
        if isinstance(one.layout, EmptyLayout):
            raise UserError(f"the adapter {folders[name]} has a trained head and no prompt; use it with ptd predict")
    Prompts(tuple(one.state() for one in found.values()))  # raises for prompts of two kinds
    model = _transformers_model(model)
    attachment = _attached(model, attention)
    try:
        identity = fingerprint(model)
        for name, one in found.items():
            try:
                one.check_fits(attachment.shape, identity, path=model.name_or_path)
            except UserError as error:
                raise UserError(f"{name}: {error}" if named else str(error)) from error
        states = [one.state_on(model.device) for one in found.values()]
        attachment.set(Prompts(tuple(states)) if named else states[0])
    except BaseException:
        attachment.remove()
        raise
    if attachment.note_on_several is not None and len(states) > 1:
        warnings.warn(attachment.note_on_several, stacklevel=2)
    method = {} if named else dict(next(iter(found.values())).facts.get("method", {}))
    return TunedModel(model, attachment, method, tuple(found) if named else ())


def _transformers_model(model: Any) -> PreTrainedModel:
    """Return ``model``, or the transformers model inside a PEFT model, including PEFT's layers (LoRA and similar).

    Raises `UserError` for any other wrapper, and for a PEFT model with a PEFT prompt.
    """
    if isinstance(model, PreTrainedModel):
        return model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else None  # a PeftModel
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"a prompt can be attached to a transformers model, not to a {type(model).__name__}; attach it before you "
            "wrap the model (DistributedDataParallel, torch.compile, FSDP), or pass the model inside the wrapper"
        )
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UserError(
            "this PEFT model already has a PEFT prompt, which ptd would ignore; convert its adapter for ptd (ptd "
            "import FOLDER NEW_FOLDER), or pass model.get_base_model() to use the model without that prompt"
        )
    return inner


def _peft_task(model: PreTrainedModel) -> str:
    if not model.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
