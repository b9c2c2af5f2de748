"""Read resumable checkpoints, ``checkpoints/step-NNNNNN/``, each of which is complete or does not exist.

torch.distributed.checkpoint stores the tensors as safetensors files: each rank writes its shards, and loading reshards
them to any number of ranks. A checkpoint is written to a temporary folder, forced to disk, listed with sizes and
SHA-256 in ``manifest.json`` and only then renamed (`ptd.checkpoint.saver`). ``latest`` names the newest, for people.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.tensor import DTensor

from ptd.checkpoint.files import as_json
from ptd.types import UserError

MANIFEST, FACTS, LATEST = "manifest.json", "state.json", "latest"
WRITING, DELETED = ".writing-", ".deleted-"
"""Prefixes of the names of folders that are not complete yet, or no longer complete."""
Listing: TypeAlias = list[Any]
"""``[size in bytes, SHA-256]`` of a file, as in the manifest."""


class ResumableOptimizer(Protocol):
    """A ``torch.optim.Optimizer`` that can make a parameter's state before the first step."""

    param_groups: list[dict[str, Any]]
    state: Any

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]: ...
    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = ...) -> None: ...


def state_tensors(trained: nn.Module, optimizer: ResumableOptimizer) -> dict[str, Tensor]:
    """Return all training state by name: the module's parameters and buffers, and each parameter's optimizer state.

    Missing optimizer state is created the way the optimizer's first step would create it, so that the same call serves
    saving and loading in place.
    """
    tensors = dict(trained.state_dict())
    for name, parameter in trained.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state.update(optimizer.new_state(parameter))
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    return {name: _whole_if_replicated(tensor) for name, tensor in tensors.items()}


def _whole_if_replicated(tensor: Tensor) -> Tensor:
    """Return the plain tensor of a replicated DTensor, which the safetensors writer does not accept itself."""
    if isinstance(tensor, DTensor) and all(placement.is_replicate() for placement in tensor.placements):
        return tensor.to_local()
    return tensor


def checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoint folders, newest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step after which a finished checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def clean(root: Path) -> None:
    """Remove files and folders that a killed process left half written or half deleted."""
    for pattern in (f"{WRITING}*", f"{DELETED}*"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder)
    for file in root.glob(".*.tmp"):
        file.unlink()


def latest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, and why newer checkpoints were passed over."""
    skipped: list[str] = []
    for folder in checkpoints(root):
        reason = _damage(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {reason}")
    return None, skipped


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the plain values that are stored with the tensors."""
    return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` (from `state_tensors`) in place, resharded to the ranks of this run.

    Raises `UserError` if a tensor has another shape in the checkpoint.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        _check_shapes(folder, reader.read_metadata().state_dict_metadata, tensors)
        with torch.no_grad():
            load_distributed(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _check_shapes(folder: Path, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise `UserError` if a tensor has another shape in the checkpoint: 8-bit moments cannot be resharded."""
    for name, tensor in tensors.items():
        size = getattr(saved.get(name), "size", tensor.shape)
        if size != tensor.shape:
            raise UserError(
                f"output_dir: {folder} holds {name} in the shape {list(size)}, but this run needs "
                f"{list(tensor.shape)}; with train.optimizer: adamw_8bit the blocks of a split layer belong to the "
                "ranks that held it: continue on as many ranks per node as before, or --overwrite to start again"
            )


def file_entry(path: Path) -> Listing:
    """Return the current size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is; every byte is checked, including the manifest's."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or FACTS not in manifest or as_json(manifest) != text:
            return f"{MANIFEST} is damaged"
        for name, listing in manifest.items():
            path = folder / name
            if [path.stat().st_size] != listing[:1]:
                return f"{name} is truncated"
            if file_entry(path) != listing:
                return f"{name} is damaged"
        strange = {path.name for path in folder.glob("*.safetensors")} - manifest.keys()
        if strange:  # the reader would load every safetensors file
            return f"{', '.join(sorted(strange))} does not belong to the checkpoint"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"unreadable ({error})"
    return None
