"""Read RUN.yaml and ``key=value`` overrides into a `RunConfig`, with types validated and unknown keys refused.

Every error names the key's path, the value given, why it cannot work and the nearest valid key.
The keys have Hugging Face's names. Relative paths are relative to the current directory.
"""

from __future__ import annotations

from ptd.config.load import (
    NOT_SETTABLE,
    backbone_config,
    data_config,
    load_config,
    parse_config,
    parse_settings,
    read_run_file,
    task_config,
)
from ptd.config.schema import (
    KEYS_OF_KINDS,
    WRITING,
    BackboneConfig,
    DataConfig,
    RunConfig,
    Section,
    TaskConfig,
    TaskKind,
    TrainConfig,
    fields_of,
    without_evaluation,
)
from ptd.config.sweep import SweepCell, member_cells, parse_varied, runs_of_file, sweep_cells
from ptd.config.validation import parse_method

__all__ = [
    "KEYS_OF_KINDS",
    "NOT_SETTABLE",
    "WRITING",
    "BackboneConfig",
    "DataConfig",
    "RunConfig",
    "Section",
    "SweepCell",
    "TaskConfig",
    "TaskKind",
    "TrainConfig",
    "backbone_config",
    "data_config",
    "fields_of",
    "load_config",
    "member_cells",
    "parse_config",
    "parse_method",
    "parse_settings",
    "parse_varied",
    "read_run_file",
    "runs_of_file",
    "sweep_cells",
    "task_config",
    "without_evaluation",
]
