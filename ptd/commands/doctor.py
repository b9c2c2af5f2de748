"""``ptd doctor``: report what this machine has, which attention backends it uses, and whether a run could start."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from torch._subclasses.fake_tensor import FakeTensorMode

from ptd.backbone import (
    TextConditioner,
    architecture_of,
    fusion_of,
    load_tokenizer,
    text_config_of,
    vocabulary_of,
)
from ptd.backbone.fake_model import blank_model
from ptd.config import RunConfig, load_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.data import check_source
from ptd.data.tokens import check_special
from ptd.distributed.preflight import bytes_to_write, check_space
from ptd.distributed.ranks import Ranks
from ptd.distributed.self_test import sum_here
from ptd.engine.optimizers import OPTIMIZERS
from ptd.files import as_path, check_writable
from ptd.inject import Attachment, explain_attention
from ptd.methods import method
from ptd.runs.build import facts_of, read_material
from ptd.runs.folder import open_run
from ptd.tasks import make_task
from ptd.tasks.labels import some, with_assumed_labels
from ptd.types import DTYPES, Reporter, UserError
from ptd.values import decimal_size
from ptd.versions import versions

MUCH = 200_000_000
"""Size of the rows, in bytes, above which ``ptd doctor`` does not read them."""


@dataclass(frozen=True)
class Check:
    """One line of the table: what was found and, in case of a problem, what to do."""

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def examine(*, dtype: str = "auto", head_dim: int = 128) -> dict[str, Any]:
    """Return the versions, the devices, and for each kind of batch which attention backend would run and why.

    ``dtype`` ``auto``: bfloat16 on a GPU, otherwise float32. Raises `UserError` for an unknown name.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype: there is no dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    on_gpu = torch.cuda.is_available()
    name = ("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype
    device = torch.device("cuda" if on_gpu else "cpu")
    return {
        "versions": versions(),
        "devices": [_gpu(index) for index in range(torch.cuda.device_count())] if on_gpu else ["cpu"],
        "attention": {
            "dtype": name,
            "head_dim": head_dim,
            "backends": explain_attention(device, DTYPES[name], head_dim),
        },
    }


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"


def check_machine() -> Iterator[Check]:
    """Yield the checks of this machine that concern every run."""
    yield _packages()
    yield _gpus()
    yield _checked("collectives", sum_here)


def check_run(run: Path, overrides: list[str]) -> Iterator[Check]:
    """Yield the checks of this run on this machine, without those that an earlier failure makes impossible."""
    config: RunConfig | None = None

    def read() -> str:
        nonlocal config
        config, _ = apply_deepspeed(load_config(run, overrides))
        return f"{run}: method {config.method_name}" + (" with sharded weights" if config.backbone.sharded else "")

    yield _checked("run file", read)
    if config is None:
        return
    yield from _trust(config)
    yield from _trackers(config)
    output = _checked("output folder", lambda: f"{check_writable(config.output_dir, 'output_dir')} can be written to")
    yield output
    yield _checked("run folder", lambda: _folder(config))
    if config.backbone.offload_folder is not None:
        folder, key = config.backbone.offload_folder, "backbone.offload_folder"
        yield _checked("offload folder", lambda: f"{check_writable(folder, key)} can be written to")
    data = _checked("data", lambda: _data(config))
    yield data
    backbone = _checked("backbone", lambda: _backbone(config))
    yield backbone
    if backbone.status == "failed":
        return
    yield _layers(config)
    yield from _added_tokens(config)
    if data.status != "failed":
        yield _checked("rows", lambda: _rows(config))
    if output.status != "failed":
        yield _checked("disk space", lambda: _space(config))


def _trackers(config: RunConfig) -> Iterator[Check]:
    """Yield a warning for each tracker that is not installed, because the run would continue without it."""
    for name in config.train.report_to:
        if importlib.util.find_spec(name) is None:
            found = f"train.report_to: {name} is not installed; the run would continue without it"
            yield Check("trackers", "warning", found, f"pip install 'ptd[{name}]'")


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", check())
    except UserError as error:
        found, _, advice = str(error).partition("; ")
        return Check(name, "failed", found, advice)


def _packages() -> Check:
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("ptd") or []]
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", "warning", "not checked: ptd is not installed", "run pip install -e . to check them")
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} is {found}")
    if wrong:
        return Check("packages", "failed", ", ".join(wrong), "install the required versions with pip")
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))


