"""RUN.yaml and ``key=value`` overrides -> `RunConfig`: typed, validated, nothing unknown.

Every refusal names the key's path, what was given, why it cannot work and the nearest valid key.
Key names are Hugging Face's. Relative paths are relative to the current directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ptd.errors import UserError
from ptd.files import as_path, local, read_text
from ptd.shipped import find_recipe
from ptd.values import name_of

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: the last two for a date like 2026-99-99 and for absurd nesting."""


class Section(BaseModel):
    """A section of RUN.yaml: unknown keys are refused, and so are true and false where a number belongs."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        _refuse_truth(value, str(field.annotation))
        return value


def _home(value: Any) -> Any:
    """``~`` in a setting that is a path, or may be one."""
    try:
        return local(value) if isinstance(value, str) else as_path(value) if isinstance(value, Path) else value
    except UserError as error:
        raise ValueError(str(error)) from error


class BackboneConfig(Section):
    """The frozen language model."""

    path: str = Field(
        description="folder that `save_pretrained` wrote, or a hub id: a decoder, an encoder or an encoder–decoder"
    )
    revision: str | None = Field(None, description="revision on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="`auto` (as stored), `float32`, `bfloat16`, `float16`. float16 trains with a loss scale, which "
        "finds its own size; bfloat16 needs none",
    )
    quantization: Literal["none", "int8", "nf4", "fp8"] = Field(
        "none",
        description="`none`, `int8` (LLM.int8) or `nf4` (4-bit, doubly quantised): frozen weights in few bits, "
        "through bitsandbytes (`pip install 'ptd[quant]'`). A checkpoint that is quantised already loads "
        "as it is. `nf4` can be sharded, `int8` cannot. `fp8`: products in 8-bit floating point, an experiment",
    )
    int8_threshold: float = Field(
        0.0, ge=0, description="LLM.int8's outlier threshold: the paper's is 6; 0 keeps no outliers apart and is faster"
    )
    sharding: Literal["none", "world", "node"] = Field(
        "none",
        description="`none`: all weights on every rank; `world`: one copy over all ranks (ZeRO-3); `node`: one copy "
        "over the ranks of each node, so that no weights travel between nodes",
    )
    sharding_group_size: int | None = Field(
        None, ge=1, description="ranks that share one copy, with `sharding: node`; default: the ranks of a node"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where the shards live while they are not used: `none` (the GPU), `cpu` (host memory) or `nvme` "
        "(`offload_folder`); needs sharding (one GPU will do)",
    )
    offload_folder: str | None = Field(None, description="folder on a local NVMe disk, for `offload: nvme`")
    gradient_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass: less memory, slower"
    )
    compile: bool = Field(
        False,
        description="torch.compile each layer: a first step of a minute, then on a CPU a fifth faster in bf16 and "
        "3 to 7 % in fp32 (not measured on a GPU); needs a C++ compiler and whole weights, not `int8` or `nf4`",
    )
    liger: bool = Field(
        False,
        description="RMSNorm, RoPE and SwiGLU of llama, mistral, qwen2, qwen3, phi3, gemma2 and gemma3_text in Liger's "
        "kernels (`pip install 'ptd[gpu]'`): needs a GPU, where it is not measured yet; not with `compile`, which "
        "fuses the same",
    )
    attention: str = Field(
        "auto",
        description="backend of `ptd_kernels.prefix_attention`: `auto`, `merge`, `joined` (on CPUs), `triton` (not "
        "measured on a GPU yet), `reference`, or `merge` with a library of your choice: `merge-cudnn`, "
        "`merge-flash-attn-2`, `merge-flash-attn-4` (never run yet)",
    )
    allow_pickle: bool = Field(
        False,
        description="also read weights from `.bin` files, which are pickles (unpickled as tensors only); otherwise "
        "safetensors alone",
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")

    _paths = field_validator("path", "offload_folder")(_home)

    @model_validator(mode="after")
    def _consistent(self) -> BackboneConfig:
        if self.int8_threshold and self.quantization != "int8":
            raise ValueError("int8_threshold: has no effect without quantization: int8; remove it")
        if self.sharding_group_size is not None and self.sharding != "node":
            raise ValueError("sharding_group_size: has no effect without sharding: node; remove it")
        if self.offload != "none" and self.sharding == "none":
            raise ValueError(
                f"offload: {self.offload} is for shards of the weights; set sharding: node or world (one GPU will do)"
            )
        if (self.offload_folder is not None) != (self.offload == "nvme"):
            raise ValueError(
                "offload_folder: offload: nvme needs a folder on the NVMe disk, and nothing else takes one"
            )
        if self.quantization == "int8" and self.sharding != "none":
            raise ValueError(
                "quantization: int8 weights are not sharded (bitsandbytes keeps all of them on every rank); use "
                "quantization: nf4, which is, or quantization: none, or sharding: none"
            )
        if self.quantization == "fp8" and self.sharding != "none":
            raise ValueError(
                "quantization: fp8 weights are not sharded (ZeRO-3 would gather them without their scales); use "
                "quantization: nf4, which is, or quantization: none, or sharding: none"
            )
        if self.compile and (self.sharding != "none" or self.quantization in ("int8", "nf4")):
            raise ValueError(
                "compile: only whole weights that bitsandbytes has not quantised are compiled; set compile: false, or "
                "sharding: none and quantization: none or fp8"
            )
        if self.compile and self.liger:
            raise ValueError("liger: torch.compile fuses the same operations; set compile: false or liger: false")
        if self.quantization == "nf4" and self.offload == "nvme":
            raise ValueError("offload: nvme takes weights of one dtype only, which nf4 does not have; use offload: cpu")
        return self


TaskKind = Literal["causal_lm", "seq2seq_lm", "classification", "token_classification", "question_answering"]
WRITING: tuple[TaskKind, ...] = ("causal_lm", "seq2seq_lm")
"""Kinds of tasks whose answer is text."""
LABELLING: tuple[TaskKind, ...] = ("classification", "token_classification")
KEYS_OF_KINDS: dict[str, dict[str, tuple[TaskKind, ...]]] = {
    "task": {
        "labels": LABELLING,
        "patterns": ("classification",),
        "verbalizer": ("classification",),
        "class_weights": LABELLING,
        "system": ("causal_lm",),
        "doc_stride": ("question_answering",),
        "max_answer_length": ("question_answering",),
    },
    "data": {"format": WRITING, "prompt_template": WRITING, "max_target_length": ("seq2seq_lm",)},
}
"""Section -> key -> the kinds of tasks that have a use for it; all other keys are for every kind."""


class TaskConfig(Section):
    """What is learned."""

    kind: TaskKind = Field("causal_lm", description="what the rows hold and what is made of them")
    labels: list[str] | None = Field(
        None,
        description="label names in the order of the scores (`classification`, `token_classification`); default: "
        "those of the verbalizer, or of the training rows, sorted",
    )
    patterns: list[str] | None = Field(
        None,
        description="`classification`: layouts of the sequence: text with `{column}` fields, `{mask}` where a label's"
        " word belongs and `{v:n}` for n virtual tokens; several are an ensemble",
    )
    verbalizer: dict[str, list[str]] | None = Field(
        None,
        description="`classification` with `{mask}`: label → the words that stand for it, e.g. `{positive: [great, "
        "good]}`",
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="weight of each label in the loss: `{label: number}` (others 1), or `balanced`: n / (k · count) "
        "(`classification`, `token_classification`)",
    )
    system: str | None = Field(
        None,
        description="`causal_lm` on `messages`: the system message before what is typed to `ptd generate`; default: "
        "that of the training rows if all have the same; an empty one: none",
    )
    doc_stride: int = Field(64, ge=1, description="`question_answering`: tokens that windows of a long context share")
    max_answer_length: int = Field(30, ge=1, description="`question_answering`: tokens of the longest answer")

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Labels are often numbers in the data."""
        return [_label(item) for item in value] if isinstance(value, list) else value

    @field_validator("verbalizer", "class_weights", mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        named = {_label(label): item for label, item in value.items()}
        if len(named) < len(value):
            raise ValueError(f"{list(value)} names a label twice")
        if info.field_name == "class_weights":
            return named
        return {label: [words] if isinstance(words, str) else words for label, words in named.items()}

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        for name, kinds in KEYS_OF_KINDS["task"].items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(
                    f"{name}: has no effect with kind {self.kind}, only with {' or '.join(kinds)}; remove it"
                )
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: {self.labels} names a label twice")
        return self


def _label(value: Any) -> str:
    """What a label of the run file is called, as those of the rows are."""
    name = name_of(value)
    if name is None:
        raise ValueError(f"{value!r} is no name of a label; give text or a number")
    return name


def fields_of(kind: str, format: str) -> list[str]:
    """The fields that rows of a task have, to which ``data.columns`` may assign other column names."""
    if kind in ("causal_lm", "seq2seq_lm"):
        return {"prompt_completion": ["prompt", "completion"], "messages": ["messages"], "text": ["text"]}[format]
    return {
        "classification": ["text", "pair", "label"],
        "token_classification": ["tokens", "tags"],
        "question_answering": ["question", "context", "answers"],
    }[kind]


class DataConfig(Section):
    """Where the rows come from and how they become tokens."""

    train: str | None = Field(
        None,
        description="`.jsonl`, `.json`, `.csv`, `.parquet`, a folder that `save_to_disk` wrote, or a hub name (`NAME`"
        " or `NAME:CONFIG`); default: none (only `hard_prompt` does without)",
    )
    eval: str | None = Field(None, description="rows for evaluation while training, from the same kinds of sources")
    train_split: str = Field("train", description="split of a folder or hub name")
    eval_split: str = Field("validation", description="split of a folder or hub name")
    format: Literal["prompt_completion", "messages", "text"] = Field(
        "prompt_completion",
        description="`prompt_completion`, `messages` (chat, the tokenizer's template, loss on the assistant's turns) "
        "or `text` (loss on all but the first token). The last two: `causal_lm` only",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="field of the format or task → column of the data, e.g. `{prompt: question, completion: answer}` "
        "or `{text: sentence, label: topic}`",
    )
    prompt_template: str | None = Field(
        None,
        description='makes the prompt from columns: `"Question: {question}\\nAnswer: "`; `{v:n}` places virtual tokens'
        " of `p_tuning`. `ptd generate` fills one with a single field",
    )
    max_length: int = Field(
        512,
        ge=2,
        description="tokens of a sequence; of the encoder's in an encoder–decoder; of a window in "
        "`question_answering`. Longer prompts are cut on the left ([what is cut where](tasks.md))",
    )
    max_target_length: int | None = Field(
        None, ge=2, description="`seq2seq_lm`: tokens of a completion; default: `max_length`"
    )
    packing: bool = Field(
        True,
        description="sequences one behind the other without padding; they do not see each other. The rows of a step "
        "are the same either way. Encoder–decoders and modernbert run padded batches all the same",
    )
    max_tokens: int | None = Field(
        None, ge=2, description="with packing: rows of a step by token budget of a micro-batch instead of by number"
    )

    _paths = field_validator("train", "eval")(_home)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.max_tokens is not None and not self.packing:
            raise ValueError("max_tokens is the budget of a packed micro-batch; set packing: true or remove it")
        if self.max_tokens is not None and self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) has to hold one sequence of max_length ({self.max_length}) tokens"
            )
        if self.prompt_template is not None and self.format != "prompt_completion":
            raise ValueError(f"prompt_template works with format prompt_completion, not {self.format!r}")
        return self

    def check_task(self, kind: TaskKind) -> None:
        """Refuse settings (`ValueError`) that a task of this kind has no use for."""
        for name, kinds in KEYS_OF_KINDS["data"].items():
            if getattr(self, name) != type(self).model_fields[name].default and kind not in kinds:
                raise ValueError(f"data.{name}: has no effect with task.kind {kind}; remove it")
        if kind == "seq2seq_lm" and self.format != "prompt_completion":
            raise ValueError(f"data.format: task.kind seq2seq_lm needs prompt_completion, not {self.format}")
        fields = fields_of(kind, self.format)
        for name in self.columns:
            if name not in fields:
                rows = f"format {self.format}" if kind in WRITING else f"task.kind {kind}"
                raise ValueError(f"data.columns: {rows} has no field {name!r}; it has {', '.join(fields)}")
        named = list(self.columns.values())
        twice = next((column for column in named if named.count(column) > 1), None)
        if twice is not None:
            raise ValueError(f"data.columns: {twice!r} is given for two fields; each has a column of its own")


