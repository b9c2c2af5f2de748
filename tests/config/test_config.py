"""`ptd.config`: what RUN.yaml and overrides may contain, and what the error messages say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptd.config import RunConfig, TrainConfig, load_config, parse_config
from ptd.engine.optimizers import OPTIMIZERS
from ptd.types import UserError

OPTIMIZER = TrainConfig.model_fields["optimizer"].annotation
MINIMAL = """
backbone: {path: some/model}
method: {name: prefix}
data: {train: rows.jsonl}
"""
FULL = """
backbone: {path: some/model, dtype: bfloat16, gradient_checkpointing: true, revision: main}
method: {name: prefix, num_virtual_tokens: 8, prefix_projection: true, encoder_hidden_size: 32}
task: {kind: causal_lm}
data: {train: rows.jsonl, eval: more.jsonl, columns: {prompt: question}, max_length: 64, max_tokens: 256}
train: {max_steps: 5, learning_rate: 3e-3, lr_scheduler_type: cosine, warmup_steps: 2, eval_steps: 2}
deepspeed: {zero_optimization: {stage: 3}}
output_dir: runs/a
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def mapping(**sections: Any) -> dict[str, Any]:
    return {**yaml.safe_load(MINIMAL), **sections}


# --- what is accepted ----------------------------------------------------------------------------------------------


def test_the_smallest_run_file(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.backbone.path, config.method_name, config.data.train) == ("some/model", "prefix", "rows.jsonl")
    assert config.train.eval_batch_size == config.train.per_device_train_batch_size
    assert config.output_dir == Path("out")
    assert config.deepspeed is None


def test_overrides_win_and_make_sections(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "train.learning_rate=3e-3",
        "method.num_virtual_tokens=4",
        "data.columns.prompt=question",
        "backbone.dtype=float32",
        "output_dir=runs/b=c",
        "data.eval=null",
        "train.max_steps=7",
        "train.max_steps=8",
    )
    assert config.train.learning_rate == 3e-3
    assert config.train.max_steps == 8
    assert config.method_config().num_virtual_tokens == 4
    assert config.data.columns == {"prompt": "question"}
    assert config.data.eval is None
    assert config.output_dir == Path("runs/b=c")
    assert config.backbone.dtype == "float32"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-2", 0.01), ("1E-2", 0.01), ("3e+0", 3.0), ("1.5e-3", 0.0015), ("5.e-3", 0.005), (".5e-2", 0.005), ("2", 2.0)],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    assert load(tmp_path, MINIMAL + f"train: {{learning_rate: {written}}}").train.learning_rate == value
    assert load(tmp_path, MINIMAL, f"train.learning_rate={written}").train.learning_rate == value


def test_whole_scientific_numbers_are_counts(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "train.max_steps=1e3").train.max_steps == 1000
    assert "max_steps" in refusal(tmp_path, MINIMAL, "train.max_steps=1e-3")


def test_lion_has_a_default_of_its_own_which_does_not_count_as_given(tmp_path: Path) -> None:
    adamw, eight, lion = (load(tmp_path, MINIMAL, f"train.optimizer={name}").train for name in get_args(OPTIMIZER))
    assert (adamw.learning_rate, adamw.adam_beta2) == (eight.learning_rate, eight.adam_beta2) == (0.05, 0.999)
    assert (lion.learning_rate, lion.adam_beta2) == (0.05, 0.99)
    assert lion.model_fields_set == {"optimizer"}
    assert load(tmp_path, MINIMAL, "train.optimizer=lion", "train.adam_beta2=0.999").train.adam_beta2 == 0.999


def test_the_optimizers_of_the_run_file_are_those_of_the_engine() -> None:
    assert list(get_args(OPTIMIZER)) == list(OPTIMIZERS)


def test_samples_need_rows_to_answer_or_continue(tmp_path: Path) -> None:
    labels = ["task.kind=classification", "data.columns={}"]
    for overrides in ([], labels):
        assert load(tmp_path, FULL, "train.samples=3", *overrides).train.samples == 3
    for overrides in (["data.eval=null"], [*labels, "data.eval=null"], ["data.format=text", "data.columns={}"]):
        said = refusal(tmp_path, FULL, "train.samples=3", *overrides)
        assert "train.samples: needs rows of data.eval" in said


