"""`ptd.config.deepspeed`: what a DeepSpeed JSON may contain, checked against DeepSpeed's own classes where possible."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptd.config import RunConfig, parse_config
from ptd.config import deepspeed_keys as keys
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.shipped import DS_CONFIGS
from ptd.types import UserError

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}}


def run(deepspeed: Any = None, *, backbone: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "backbone": {"path": "m", **(backbone or {})},
        "method": {"name": "prefix"},
        "data": {"train": "x.jsonl"},
        "deepspeed": deepspeed,
    }
    return parse_config(raw | ({"train": train} if train else {}))


def applied(deepspeed: dict[str, Any], **train: Any) -> RunConfig:
    return apply_deepspeed(run(deepspeed, **train))[0]


def refusal(deepspeed: Any, **train: Any) -> str:
    with pytest.raises(UserError) as caught:
        apply_deepspeed(run(**train), source=deepspeed)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------------------------


def test_no_section_shards_nothing() -> None:
    config = run()
    assert apply_deepspeed(config) == (config, None)


@pytest.mark.parametrize("section", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": False}])
def test_stage_0_shards_nothing(section: dict[str, Any]) -> None:
    assert apply_deepspeed(run(section))[1] is None


def test_source_replaces_the_config_and_neither_is_changed() -> None:
    config, source = run({"gradient_clipping": 0.5}), {**ZERO3, "gradient_clipping": 0.25, "_comment": "x"}
    before = json.dumps(source), config.model_dump()
    merged, zero3 = apply_deepspeed(config, source=source)
    assert merged.train.max_grad_norm == 0.25
    assert zero3 is not None
    assert (json.dumps(source), config.model_dump()) == before


def test_a_shipped_file_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert apply_deepspeed(run("zero3.json"))[1] is not None
    assert apply_deepspeed(run("elsewhere/zero3.json"))[1] is not None
    (tmp_path / "zero3.json").write_text("{}")
    assert apply_deepspeed(run("zero3.json"))[1] is None, "a file at the path itself goes first"


def test_a_missing_file_names_those_that_exist() -> None:
    assert "no file 'nothing.json'" in refusal("nothing.json")
    assert "zero3.json" in refusal("nothing.json")


@pytest.mark.parametrize("path", ["", "\0", "a" * 5000, "tests"])
def test_what_is_no_file_is_refused(path: str) -> None:
    assert "deepspeed" in refusal(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  "a": 1,\n  // why\n}', "line 3"),
        ('{"optimizer": {}, "optimizer": {}}', "'optimizer' is given twice"),
        ("[1]", "has to be a JSON object, got list"),
        ("\x80", "cannot read"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    assert said in refusal(str(path))
    assert "broken.json" in refusal(str(path))


# --- honoured ------------------------------------------------------------------------------------------------------

HONOURED = [
    ({"train_micro_batch_size_per_gpu": 4}, "train.per_device_train_batch_size", 4),
    ({"gradient_accumulation_steps": 2}, "train.gradient_accumulation_steps", 2),
    ({"gradient_clipping": 0.5}, "train.max_grad_norm", 0.5),
    ({"bf16": {"enabled": True}}, "backbone.dtype", "bfloat16"),
    ({"bf16": {"enabled": False}}, "backbone.dtype", "float32"),
    ({"bfloat16": {"enabled": True}}, "backbone.dtype", "bfloat16"),
    ({"fp16": {"enabled": True}}, "backbone.dtype", "float16"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "backbone.dtype", "float16"),
    ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "backbone.dtype", "float32"),
    ({"fp16": {"enabled": True, "initial_scale_power": 12}}, "train.initial_scale_power", 12),
    ({"fp16": {"enabled": "auto", "loss_scale_window": 1000}}, "train.loss_scale_window", 1000),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-3}}}, "train.learning_rate", 3e-3),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9]}}}, "train.adam_beta1", 0.8),
    ({"optimizer": {"type": "DeepSpeedCPUAdam", "params": {"betas": [0.8, 0.9]}}}, "train.adam_beta2", 0.9),
    ({"optimizer": {"type": "FusedAdam", "params": {"eps": 1e-6}}}, "train.adam_epsilon", 1e-6),
    ({"optimizer": {"type": "adamw", "params": {"weight_decay": 0.1}}}, "train.weight_decay", 0.1),
    ({"scheduler": {"type": "WarmupLR"}}, "train.lr_scheduler_type", "constant_with_warmup"),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "train.lr_scheduler_type", "linear"),
    ({"scheduler": {"type": "WarmupCosineLR"}}, "train.lr_scheduler_type", "cosine"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}}}, "train.learning_rate", 2e-3),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7, "warmup_type": "linear"}}},
        "train.warmup_steps",
        7,
    ),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 70}}}, "train.max_steps", 70),
    (ZERO3, "backbone.sharding", "world"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}, "backbone.sharding", "world"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}, "backbone.sharding", "node"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "backbone.sharding", "node"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "backbone.sharding_group_size", 4),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "backbone.offload", "cpu"),
    (NVME, "backbone.offload", "nvme"),
    (NVME, "backbone.offload_folder", "/nvme"),
]


def value_at(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize(("section", "key", "value"), HONOURED)
def test_a_value_sets_what_the_run_file_leaves_open(section: dict[str, Any], key: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_at(applied(section), key) == value


def automatic(value: Any, name: str = "") -> Any:
    """Return the section with every value replaced by "auto" (a scheduler or optimizer keeps its type)."""
    if isinstance(value, dict):
        return {key: automatic(item, key) for key, item in value.items()}
    return value if name == "type" else "auto"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [entry for entry in HONOURED if "lr_sched" not in entry[1] and "backbone.offload" not in entry[1]],
)
def test_auto_leaves_the_run_file_alone(section: dict[str, Any], key: str, value: Any) -> None:
    assert value_at(applied(automatic(section)), key) == value_at(run(), key)


def test_lion() -> None:
    train = applied({"optimizer": {"type": "Lion"}}).train
    assert (train.optimizer, train.learning_rate, train.adam_beta2) == ("lion", 0.05, 0.99)
    train = applied({"optimizer": {"type": "FusedLion", "params": {"lr": 3e-3, "betas": [0.8, 0.9]}}}).train
    assert (train.optimizer, train.learning_rate, train.adam_beta1, train.adam_beta2) == ("lion", 3e-3, 0.8, 0.9)
    assert applied({"optimizer": {"type": "Lion"}}, optimizer="lion", learning_rate=0.1).train.learning_rate == 0.1
    assert "adam_epsilon: has no effect with optimizer: lion" in refusal(
        {"optimizer": {"type": "Lion", "params": {"eps": 1e-6}}}
    )
    assert (
        applied({"optimizer": {"type": "DeepSpeedCPULion", "params": {"weight_decay": 0.1}}}).train.weight_decay == 0.1
    )


def test_the_type_auto_leaves_the_optimizer_to_the_run_file() -> None:
    assert applied({"optimizer": {"type": "auto", "params": {"lr": 0.1}}}, optimizer="adamw_8bit").train.optimizer == (
        "adamw_8bit"
    )


CONFLICTS = [
    ("optimizer.type", "Lion", "optimizer", "adamw"),
    ("optimizer.type", "AdamW", "optimizer", "adamw_8bit"),
    ("train_micro_batch_size_per_gpu", 4, "per_device_train_batch_size", 8),
    ("gradient_accumulation_steps", 2, "gradient_accumulation_steps", 1),
    ("gradient_clipping", 0.5, "max_grad_norm", 1.0),
    ("optimizer.params.lr", 0.1, "learning_rate", 0.2),
    ("optimizer.params.eps", 1e-6, "adam_epsilon", 1e-8),
    ("optimizer.params.weight_decay", 0.1, "weight_decay", 0.0),
    ("scheduler.type", "WarmupLR", "lr_scheduler_type", "linear"),
    ("scheduler.params.warmup_max_lr", 0.1, "learning_rate", 0.2),
    ("scheduler.params.warmup_num_steps", 7, "warmup_steps", 8),
    ("scheduler.params.warmup_num_steps", 7, "warmup_ratio", 0.1),
    ("scheduler.params.total_num_steps", 7, "max_steps", 8),
    ("scheduler.params.total_num_steps", 7, "num_train_epochs", 2.0),
]


def at(path: str, value: Any) -> dict[str, Any]:
    """Return a section that has ``value`` at the dotted ``path``."""
    section: dict[str, Any] = {}
    if path.startswith("scheduler"):
        section["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}}
    *parents, last = path.split(".")
    node = section
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return section


@pytest.mark.parametrize(("path", "value", "key", "other"), CONFLICTS)
def test_a_contradiction_names_both_keys_and_values(path: str, value: Any, key: str, other: Any) -> None:
    message = refusal(at(path, value), **{key: other})
    for part in (f"{path}: is {json.dumps(value)}", f"RUN.yaml sets train.{key} to {other!r}", f"{path} to 'auto'"):
        assert part in message


@pytest.mark.parametrize(
    ("path", "value", "key"), [entry[:3] for entry in CONFLICTS if entry[2] not in ("warmup_ratio", "num_train_epochs")]
)
def test_the_same_value_twice_is_no_contradiction(path: str, value: Any, key: str) -> None:
    same = getattr(applied(at(path, value)).train, key)
    assert applied(at(path, value), **{key: same}).train == applied(at(path, value)).train


def test_the_second_beta_contradicts() -> None:
    message = refusal({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, adam_beta1=0.9, adam_beta2=0.999)
    assert "optimizer.params.betas[1]: is 0.95" in message
    assert "train.adam_beta2 to 0.999" in message


def test_dtype_contradiction() -> None:
    for enabled, dtype in ((True, "float32"), (False, "bfloat16")):
        config = run({"bf16": {"enabled": enabled}}, backbone={"dtype": dtype})
        with pytest.raises(UserError, match=rf"bf16.enabled: is {json.dumps(enabled)}.* backbone.dtype to '{dtype}'"):
            apply_deepspeed(config)
    assert apply_deepspeed(run({"bf16": {"enabled": True}}, backbone={"dtype": "auto"}))[0].backbone.dtype == "bfloat16"


def test_float16_of_the_run_file() -> None:
    """Disabling bf16 does not contradict the dtype float16; disabling fp16 or enabling bf16 does."""
    for section in ({"bf16": {"enabled": False}}, {"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}):
        assert apply_deepspeed(run(section, backbone={"dtype": "float16"}))[0].backbone.dtype == "float16"
    for section, said in (
        ({"fp16": {"enabled": False}}, r"fp16.enabled: is false.* backbone.dtype to 'float16'"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled: is true.* backbone.dtype to 'float16'"),
    ):
        with pytest.raises(UserError, match=said):
            apply_deepspeed(run(section, backbone={"dtype": "float16"}))


# The values in Hugging Face's documentation.
LOSS_SCALING = {
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


def test_how_the_loss_scale_falls_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"ignored: fp16.hysteresis \(ptd lowers the loss scale at every overflow\)$"):
        config = applied({"fp16": {"enabled": True, **LOSS_SCALING}})
    assert (config.train.loss_scale_window, config.train.initial_scale_power) == (1000, 16)


def test_loss_scaling_that_is_off_means_nothing() -> None:
    assert applied({"fp16": {"enabled": False, "loss_scale": 128, "loss_scale_window": 7}}).train == run().train


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loss_scaling_means_nothing_in_another_dtype(dtype: str) -> None:
    config = apply_deepspeed(run({"fp16": {"enabled": "auto", **LOSS_SCALING}}, backbone={"dtype": dtype}))[0]
    assert config.train == run().train
    with pytest.raises(UserError, match=f"train.loss_scale_window: has no effect with backbone.dtype {dtype}"):
        run(backbone={"dtype": dtype}, loss_scale_window=1000)


def test_two_keys_of_the_json_may_not_contradict_each_other() -> None:
    section = {
        "optimizer": {"params": {"lr": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.2}},
    }
    message = refusal(section)
    assert "optimizer.params.lr is 0.1" in message
    assert "scheduler.params.warmup_max_lr: is 0.2" in message


def test_comments_are_allowed_at_every_level() -> None:
    section = {"_why": 1, "comment": "x", "zero_optimization": {"stage": 3, "_why": [1], "offload_param": {"_why": 1}}}
    zero3 = apply_deepspeed(run(section))[1]
    assert zero3 is not None
    assert "_why" not in json.dumps(zero3)


def test_what_is_set_survives_a_second_reading() -> None:
    section = {**ZERO3, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    once, zero3 = apply_deepspeed(run(section))
    assert apply_deepspeed(once) == (once, zero3)
    assert parse_config(once.to_dict()) == parse_config(parse_config(once.to_dict()).to_dict())


# --- refused -------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "0 to replicate"),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "gradients of the backbone"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "has to be 3 or 0, got 4"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "has to be"),
    ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage", "'3'"),
    ({"zero_optimization": {"stage": [3]}}, "zero_optimization.stage", "[3]"),
    ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.stage", "is missing"),
    ({"zero_optimization": True}, "zero_optimization", "has to be an object, got True"),
    ({"zero_optimization": {"stage": 3, "overlap_comm": 1}}, "zero_optimization.overlap_comm", "true or false"),
    ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, "zero_optimization.sub_group_size", "at least 0"),
    ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "zero_optimization.offload_param", "an object"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "offload_param.device", "'nvme'"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device", "nvme_path"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"devise": 1}}}, "offload_param.devise", "param.device?"),
    ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}, "prefetch_bucket", "prefetch_bucket_size?"),
    ({"zero_optimization": {"stage": 3, 3: 1}}, "zero_optimization.3", "unknown key"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled", "one dtype"),
    ({"fp16": {"enabled": "yes"}}, "fp16.enabled", "true, false or 'auto'"),
    ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale", "give 0"),
    ({"fp16": {"enabled": True, "initial_scale_power": -1}}, "fp16.initial_scale_power", "greater than or equal to 0"),
    ({"fp16": {"enabled": True, "loss_scale_window": True}}, "fp16.loss_scale_window", "got true"),
    ({"fp16": {"scale_window": 1}}, "fp16.scale_window", "fp16.loss_scale_window?"),
    ({"bf16": {"enabled": "yes"}}, "bf16.enabled", "true, false or 'auto'"),
    ({"bf16": True}, "bf16", "has to be an object"),
    ({"bf16": {"enable": True}}, "bf16.enable", "bf16.enabled?"),
    ({"gradient_cliping": 1}, "gradient_cliping", "gradient_clipping?"),
    ({"gradient_clipping": -1}, "gradient_clipping", "train.max_grad_norm"),
    ({"gradient_clipping": True}, "gradient_clipping", "got true"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu", "greater than or equal to 1"),
    ({"train_micro_batch_size_per_gpu": [1]}, "train_micro_batch_size_per_gpu", "valid integer"),
    ({"train_batch_size": 1.5}, "train_batch_size", "whole number"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "AdamW"),
    ({"optimizer": {"type": ["AdamW"]}}, "optimizer.type", "AdamW"),
    ({"optimizer": {"params": {"lrr": 1}}}, "optimizer.params.lrr", "optimizer.params.lr?"),
    ({"optimizer": {"params": [1]}}, "optimizer.params", "has to be an object"),
    ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas", "two numbers"),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode", "true"),
    ({"optimizer": {"params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm", "gradient_clipping"),
    ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", "WarmupLR"),
    ({"scheduler": {"params": {}}}, "scheduler.type", "None"),
    ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 3}}}, "params.total_num_steps", "unknown key"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}}, "params.warmup_min_lr", "remove it"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, "params.warmup_type", "'linear'"),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1}}}, "params.cos_min_ratio", "remove"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "zero_optimization.stage 3"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size", "remove it"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "remove it"),
]


@pytest.mark.parametrize(("section", "path", "advice"), REFUSED)
def test_refusals_name_the_key_and_what_to_do(section: dict[str, Any], path: str, advice: str) -> None:
    message = refusal(section)
    assert path in message
    assert advice in message


@pytest.mark.parametrize("key", sorted(keys.REFUSED))
def test_every_refused_key(key: str) -> None:
    message = refusal({key: {"enabled": True}})
    assert f"deepspeed: {key}: is not supported: " in message
    assert "remove" in message
    for off in (None, False, {}, {"enabled": False}, "auto"):
        assert applied({key: off}) == run({key: off})


@pytest.mark.parametrize("key", sorted(keys.ZERO_REFUSED))
def test_every_refused_zero_key(key: str) -> None:
    assert f"zero_optimization.{key}: is not supported" in refusal({"zero_optimization": {"stage": 3, key: 2}})
    zero3 = apply_deepspeed(run({"zero_optimization": {"stage": 3, key: None}}))[1]
    assert zero3 is not None
    assert zero3["zero_optimization"] == {"stage": 3}


# --- ignored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(keys.IGNORED))
def test_every_ignored_key_is_named(key: str) -> None:
    with pytest.warns(UserWarning, match=rf"deepspeed: ignored: {key}"):
        applied({key: {"x": 1}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied({key: False})


@pytest.mark.parametrize("key", sorted(keys.ZERO_IGNORED.keys() - {"compute_grad_norm"}))
def test_every_ignored_zero_key_is_named_and_not_handed_on(key: str) -> None:
    value: Any = {"device": "cpu"} if key in keys.ZERO_SECTIONS else True
    with pytest.warns(UserWarning, match=rf"ignored: zero_optimization.{key}"):
        zero3 = apply_deepspeed(run({"zero_optimization": {"stage": 3, key: value}}))[1]
    assert zero3 is not None
    assert key not in zero3["zero_optimization"]


def test_the_gradient_norm_of_no_gradients_needs_no_word() -> None:
    for value in (True, False):  # DeepSpeed itself refuses false together with stage 3
        zero3 = apply_deepspeed(run({"zero_optimization": {"stage": 3, "compute_grad_norm": value}}))[1]
        assert zero3 is not None
        assert zero3["zero_optimization"] == {"stage": 3}


def test_logarithmic_warm_up_is_not_taken_over_in_silence() -> None:
    with pytest.warns(UserWarning, match="ptd's warm-up is linear"):
        applied({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}})


# --- anything else -------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    sorted(keys.HONOURED)
    + sorted(keys.ZERO_KEYS | keys.ADAM_KEYS | keys.OFFLOAD_PARAM_KEYS)
    + ["type", "params", "enabled", "warmup_num_steps", "total_num_steps", "cos_min_ratio", "_why"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.integers(0, 3)
SCALARS |= st.sampled_from(["auto", "AdamW", "cpu", "nvme", *keys.SCHEDULERS])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=4) | st.integers(), JSON, max_size=4))
def test_anything_gives_a_config_or_a_user_error(section: dict[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config, zero3 = apply_deepspeed(run(), source=section)
            check_batch_size(config, 2, source=section)
        except UserError:
            return
    assert zero3 is None or zero3["zero_optimization"]["stage"] == 3


# --- what DeepSpeed gets -------------------------------------------------------------------------------------------


def test_the_dict_says_nothing_of_dtypes_and_accumulation() -> None:
    config = run(ZERO3, backbone={"dtype": "bfloat16"}, per_device_train_batch_size=5, gradient_accumulation_steps=3)
    zero3 = apply_deepspeed(config)[1]
    assert zero3 is not None
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & zero3.keys()
    assert (zero3["train_micro_batch_size_per_gpu"], zero3["gradient_accumulation_steps"]) == (5, 1)


def test_sharding_needs_no_json() -> None:
    for backbone, offload in (
        ({"sharding": "node"}, None),
        ({"sharding": "world", "offload": "cpu"}, {"device": "cpu", "pin_memory": True}),
        (
            {"sharding": "world", "offload": "nvme", "offload_folder": "/x"},
            {"device": "nvme", "nvme_path": "/x", "pin_memory": True, "buffer_size": 300_000_000},
        ),
    ):
        config, zero3 = apply_deepspeed(run(backbone=backbone))
        assert config == run(backbone=backbone)
        assert zero3 is not None
        assert zero3["zero_optimization"] == {"stage": 3, **({"offload_param": offload} if offload else {})}


def test_a_json_adds_to_what_the_run_file_says_of_placement() -> None:
    section = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7, "offload_param": {"buffer_count": 9}}
    }
    for sharding in ("world", "node"):
        config, zero3 = apply_deepspeed(run(section, backbone={"sharding": sharding, "offload": "cpu"}))
        assert zero3 is not None
        assert config.backbone.sharding == sharding
        assert zero3["zero_optimization"] == {
            "stage": 3,
            "stage3_prefetch_bucket_size": 7,
            "offload_param": {"device": "cpu", "pin_memory": True, "buffer_count": 9},
        }


@pytest.mark.parametrize(
    ("section", "backbone", "said"),
    [
        (ZERO3, {"sharding": "none"}, "stage: is 3, but RUN.yaml sets backbone.sharding to 'none'"),
        ({"zero_optimization": {"stage": 0}}, {"sharding": "node"}, "stage: is 0, but RUN.yaml sets backbone.sharding"),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}},
            {"sharding": "world"},
            "zero_hpz_partition_size: is 4, but RUN.yaml sets backbone.sharding to 'world'",
        ),
        (NVME, {"sharding": "world", "offload": "cpu"}, "RUN.yaml sets backbone.offload to 'cpu'"),
        (
            NVME,
            {"sharding": "world", "offload": "nvme", "offload_folder": "/other"},
            "RUN.yaml sets backbone.offload_folder to '/other'",
        ),
        (ZERO3, {"quantization": "int8"}, "use quantization: nf4"),
        (NVME, {"quantization": "nf4"}, "use offload: cpu"),
    ],
)
def test_placements_that_contradict_each_other_are_refused(
    section: dict[str, Any], backbone: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        apply_deepspeed(run(section, backbone=backbone))
    assert said in str(caught.value)


def test_auto_values_are_left_to_deepspeed_and_sizes_are_whole() -> None:
    section = {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "sub_group_size": 1e9,
        "offload_param": {"device": "cpu", "pin_memory": "auto", "buffer_size": 1e8},
    }
    zero3 = apply_deepspeed(run({"zero_optimization": section, "aio": {"block_size": 1, "queue_depth": "auto"}}))[1]
    assert zero3 is not None
    assert zero3["aio"] == {"block_size": 1}
    assert zero3["zero_optimization"] == {
        "stage": 3,
        "sub_group_size": 1_000_000_000,
        "offload_param": {"device": "cpu", "buffer_size": 100_000_000, "pin_memory": True},
    }
    assert isinstance(zero3["zero_optimization"]["sub_group_size"], int)


def test_batch_size_is_checked_against_the_processes() -> None:
    config = run({**ZERO3, "train_batch_size": 16}, per_device_train_batch_size=4)
    check_batch_size(config, 4)
    check_batch_size(run(), 3)
    check_batch_size(run({"train_batch_size": "auto"}), 3)
    with pytest.raises(UserError, match=r"train_batch_size: is 16, .*\(4\).*\(1\).*\(2\) is 8; .*steps to 2"):
        check_batch_size(config, 2)
    with pytest.raises(UserError, match=r"set train_batch_size to 'auto'$"):
        check_batch_size(config, 3)


# --- against the installed DeepSpeed -------------------------------------------------------------------------------


def test_the_key_lists_are_deepspeeds() -> None:
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    fields = DeepSpeedZeroConfig.model_fields
    names = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert names == keys.ZERO_KEYS
    assert {
        name
        for key, field in fields.items()
        if "bool" in str(field.annotation)
        for name in (key, field.alias)
        if name is not None
    } == keys.ZERO_FLAGS
    assert set(DeepSpeedZeroOffloadParamConfig.model_fields) == keys.OFFLOAD_PARAM_KEYS
    assert set(DeepSpeedBF16Config.model_fields) == keys.BF16_KEYS
    assert set(DeepSpeedFP16Config.model_fields) == keys.FP16_KEYS
    assert set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(keys.REFUSED)
    assert set(ds._REMOVED_ZERO_CONFIG_KEYS) <= set(keys.ZERO_REFUSED)
    assert not keys.IGNORED & keys.REFUSED.keys()
    assert not keys.HONOURED & (keys.IGNORED | keys.REFUSED.keys())


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_are_what_deepspeed_takes(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config, zero3 = apply_deepspeed(run(str(path)))
    assert config.train == run().train, "a shipped file leaves the optimisation to RUN.yaml"
    if zero3 is not None:
        taken = DeepSpeedConfig(zero3)
        offload = taken.zero_config.offload_param
        assert (str(getattr(offload.device, "value", offload.device)) if offload else "none") == config.backbone.offload
        assert taken.zero_config.stage == 3
        assert taken.optimizer_name is None
        assert taken.scheduler_name is None
        assert not taken.float16_config.enabled


def test_shipped_files_are_described() -> None:
    text = (DS_CONFIGS / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in DS_CONFIGS.glob("*.json"))
