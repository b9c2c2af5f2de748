"""The planner's model of what DeepSpeed gathers, compared with DeepSpeed itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from families import save_backbone

from ptd.commands.plan import plan, trace_run
from ptd.config import parse_config
from ptd.planner.zero3_gathers import Limits, Use, Weight, gathers

HERE = Path(__file__).parent
LIMITS = {
    "stage3_prefetch_bucket_size": 3_000,
    "stage3_param_persistence_threshold": 100,
    "stage3_max_reuse_distance": 9_000,
    "stage3_max_live_parameters": 30_000,
}


def test_shards_and_traffic_are_those_of_deepspeed(launch: Any, tmp_path: Path) -> None:
    """On two ranks in fp32, the plan gives the exact size of a rank's shards and the exact bytes it sends per step."""
    run = {
        "backbone": {"path": str(save_backbone(tmp_path / "llama", num_hidden_layers=4)), "dtype": "float32"},
        "method": {"name": "prefix", "num_virtual_tokens": 3},
        "data": {"train": "unread.jsonl", "max_length": 16},
        "train": {"per_device_train_batch_size": 2},
        "deepspeed": {"zero_optimization": {"stage": 3, **LIMITS}},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    launch(2, HERE / "worker_zero3_gathers.py", tmp_path / "run.json", tmp_path / "real.json")
    real = json.loads((tmp_path / "real.json").read_text())
    config = parse_config(run)
    found = plan(config, gpus=2, device="cpu", memory="1GiB", alternatives=False)
    trace = found.trace
    assert found.own.placement.name == "world"
    shards = sum(-(-weight.numel // 2) for weight in trace.weights)
    assert shards == real["shards"]
    assert found.own.items["weights"] == 4 * shards + trace.fixed_bytes
    assert found.own.sent_for_weights == {"inside": real["sent"], "between": 0}


def uses_of(layers: int) -> list[Use]:
    both = [Use(kind, layer) for layer in range(layers) for kind in ("fetch", "release")]
    return both + [Use(kind, layer, True) for layer in reversed(range(layers)) for kind in ("fetch", "release")]


def test_a_wide_prefetch_holds_all_and_none_holds_one_layer() -> None:
    weights = [Weight(1000, 2)] * 6
    modules = [(layer,) for layer in range(6)]
    wide = gathers(weights, modules, uses_of(6), 4, Limits(param_persistence_threshold=0))
    assert max(moment.live for moment in wide.moments) == 6 * 2000 + 5 * 2000, "copies, beside what they come from"
    assert wide.nbytes == 6 * 2000, "what a forward pass keeps the backward one does not gather"
    narrow = gathers(weights, modules, uses_of(6), 4, Limits(0, 0, 1000, 0))
    assert max(moment.live for moment in narrow.moments) == 2000
    assert narrow.nbytes == 12 * 2000, "once forward and once backward"


def test_small_weights_are_never_gathered_again() -> None:
    found = gathers([Weight(10, 4), Weight(1000, 4)], [(0,), (1,)], uses_of(2), 3, Limits(0, 100, 10**9, 0))
    assert found.nbytes == 2 * 1002 * 4, "padded to whole shards"
    assert min(moment.live for moment in found.moments) == 40


def test_a_trace_of_a_step_has_a_use_for_each_pass(tmp_path: Path) -> None:
    config = parse_config(
        {
            "backbone": {"path": str(save_backbone(tmp_path)), "gradient_checkpointing": True},
            "method": {"name": "prompt"},
            "data": {"train": "unread.jsonl", "max_length": 16},
        }
    )
    trace = trace_run(config, capability=None, local_ranks=1)
    events = [interval.event for interval in trace.timeline if interval.event is not None]
    assert events[0].kind == "fetch"
    fetched = Counter(event.module for event in events if event.kind == "fetch")
    assert max(fetched.values()) == 3, "forward, recomputation and backward"
