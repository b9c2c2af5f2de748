"""Resumable checkpoints: ``checkpoints/step-NNNNNN/``, complete or not there at all.

Tensors go through torch.distributed.checkpoint with safetensors files (each rank writes its shards; loading reshards
to any number of ranks). A checkpoint is written to a temporary folder, forced to disk, listed with sizes and SHA-256
in ``manifest.json`` and only then renamed; ``latest`` names the newest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from ptd.checkpoint.files import sync, write_atomically, write_json

MANIFEST, FACTS = "manifest.json", "state.json"


def tensors_of(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything trained, by name: the module's parameters and buffers and AdamW's moments of each parameter.

    The optimizer's state is created where it does not exist yet: the same call serves saving and loading in place.
    """
    tensors = dict(trained.state_dict())
    for name, parameter in trained.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"optimizer.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return {name: _whole_if_replicated(tensor) for name, tensor in tensors.items()}


def _whole_if_replicated(tensor: Tensor) -> Tensor:
    """The plain tensor behind a DTensor that every rank holds whole (the safetensors writer cannot take it itself)."""
    if isinstance(tensor, DTensor) and all(placement.is_replicate() for placement in tensor.placements):
        return tensor.to_local()
    return tensor


def save_state(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    is_main: bool,
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Write checkpoint ``step`` and delete all but the newest ``keep``. Every rank calls this together."""
    final, temporary = root / f"step-{step:06d}", root / f".writing-{step:06d}"
    if is_main:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    barrier()
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming a single process", which is what is meant
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save_distributed(tensors, storage_writer=writer, no_dist=alone)
    barrier()
    if is_main:
        write_json(temporary / FACTS, {"step": step, **facts})
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            sync(path)
        write_json(temporary / MANIFEST, {path.name: [path.stat().st_size, _sha256(path)] for path in files})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(root)
        write_atomically(root / "latest", final.name + "\n")
        # One of a later step was passed over as damaged; if it counted among the kept, it would push out whole ones.
        mine = [path for path in checkpoints(root) if _step_of(path) <= step]
        for old in set(checkpoints(root)) - set(mine[:keep]):
            shutil.rmtree(old)
    barrier()
    return final


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoint folders, newest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def latest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over."""
    skipped: list[str] = []
    for folder in checkpoints(root):
        reason = _damage(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {reason}")
    return None, skipped


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain values stored beside the tensors."""
    return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` (from `tensors_of`) in place, resharded to the ranks of this run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        with torch.no_grad():
            load_distributed(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest.items():
            if (folder / name).stat().st_size != size:
                return f"{name} is cut"
            if _sha256(folder / name) != checksum:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
