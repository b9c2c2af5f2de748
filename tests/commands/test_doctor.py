"""``ptd doctor`` reports the attention backends that a run would choose and the checks that would fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import save_backbone
from ptd_kernels import available_backends, explain_backend

from ptd import cli
from ptd.commands import doctor
from ptd.commands.doctor import check_machine, check_run, examine
from ptd.config import parse_config
from ptd.distributed.preflight import bytes_to_write
from ptd.inject.explain import CASES
from ptd.types import UserError
from ptd.values import decimal_size


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 128), ("float16", 80)])
def test_every_backend_is_explained_for_every_kind_of_batch(dtype: str, head_dim: int) -> None:
    found = examine(dtype=dtype, head_dim=head_dim)["attention"]
    assert (found["dtype"], found["head_dim"]) == (dtype, head_dim)
    assert set(found["backends"]) == set(CASES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case, reasons in found["backends"].items():
        assert set(reasons) == {"auto", *available_backends()}
        name, reason = explain_backend(device=device, dtype=getattr(torch, dtype), head_dim=head_dim, **CASES[case])
        assert reasons["auto"] == f"{name}: {reason}"
        assert reasons[name] == reason
        assert all(reasons.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_on_a_cpu_the_gpu_libraries_say_why_not() -> None:
    reasons = examine()["attention"]["backends"]["packed"]
    assert reasons["auto"].startswith("joined: ")
    for name in ("merge-cudnn", "merge-flash-attn-2", "merge-flash-attn-4"):
        assert "cannot do this" in reasons[name]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="there is no dtype 'int3'"):
        examine(dtype="int3")


def test_this_machine() -> None:
    """Two real ranks rendezvous and compute a sum; the installed packages are those that ptd requires."""
    checks = {check.name: check for check in check_machine()}
    assert list(checks) == ["packages", "GPUs", "collectives"]
    assert all(check.status != "failed" for check in checks.values()), checks
    assert checks["collectives"].found.endswith("summed a number")
    assert torch.__version__ in checks["packages"].found or checks["packages"].status == "warning"


@pytest.mark.parametrize("there", ["missing", "other version"])
def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    wanted = ["numpy", 'absent; extra == "gpu"', "absent" if there == "missing" else "torch<1"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    check = doctor._packages()
    assert check.status == "failed"
    expected = "absent is missing" if there == "missing" else f"torch<1 is {torch.__version__}"
    assert check.found == expected


def run_file(folder: Path, path_of_backbone: Path, **sections: Any) -> Path:
    run = {
        "backbone": {"path": str(path_of_backbone)},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "output_dir": str(folder / "out"),
    }
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    path = folder / "run.yaml"
    path.write_text(json.dumps({key: {**run.get(key, {}), **value} if isinstance(value, dict) else value
                                for key, value in {**run, **sections}.items()}))  # fmt: skip
    return path


def test_a_run_that_can_start(tmp_path: Path, backbone_dir: Path) -> None:
    checks = {check.name: check for check in check_run(run_file(tmp_path, backbone_dir), ["train.save_total_limit=3"])}
    places = ["output folder", "run folder", "data"]
    assert list(checks) == ["run file", *places, "backbone", "layers", "rows", "disk space"]
    assert {check.status for check in checks.values()} == {"ok"}
    # The prefix has keys and values of 4 tokens for 2 layers with 2 heads of 8 numbers: 256 numbers.
    assert f"{decimal_size(bytes_to_write(256, 256, 3, 8))} needed" in checks["disk space"].found
    assert not (tmp_path / "out").exists()


BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"train": {"max_step": 1}}, "run file", "did you mean train.max_steps"),
    "no backbone": ({"backbone": {"path": "./nowhere"}}, "backbone", "there is no model folder ./nowhere"),
    "no data": ({"data": {"train": "./nowhere.csv"}}, "data", "there is no file or folder ./nowhere.csv"),
    "output is a device": ({"output_dir": "/proc/none"}, "output folder", "cannot write to /proc"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_cannot(tmp_path: Path, backbone_dir: Path, case: str) -> None:
    sections, name, said = BROKEN[case]
    failed = [
        check for check in check_run(run_file(tmp_path, backbone_dir, **sections), []) if check.status == "failed"
    ]
    assert [check.name for check in failed] == [name]
    assert said in failed[0].found + failed[0].advice


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbone_dir: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    check = list(check_run(run_file(tmp_path, backbone_dir), []))[-1]
    assert (check.name, check.status) == ("disk space", "failed")
    assert "1 kB free" in check.found
    assert "train.save_total_limit" in check.advice


def test_trust_is_pointed_out(tmp_path: Path, backbone_dir: Path) -> None:
    run = run_file(tmp_path, backbone_dir, backbone={"trust_remote_code": True, "allow_pickle": True})
    found = [check.found for check in check_run(run, []) if check.status == "warning"]
    assert [line.partition(":")[0] for line in found] == ["backbone.trust_remote_code", "backbone.allow_pickle"]


def test_a_tracker_that_is_not_installed_is_pointed_out(
    tmp_path: Path, backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    run = run_file(tmp_path, backbone_dir, train={"report_to": ["tensorboard", "wandb"]})
    (check,) = [check for check in check_run(run, []) if check.name == "trackers"]
    assert check.found == "train.report_to: wandb is not installed; the run would continue without it"
    assert check.advice == "pip install 'ptd[wandb]'"


@pytest.mark.parametrize(
    ("family", "method", "task"),
    [
        ("llama", {"name": "prefix", "prefix_projection": True, "encoder_hidden_size": 12}, {}),
        ("llama", {"name": "prompt", "init": "text", "init_text": "some words"}, {}),
        ("bert", {"name": "p_tuning_v2"}, {"kind": "classification"}),
        ("bert", {"name": "head", "hidden_sizes": [7]}, {"kind": "token_classification", "labels": ["O", "A", "B"]}),
        ("t5", {"name": "p_tuning", "num_virtual_tokens": 3}, {"kind": "seq2seq_lm"}),
    ],
)
def test_what_is_trained_is_counted_without_weights(tmp_path: Path, family: str, method: Any, task: Any) -> None:
    """`trained_numbers` returns the numbers of parameters of the encoder and the head that a run would build."""
    from ptd.backbone import TextConditioner, architecture_of, load_model, load_tokenizer
    from ptd.inject import Attachment
    from ptd.methods import TaskFacts
    from ptd.methods import method as registered
    from ptd.tasks import make_task
    from ptd.tasks.labels import with_assumed_labels

    folder = save_backbone(tmp_path / family, family)
    run = run_file(tmp_path, folder, method={"num_virtual_tokens": 4} | method, task=task)
    raw = json.loads(run.read_text())
    raw["method"] = method
    config = parse_config(raw)
    built = make_task(with_assumed_labels(config.task), config.data, architecture_of(config.backbone))
    model = load_model(config.backbone, built.output, device=torch.device("cpu"))
    tokenizer = load_tokenizer(config.backbone)
    attachment = Attachment(model)
    shape = attachment.shape
    facts = TaskFacts(config.task.kind, built.labels, built.cloze, built.output == "body", built.virtual_tokens)
    chosen, settings = registered(config.method_name), config.method_config()
    encoder = chosen.build(settings, shape, TextConditioner(attachment, tokenizer), facts, seed=0)
    readout = built.readout(tokenizer, shape.hidden_size, chosen.head(settings))
    head = sum(parameter.numel() for parameter in readout.parameters())
    own = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert doctor.trained_numbers(config) == (own + head, encoder().numel() + head)


def test_from_the_command_line(tmp_path: Path, backbone_dir: Path) -> None:
    run = run_file(tmp_path, backbone_dir, output_dir="/proc/none")
    command = [sys.executable, "-m", "ptd.cli", "doctor", str(run), "--json"]
    wrong = {**os.environ, "GLOO_SOCKET_IFNAME": "nowhere0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wrong)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]
    assert set(found["attention"]["backends"]) == set(CASES)
    failed = {check["name"]: check for check in found["checks"] if check["status"] == "failed"}
    assert list(failed) == ["collectives", "output folder"]
    assert "GLOO_SOCKET_IFNAME (now nowhere0" in failed["collectives"]["found"] + failed["collectives"]["advice"]


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "check_machine", lambda: [doctor.Check("disk", "failed", "it is [full]", "empty it")])
    monkeypatch.setattr(sys, "argv", ["ptd", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    table = " ".join(capsys.readouterr().out.split())
    assert "disk failed it is [full] empty it" in table
    for case, reasons in examine()["attention"]["backends"].items():
        assert f"{case} auto {reasons['auto']}"[:60] in table
