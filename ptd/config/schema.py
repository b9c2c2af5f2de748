"""The sections of a run file, their keys, types and defaults, and the rules between keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ptd.config.validation import parse_method, refuse_truth
from ptd.errors import UserError
from ptd.files import as_path, expand_home
from ptd.values import name_of

Auto = Literal["auto", True, False]


class Section(BaseModel):
    """A section of RUN.yaml. It refuses unknown keys, and true or false in place of a number."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        refuse_truth(value, str(field.annotation))
        return value


def _home(value: Any) -> Any:
    """Resolve ``~`` in a setting that is a path, or may be one."""
    try:
        return expand_home(value) if isinstance(value, str) else as_path(value) if isinstance(value, Path) else value
    except UserError as error:
        raise ValueError(str(error)) from error


class BackboneConfig(Section):
    """The frozen language model."""

    path: str = Field(
        description="folder written by `save_pretrained`, or a hub id: a decoder, an encoder or an encoder–decoder"
    )
    revision: str | None = Field(None, description="revision on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="`auto` (as stored), `float32`, `bfloat16`, `float16`. Training in float16 uses a dynamic loss "
        "scale; bfloat16 needs none",
    )
    quantization: Literal["none", "int8", "nf4", "fp8"] = Field(
        "none",
        description="`none`, `int8` (LLM.int8) or `nf4` (4-bit, doubly quantised): bitsandbytes quantises the frozen "
        "weights (`pip install 'ptd[quant]'`). A checkpoint that is already quantised loads unchanged. `nf4` can be "
        "sharded, `int8` cannot. `fp8` (experimental): matrix products in 8-bit floating point",
    )
    int8_threshold: float = Field(
        0.0,
        ge=0,
        description="LLM.int8's outlier threshold. The paper uses 6; 0 separates no outliers and is faster",
    )
    sharding: Literal["none", "world", "node"] = Field(
        "none",
        description="`none`: every rank holds all weights; `world`: one copy is sharded over all ranks (ZeRO-3); "
        "`node`: one copy is sharded over the ranks of each node, so that no weights are sent between nodes",
    )
    sharding_group_size: int | None = Field(
        None, ge=1, description="ranks that share one copy, with `sharding: node`; default: all ranks of a node"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where the shards are stored while they are not in use: `none` (the GPU), `cpu` (host memory) or "
        "`nvme` (`offload_folder`); requires sharding, which also works with one GPU",
    )
    offload_folder: str | None = Field(None, description="folder on a local NVMe disk, for `offload: nvme`")
    gradient_checkpointing: bool = Field(
        False, description="recompute the layers' activations in the backward pass: uses less memory and is slower"
    )
    liger: Auto = Field(
        "auto",
        description="run RMSNorm, RoPE and SwiGLU of llama, mistral, qwen2, qwen3, phi3, gemma2 and gemma3_text in "
        "Liger's kernels (`pip install 'ptd[gpu]'`), in every placement. `auto`: on a GPU, if Liger is installed and "
        "`compile` is not `true`. Requires a GPU, on which it is not measured yet",
    )
    compile: Auto = Field(
        "auto",
        description="compile each layer with torch.compile, which fuses the same operations as `liger`. The first step "
        "takes a minute; on a CPU the later steps are a fifth faster in bf16 and 3 to 7 % faster in fp32 (not measured "
        "on a GPU). Requires a C++ compiler and weights that are not sharded and not `int8` or `nf4`. `auto` does not "
        "compile",
    )
    attention: str = Field(
        "auto",
        description="backend of `ptd_kernels.prefix_attention`: `auto`, `merge`, `joined` (on CPUs), `triton` (not "
        "measured on a GPU yet), `reference`, or `merge` with a library of your choice: `merge-cudnn`, "
        "`merge-flash-attn-2`, `merge-flash-attn-4` (not run yet), or `merge-plain-torch`, without any library: slow. "
        "On an NVIDIA GPU, `auto` computes generated tokens by a Triton kernel (not measured yet); `merge` uses the "
        "libraries' kernels. `cache` leaves attention to the model and puts a prefix into the model's own cache, which "
        "is slower; `auto` does so for families that take a prefix in no other way",
    )
    allow_pickle: bool = Field(
        False,
        description="also read weights from `.bin` files, which are pickles (only tensors are unpickled); by default, "
        "ptd reads only safetensors",
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")

    _paths = field_validator("path", "offload_folder")(_home)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the weights."""
        return self.sharding != "none"

    def ranks_per_copy(self, ranks: int, ranks_per_node: int) -> int:
        """Return how many ranks share one copy of the weights.

        Raises `UserError` if groups of ``sharding_group_size`` do not divide the ``ranks``.
        """
        node = self.sharding_group_size or ranks_per_node
        size = {"none": 1, "world": ranks, "node": node}[self.sharding]
        if ranks % size:
            raise UserError(
                f"backbone.sharding_group_size: {ranks} ranks do not divide into groups of {size}; give a size that "
                "divides them, or set backbone.sharding: world"
            )
        return size

    @model_validator(mode="after")
    def _consistent(self) -> BackboneConfig:
        if self.int8_threshold and self.quantization != "int8":
            raise ValueError("int8_threshold: has no effect without quantization: int8; remove it")
        if self.sharding_group_size is not None and self.sharding != "node":
            raise ValueError("sharding_group_size: has no effect without sharding: node; remove it")
        if self.offload != "none" and self.sharding == "none":
            raise ValueError(
                f"offload: {self.offload} stores shards of the weights, but sharding: none makes no shards; set "
                "sharding: node or world (one GPU is enough)"
            )
        if (self.offload_folder is not None) != (self.offload == "nvme"):
            raise ValueError(
                "offload_folder: has to name a folder on the NVMe disk with offload: nvme, and has no effect with any "
                "other offload; set both keys, or neither"
            )
        if self.quantization == "int8" and self.sharding != "none":
            raise ValueError(
                "quantization: int8 weights cannot be sharded (bitsandbytes keeps all of them on every rank); use "
                "quantization: nf4 (which can be sharded), quantization: none, or sharding: none"
            )
        if self.quantization == "fp8" and self.sharding != "none":
            raise ValueError(
                "quantization: fp8 weights cannot be sharded (ZeRO-3 would gather them without their scales); use "
                "quantization: nf4 (which can be sharded), quantization: none, or sharding: none"
            )
        if self.compile is True and (self.sharding != "none" or self.quantization in ("int8", "nf4")):
            raise ValueError(
                "compile: works only with weights that are neither sharded nor quantised by bitsandbytes; set "
                "compile: false, or sharding: none and quantization: none or fp8"
            )
        if self.compile is True and self.liger is True:
            raise ValueError("liger: torch.compile fuses the same operations; remove liger: true or compile: true")
        if self.quantization == "nf4" and self.offload == "nvme":
            raise ValueError("offload: nvme stores weights of one dtype only, but nf4 has several; use offload: cpu")
        return self


TaskKind = Literal["causal_lm", "seq2seq_lm", "classification", "token_classification", "question_answering"]


WRITING: tuple[TaskKind, ...] = ("causal_lm", "seq2seq_lm")
"""The kinds of task that generate text."""


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
"""Section -> key -> the kinds of task that use the key. Keys that are not listed apply to every kind."""


class TaskConfig(Section):
    """What the model learns."""

    kind: TaskKind = Field("causal_lm", description="what the rows contain and what the model predicts")
    labels: list[str] | None = Field(
        None,
        description="label names in the order of the scores (`classification`, `token_classification`); default: "
        "the labels of the verbalizer, or the sorted labels of the training rows",
    )
    patterns: list[str] | None = Field(
        None,
        description="`classification`: layouts of the sequence: text with `{column}` fields (`{text}` and `{pair}` "
        "follow `data.columns`), `{mask}` in place of a label's word and `{v:n}` for n virtual tokens; several "
        "patterns form an ensemble",
    )
    verbalizer: dict[str, list[str]] | None = Field(
        None,
        description="`classification` with `{mask}`: label → the words that stand for it, e.g. `{positive: [great, "
        "good]}`",
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="weight of each label in the loss: `{label: number}` (1 for other labels), or `balanced`: "
        "n / (k · count) for k labels with n occurrences in total (`classification`, `token_classification`)",
    )
    system: str | None = Field(
        None,
        description="`causal_lm` with `format: messages`: the system message before each prompt of `ptd generate`; "
        "an empty string: none; default: the system message of the training rows if all have the same",
    )
    doc_stride: int = Field(
        64, ge=1, description="`question_answering`: tokens by which the windows of a long context overlap"
    )
    max_answer_length: int = Field(30, ge=1, description="`question_answering`: maximum number of tokens in an answer")

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Turn the labels into strings: in the data they are often numbers."""
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
    """Return the name of a label in the run file, by the rule for labels in rows (`name_of`); raises `ValueError`."""
    name = name_of(value)
    if name is None:
        raise ValueError(f"{value!r} is not a label name; give text or a number")
    return name


def fields_of(kind: str, format: str) -> list[str]:
    """Return the fields that the rows of a task have. ``data.columns`` may map each field to another column name."""
    if kind in ("causal_lm", "seq2seq_lm"):
        return {"prompt_completion": ["prompt", "completion"], "messages": ["messages"], "text": ["text"]}[format]
    return {
        "classification": ["text", "pair", "label"],
        "token_classification": ["tokens", "tags"],
        "question_answering": ["question", "context", "answers"],
    }[kind]


class DataConfig(Section):
    """Where the rows come from and how they are tokenised."""

    train: str | None = Field(
        None,
        description="training rows: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder written by "
        "`save_to_disk`, or a hub name (`NAME` or `NAME:CONFIG`); default: none, which only `hard_prompt` allows",
    )
    eval: str | None = Field(
        None, description="rows for evaluation during training, from the same kinds of source as `train`"
    )
    train_split: str = Field("train", description="split to read if `train` is a folder or a hub name")
    eval_split: str = Field("validation", description="split to read if `eval` is a folder or a hub name")
    format: Literal["prompt_completion", "messages", "text"] = Field(
        "prompt_completion",
        description="`prompt_completion`, `messages` (chat in the tokenizer's template, with loss on the assistant's "
        "turns) or `text` (with loss on all tokens but the first). `messages` and `text`: `causal_lm` only",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="field of the format or task → column of the data, e.g. `{prompt: question, completion: answer}` "
        "or `{text: sentence, label: topic}`",
    )
    prompt_template: str | None = Field(
        None,
        description='builds the prompt from columns: `"Question: {question}\\nAnswer: "`; `{prompt}` is the column '
        "that `data.columns` names; `{v:n}` places n virtual tokens of `p_tuning`. If the template has a single field, "
        "`ptd generate` fills it with the given prompt",
    )
    max_length: int = Field(
        512,
        ge=2,
        description="maximum number of tokens in a sequence (`question_answering`: in a window; encoder–decoders: in "
        "the encoder's sequence). Longer prompts are truncated on the left ([what is truncated where](tasks.md))",
    )
    max_target_length: int | None = Field(
        None, ge=2, description="`seq2seq_lm`: maximum number of tokens in a completion; default: `max_length`"
    )
    packing: bool = Field(
        True,
        description="concatenate the sequences of a micro-batch instead of padding them; they do not attend to each "
        "other. A step has the same rows with and without packing. Encoder–decoders and modernbert always use padded "
        "batches",
    )
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="with packing: token budget of a micro-batch, which decides how many rows a step has in place of "
        "`per_device_train_batch_size`",
    )

    cache: str | None = Field(
        None,
        description="folder that holds the tokenised rows, so that a later start maps them into memory instead of "
        "tokenising them again, and the ranks of a node share one copy ([many rows](your-data.md#many-rows)); `none`: "
        "every rank holds the rows in its own memory; default: `~/.cache/ptd/rows`",
    )
    cache_gb: float = Field(
        50.0,
        ge=0,
        description="GB (10⁹ bytes) that the folder `data.cache` may have: at the start of a run, ptd removes what was "
        "not used for the longest time, except what a run is using",
    )

    _paths = field_validator("train", "eval", "cache")(_home)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.max_tokens is not None and not self.packing:
            raise ValueError("max_tokens is the token budget of a packed micro-batch; set packing: true, or remove it")
        if self.max_tokens is not None and self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) has to hold one sequence of max_length ({self.max_length}) tokens"
            )
        if self.prompt_template is not None and self.format != "prompt_completion":
            raise ValueError(f"prompt_template works with format prompt_completion, not {self.format!r}")
        return self

    def check_task(self, kind: TaskKind) -> None:
        """Raise `ValueError` for a setting that has no effect with, or does not work for, a task of this kind."""
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
            raise ValueError(f"data.columns: {twice!r} is given for two fields; give each field its own column")