class TrainConfig(Section):
    """The optimisation."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; takes precedence over `num_train_epochs`")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    per_device_train_batch_size: int = Field(8, ge=1, description="rows of one micro-batch of one rank")
    per_device_eval_batch_size: int | None = Field(
        None, ge=1, description="the same for evaluation; default: the training value"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of one rank in a step")
    learning_rate: float = Field(
        5e-2,
        gt=0,
        description="peak, in units of the backbone's own keys, values or embeddings: the default is meant for every "
        "backbone, method, length and width ([the learning rate](methods.md#the-learning-rate))",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak for a trained head, in units of the hidden states, under the same schedule; default: "
        "`learning_rate`",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field("linear", description="how the learning rate falls after the warm-up")
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all steps")
    warmup_steps: int | None = Field(None, ge=0, description="takes precedence over `warmup_ratio`")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    initial_scale_power: int = Field(
        16,
        ge=0,
        le=64,
        description="float16: the loss scale starts at 2 to this power; it is halved, and the step skipped, when a "
        "gradient overflows",
    )
    loss_scale_window: int = Field(
        2000, ge=1, description="float16: steps without an overflow after which the loss scale is doubled"
    )
    seed: int = Field(0, ge=0, description="of what is trained at its start and of the order of rows")
    logging_steps: int = Field(10, ge=1, description="steps between two records")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two evaluations; the best adapter is kept in `best/`; default: only at the end",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two resumable checkpoints; written beside the training, from a copy in memory, "
        "whole or not at all; default: only at the end",
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints to keep")
    max_restarts: int = Field(
        3,
        ge=0,
        description="starts of a run after failures; stops that were asked for do not count "
        "([interruptions](interruptions.md))",
    )
    hang_timeout_minutes: float = Field(
        20.0,
        ge=0,
        description="a rank that makes no progress for so long ends itself, its stacks in `output_dir/logs/`; 0: never",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="trackers that get the records too: `tensorboard`, `wandb`, `mlflow`, or `[]`; one that fails "
        "never stops the run ([reports](reports.md#trackers))",
    )
    run_name: str | None = Field(
        None, min_length=1, description="what the trackers call the run; default: the name of `output_dir`"
    )
    samples: int = Field(
        0,
        ge=0,
        description="held-out rows whose greedy continuation, or label or answer, is kept, from before and after the "
        "training ([reports](reports.md#samples))",
    )
    metric_for_best_model: str = Field(
        "loss",
        description="what `best/` is kept by: `loss`, `perplexity` (the lower the better), or a metric of the task "
        "(the higher the better); `eval_` in front of it means nothing",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a better `metric_for_best_model` after which the run ends; needs "
        "`eval_steps`; default: none, all steps are taken",
    )
    on_divergence: Literal["warn", "stop", "retry"] = Field(
        "warn",
        description="when the training loss rises and stays above that of the backbone alone: `warn` says so and goes "
        "on, `stop` ends the run, `retry` goes back to the last good checkpoint, or to the start, with a third of the "
        "learning rate, three times at most ([divergence](interruptions.md#divergence))",
    )

    @property
    def best_metric(self) -> str:
        """``metric_for_best_model`` as a task calls it; Hugging Face's Trainer, too, takes it with ``eval_`` or not."""
        return self.metric_for_best_model.removeprefix("eval_")

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size or self.per_device_train_batch_size


