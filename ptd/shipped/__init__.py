"""Files that ptd ships for use by name: ``ds_configs/`` and ``launch/``, in a clone or in the installed package."""

from __future__ import annotations

import difflib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ptd.errors import UserError
from ptd.files import as_path

HERE = Path(__file__).parent
ROOT = HERE if (HERE / "launch").is_dir() else HERE.parents[1]
"""The folder of ``ds_configs/`` and ``launch/``: a wheel has them next to this file, a clone in its top folder."""
DS_CONFIGS = ROOT / "ds_configs"
RECIPES = ROOT / "launch" / "recipes"
SLURM = ROOT / "launch" / "slurm"


def find_recipe(source: str | Path) -> Path:
    """Return the run file at ``source``, or else the shipped recipe of that name.

    The name may be ``7b.yaml`` or ``launch/recipes/7b.yaml``. Any other path is returned unchanged, so that reading it
    raises the error.
    """
    path = as_path(source)
    shipped = RECIPES / path.name
    meant = path.parent in (Path("."), RECIPES.relative_to(ROOT))
    return shipped if meant and not path.exists() and shipped.is_file() else path


Kind = Literal["recipe", "deepspeed", "slurm", "hostfile"]
KINDS: dict[Kind, str] = {
    "recipe": "recipes: run files per task and per model size",
    "deepspeed": "DeepSpeed files, for the key deepspeed",
    "slurm": "job scripts for Slurm",
    "hostfile": "hostfile, for ptd launch ssh",
}


@dataclass(frozen=True)
class Shipped:
    """A file that can be used or copied by its name."""

    path: Path
    kind: Kind

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def about(self) -> str:
        """The first sentence of the file's first comment."""
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".json":
            comment = str(json.loads(text).get("_comment", ""))
        else:
            lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and line[:2] != "#!"]
            comment = lines[0] if lines else ""
        return comment.partition(". ")[0].rstrip(".:")


def shipped_files() -> list[Shipped]:
    """Return all shipped files, ordered by kind."""
    found: dict[Kind, list[Path]] = {
        "recipe": sorted(RECIPES.glob("*.yaml")),
        "deepspeed": sorted(DS_CONFIGS.glob("*.json")),
        "slurm": sorted(SLURM.glob("*.sbatch")),
        "hostfile": sorted(RECIPES.parent.glob("hostfile*")),
    }
    return [Shipped(path, kind) for kind, paths in found.items() for path in paths]


def copy_shipped(name: str, target: Path, *, force: bool = False) -> tuple[Shipped, Path]:
    """Copy the shipped file ``name`` to ``target``, a file or a folder; return the shipped file and the copy's path.

    Raises `UserError` if no such file is shipped, if the copy's path exists and ``force`` is not set, or if that path
    cannot be written.
    """
    known, target = {file.name: file for file in shipped_files()}, as_path(target)
    if name not in known:
        stems = {Path(each).stem: each for each in known}
        near = stems.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
        raise UserError(
            f"there is no shipped file {name}; "
            + (f"did you mean {near}?" if near else "ptd ls shows all shipped files")
        )
    where = target / name if target.is_dir() else target
    if where.exists() and not force:
        raise UserError(f"{where} exists already; give another name, or --force to replace it")
    try:
        shutil.copyfile(known[name].path, where)
    except OSError as error:
        raise UserError(f"cannot write {where}: {error.strerror}; give a file or an existing folder") from error
    return known[name], where
