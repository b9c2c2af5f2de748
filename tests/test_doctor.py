"""``ptd doctor``: it says what would really be chosen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from ptd_kernels import available_backends, explain_backend

from ptd.doctor import examine
from ptd.inject.explain import CASES
from ptd.types import UserError


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
    assert reasons["auto"].startswith("merge: ")
    for name in ("merge-cudnn", "merge-flash-attn-2", "merge-flash-attn-4"):
        assert "cannot do this" in reasons[name]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="there is no 'int3'"):
        examine(dtype="int3")


def test_from_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "ptd.cli", "doctor"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]