NEEDS_EVAL = (
    ("train", "eval_steps"),
    ("train", "metric_for_best_model"),
    ("train", "early_stopping_patience"),
    ("train", "per_device_eval_batch_size"),
    ("data", "eval_split"),
)
"""Keys that are about ``data.eval``."""


def without_evaluation(config: RunConfig) -> RunConfig:
    """The run without rows to evaluate on, and without what is said of them."""
    changes: dict[str, dict[str, Any]] = {"data": {"eval": None}, "train": {"samples": 0}}
    for section, key in NEEDS_EVAL:
        changes[section][key] = type(getattr(config, section)).model_fields[key].default
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


class RunConfig(Section):
    """A whole run. ``method`` holds the method's name and ``method_config`` its validated dataclass."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    backbone: BackboneConfig
    method: dict[str, Any]
    task: TaskConfig = Field(default_factory=lambda: TaskConfig())
    data: DataConfig
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="DeepSpeed JSON: path, or the mapping itself ([what is honoured](../ds_configs/README.md))"
    )
    output_dir: Path = Field(Path("out"), description="where everything goes")

    _paths = field_validator("deepspeed", "output_dir")(_home)

    @field_validator("task", "train", mode="before")
    @classmethod
    def _all_defaults(cls, value: Any) -> Any:
        """YAML reads a section whose keys are all commented out as nothing."""
        return {} if value is None else value

    @property
    def method_name(self) -> str:
        return cast(str, self.method["name"])

    @model_validator(mode="after")
    def _data_fits_task(self) -> RunConfig:
        self.data.check_task(self.task.kind)
        if self.task.system is not None and self.data.format != "messages":
            raise ValueError(f"task.system: has no effect with data.format {self.data.format}; remove it")
        return self

    @model_validator(mode="after")
    def _scaled_in_float16(self) -> RunConfig:
        for name in ("initial_scale_power", "loss_scale_window"):
            given = getattr(self.train, name) != TrainConfig.model_fields[name].default
            if given and self.backbone.dtype not in ("auto", "float16"):
                raise ValueError(f"train.{name}: has no effect with backbone.dtype {self.backbone.dtype}; remove it")
        return self

    @model_validator(mode="after")
    def _samples_of_rows(self) -> RunConfig:
        if self.train.samples and (self.data.eval is None or self.data.format == "text"):
            raise ValueError(
                "train.samples: shows what becomes of rows of data.eval, so it needs that, and where text is written a "
                "data.format with prompts to continue; remove it"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_rows(self) -> RunConfig:
        if self.data.eval is None:
            for section, key in NEEDS_EVAL:
                values = getattr(self, section)
                if getattr(values, key) != type(values).model_fields[key].default:
                    raise ValueError(
                        f"{section}.{key}: has no effect without rows to evaluate on; set data.eval, or remove it"
                    )
        if self.train.early_stopping_patience is not None and self.train.eval_steps is None:
            raise ValueError(
                "train.early_stopping_patience: counts evaluations, and without train.eval_steps there is only one, at "
                "the end; set train.eval_steps, or remove it"
            )
        return self

    def method_config(self) -> Any:
        """The method's own dataclass, built from the ``method`` section."""
        return parse_method(self.method)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (for run.json): the method section with its defaults filled in."""
        plain = self.model_dump(mode="json")
        settings = dataclasses.asdict(self.method_config())
        plain["method"] = {
            "name": self.method_name,
            **{key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        }
        return plain


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read RUN.yaml (or the shipped recipe of that name), apply ``a.b=value`` overrides (values are YAML) and validate.

    Raises `UserError` with one line for each thing that is wrong.
    """
    text = read_text(find_recipe(path), "cannot read the run file")
    try:
        raw = yaml.safe_load(text)
    except NOT_YAML as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} has to be a mapping with the sections backbone, method, data …; got {type(raw).__name__}"
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw, source=str(path))


