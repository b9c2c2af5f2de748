"""``ptd export`` and ``ptd import``: adapters to and from PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from ptd.checkpoint import backbone_reference, load_adapter, save_adapter
from ptd.config import BackboneConfig
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import prepare
from ptd.files import as_path, check_writable
from ptd.types import Output, PrefixLayout, UserError

OUTPUTS: dict[str | None, Output] = {"SEQ_2_SEQ_LM": "seq2seq_lm", "FEATURE_EXTRACTION": "body"}
"""PEFT's task type -> the backbone's output. Every other task type means a causal language model."""


def export_adapter(source: str | Path, target: str | Path, *, base_model: str | None = None) -> str | None:
    """Write the adapter in ``source`` as a PEFT folder ``target``; return a note on what was not exported, or None.

    ``base_model`` (for example a hub id) replaces the backbone's path in the folder.

    Raises `UserError` for an adapter that PEFT cannot hold, and for a target that cannot be written.
    """
    target = _new(target)
    adapter = load_adapter(source)
    if base_model is not None:
        adapter = replace(adapter, backbone=base_model, revision=None)
    with _writing(target):
        save_adapter(target, adapter, peft_only=True)
    if not adapter.head:
        return None
    return (
        f"only the prompt was exported: the trained head stays in {source}, because PEFT stores heads as layers of "
        "transformers' model classes"
    )


def import_adapter(source: str | Path, target: str | Path, *, backbone: str | None = None) -> None:
    """Convert a PEFT adapter to a ptd adapter: check it against its backbone and add the backbone's fingerprint.

    Raises `UserError` for an adapter that is not a prompt or does not fit the backbone, and for a target that cannot be
    written.
    """
    target = _new(target)
    adapter = load_adapter(source)
    path = backbone or adapter.backbone
    if not path:
        raise UserError("the backbone is unknown: the adapter does not name it; give --backbone")
    if backbone is not None:
        adapter = replace(adapter, revision=None)
    config = BackboneConfig(path=path, revision=adapter.revision)
    prepared = prepare(config, Ranks.start(), output=OUTPUTS.get(adapter.task_type, "causal_lm"))
    adapter.check_fits(prepared.shape, prepared.fingerprint, path=path)
    # PEFT does not record whether a prefix's layers belong to a decoder or an encoder; the backbone tells.
    layout = PrefixLayout(prepared.shape.layers) if isinstance(adapter.layout, PrefixLayout) else adapter.layout
    facts = {**adapter.facts, "fingerprint": prepared.fingerprint}
    with _writing(target):
        save_adapter(target, replace(adapter, layout=layout, backbone=backbone_reference(path), facts=facts))


def _new(target: str | Path) -> Path:
    """Return the folder's path if it is new (or empty) and can be created; otherwise raise `UserError`."""
    folder = as_path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists; give a new folder")
    check_writable(folder, "the new folder")
    return folder


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the adapter to {target} ({reason}); give a folder with space for it") from error
