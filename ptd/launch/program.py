"""The program of every rank: ``ptd train`` with a run file that is checked before a job waits in a queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptd.config import RunConfig, runs_of_file
from ptd.config.deepspeed import apply_deepspeed
from ptd.shipped import find_recipe


@dataclass(frozen=True)
class Program:
    """``ptd train RUN.yaml [key=value …]``, started as a Python module."""

    run_file: Path
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Flags such as ``--overwrite`` and ``--retry``, which apply to this start and not when Slurm requeues the job."""

    @classmethod
    def of(
        cls,
        run_file: str | Path,
        overrides: list[str] | None = None,
        *,
        overwrite: bool = False,
        retry: bool = False,
        quiet: bool = False,
    ) -> Program:
        """Return the program, with the absolute path of the run file because the ranks may start in another folder."""
        flags = [flag for flag, given in (("--overwrite", overwrite), ("--retry", retry), ("--quiet", quiet)) if given]
        return cls(find_recipe(run_file).absolute(), tuple(overrides or ()), tuple(flags))

    def config(self) -> RunConfig:
        """Return the configuration as every rank will read it; if the file has members, that of the first one.

        Raises `UserError` for mistakes that can be found without the backbone.
        """
        runs = runs_of_file(self.run_file, list(self.overrides))
        configs = [apply_deepspeed(run.config)[0] for run in runs]
        if not runs[0].name:
            return configs[0]
        return configs[0].model_copy(update={"output_dir": configs[0].output_dir.parent})

    @property
    def arguments(self) -> list[str]:
        """The module and its arguments, for ``python -m`` or ``deepspeed --module``."""
        return ["ptd.cli", "train", str(self.run_file), *self.overrides, *self.flags]