LION: dict[str, Any] = {"adam_beta2": 0.99}
"""Defaults of ``train`` that are different with ``optimizer: lion``."""


class TrainConfig(Section):
    """Optimisation, evaluation, checkpoints and trackers."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; takes precedence over `num_train_epochs`")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    per_device_train_batch_size: int = Field(8, ge=1, description="rows per micro-batch of each rank")
    per_device_eval_batch_size: int | None = Field(
        None, ge=1, description="rows per evaluation batch of each rank; default: `per_device_train_batch_size`"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of each rank per optimizer step")
    optimizer: Literal["adamw", "adamw_8bit", "lion"] = Field(
        "adamw",
        description="`adamw` (state: 8 bytes per trained number), `adamw_8bit` (AdamW with bitsandbytes' 8-bit "
        "moments, 2 bytes; `pip install 'ptd[quant]'`) or `lion` (4 bytes; it moves numbers by half of "
        "`learning_rate`) ([when to use which](methods.md#the-optimizer))",
    )
    learning_rate: float = Field(
        5e-2,
        gt=0,
        description="peak learning rate, in units of the backbone's own keys, values or embeddings. The default is "
        "meant for every backbone, method, prompt length and width ([the learning rate](methods.md#the-learning-rate))",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of a trained head, in units of the hidden states, with the same schedule; "
        "default: `learning_rate`",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field("linear", description="schedule of the learning rate after the warm-up")
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="length of the warm-up as a share of all steps")
    warmup_steps: int | None = Field(
        None, ge=0, description="length of the warm-up in steps; takes precedence over `warmup_ratio`"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="β₁ of AdamW and Lion")
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description=f"β₂ of AdamW and Lion; with `lion` the default is {LION['adam_beta2']:g}"
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's ε")
    max_grad_norm: float = Field(1.0, ge=0, description="norm to which gradients are clipped; 0: no clipping")
    initial_scale_power: int = Field(
        16,
        ge=0,
        le=64,
        description="float16: the loss scale starts at 2 to this power. When a gradient overflows, the scale is halved "
        "and the step is skipped",
    )
    loss_scale_window: int = Field(
        2000, ge=1, description="float16: steps without an overflow after which the loss scale is doubled"
    )
    seed: int = Field(0, ge=0, description="seed of the initial values and of the order of the rows")
    logging_steps: int = Field(10, ge=1, description="steps between two records")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two evaluations; `best/` holds the best adapter; default: only at the end",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two resumable checkpoints, which are written atomically from a copy in memory while "
        "training continues; default: only at the end",
    )
    save_total_limit: int = Field(2, ge=1, description="number of checkpoints to keep")
    max_restarts: int = Field(
        3,
        ge=0,
        description="how often a run may start again after failures; requested stops do not count "
        "([interruptions](interruptions.md))",
    )
    hang_timeout_minutes: float = Field(
        20.0,
        ge=0,
        description="time without progress after which a rank writes its stacks to `output_dir/logs/` and exits; "
        "0: never",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="trackers that also receive the records: `tensorboard`, `wandb`, `mlflow`, or `[]`; a tracker that "
        "fails never stops the run ([reports](reports.md#trackers))",
    )
    run_name: str | None = Field(
        None, min_length=1, description="name of the run in the trackers; default: the name of `output_dir`"
    )
    samples: int = Field(
        0,
        ge=0,
        description="number of held-out rows whose greedy continuation, label or answer is stored before and after "
        "training ([reports](reports.md#samples))",
    )
    metric_for_best_model: str = Field(
        "loss",
        description="metric that selects the adapter in `best/`: `loss`, `perplexity` (lower is better), or a metric "
        "of the task (higher is better); a prefix `eval_` is ignored",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="consecutive evaluations without a better `metric_for_best_model` after which the run ends; "
        "requires `eval_steps`; default: none, the run takes all steps",
    )
    on_divergence: Literal["warn", "stop", "retry"] = Field(
        "warn",
        description="what to do when the training loss rises and stays above the loss of the backbone without a "
        "prompt: `warn` prints a warning and continues, `stop` ends the run, `retry` returns to the last good "
        "checkpoint, or to the start, with a third of the learning rate, at most three times "
        "([divergence](interruptions.md#divergence))",
    )

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> TrainConfig:
        if self.optimizer == "lion":
            if self.adam_epsilon != type(self).model_fields["adam_epsilon"].default:
                raise ValueError("adam_epsilon: has no effect with optimizer: lion, which does not divide; remove it")
            # Not by assignment, after which these keys would count as given by the run file.
            self.__dict__.update({key: value for key, value in LION.items() if key not in self.model_fields_set})
        return self

    @property
    def best_metric(self) -> str:
        """``metric_for_best_model`` without the prefix ``eval_``, which is optional in Hugging Face's Trainer too."""
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
"""Keys that have no effect without ``data.eval``."""


