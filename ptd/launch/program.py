"""What every rank runs: ``ptd train`` with a run file that has been checked before anything waits in a queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptd.config import RunConfig, load_config
from ptd.deepspeed_config import apply_deepspeed
from ptd.shipped import find_recipe


@dataclass(frozen=True)
class Program:
    """``ptd train RUN.yaml [key=value …]``, to be started as a Python module."""

    run_file: Path
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """What a person says of this start alone, not of one that Slurm repeats: ``--overwrite``, ``--retry`` …"""

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
        """The run file's path becomes absolute: the ranks may start in another folder."""
        flags = [flag for flag, given in (("--overwrite", overwrite), ("--retry", retry), ("--quiet", quiet)) if given]
        return cls(find_recipe(run_file).absolute(), tuple(overrides or ()), tuple(flags))

    def config(self) -> RunConfig:
        """The run as every rank will read it; raises `UserError` for what can be seen without the backbone."""
        config, _ = apply_deepspeed(load_config(self.run_file, list(self.overrides)))
        return config

    @property
    def arguments(self) -> list[str]:
        """The module and its arguments, for ``python -m`` or ``deepspeed --module``."""
        return ["ptd.cli", "train", str(self.run_file), *self.overrides, *self.flags]