def test_only_known_trackers(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "train.report_to=[]").train.report_to == []
    assert "train.report_to" in refusal(tmp_path, MINIMAL, "train.report_to=[tensorbord]")


def test_to_dict_is_plain_and_reads_back(tmp_path: Path) -> None:
    for text in (MINIMAL, FULL):
        config = load(tmp_path, text)
        plain = config.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        again = parse_config(plain)
        assert again.to_dict() == plain
        assert again.method_config() == config.method_config()
        assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["method"]["init"] == "rows", "defaults of the method are filled in"


def test_a_path_of_the_method_is_plain_too(tmp_path: Path) -> None:
    plain = load(tmp_path, MINIMAL, "method.init=text", "method.init_text_file=a.txt").to_dict()
    assert plain["method"]["init_text_file"] == "a.txt"
    assert parse_config(plain).to_dict() == plain


def test_parsing_does_not_change_what_it_is_given() -> None:
    raw = mapping(train={"learning_rate": "1e-2"})
    before = json.dumps(raw)
    parse_config(raw)
    assert json.dumps(raw) == before


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trian.max_steps=1", "trian: unknown key; did you mean train?"),
        ("backbone.dtypes=auto", "backbone.dtypes: unknown key; did you mean backbone.dtype?"),
        ("data.max_lenght=8", "data.max_lenght: unknown key; did you mean data.max_length?"),
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean train.learning_rate?"),
        ("task.kinds=x", "task.kinds: unknown key; did you mean task.kind?"),
        (
            "method.num_virtual_token=1",
            "method.num_virtual_token: unknown key; did you mean method.num_virtual_tokens?",
        ),
        ("train.xyz=1", "train.xyz: unknown key; valid keys: adam_beta1, "),
        ("method.xyz=1", "method.xyz: unknown key; valid keys: "),
        ("data.columns.answer=a", "data.columns: format prompt_completion has no field 'answer'"),
        ("method.name=prefx", "method.name: there is no method 'prefx'; available: "),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, override: str, nearest: str) -> None:
    assert nearest in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("train.max_steps=many", "train.max_steps: got 'many'"),
        ("train.max_steps=0", "train.max_steps: got 0"),
        ("train.max_steps=1.5", "train.max_steps: got 1.5"),
        ("train.max_steps=true", "train.max_steps: "),
        ("train.learning_rate=yes", "train.learning_rate: "),
        ("train.learning_rate=-1", "train.learning_rate: got -1"),
        ("train.learning_rate=.nan", "train.learning_rate: got nan"),
        ("train.learning_rate=.inf", "train.learning_rate: got inf"),
        ("train.num_train_epochs=.inf", "train.num_train_epochs: got inf"),
        ("train.adam_beta1=1", "train.adam_beta1: got 1"),
        ("train.lr_scheduler_type=cos", "train.lr_scheduler_type: got 'cos'"),
        ("train.optimizer=adam8", "train.optimizer: got 'adam8'"),
        ("train=3", "train: got 3"),
        ("train=[1]", "train: got [1]"),
        ("backbone.dtype=float8", "backbone.dtype: got 'float8'"),
        ("backbone.path=3", "backbone.path: got 3"),
        ("backbone.gradient_checkpointing=7", "backbone.gradient_checkpointing: got 7"),
        ("data.packing=maybe", "data.packing: got 'maybe'"),
        ("data.max_length=1", "data.max_length: got 1"),
        ("data.columns=prompt", "data.columns: got 'prompt'"),
        ("deepspeed=3", "deepspeed: got 3"),
        ("deepspeed={1: 2}", "deepspeed: got 1; input should be a valid string"),
        ("train.dict[=1", "train.dict[: unknown key"),
        ("dict[=1", "dict[: unknown key"),
        ("output_dir=[1]", "output_dir: got [1]"),
        ("method=prefix", "method: got 'prefix'"),
        ("method.name=3", "method.name: "),
        ("method.num_virtual_tokens=ten", "method.num_virtual_tokens: got 'ten'"),
        ("method.num_virtual_tokens=0", "method.num_virtual_tokens: got 0"),
        ("method.num_virtual_tokens=true", "method.num_virtual_tokens: "),
        ("method.init=text", "method.init: text needs exactly one of"),
        ("method.init_text=x", "method.init_text: is given, but"),
        ("method.encoder_hidden_size=3", "method.encoder_hidden_size: has no effect"),
    ],
)
def test_wrong_types_and_values_name_their_path(tmp_path: Path, override: str, path: str) -> None:
    assert path in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.max_tokens=64", "data.packing=false"), "data: max_tokens is the token budget of a packed micro-batch"),
        (("data.max_tokens=64", "data.max_length=65"), "has to hold one sequence of max_length (65)"),
        (("data.format=text", "data.prompt_template='{a}'"), "prompt_template works with format prompt_completion"),
        (("data.format=messages", "data.columns.prompt=a"), "format messages has no field 'prompt'"),
        (("train.optimizer=lion", "train.adam_epsilon=1e-6"), "adam_epsilon: has no effect with optimizer: lion"),
    ],
)
def test_impossible_combinations(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    assert said in refusal(tmp_path, MINIMAL, *overrides)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "train.max_steps=0", "backbone.dtyp=auto", "data.max_length=x")
    assert all(path in message for path in ("train.max_steps", "backbone.dtyp:", "data.max_length"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has to be a mapping"),
        ("[1, 2]", "got list"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("method: {name: prefix}", "backbone: is missing"),
        ("backbone: {}\nmethod: {name: prefix}\ndata: {}", "backbone.path: is missing"),
        ("backbone: {path: m}\nmethod: {}\ndata: {}", "method.name: is missing"),
        ("1: 2", "1: got 1; keys should be strings"),
        ("a: 2026-99-99", "not valid YAML"),
    ],
)
def test_a_run_file_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_run_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml", tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot read the run file"):
            load_config(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("backbone.path.deep=3", "backbone.path is not a section"),
        ("train.max_steps=[", "not valid YAML"),
        ("train.max_steps=2026-99-99", "not valid YAML"),
    ],
)
def test_overrides_that_are_none(tmp_path: Path, override: str, said: str) -> None:
    message = refusal(tmp_path, MINIMAL, override)
    assert said in message
    assert override in message


