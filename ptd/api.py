"""The stages as a small Python API: attach a prompt to a model you loaded, train it your way, save, load, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptd.backbone import TextConditioner, fingerprint
from ptd.checkpoint import Adapter, backbone_reference, load_adapter, save_adapter
from ptd.config import parse_method
from ptd.inject import Attachment, measure_shape
from ptd.methods import method
from ptd.types import BackboneShape, PrefixKV, UserError

SUBMODULE = "prompt_encoder"


class TunedModel:
    """A prompt on a Hugging Face model, made by `attach` or `load`.

    The model itself is used as before (``model(...)``, ``model.generate(...)``, HF ``Trainer``); its own parameters
    are frozen, and `encoder`, registered as its submodule ``prompt_encoder``, holds the only trainable ones.
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, shape: BackboneShape, method: dict[str, Any]
    ) -> None:
        self.model, self.attachment, self.shape, self.method = model, attachment, shape, method

    @property
    def encoder(self) -> nn.Module | None:
        """The trained module; None on a loaded adapter, which is fixed."""
        return getattr(self.model, SUBMODULE, None)

    def save(self, folder: str | Path) -> None:
        """Write the prompt as it stands as an adapter folder that ptd and PEFT load."""
        encoder = self.encoder
        if encoder is None:
            raise UserError("there is nothing to save: this model carries a loaded adapter, which is saved already")
        with torch.no_grad():
            flat = encoder()
        facts = {"fingerprint": self._fingerprint(), "method": self.method}
        save_adapter(
            Path(folder), Adapter(flat, self.shape.layers, backbone_reference(self.model.name_or_path), facts=facts)
        )

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
    seed: int = 0,
    attention: str = "auto",
    **settings: Any,
) -> TunedModel:
    """Freeze ``model`` and put a trainable prompt of method ``name`` on it, in place.

    Args:
        tokenizer: needed by ``init="text"`` only.
        seed: of the prompt's initial values.
        attention: backend of `ptd_kernels.prefix_attention`.
        settings: the method's own keys, as in the ``method`` section of RUN.yaml (``num_virtual_tokens=16`` …).

    Raises:
        UserError: unknown method or setting, or a model family a prompt cannot be injected into.
    """
    section = {"name": name, **settings}
    config = parse_method(section)
    attachment = Attachment(model, backend=attention)
    try:
        shape = measure_shape(attachment, model)
        conditioner = TextConditioner(model, tokenizer, model.device)
        encoder = method(name).build(config, shape, conditioner, seed=seed)
    except BaseException:
        attachment.remove()
        raise
    model.requires_grad_(False)
    model.add_module(SUBMODULE, encoder.to(model.device))
    attachment.encoder = encoder
    return TunedModel(model, attachment, shape, section)


def load(model: PreTrainedModel, adapter: str | Path, *, attention: str = "auto") -> TunedModel:
    """Put a saved adapter (ptd's or PEFT's) on ``model``, in place, for evaluation and generation.

    Raises `UserError` if the folder is no prefix adapter or was made for another backbone.
    """
    found = load_adapter(adapter)
    attachment = Attachment(model, backend=attention)
    try:
        shape = measure_shape(attachment, model)
        found.check_fits(shape, fingerprint(model), path=model.name_or_path)
    except BaseException:
        attachment.remove()
        raise
    attachment.set(PrefixKV.from_flat(found.flat.to(model.device), found.layers))
    return TunedModel(model, attachment, shape, dict(found.facts.get("method", {})))