LARGEST, DEEPEST = 100_000, 50
"""Values of a run file, and how deep they may lie in each other: far more than any run has."""


def _check_size(raw: Any, source: str) -> None:
    """Refuse (`UserError`) what would take for ever to read: YAML's aliases can say a lot in a line, and themselves."""
    rest, seen = [(raw, 0)], 0
    while rest:
        value, depth = rest.pop()
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(each, depth + 1) for each in inner]
        seen += 1
        if seen + len(rest) > LARGEST or depth > DEEPEST:
            raise UserError(
                f"{source}: has more than {LARGEST:,} values, or values more than {DEEPEST} levels deep, counting what "
                "aliases repeat; no run needs that: write it plainly"
            )


def parse_config(raw: dict[str, Any], *, source: str = "the configuration") -> RunConfig:
    """Validate a plain mapping into a `RunConfig`; raises `UserError`."""
    _check_size(raw, source)
    try:
        config = RunConfig.model_validate(_repair_scientific(raw))
    except ValidationError as error:
        raise UserError(f"{source}: " + "\n".join(_explain(error, RunConfig))) from error
    config.method_config()
    return config


def parse_method(section: dict[str, Any]) -> Any:
    """``{name: …, **settings}`` -> the method's config dataclass; raises `UserError`."""
    from ptd.methods import method  # brings torch, which the names of the keys do without

    if not isinstance(section.get("name"), str):
        raise UserError("method.name: is missing; give the tuning method's name, e.g. method: {name: prefix}")
    cls = method(section["name"]).config
    settings = {key: value for key, value in section.items() if key != "name"}
    known = [field.name for field in dataclasses.fields(cls)]
    for key in settings:
        if key not in known:
            raise UserError(_unknown_key(f"method.{key}", str(key), ["name", *known]))
    for field in dataclasses.fields(cls):
        try:
            _refuse_truth(settings.get(field.name), str(field.type))
        except ValueError as error:
            raise UserError(f"method.{field.name}: {error}") from error
    try:
        # Validates each field's type; the dataclass itself stays free of pydantic.
        return TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, None, prefix="method"))) from error