def without_evaluation(config: RunConfig) -> RunConfig:
    """Return the run without ``data.eval``, with the keys that depend on it at their defaults."""
    changes: dict[str, dict[str, Any]] = {"data": {"eval": None}, "train": {"samples": 0}}
    for section, key in NEEDS_EVAL:
        changes[section][key] = type(getattr(config, section)).model_fields[key].default
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


class RunConfig(Section):
    """A whole run. ``method`` is the section as given; `method_config` returns it as the method's dataclass."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    backbone: BackboneConfig
    method: dict[str, Any]
    task: TaskConfig = Field(default_factory=lambda: TaskConfig())
    data: DataConfig
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed configuration: path of a JSON file, or the mapping itself "
        "([what is honoured](../ds_configs/README.md))",
    )
    output_dir: Path = Field(Path("out"), description="folder for everything that the run writes")

    _paths = field_validator("deepspeed", "output_dir")(_home)

    @field_validator("task", "train", mode="before")
    @classmethod
    def _all_defaults(cls, value: Any) -> Any:
        """Replace null by an empty section: YAML reads a section whose keys are all commented out as null."""
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
                "train.samples: needs rows of data.eval and, for tasks that generate text, a data.format with prompts; "
                "set them, or remove it"
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
        """Build the method's dataclass from the ``method`` section."""
        return parse_method(self.method)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for run.json, with the defaults of the method section filled in."""
        plain = self.model_dump(mode="json")
        settings = dataclasses.asdict(self.method_config())
        plain["method"] = {
            "name": self.method_name,
            **{key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        }
        return plain
