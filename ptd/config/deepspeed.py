"""Translate a DeepSpeed JSON into values of `RunConfig` and the ZeRO-3 configuration of the backbone.

In ptd, DeepSpeed shards the frozen backbone and owns no optimizer, so ptd cannot honour every key of a JSON for full
fine-tuning. It drops no key silently: it honours the key, ignores it with a warning, or refuses it.
``"auto"`` stands for the value in RUN.yaml. Keys named ``comment`` or starting with ``_`` are comments.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from ptd.config.deepspeed_keys import (
    ADAM_KEYS,
    BF16_KEYS,
    FP16_IGNORED,
    FP16_KEYS,
    HONOURED,
    IGNORED,
    NEUTRAL,
    OFFLOAD_PARAM_KEYS,
    OPTIMIZERS,
    REFUSED,
    SCHEDULERS,
    ZERO_FLAGS,
    ZERO_IGNORED,
    ZERO_KEYS,
    ZERO_REFUSED,
    ZERO_SECTIONS,
    ZERO_SIZES,
)
from ptd.config.load import parse_config
from ptd.config.schema import BackboneConfig, RunConfig
from ptd.files import as_path, read_text
from ptd.shipped import DS_CONFIGS
from ptd.types import UserError

AUTO = "auto"
NVME_BUFFER = 300_000_000  # numbers; a shard has to fit, and DeepSpeed's default, 100 million, is below an embedding
NEVER = 2**31 - 1  # steps between two progress lines of DeepSpeed; ptd writes its own


def apply_deepspeed(
    config: RunConfig, *, source: str | dict[str, Any] | None = None
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Apply ``config.deepspeed`` (or ``source``) to the run.

    Returns the `RunConfig` with the JSON's values, and the ZeRO-3 configuration of the backbone, which is None if the
    backbone is not sharded (``backbone.sharding: none``).

    Raises:
        UserError: the JSON cannot be read, contradicts RUN.yaml, or requires what ptd cannot do.
    """
    source = config.deepspeed if source is None else source
    document = _Document.read({} if source is None else source)
    document.check_keys()
    run = _Merge(config, document)
    _take_batch(run)
    _take_dtype(run)
    _take_optimizer(run)
    _take_scheduler(run)
    zero = _take_zero(run)
    document.warn_ignored()
    config, aio = run.config, document.section("aio")
    return config, zero3_config(config.backbone, config.train.per_device_train_batch_size, zero=zero, aio=aio)


