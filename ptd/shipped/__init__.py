"""Files that ptd ships to be used by name: ``ds_configs/`` and ``launch/``, in a clone or in the installed package."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE if (HERE / "launch").is_dir() else HERE.parents[1]
"""The folder that holds ``ds_configs/`` and ``launch/``: a wheel carries them beside this file, a clone at its top."""
DS_CONFIGS = ROOT / "ds_configs"
RECIPES = ROOT / "launch" / "recipes"
SLURM = ROOT / "launch" / "slurm"


def find_recipe(source: str | Path) -> Path:
    """The run file at ``source``, or else the shipped recipe of that name (``7b.yaml``, ``launch/recipes/7b.yaml``).

    A path that is neither comes back as it was given: reading it says what is wrong.
    """
    path = Path(source)
    shipped = RECIPES / path.name
    meant = path.parent in (Path("."), RECIPES.relative_to(ROOT))
    return shipped if meant and not path.exists() and shipped.is_file() else path
