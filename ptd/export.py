"""``ptd export`` and ``ptd import``: adapters to and from PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ptd.checkpoint import backbone_reference, load_adapter, save_adapter
from ptd.engine.ranks import Ranks
from ptd.generate import load_tuned
from ptd.types import UserError


def export_adapter(source: str, target: Path, *, base_model: str | None = None) -> None:
    """Write the adapter of ``source`` as a plain PEFT folder ``target``.

    ``base_model`` replaces the backbone's path in it (a hub id, say). Raises `UserError`.
    """
    _must_be_new(target)
    adapter = load_adapter(source)
    if base_model is not None:
        adapter = replace(adapter, backbone=base_model, revision=None)
    save_adapter(target, adapter, peft_only=True)


def import_adapter(source: str, target: Path, *, backbone: str | None = None) -> None:
    """Write a PEFT prefix adapter as a ptd one: checked against its backbone and bound to it by fingerprint."""
    _must_be_new(target)
    tuned = load_tuned(source, backbone, Ranks.start())
    assert tuned.adapter is not None
    path = backbone or tuned.adapter.backbone
    facts = {**tuned.adapter.facts, "fingerprint": tuned.prepared.fingerprint}
    save_adapter(target, replace(tuned.adapter, backbone=backbone_reference(path), facts=facts))


def _must_be_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; give a new folder")
