"""No content of a run file, a data file, a checkpoint or an adapter is ever run as code or as a command."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import save_backbone

from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.checkpoint.adapter import CONFIG, EXTRA, LARGEST_DESCRIPTION, WEIGHTS
from ptd.config import BackboneConfig, load_config
from ptd.runs.tuned import backbone_of, sections_of
from ptd.types import LayerShape, PrefixLayout, UserError

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "ptd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "commands", "pty"}
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "runs text as code"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "runs a shell"),
    **dict.fromkeys(("torch.load", "torch.jit.load", "torch.package.PackageImporter"), "unpickles"),
    **dict.fromkeys(("np.load", "numpy.load", "np.fromfile", "pandas.read_pickle", "pd.read_pickle"), "may unpickle"),
    **dict.fromkeys(
        (f"yaml.{name}{all_}" for name in ("load", "unsafe_load", "full_load") for all_ in ("", "_all")),
        "makes objects; use yaml.safe_load",
    ),
}


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for a name or attribute, and an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and reason of everything that could run what it should only read."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, f"imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = dotted(node.func).partition(".")
        called = aliases.get(first, first) + (f".{rest}" if rest else "")
        if called in FORBIDDEN_CALLS:
            yield node.lineno, f"{called} {FORBIDDEN_CALLS[called]}"
        for keyword in node.keywords:
            plain_no = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "shell" and not plain_no:
                yield node.lineno, "a shell would read what is in the command; give a list without shell"
            if keyword.arg == "trust_remote_code" and not (
                plain_no or dotted(keyword.value).endswith("config.trust_remote_code")
            ):
                yield node.lineno, "trust_remote_code comes from the run's backbone section or is False"
            if keyword.arg == "allow_pickle" and not plain_no:
                yield node.lineno, "allow_pickle unpickles"
            if keyword.arg == "weights_only":
                yield node.lineno, "weights_only is for torch.load, which unpickles"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_run_nothing_that_they_read(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reason}" for line, reason in dangers(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load as read\nread(text)",
        "import os\nos.system(f'ls {folder}')",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "from subprocess import run\nrun(command, shell=flag)",
        "eval(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=adapter.facts['x'])",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_the_test_sees(source: str) -> None:
    assert list(dangers(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(text)",
        "model.eval()\nload(path)\nre.compile(x)",
        "import subprocess\nsubprocess.run([program, argument], check=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust_remote_code)",
    ],
)
def test_the_test_lets_pass(source: str) -> None:
    assert not list(dangers(ast.parse(source)))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_the_bomb_goes_off_where_pickles_are_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_weights_that_are_a_pickle_are_not_opened(tmp_path: Path) -> None:
    """The pickle is not executed, either by default or with ``allow_pickle``, which reads only tensors."""
    from ptd.backbone import load_model

    folder, ran = save_backbone(tmp_path / "backbone"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(ran)}, folder / "pytorch_model.bin")
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"backbone\.path: cannot load"):
            load_model(BackboneConfig(path=str(folder), allow_pickle=allowed), device=torch.device("cpu"))
    assert not ran.exists()


def test_code_that_comes_with_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    from ptd.backbone import architecture_of, load_tokenizer

    folder, ran = save_backbone(tmp_path / "backbone"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "surprise", "auto_map": {"AutoConfig": "code.Surprise", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Surprise", "auto_map": {"AutoTokenizer": ["code.Surprise", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert BackboneConfig(path=str(folder)).trust_remote_code is False
    with pytest.raises(UserError, match=r"backbone\.path"):
        architecture_of(BackboneConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"backbone\.path"):
        load_tokenizer(BackboneConfig(path=str(folder)))
    assert not ran.exists()


def test_a_run_file_makes_no_objects(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "run.yaml").write_text(
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{ran}]]"
    )
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("backbone: {path: x}\nmethod: {name: prefix}\ndata: {train: x}")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "run.yaml", [f"output_dir=!!python/object/apply:os.mkdir [{ran}]"])
    assert not ran.exists()


# --- adapters, which people download from strangers ----------------------------------------------------------------


def an_adapter(folder: Path, **facts: object) -> Path:
    layout = PrefixLayout((LayerShape(2, 4, 4),))
    save_adapter(folder, Adapter(torch.ones(2, 16), layout, "x", None, "CAUSAL_LM", "PREFIX_TUNING", facts=dict(facts)))
    return folder


def test_an_adapter_decides_nothing_about_trust_or_where_files_are_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("words of the user")
    folder = an_adapter(
        tmp_path / "adapter",
        backbone_config={
            "path": "elsewhere", "trust_remote_code": True, "allow_pickle": True, "dtype": "float32",
            "revision": "evil", "offload": "nvme", "sharding": "world", "offload_folder": "/", "attention": "reference",
        },
        method={"name": "prefix", "num_virtual_tokens": 2, "init": "text", "init_text_file": str(secret)},
        data={"train": str(secret), "eval": "/etc/passwd", "max_length": 8},
        task={"kind": "causal_lm"},
    )  # fmt: skip
    adapter = load_adapter(folder)
    taken = backbone_of(adapter, None)
    assert taken == BackboneConfig(path="x", dtype="float32")
    secret.unlink()  # nothing below reads it: only the new run decides which files are read
    task, data, _ = sections_of(adapter, {})
    assert task is not None
    assert data.max_length == 8


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [2, 16], "data_offsets": [64, 192]},
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
        {"dtype": "I8", "shape": [2, 64], "data_offsets": [0, 128]},
        {"dtype": "U8", "shape": [2, 16, 4], "data_offsets": [0, 128]},
        {"dtype": "I32", "shape": [2, 16], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [-2, -16], "data_offsets": [0, 128]},
    ],
)
def test_a_header_with_absurd_sizes(tmp_path: Path, entry: dict[str, object]) -> None:
    path = an_adapter(tmp_path) / WEIGHTS
    header, data = header_of(path)
    written = json.dumps({**header, "prompt_embeddings": entry}).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + data)
    with pytest.raises(UserError, match=r"--adapter: .*adapter_model\.safetensors"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (EXTRA, {"prompt": {"kind": "prefix_kv", "num_virtual_tokens": 2, "layers": [[2**40, 4, 4, "decoder"]]}}),
        (EXTRA, {"prompt": {"kind": "prefix_kv", "num_virtual_tokens": 2, "layers": [[-2, -4, 4, "decoder"]]}}),
        (EXTRA, {"prompt": {"kind": "prefix_kv", "num_virtual_tokens": True, "layers": [[2, 4, 4, "decoder"]]}}),
        (EXTRA, {"prompt": {"kind": "soft_tokens", "num_virtual_tokens": 2.5, "hidden_size": 16, "in_front": True}}),
        (EXTRA, {"head": {"weight": [2**70, 3]}}),
        (EXTRA, {"data": [1]}),
        (EXTRA, {"method": "prefix"}),
        (EXTRA, {"fingerprint": 3}),
        (CONFIG, {"num_layers": 10**9}),
        (CONFIG, {"num_layers": 1e308}),
        (CONFIG, {"token_dim": "8"}),
        (CONFIG, {"num_attention_heads": 3}),
    ],
)
def test_a_description_with_absurd_sizes(tmp_path: Path, file: str, changes: dict[str, object]) -> None:
    folder = an_adapter(tmp_path)
    described = json.loads((folder / file).read_text())
    if file == CONFIG:
        (folder / EXTRA).unlink()
    (folder / file).write_text(json.dumps({**described, **changes}))
    with pytest.raises(UserError, match=r"--adapter: the configuration in .* is incomplete or damaged"):
        load_adapter(folder)


def test_a_description_that_is_too_large(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path)
    (folder / EXTRA).write_text(" " * LARGEST_DESCRIPTION + "{}")
    with pytest.raises(UserError, match="larger than 16 MiB"):
        load_adapter(folder)


def test_an_adapter_with_a_pickle_in_it(tmp_path: Path) -> None:
    """PEFT also reads adapter_model.bin, which is a pickle; ptd reads no pickle, whatever its name."""
    folder, ran = an_adapter(tmp_path / "adapter"), tmp_path / "ran"
    (folder / WEIGHTS).unlink()
    for name in ("adapter_model.bin", WEIGHTS):
        (folder / name).write_bytes(pickle.dumps(Bomb(ran)))
        with pytest.raises(UserError, match=r"--adapter: cannot read .*adapter_model\.safetensors"):
            load_adapter(folder)
    assert not ran.exists()
