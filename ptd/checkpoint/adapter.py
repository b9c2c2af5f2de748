"""Write and read adapter folders: PEFT's format where it can hold the prompt, plus files for what it has no field for.

=============================  =====================================================================================
``adapter_model.safetensors``  ``prompt_embeddings``: the flat prompt, fp32 (see `ptd.checkpoint.peft_format`);
                               missing without a prompt
``adapter_config.json``        PEFT's description of the prompt; missing if PEFT's format cannot hold the prompt
``head.safetensors``           the parameters of a trained head; missing without one
``ptd.json``                   ptd's own description and the facts of the run; missing in a pure PEFT adapter
``README.md``                  the model card (`ptd.checkpoint.card`), for people; ptd never reads it
=============================  =====================================================================================

The networks of re-parameterisations (MLP, LSTM) are not stored: after training only their output is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptd.checkpoint import peft_format
from ptd.checkpoint.card import Subject, card, write_card
from ptd.checkpoint.files import write_json
from ptd.checkpoint.layouts import Layout, checked_size, misfit, read_layout, write_layout
from ptd.files import as_path, sync
from ptd.types import BackboneShape, EmptyLayout, PromptState, UserError, same_backbone

CONFIG, WEIGHTS, HEAD, EXTRA = "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "ptd.json"
KEY = "prompt_embeddings"
OWN_KEYS = ("backbone", "revision", "peft_type", "task_type", "prompt", "head")
"""Keys of ptd.json that are not in `Adapter.facts`."""
SECTIONS = ("backbone_config", "method", "task", "data")
"""Facts that are sections of the run's configuration."""


KINDS = ("F64", "F32", "F16", "BF16")
"""Dtypes (safetensors' names) that a stored prompt or head may have; ptd converts them to fp32."""

LARGEST_DESCRIPTION = 16 << 20
"""Largest JSON file that is accepted, in bytes. Patterns, label names and layers take kilobytes."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A tuned prompt, a trained head, or both, independent of how they were trained.

    ``flat`` is the fp32 prompt, whose columns ``layout`` describes (shape ``[0, 0]`` without a prompt). ``backbone`` is
    the path or hub id of the backbone the adapter was made for. ``task_type`` and ``peft_type`` are PEFT's names (None:
    PEFT has none). ``head`` is the state dict of the readout's parameters. ``facts`` holds everything else that is
    known: ``fingerprint``, and the run's sections ``backbone_config``, ``method``, ``task``, ``data`` (empty for an
    adapter that PEFT wrote).
    """

    flat: Tensor
    layout: Layout
    backbone: str
    revision: str | None = None
    task_type: str | None = None
    peft_type: str | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def state(self) -> PromptState:
        """Return the prompt in the form that `ptd.inject` takes."""
        return self.layout.state(self.flat)

    def state_on(self, device: torch.device) -> PromptState:
        """Return `state` on a device."""
        return self.layout.state(self.flat.to(device))

    def peft_obstacle(self) -> str | None:
        """Return why PEFT's format cannot hold the prompt; None if it can."""
        return peft_format.obstacle(self.layout, self.peft_type, self.task_type)

    def check_fits(self, shape: BackboneShape, fingerprint: str | None, *, path: str) -> None:
        """Raise `UserError` if the adapter was not made for this backbone."""
        made_for = self.facts.get("fingerprint")
        wrong = misfit(self.layout, shape, kinds=made_for is not None)
        if wrong:
            raise UserError(
                f"the adapter was made for {wrong[0]}, but the backbone {path} has {wrong[1]}; "
                f"use the backbone it was trained on: {self.backbone}"
            )
        if made_for and fingerprint and not same_backbone(made_for, fingerprint):
            raise UserError(
                f"the adapter was made for another backbone (fingerprint {made_for}) of the same shape as {path} "
                f"({fingerprint}); use the backbone it was trained on: {self.backbone}"
            )


def backbone_reference(path: str) -> str:
    """Return how an adapter names its backbone: the absolute path of a folder (valid from anywhere), or the hub id."""
    return str(as_path(path).resolve()) if path and as_path(path).is_dir() else path


def save_adapter(folder: str | Path, adapter: Adapter, *, peft_only: bool = False) -> None:
    """Write the adapter; ``peft_only`` leaves out what PEFT does not read: ptd.json and a trained head.

    Raises `UserError` if ``peft_only`` is set and PEFT's format cannot hold the prompt.
    """
    obstacle = adapter.peft_obstacle()
    if peft_only and obstacle:
        raise UserError(f"this adapter cannot be exported to PEFT: {obstacle}; use it with ptd instead")
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompted = not isinstance(adapter.layout, EmptyLayout)
    head = {} if peft_only else {name: tensor.detach().cpu().clone() for name, tensor in adapter.head.items()}
    _write_tensors(folder / WEIGHTS, {KEY: adapter.flat.detach().float().cpu()} if prompted else {})
    _write_tensors(folder / HEAD, head)
    kind = {"peft_type": adapter.peft_type, "task_type": adapter.task_type, "revision": adapter.revision}
    if obstacle:
        (folder / CONFIG).unlink(missing_ok=True)
    else:
        prompt = peft_format.write_config(adapter.layout, len(adapter.flat), adapter.peft_type)
        write_json(folder / CONFIG, {**kind, "base_model_name_or_path": adapter.backbone, **prompt})
    if peft_only:
        (folder / EXTRA).unlink(missing_ok=True)
    else:
        own = {
            "prompt": write_layout(adapter.layout, len(adapter.flat)),
            "head": {name: list(tensor.shape) for name, tensor in head.items()},
        }
        write_json(folder / EXTRA, {**adapter.facts, **kind, "backbone": adapter.backbone, **own})
    write_card(folder, card(_subject(adapter, obstacle, head)))