NOT_SETTABLE = {
    "backbone.path": "the backbone is given as --backbone",
    "backbone.revision": "the revision is the one the adapter was trained on; for another give a folder as --backbone",
    "backbone.gradient_checkpointing": "nothing is trained here; remove it",
    "backbone.compile": "nothing is trained here; remove it",
    "data.train": "nothing is trained here; remove it",
    "data.train_split": "nothing is trained here; remove it",
    "data.max_tokens": "batches are of --batch-size rows here; remove it",
    "data.eval": "the rows are given as --data",
}
"""Keys of the sections of `parse_settings` that it refuses, and why."""


def parse_settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """``SECTION.KEY=VALUE`` pairs (values are YAML) of the sections backbone and data, for verbs that do not train.

    Raises `UserError` for other keys, naming the nearest; the values are checked by `backbone_config` and
    `data_config`.
    """
    sections: dict[str, type[Section]] = {"backbone": BackboneConfig, "data": DataConfig}
    names = {key: section for section, model in sections.items() for key in model.model_fields}
    known = [key for name, section in names.items() if (key := f"{section}.{name}") not in NOT_SETTABLE]
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        given, sign, _ = pair.partition("=")
        key = ".".join(given.split(".")[:2])  # what follows is inside of the value, as in data.columns.text
        if not sign or not given:
            raise UserError(f"--set {pair}: write it as SECTION.KEY=VALUE, e.g. backbone.dtype=bfloat16")
        if key in NOT_SETTABLE:
            raise UserError(f"--set {key}: {NOT_SETTABLE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.6)
            meant = f"did you mean {names[near[0]]}.{near[0]}?" if near else f"valid keys: {', '.join(sorted(known))}"
            raise UserError(f"--set {key}: unknown key; {meant}")
        _apply_override(settings, pair)
    return settings


def backbone_config(settings: dict[str, Any]) -> BackboneConfig:
    """Validate a ``backbone`` section on its own; raises `UserError`."""
    try:
        return BackboneConfig.model_validate(_repair_scientific(settings))
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, BackboneConfig, prefix="backbone"))) from error