def _gpus() -> Check:
    built_in = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built_in and not seen and visible != "":
        cause = (
            f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "probably the driver"
        )
        advice = f"{cause}; compare nvidia-smi with python -c 'import torch; torch.cuda.init()'"
        return Check("GPUs", "failed", f"this machine has {built_in}, but torch finds none", advice)
    if not seen:
        return Check(
            "GPUs", "warning", "none; runs use the CPU" + (" (CUDA_VISIBLE_DEVICES hides the GPUs)" * bool(built_in))
        )
    return Check("GPUs", "ok", "; ".join(_gpu(index) for index in range(seen)))


def _trust(config: RunConfig) -> Iterator[Check]:
    risks = {
        "trust_remote_code": "code that comes with the checkpoint runs with your permissions",
        "allow_pickle": "weights in .bin files are unpickled, though only as tensors",
    }
    for key, what in risks.items():
        if getattr(config.backbone, key):
            yield Check("trust", "warning", f"backbone.{key}: {what}", "remove it unless you trust the authors")


def _folder(config: RunConfig) -> str:
    folder = open_run(config, overwrite=False)
    return f"{folder.path}: " + ("; ".join(folder.notes) or "a new run")


def _data(config: RunConfig) -> str:
    named = {"data.train": config.data.train, "data.eval": config.data.eval}
    return ", ".join(check_source(source, what=what) for what, source in named.items() if source is not None) or "none"


def _backbone(config: RunConfig) -> str:
    architecture = architecture_of(config.backbone)
    check_special(load_tokenizer(config.backbone), vocabulary_of(text_config_of(config.backbone)))
    return f"{config.backbone.path}, {architecture}"


def _layers(config: RunConfig) -> Check:
    """Say what runs the layers' elementwise work, with a warning if installing something would let it run faster."""
    try:
        fusion = fusion_of(config.backbone, "cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        return Check("layers", "failed", str(error))
    return Check("layers", "warning" if fusion.remedy else "ok", fusion.found, fusion.remedy)


def _added_tokens(config: RunConfig) -> Iterator[Check]:
    """Yield a warning if the tokenizer has tokens without an embedding, because a run refuses rows that have one."""
    tokenizer, rows = load_tokenizer(config.backbone), vocabulary_of(text_config_of(config.backbone))
    beyond = {} if rows is None else {name: token for name, token in tokenizer.get_vocab().items() if token >= rows}
    if beyond:
        found = f"the tokens {some(sorted(beyond, key=beyond.__getitem__), 5)} are beyond the {rows} embedding rows"
        advice = "a run refuses rows with them; to use them, resize the embedding (model.resize_token_embeddings)"
        yield Check("tokenizer", "warning", found, advice)


def _rows(config: RunConfig) -> str:
    """Read the rows as a run would, if they are local files of at most `MUCH` bytes."""
    given = [source for source in (config.data.train, config.data.eval) if source is not None]
    if not all(as_path(source).exists() for source in given):
        return "not checked: the rows are on the hub"
    if sum(map(_bytes, given)) > MUCH:
        return f"not checked: the rows have more than {decimal_size(MUCH)}; the run reads them when it starts"
    material = read_material(config, Ranks(0, 1, 1, torch.device("cpu")), Reporter())
    held_out = "" if material.held_out is None else f"; for evaluation: {material.held_out.examples.report}"
    return f"{material.examples.report}{held_out}"


def _bytes(source: str) -> int:
    place = as_path(source)
    return sum(file.stat().st_size for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())


def _space(config: RunConfig) -> str:
    trained, adapter = trained_numbers(config)
    state_bytes = OPTIMIZERS[config.train.optimizer].state_bytes
    needed = bytes_to_write(trained, adapter, config.train.save_total_limit, state_bytes)
    return check_space([config.output_dir], needed)


def trained_numbers(config: RunConfig) -> tuple[int, int]:
    """Return how many numbers the run trains, and how many its adapter stores (head and prompt); load no weights.

    If the run learns the labels from its data, the head is counted with two labels. Raises `UserError`.
    """
    task = make_task(with_assumed_labels(config.task), config.data, architecture_of(config.backbone))
    chosen = method(config.method_name)
    settings = chosen.sizes(config.method_config())
    tokenizer = load_tokenizer(config.backbone)
    with _without_data():
        model = blank_model(config.backbone, task.output)
        attachment = Attachment(model)
        shape = attachment.shape
        encoder = chosen.build(settings, shape, TextConditioner(attachment, tokenizer), facts_of(config, task), seed=0)
        readout = task.readout(tokenizer, shape.hidden_size, chosen.head(settings))
        heads = sum(parameter.numel() for parameter in readout.parameters())
        trained = heads + sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
        return trained, heads + encoder().numel()


@contextmanager
def _without_data() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
