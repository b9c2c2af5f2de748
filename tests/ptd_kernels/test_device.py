"""PTD_TEST_DEVICE puts the inputs of the attention tests on a device, and nothing else in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECK = """
import conftest, torch  # by which pytest makes attention_cases importable
import attention_cases
assert torch.get_default_device().type == "cpu"
drawn = torch.randn(3, generator=torch.Generator())  # as any test draws that has nothing to do with that device
assert drawn.device.type == "cpu"
case = attention_cases.Case(options={"bias": torch.zeros(1, 4, 13, 13)})
with attention_cases.on_device():
    made = torch.zeros(3)
made = [made, *case.tensors(), case.options["bias"], attention_cases.offsets(13)]
assert {x.device.type for x in made} == {"meta"}, {x.device.type for x in made}
assert torch.get_default_device().type == "cpu"
"""


def test_the_default_device_stays() -> None:
    """The default device does not change if the inputs are on `meta`, a device that every machine has."""
    found = f"import ptd_kernels, sys; sys.path.append({str(Path(__file__).parents[1])!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{found}\n{CHECK}"],
        env={**os.environ, "PTD_TEST_DEVICE": "meta"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