def data_config(settings: dict[str, Any]) -> DataConfig:
    """Validate a ``data`` section on its own; raises `UserError`."""
    try:
        return DataConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, DataConfig, prefix="data"))) from error


def task_config(settings: dict[str, Any]) -> TaskConfig:
    """Validate a ``task`` section on its own; raises `UserError`."""
    try:
        return TaskConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, TaskConfig))) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r}: write it as key=value, e.g. train.learning_rate=3e-3")
    node = raw
    *parents, last = key.split(".")
    for index, name in enumerate(parents):
        if node.get(name) is None:  # also a section whose keys are all commented out
            node[name] = {}
        child = node[name]
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: index + 1])} is not a section")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except NOT_YAML as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _refuse_truth(value: Any, annotation: str) -> None:
    """Python counts True as 1, and so would a field that takes numbers."""
    if isinstance(value, bool) and "bool" not in annotation and ("int" in annotation or "float" in annotation):
        raise ValueError(f"got {value}; a number is needed")


def _repair_scientific(value: Any) -> Any:
    """YAML 1.1 reads ``1e-2`` (no dot) as a string; people mean the number."""
    if isinstance(value, dict):
        return {key: _repair_scientific(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


_SCIENTIFIC = re.compile(r"[+-]?[0-9]+e[+-]?[0-9]+", re.IGNORECASE)


def _shown(value: Any) -> str:
    """A value in a message: the beginning of it, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4300 digits
        text = f"{type(value).__name__} with a very long number"
    return text if len(text) <= 200 else f"{text[:199]}…"


def _explain(error: ValidationError, model: type[BaseModel] | None, prefix: str = "") -> list[str]:
    lines = []
    for item in error.errors():
        # What follows deepspeed are pydantic's labels of the types it may have, not keys.
        path = list(item["loc"][:1] if item["loc"][:1] == ("deepspeed",) else item["loc"])
        dotted = ".".join([prefix, *map(str, path)] if prefix else map(str, path))
        if item["type"] == "extra_forbidden":
            lines.append(_unknown_key(dotted, str(path[-1]), _keys_of(model, path[:-1])))
        elif item["type"] == "missing":
            lines.append(f"{dotted}: is missing")
        elif item["type"] == "value_error":
            lines.append(f"{dotted}: {item['ctx']['error']}" if dotted else str(item["ctx"]["error"]))
        else:
            lines.append(f"{dotted}: got {_shown(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def _keys_of(model: type[BaseModel] | None, path: list[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part)) if model is not None else None
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return list(model.model_fields) if model is not None else []


def _unknown_key(dotted: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"{dotted}: unknown key; did you mean {'.'.join([*dotted.split('.')[:-1], near[0]])}?"
    return f"{dotted}: unknown key; valid keys: {', '.join(sorted(known))}"