# --- anything else -------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
NAMES = st.sampled_from(
    "backbone method data train task deepspeed output_dir path name prefix columns max_steps learning_rate "  # noqa: SIM905
    "num_virtual_tokens init dtype max_tokens packing format stage".split()
)
VALUES = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS | NAMES, inner, max_size=4),
    max_leaves=12,
)
LIGHT = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def tell(read: Callable[[], RunConfig]) -> str | None:
    """Return the `UserError` message of ``read``, or None if JSON can hold the result; other exceptions propagate."""
    try:
        config = read()
    except UserError as error:
        return str(error)
    json.dumps(config.to_dict())
    return None


@LIGHT
@given(st.dictionaries(NAMES | SCALARS, VALUES, max_size=6), st.booleans())
def test_any_mapping_gives_a_config_or_a_user_error(raw: dict[Any, Any], complete: bool) -> None:
    assert tell(lambda: parse_config({**(mapping() if complete else {}), **raw})) != ""


@LIGHT
@given(st.sampled_from(["backbone", "method", "data", "train", "task"]), NAMES | st.text(max_size=4), VALUES)
def test_any_value_of_a_section_gives_a_config_or_a_user_error(section: str, key: str, value: Any) -> None:
    raw = mapping()
    raw[section] = {**raw.get(section, {}), key: value}
    assert tell(lambda: parse_config(raw)) != ""


@LIGHT
@given(
    st.text(max_size=20)
    | st.tuples(
        st.lists(NAMES | st.text(max_size=3), max_size=3).map(".".join),
        st.text(alphabet="{}[]:,-!&*#|>%@`'\"?= \n\tabc019.e_", max_size=8) | st.text(max_size=8),
    ).map("=".join)
)
def test_any_override_gives_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(MINIMAL)
    assert tell(lambda: load_config(path, [override])) != ""