def _subject(adapter: Adapter, obstacle: str | None, head: Mapping[str, Tensor]) -> Subject:
    return Subject(
        backbone=adapter.backbone,
        revision=adapter.revision,
        task_type=adapter.task_type,
        peft_type=adapter.peft_type,
        num_virtual_tokens=len(adapter.flat),
        prompt_numbers=adapter.flat.numel(),
        head_numbers=sum(tensor.numel() for tensor in head.values()),
        obstacle=obstacle,
        head_left=bool(adapter.head) and not head,
        facts=adapter.facts,
    )


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder that ptd or PEFT wrote, or a run's output folder, which holds one in ``adapter/``.

    Raises `UserError` if a file is missing or damaged, or if the folder holds neither a prompt nor a head.
    """
    folder = as_path(path)
    if not _holds_adapter(folder) and _holds_adapter(folder / "adapter"):
        folder = folder / "adapter"
    if not folder.is_dir():
        raise UserError(f"--adapter: there is no folder {path}; give an adapter folder or a run's output_dir")
    ours = (folder / EXTRA).is_file()
    found = _read_json(folder / (EXTRA if ours else CONFIG))
    try:
        layout, virtual = read_layout(found["prompt"]) if ours else peft_format.read_config(found)
        rows = virtual if ours else peft_format.stored_rows(found)
        shapes = {name: tuple(map(checked_size, shape)) for name, shape in found["head"].items()} if ours else {}
        backbone = _name(found, "backbone" if ours else "base_model_name_or_path") or ""
        revision, task_type, peft_type = (_name(found, key) for key in ("revision", "task_type", "peft_type"))
        facts = _facts(found) if ours else {}
    except UserError as error:
        raise UserError(f"--adapter: {folder} cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"--adapter: the configuration in {folder} is incomplete or damaged: {error!r}") from error
    owner = EXTRA if ours else CONFIG
    flat = torch.empty(0, 0)
    if not isinstance(layout, EmptyLayout):
        flat = _read_tensors(folder / WEIGHTS, {KEY: (rows, layout.width)}, owner=owner)[KEY]
    # The copy frees the unused half of the rows that PEFT stores for an encoder-decoder.
    flat = flat if rows == virtual else flat[:virtual].clone()
    head = _read_tensors(folder / HEAD, shapes, owner=owner) if shapes else {}
    return Adapter(flat, layout, backbone, revision, task_type, peft_type, head, facts)


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, CONFIG, EXTRA))


def _name(values: dict[str, Any], key: str) -> str | None:
    value = values.get(key)
    if not isinstance(value, str | None):
        raise TypeError(f"{key} is {value!r:.60}, not a string")
    return value


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the run; raise `TypeError` if a section is not an object. Its users check its contents."""
    facts = {key: value for key, value in found.items() if key not in OWN_KEYS}
    for key in SECTIONS:
        if not isinstance(facts.get(key, {}), dict):
            raise TypeError(f"{key} is {facts[key]!r:.60}, not an object")
    _name(facts, "fingerprint")
    return facts


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write to a temporary file, force it to disk, then rename it to ``path``; without tensors, remove ``path``."""
    if not tensors:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]], *, owner: str) -> dict[str, Tensor]:
    """Return the tensors of a file in fp32.

    All names, shapes and dtypes are checked before any tensor is read. ``owner``: the file that ``expected`` is from.
    """
    try:
        with safe_open(path, framework="pt") as file:  # raises if the header does not match the file's size
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            _check_shapes(path, shapes, expected, owner)
            for name, part in slices.items():
                if part.get_dtype() not in KINDS:
                    raise UserError(
                        f"--adapter: {name} in {path} has the dtype {part.get_dtype()}; it has to be one of "
                        f"{', '.join(KINDS)}"
                    )
            tensors = {name: file.get_tensor(name).float() for name in slices}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"--adapter: cannot read {path}: {error}") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"--adapter: {path} holds values that are not finite; the adapter is damaged")
    return tensors


def _check_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], owner: str
) -> None:
    if KEY in expected and KEY not in found:
        raise UserError(f"--adapter: {path} has {sorted(found)[:5]} but no {KEY!r}; it is not a prompt adapter")
    others = sorted(set(found) - set(expected))
    if KEY in expected and others:
        raise UserError(
            f"--adapter: {path} holds {', '.join(others[:5])} as well as the prompt; ptd reads prompts from PEFT's "
            "files, but not trained layers of the backbone; save the adapter without modules_to_save"
        )
    if KEY in expected and found[KEY] != expected[KEY]:
        raise UserError(
            f"--adapter: {path} has shape {found[KEY]}, but its configuration says {list(expected[KEY])}; the adapter "
            "is damaged"
        )
    if dict(found) != dict(expected):
        raise UserError(
            f"--adapter: {path} holds {dict(found)}, but {owner} in the same folder says {dict(expected)}; the head is "
            "damaged"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_DESCRIPTION:
            raise ValueError(f"it is larger than {LARGEST_DESCRIPTION >> 20} MiB, more than any adapter needs")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--adapter: cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"--adapter: {path} has to hold a JSON object")
    return value