def zero3_config(
    backbone: BackboneConfig,
    micro_batch: int = 1,
    *,
    zero: dict[str, Any] | None = None,
    aio: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration of a sharded backbone: placement only, no optimizer, schedule, logging or casts.

    None with ``backbone.sharding: none``. ``micro_batch``: rows per micro-batch, which DeepSpeed requires. ``zero`` and
    ``aio``: the checked sections of a JSON, on how ZeRO-3 gathers and how NVMe offload reads.
    """
    if backbone.sharding == "none":
        return None
    section = {**(zero or {}), "stage": 3}
    offload = section.pop("offload_param", {})
    if backbone.offload == "cpu":
        section["offload_param"] = {"pin_memory": True, **offload, "device": "cpu"}
    elif backbone.offload == "nvme":
        place = {"device": "nvme", "nvme_path": backbone.offload_folder}
        section["offload_param"] = {"pin_memory": True, "buffer_size": NVME_BUFFER, **offload, **place}
    zero3 = {
        "zero_optimization": section,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # ptd accumulates the prompt's gradient itself
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    return {**zero3, "aio": aio} if aio else zero3


def check_batch_size(config: RunConfig, world_size: int, *, source: str | dict[str, Any] | None = None) -> None:
    """Raise `UserError` if a JSON's ``train_batch_size`` is not micro-batch x accumulation x ``world_size``."""
    source = config.deepspeed if source is None else source
    document = _Document.read(source) if source is not None else None
    wanted = document.values.get("train_batch_size", AUTO) if document is not None else AUTO
    if document is None or wanted == AUTO or wanted is None:
        return
    rows, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    if wanted != rows * steps * world_size:
        advice = "set train_batch_size to 'auto'"
        if isinstance(wanted, int) and wanted > 0 and wanted % (rows * world_size) == 0:
            advice += f" or train.gradient_accumulation_steps to {wanted // (rows * world_size)}"
        document.refuse(
            "train_batch_size",
            f"is {wanted!r}, but train.per_device_train_batch_size ({rows}) x train.gradient_accumulation_steps "
            f"({steps}) x processes ({world_size}) is {rows * steps * world_size}; {advice}",
        )


class _Document:
    """The values of the JSON, its name for messages, and the keys that are ignored."""

    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        self.ignored: list[str] = []
        if not isinstance(values, dict):
            raise UserError(f"{name}: has to be a JSON object, got {type(values).__name__}")
        self.values: dict[str, Any] = _without_comments(values)

    @classmethod
    def read(cls, source: str | dict[str, Any]) -> _Document:
        if isinstance(source, dict):
            return cls("deepspeed", source)
        path = _find(source)
        text = read_text(path, "deepspeed: cannot read")
        try:
            return cls(str(path), json.loads(text, object_pairs_hook=_no_duplicates))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
                'Write comments as keys, e.g. "_comment": "…"'
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error

    def refuse(self, path: str, reason: str) -> NoReturn:
        raise UserError(f"{self.name}: {path}: {reason}")

    def section(self, key: str, known: Iterable[str] | None = None) -> dict[str, Any]:
        """Return the mapping at the dotted ``key`` without its "auto" values; an empty mapping if there is none."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or value == AUTO:
            return {}
        if not isinstance(value, dict):
            self.refuse(key, f"has to be an object, got {value!r}")
        if known is not None:
            self.known(value, known, prefix=f"{key}.")
        return {name: item for name, item in value.items() if item != AUTO}

    def known(self, section: dict[str, Any], known: Iterable[str], prefix: str = "") -> None:
        """Refuse keys of ``section`` that are not among ``known``, and name the nearest known key."""
        known = sorted(known)
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
                self.refuse(f"{prefix}{key}", f"unknown key; {hint}")

    def check_keys(self) -> None:
        self.known(self.values, HONOURED | IGNORED | REFUSED.keys())
        self.refuse_active(self.values, REFUSED)
        self.ignored += [key for key in self.values if key in IGNORED and not _is_off(key, self.values[key])]

    def refuse_active(self, section: dict[str, Any], refused: dict[str, str], prefix: str = "") -> None:
        for key, reason in refused.items():
            if key in section and not _is_off(key, section[key]):
                self.refuse(f"{prefix}{key}", f"is not supported: {reason}")

    def warn_ignored(self) -> None:
        if "activation_checkpointing" in self.ignored:
            index = self.ignored.index("activation_checkpointing")
            self.ignored[index] += " (set backbone.gradient_checkpointing instead)"
        if self.ignored:
            warnings.warn(f"{self.name}: ignored: {', '.join(self.ignored)}", stacklevel=3)


class _Merge:
    """RUN.yaml's values, to which the JSON's values are added one by one."""

    def __init__(self, config: RunConfig, document: _Document) -> None:
        self.config, self.document = config, document
        self.original = config
        self.origin: dict[str, str] = {}  # RUN.yaml's key -> the JSON key that has set it

    def set(
        self, json_key: str, value: Any, key: str, *, written: Any = None, beside: dict[str, Any] | None = None
    ) -> None:
        """Set the RUN.yaml key ``key`` (``section.name``) to the JSON's ``value``; "auto" and null change nothing.

        ``written``: the value as the JSON writes it, if it differs from ``value``. ``beside``: further keys that are
        valid only together with ``key``, and their values. Refuses a value that contradicts RUN.yaml or another key.
        """
        if value is None or value == AUTO:
            return
        shown = json.dumps(value if written is None else written, default=repr)
        if isinstance(value, bool):  # Python and pydantic accept it as a number
            self.document.refuse(json_key, f"has to be a valid value of {key}, got {shown}")
        values = {key: value, **(beside or {})}
        raw = self.config.model_dump(exclude_unset=True)
        for path, item in values.items():
            section, name = path.split(".")
            raw.setdefault(section, {})[name] = item
        merged = parse_config(raw, source=f"{self.document.name}: {json_key}: {shown} sets {key}")
        for path in values:
            new, old = value_at(merged, path), value_at(self.config, path)
            fixed = path in self.origin or self.in_run_file(path)
            if fixed and new != old:
                where = f"{self.origin[path]} is" if path in self.origin else f"RUN.yaml sets {path} to"
                self.document.refuse(
                    json_key, f"is {shown}, but {where} {old!r}; give both the same value, or set {json_key} to 'auto'"
                )
            self.origin.setdefault(path, json_key)
        self.config = merged

    def in_run_file(self, key: str) -> bool:
        """Return whether RUN.yaml itself gives ``key`` a value other than "auto" and null."""
        section, name = key.split(".")
        values = getattr(self.original, section)
        return name in values.model_fields_set and getattr(values, name) not in (None, AUTO)


def value_at(config: RunConfig, path: str) -> Any:
    """Return the value of the key ``section.name``."""
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def _take_batch(run: _Merge) -> None:
    values = run.document.values
    for json_key, key in (
        ("train_micro_batch_size_per_gpu", "train.per_device_train_batch_size"),
        ("gradient_accumulation_steps", "train.gradient_accumulation_steps"),
        ("gradient_clipping", "train.max_grad_norm"),
    ):
        run.set(json_key, values.get(json_key), key)
    total = values.get("train_batch_size")
    if total not in (None, AUTO) and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        run.document.refuse("train_batch_size", f"has to be a whole number of rows or 'auto', got {total!r}")


def _take_dtype(run: _Merge) -> None:
    half = _flag(run.document, "fp16", FP16_KEYS)
    if half:
        run.set("fp16.enabled", "float16", "backbone.dtype", written=True)
    elif half is False and run.config.backbone.dtype == "float16":
        run.document.refuse(
            "fp16.enabled",
            "is false, but RUN.yaml sets backbone.dtype to 'float16'; set it to true or 'auto'",
        )
    for name in ("bf16", "bfloat16"):  # the second is DeepSpeed's older spelling
        enabled = _flag(run.document, name, BF16_KEYS)
        if half and enabled:
            run.document.refuse(f"{name}.enabled", "is true, as is fp16.enabled; the backbone has one dtype; set one")
        if enabled is None or (not enabled and run.config.backbone.dtype == "float16"):
            continue
        run.set(f"{name}.enabled", "bfloat16" if enabled else "float32", "backbone.dtype", written=enabled)
    if half is not False and run.config.backbone.dtype in (AUTO, "float16"):
        _take_loss_scale(run)


def _take_loss_scale(run: _Merge) -> None:
    document, section = run.document, run.document.section("fp16")
    if not _is_off("loss_scale", section.get("loss_scale")):
        document.refuse(
            "fp16.loss_scale",
            f"{section['loss_scale']!r} is not supported: ptd's loss scale is dynamic; give 0, and set its initial "
            "value with fp16.initial_scale_power",
        )
    for key in ("initial_scale_power", "loss_scale_window"):
        run.set(f"fp16.{key}", section.get(key), f"train.{key}")
    for key, reason in FP16_IGNORED.items():
        if not _is_off(key, section.get(key)):
            document.ignored.append(f"fp16.{key} ({reason})")


def _flag(document: _Document, name: str, known: Iterable[str]) -> bool | None:
    enabled = document.section(name, known).get("enabled")
    if enabled is not None and not isinstance(enabled, bool):
        document.refuse(f"{name}.enabled", f"has to be true, false or 'auto', got {enabled!r}")
    return enabled


def _take_optimizer(run: _Merge) -> None:
    document = run.document
    section = document.section("optimizer", ("type", "params", "legacy_fusion"))
    name = section.get("type")
    if name is not None and (not isinstance(name, str) or name.lower() not in OPTIMIZERS):
        document.refuse(
            "optimizer.type",
            f"{name!r} is not supported: AdamW or Lion trains the prompt encoder; use AdamW or Lion, or 'auto' for "
            "train.optimizer",
        )
    if name is not None:
        run.set("optimizer.type", OPTIMIZERS[name.lower()], "train.optimizer", written=name)
    params = document.section("optimizer.params", ADAM_KEYS)
    wanted = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
    for key, value in wanted.items():
        if params.get(key, value) is not value:
            document.refuse(
                f"optimizer.params.{key}",
                f"{params[key]!r} is not supported: ptd's AdamW uses {json.dumps(value)}; remove it",
            )
    if not _is_off("max_grad_norm", params.get("max_grad_norm")):
        document.refuse("optimizer.params.max_grad_norm", "DeepSpeed does not clip by it either; use gradient_clipping")
    betas = params.get("betas", [None, None])
    if not isinstance(betas, list) or len(betas) != 2:
        document.refuse("optimizer.params.betas", f"has to be a list of two numbers, got {betas!r}")
    run.set("optimizer.params.lr", params.get("lr"), "train.learning_rate")
    run.set("optimizer.params.betas[0]", betas[0], "train.adam_beta1")
    run.set("optimizer.params.betas[1]", betas[1], "train.adam_beta2")
    run.set("optimizer.params.eps", params.get("eps"), "train.adam_epsilon")
    run.set("optimizer.params.weight_decay", params.get("weight_decay"), "train.weight_decay")


def _take_scheduler(run: _Merge) -> None:
    document = run.document
    section = document.section("scheduler", ("type", "params"))
    if not section:
        return
    name = section.get("type")
    if not isinstance(name, str) or name not in SCHEDULERS:
        document.refuse(
            "scheduler.type",
            f"{name!r} is not supported; use one of {', '.join(SCHEDULERS)} or set train.lr_scheduler_type in RUN.yaml",
        )
    run.set("scheduler.type", SCHEDULERS[name], "train.lr_scheduler_type", written=name)
    params = _scheduler_params(document, name)
    _forbid_shadowed(run, "warmup_num_steps", params, "train.warmup_ratio", "train.warmup_steps")
    run.set("scheduler.params.warmup_num_steps", params.get("warmup_num_steps"), "train.warmup_steps")
    run.set("scheduler.params.warmup_max_lr", params.get("warmup_max_lr"), "train.learning_rate")
    _forbid_shadowed(run, "total_num_steps", params, "train.num_train_epochs", "train.max_steps")
    run.set("scheduler.params.total_num_steps", params.get("total_num_steps"), "train.max_steps")


def _scheduler_params(document: _Document, name: str) -> dict[str, Any]:
    """Return the parameters of the scheduler; refuse those that ptd's schedule of that name cannot follow."""
    cosine = name == "WarmupCosineLR"
    known = {"warmup_num_steps", "warmup_type", "last_batch_iteration"}
    known |= {"warmup_min_ratio", "cos_min_ratio"} if cosine else {"warmup_min_lr", "warmup_max_lr"}
    known |= set() if name == "WarmupLR" else {"total_num_steps"}
    params = document.section("scheduler.params", known)
    # DeepSpeed's default of cos_min_ratio, 1e-4 of the learning rate, is practically the 0 at which ptd's cosine ends.
    highest = {"warmup_min_lr": 0, "warmup_min_ratio": 0, "cos_min_ratio": 1e-4, "last_batch_iteration": -1}
    for key, limit in highest.items():
        value = params.get(key, limit)
        if not isinstance(value, int | float) or not value <= limit:
            document.refuse(
                f"scheduler.params.{key}", f"{value!r} is not supported: ptd's schedule uses {limit}; remove it"
            )
    kind = params.get("warmup_type")
    if kind not in (None, "linear"):
        document.refuse(
            "scheduler.params.warmup_type", f"{kind!r} is not supported: ptd's warm-up is linear; set it to 'linear'"
        )
    if kind is None and params.get("warmup_num_steps"):
        warnings.warn(
            f"{document.name}: scheduler.params.warmup_type is not given: ptd's warm-up is linear, but "
            "DeepSpeed's default is logarithmic; set it to 'linear'",
            stacklevel=4,
        )
    return params


def _forbid_shadowed(run: _Merge, json_name: str, params: dict[str, Any], shadowed: str, key: str) -> None:
    """Refuse a JSON value for ``key`` if RUN.yaml sets ``shadowed``, over which ``key`` would take precedence."""
    if params.get(json_name) is None or not run.in_run_file(shadowed) or run.in_run_file(key):
        return
    section, name = shadowed.split(".")
    run.document.refuse(
        f"scheduler.params.{json_name}",
        f"is {params[json_name]!r}, but RUN.yaml sets {shadowed} to {getattr(getattr(run.config, section), name)!r}, "
        f"which {key} would override; set scheduler.params.{json_name} to 'auto' or remove {shadowed}",
    )


def _take_zero(run: _Merge) -> dict[str, Any]:
    """Return the checked ``zero_optimization`` section for DeepSpeed, without the values moved to RUN.yaml's keys."""
    document = run.document
    if document.values.get("zero_optimization") is False:  # DeepSpeed's old spelling of stage 0
        document.values["zero_optimization"] = {"stage": 0}
    document.refuse_active(document.section("zero_optimization"), ZERO_REFUSED, prefix="zero_optimization.")
    section = document.section("zero_optimization", ZERO_KEYS | ZERO_REFUSED.keys())
    if not section:
        return {}
    stage = _check_stage(document, section.get("stage"))
    for key, value in section.items():
        _check_zero_value(document, f"zero_optimization.{key}", key, value)
    _take_sharding(run, stage, document.values["zero_optimization"].get("zero_hpz_partition_size"))
    if "offload_param" in section:
        section["offload_param"] = _take_offload(run)
    for key, reason in ZERO_IGNORED.items():
        if key in section and not _is_off(key, section[key]):
            document.ignored.append(f"zero_optimization.{key} ({reason})")
    unused = {"stage", "zero_hpz_partition_size", *ZERO_REFUSED, *ZERO_IGNORED}
    # int(): DeepSpeed accepts 5e8 as a size, but json reads it as a float.
    return {
        key: int(value) if key in ZERO_SIZES else value
        for key, value in section.items()
        if key not in unused and value is not None
    }


def _take_sharding(run: _Merge, stage: int, group_size: Any) -> None:
    """Apply stage 3: one copy over all ranks or, with DeepSpeed's hpZ, one whole copy in each group of ranks.

    hpZ keeps a second copy over all ranks for updates, which a frozen backbone never gets.
    """
    sharding, size = run.config.backbone.sharding, group_size if isinstance(group_size, int | float) else None
    if stage == 3 and (group_size == AUTO or (size is not None and size > 1)):
        run.set("zero_optimization.zero_hpz_partition_size", "node", "backbone.sharding", written=group_size)
        run.set("zero_optimization.zero_hpz_partition_size", size, "backbone.sharding_group_size")
    elif not (stage == 3 and sharding == "node"):  # sharding: node in RUN.yaml is stage 3 too
        run.set("zero_optimization.stage", {3: "world", 0: "none"}[stage], "backbone.sharding", written=stage)


def _check_stage(document: _Document, stage: Any) -> int:
    if stage is None:
        document.refuse("zero_optimization.stage", "is missing; give 3 to shard the backbone or 0 to replicate it")
    if stage in (1, 2) and not isinstance(stage, bool):
        document.refuse(
            "zero_optimization.stage",
            f"{stage} shards optimizer state{' and gradients' if stage == 2 else ''} of the backbone, which is frozen "
            "and has none; give 3 to shard its weights or 0 to replicate them",
        )
    if isinstance(stage, bool) or stage not in (0, 3):
        document.refuse("zero_optimization.stage", f"has to be 3 or 0, got {stage!r}")
    return int(stage)


def _check_zero_value(document: _Document, path: str, key: str, value: Any) -> None:
    if value is None:
        return
    checks: list[tuple[frozenset[str], Callable[[Any], bool], str]] = [
        (ZERO_FLAGS, lambda item: isinstance(item, bool), "true or false"),
        (ZERO_SIZES, _is_size, "a whole number of at least 0"),
        (ZERO_SECTIONS, lambda item: isinstance(item, dict), "an object"),
    ]
    for keys, fits, wanted in checks:
        if key in keys and not fits(value):
            document.refuse(path, f"has to be {wanted}, got {value!r}")


def _take_offload(run: _Merge) -> dict[str, Any]:
    """Return the checked section without the device and the path, which are moved to RUN.yaml's keys."""
    path, document = "zero_optimization.offload_param", run.document
    section = document.section(path, OFFLOAD_PARAM_KEYS)
    device = section.pop("device", None)
    folder = section.pop("nvme_path", None)
    if device not in (None, "none", "cpu", "nvme"):
        document.refuse(f"{path}.device", f"has to be 'cpu', 'nvme' or 'none', got {device!r}")
    if device == "nvme" and not isinstance(folder, str):
        document.refuse(f"{path}.device", "'nvme' needs nvme_path, a folder on the NVMe disk")
    for key in ("buffer_count", "buffer_size", "max_in_cpu"):
        if key in section:
            if not _is_size(section[key]):
                document.refuse(f"{path}.{key}", f"has to be a whole number of at least 0, got {section[key]!r}")
            section[key] = int(section[key])
    if not isinstance(section.get("pin_memory", True), bool):
        document.refuse(f"{path}.pin_memory", f"has to be true or false, got {section['pin_memory']!r}")
    beside = {"backbone.offload_folder": folder} if device == "nvme" else {}
    run.set(f"{path}.device", device, "backbone.offload", beside=beside)
    return section


def _find(source: str) -> Path:
    """Return the file at that path or, if there is none, the shipped file of that name."""
    path = as_path(source)
    try:
        for candidate in (path, DS_CONFIGS / path.name):
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:  # the name is too long or has a null character
        raise UserError(f"deepspeed: {source!r} is not a path: {error}") from error
    shipped = ", ".join(sorted(file.name for file in DS_CONFIGS.glob("*.json"))) or "none"
    raise UserError(f"deepspeed: there is no file {source!r}; give a DeepSpeed JSON, or one that ptd ships: {shipped}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == value // 1


def _is_off(key: str, value: Any) -> bool:
    """Return whether the value leaves the feature off, so that ptd need not support it."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False or value.get("device") == "none"
    return value is None or value is False or value in (0, AUTO) or value == NEUTRAL.get(key, AUTO)


def _without_comments(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_comments(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if not str(key).startswith("_") and key != "comment"
    }


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return seen
