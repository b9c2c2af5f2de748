"""Generated text on the GPU: the CPU's tokens, no host wait within a pass, and waits that do not grow with the rows.

The reference of the texts is transformers itself, which gets the prefix as keys and values in its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, VOCAB, save_backbone, tiny_model
from matrix import METHODS, TASKS
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ptd.commands.train import train
from ptd.config import parse_config
from ptd.data import load_rows
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import evaluate_held_out
from ptd.inject import Attachment
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode
from ptd.runs.tuned import Tuned, load_tuned
from ptd.types import PrefixKV, Reporter
from tests.gpu_paper.device import EMULATED, watched

GPU = torch.device("cuda", 0)
P, NEW = 4, 6
IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0
CASES = [
    ("llama", {}), ("llama", {"cache_implementation": "static"}), ("llama", {"num_beams": 3}),
    ("mistral", {}), ("gemma2", {}), ("gemma2", {"cache_implementation": "static"}), ("gpt2", {}),
    ("t5", {}), ("bart", {"cache_implementation": "static"}),
]  # fmt: skip


def attached(model: Any) -> Attachment:
    attachment = Attachment(model)
    drawn, layers = torch.Generator().manual_seed(0), attachment.shape.layers
    sizes = [[(layer.kv_heads, getattr(layer, name)) for layer in layers] for name in ("key_dim", "value_dim")]
    keys, values = (
        tuple(torch.randn(P, *size, generator=drawn).to(model.device) for size in of_layers) for of_layers in sizes
    )
    attachment.set(PrefixKV(keys, values))
    return attachment


def written(family: str, device: torch.device, mask: Tensor, **options: Any) -> Tensor:
    """Return the tokens that a model of this family with a prefix writes on a device, never its end token."""
    attachment = attached(tiny_model(family).to(device))
    if family in ENCODER_DECODERS:
        mask = mask.flip(1)
    inputs = attachment.generation_inputs(IDS.to(device), mask.to(device))
    always = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    with torch.no_grad(), attachment.padding_known(not mask.all()):
        return attachment.model.generate(**inputs, **always, **options).cpu()


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_gpu_writes_the_tokens_of_a_cpu(family: str, options: dict[str, Any]) -> None:
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    for mask in (LEFT, torch.ones_like(LEFT)):
        wanted = written(family, torch.device("cpu"), mask, **beams)
        assert written(family, GPU, mask, **options).tolist() == wanted.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gpu_writes_what_transformers_writes_with_the_prefix_in_its_cache(family: str) -> None:
    attachment = attached(tiny_model(family).to(GPU))
    plain, cache = tiny_model(family), DynamicCache()
    for number, slot in enumerate(attachment.slots):
        cache.update(*(x.cpu().transpose(0, 1)[None] for x in (slot.key, slot.value)), number)
    ids, found = IDS[1:], []
    with torch.no_grad():
        tokens, begin = ids, P
        while len(found) < NEW:
            positions = torch.arange(begin, begin + tokens.shape[1])[None]
            output = plain(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            begin += tokens.shape[1]
            logits = output.logits[:, -1]
            logits[:, plain.generation_config.eos_token_id] = -torch.inf
            tokens = logits.argmax(-1, keepdim=True)
            found.append(int(tokens))
        attachment.remove()
    assert written(family, GPU, torch.ones_like(LEFT))[1, ids.shape[1] :].tolist() == found


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_waits_for_nothing(static: bool, padded: bool, dtype: torch.dtype) -> None:
    attachment = attached(tiny_model("llama").to(GPU, dtype))
    model, mask = attachment.model, LEFT if padded else torch.ones_like(LEFT)
    mask = torch.cat([mask, torch.ones_like(mask)], dim=1).to(GPU)
    cache: Any = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    ids = IDS.to(GPU)
    with torch.no_grad(), attachment.padding_known(padded), watched() as seen:
        for doing, tokens, first, last in (
            ("prompt", ids, 0, 9),
            ("first", ids[:, :1], 9, 10),
            ("token", ids[:, :1], 10, 11),
        ):
            seen.doing = doing
            positions = torch.arange(first, last, device=GPU)[None]
            given = {} if static else {"attention_mask": mask[:, :last]}
            model(input_ids=tokens, position_ids=positions, past_key_values=cache, **given)
    assert [wait for wait in seen.waited if wait[0] == "token"] == []
    kernels = {name: count for (doing, name), count in seen.launched.items() if doing == "token" and "triton" in name}
    if EMULATED:
        layers = model.config.num_hidden_layers
        assert kernels == {"triton.decode_kernel": layers}, "the prefix, the cache and its mask in one launch per layer"


# ---- waits of whole evaluations


@pytest.fixture(scope="module")
def tuned_for(tmp_path_factory: pytest.TempPathFactory, labelled_rows: Path) -> Callable[[str, str, str], Tuned]:
    """Return a function that trains one step of a method on a family for a task and loads the adapter."""
    folder = tmp_path_factory.mktemp("waits")

    def build(method: str, family: str, task: str) -> Tuned:
        backbone, out = folder / family, folder / f"{method}-{family}-{task}"
        if not backbone.exists():
            save_backbone(backbone, family)
        raw = {
            "backbone": {"path": str(backbone), "dtype": "float32"},
            "method": METHODS[method],
            "task": TASKS[task],
            "data": {"train": str(labelled_rows), "eval": str(labelled_rows), "max_length": 40},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4},
            "output_dir": str(out),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ptd.commands.train.leave_report", lambda folder: None)
            train(parse_config(raw))
        return load_tuned(str(out / "adapter"), None, Ranks.start())

    return build


EVALUATED = [
    ("prefix-direct", "llama", "causal_lm"), ("prefix-direct", "t5", "seq2seq_lm"),
    ("p_tuning_v2-direct", "bert", "classification"), ("prefix-direct", "llama", "cloze"),
    ("p_tuning_v2-direct", "llama", "token_classification"), ("p_tuning_v2-direct", "bert", "question_answering"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "family", "task"), EVALUATED)
def test_waits_do_not_grow_with_the_rows(
    method: str, family: str, task: str, tuned_for: Callable[[str, str, str], Tuned], labelled_rows: Path
) -> None:
    """An evaluation waits once, for its sums. Generating waits per batch and per token, but not per row."""
    tuned, ranks = tuned_for(method, family, task), Ranks.start()
    rows = load_rows(str(labelled_rows), "train", what="rows")
    waits = {}
    for count in (10, 100):
        many = rows.select([number % len(rows) for number in range(count)])
        held_out = tuned.held_out(many, 4, what="rows", labelled=True)
        with watched() as seen:
            evaluate_held_out(held_out, tuned.prepared, tuned.readout, ranks, Reporter())
        waits[count] = Counter(operation for _, operation, _ in seen.waited)
    assert waits[10] == waits[100]
    assert sum(waits[100].values()) <= 2, waits
    if not tuned.task.generates:
        return
    for count in (2, 5):
        prompts, _ = tuned.task.prompts_and_references(
            rows.select([number % len(rows) for number in range(count)]), tuned.tokenizer, max_length=40, what="rows"
        )
        with watched() as seen:
            decode(tuned, prompts, Decoding(max_new_tokens=3), ranks, batch_size=count, reporter=Reporter())
        own = [wait for wait in seen.waited if "generation/utils" not in wait[2]]
        waits[count] = Counter(where for _, _, where in own)
    assert sum(waits[2].values()) == sum(waits[5].values()), waits
