"""The distributed optimizer step, compared with one process: gradients, sharding, network bytes, skipped steps.

worker_steps.py measures on 1, 2 and 4 ranks, one launch each; each test here checks one of its cases.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker_steps.py")
WORLDS = (1, 2, 4)

# fp32 against an fp64 reference with another attention algorithm. The largest error of all cases is 5e-6, in the third
# step, which includes the rounding errors of two optimizer steps. A mean of means has an error of 1.6.
TOLERANCE = 1e-5

P, EMBEDDING, WIDTH = 5, 12, 2 * 2 * 2 * 8  # tokens of the prompt; 2 layers × (keys, values) × 2 heads × 8
HIDDEN_SIZES = (8, 64, 512)

GRID = [
    f"{placement}/accumulation{accumulation}/{encoder}/{layout}"
    for placement, accumulation, encoder, layout in itertools.product(
        ("replicated", "zero3"), (1, 4), ("direct", "mlp"), ("packed", "padded")
    )
]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world}ranks")
def world(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def measured(world: int, launch: Any, backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("steps") / "results.json"
    launch(world, WORKER, backbone_dir, results)
    return dict(json.loads(results.read_text()))


def assert_like_one_process(case: dict[str, Any]) -> None:
    assert "error" not in case, case["error"]
    assert case["gradient_error"] <= TOLERANCE, case["worst_gradient"]
    assert case["parameter_error"] <= TOLERANCE
    assert case["change_error"] <= TOLERANCE
    assert case["loss_error"] <= TOLERANCE
    assert case["norm_error"] <= TOLERANCE
    assert case["ranks_equal"]
    assert case["tokens"] == case["expected_tokens"]
    assert case["supervised"] == case["expected_supervised"]


@pytest.mark.parametrize("case", GRID)
def test_training_equals_one_process_with_plain_autograd(measured: dict[str, Any], case: str) -> None:
    assert_like_one_process(measured[f"training/{case}"])


@pytest.mark.parametrize("encoder", ["frozen_first", "uneven_mlp", "narrow_mlp"])
def test_training_of_encoders_that_do_not_divide(measured: dict[str, Any], encoder: str) -> None:
    """The encoder has a hidden layer of 6, or of 3 (too few to split over four ranks), or a part without a gradient."""
    assert_like_one_process(measured[f"training/{encoder}"])


def test_training_with_the_encoder_split_within_nodes(measured: dict[str, Any], world: int) -> None:
    if world < 4:
        pytest.skip("two nodes of two ranks")
    assert_like_one_process(measured["training/two_nodes_mlp"])


def test_the_data_tells_a_mean_of_means_from_the_mean(measured: dict[str, Any]) -> None:
    assert measured["mean_of_means"] > 0.1


def test_some_slots_have_no_row(measured: dict[str, Any], world: int) -> None:
    fillers = {case: measured[f"training/{case}"]["fillers"] for case in GRID}
    for case, count in fillers.items():
        assert (count > 0) == ("accumulation4" in case or world == 4), case


@pytest.mark.parametrize("case", GRID)
def test_clipping_brings_the_norm_to_the_limit(measured: dict[str, Any], case: str) -> None:
    result = measured[f"training/{case}"]
    assert result["smallest_norm"] > 0.1
    # torch multiplies by max_grad_norm / (norm + 1e-6), so the norm is below the limit by a relative 1e-6 / norm
    assert result["clipped_norms"] == pytest.approx([0.05] * 3, rel=2e-5)


def test_wide_layer_and_its_moments_are_divided_by_the_ranks(measured: dict[str, Any], world: int) -> None:
    full = measured["sharding"]["full"]
    assert full == WIDTH * 64 * 4
    share = full // world
    for held in measured["sharding"]["local"]:
        assert held == {"weight": share, "exp_avg": share, "exp_avg_sq": share, "step": 4}


def all_reduce_bytes(world: int, *numbers_of_bytes: int) -> int:
    """Return the bytes that all ranks together send to all-reduce buffers of these sizes."""
    return sum(2 * (world - 1) * size for size in numbers_of_bytes)


@pytest.mark.parametrize("placement", ["replicated", "zero3"])
def test_network_bytes_of_a_step(measured: dict[str, Any], world: int, placement: str) -> None:
    """A step reduces loss, weight, two counts and a stop flag in fp64, and the gradient at the prompt.

    An MLP adds its output, the gradient dE of its embedding, and four norms.
    """
    counts, prompt, embedding, norms = 5 * 8, P * WIDTH * 4, P * EMBEDDING * 4, 4 * 4
    direct = measured[f"network/{placement}/direct"]["bytes"]
    assert direct["network_bytes_prompt"] == all_reduce_bytes(world, counts, prompt)
    for hidden in HIDDEN_SIZES:
        mlp = measured[f"network/{placement}/mlp{hidden}"]["bytes"]
        assert mlp["network_bytes_prompt"] == all_reduce_bytes(world, counts, prompt, prompt, embedding, norms)
        assert mlp["network_bytes_backbone"] == direct["network_bytes_backbone"]
    assert direct["network_bytes"] == direct["network_bytes_prompt"] + direct["network_bytes_backbone"]
    assert direct["network_bytes_between_nodes"] == 0


def test_backbone_bytes_are_those_of_gathering_it(measured: dict[str, Any], world: int) -> None:
    """Each weight is gathered at least once and at most twice (forward and backward) per micro-batch."""
    assert measured["network/replicated/direct"]["bytes"]["network_bytes_backbone"] == 0
    sent = measured["network/zero3/direct"]["bytes"]["network_bytes_backbone"]
    whole = 4 * (world - 1) * measured["backbone_parameters"]
    assert whole <= sent <= 2 * whole


@pytest.mark.parametrize("encoder", ["direct", *(f"mlp{hidden}" for hidden in HIDDEN_SIZES)])
@pytest.mark.parametrize("placement", ["replicated", "zero3"])
def test_the_meter_misses_no_collective(measured: dict[str, Any], world: int, placement: str, encoder: str) -> None:
    """The meter counts the same collectives in a step as torch's CommDebugMode, which is independent of the meter."""
    assert_same_collectives(measured[f"network/{placement}/{encoder}"], world)


def assert_same_collectives(case: dict[str, Any], world: int) -> None:
    names = {"c10d.allreduce_": "all_reduce", "c10d_functional.all_reduce": "all_reduce"}
    names |= {"c10d._allgather_base_": "all_gather", "c10d._reduce_scatter_base_": "reduce_scatter"}
    by_torch, seen_by_torch = dict(case["torch"]), dict[str, int]()
    if world > 1:  # the record gathers the counts of all ranks: first their lengths, then the counts
        assert by_torch.pop("c10d.allgather_") == 2
    for operation, count in by_torch.items():
        seen_by_torch[names[operation]] = seen_by_torch.get(names[operation], 0) + count
    assert case["counted"] == seen_by_torch


# ---- four ranks as two nodes of two


@pytest.fixture
def two_nodes(measured: dict[str, Any], world: int) -> dict[str, Any]:
    if world < 4:
        pytest.skip("two nodes of two ranks")
    return {name.removeprefix("nodes/"): case for name, case in measured.items() if name.startswith("nodes/")}


def test_sum_over_nodes(two_nodes: dict[str, Any]) -> None:
    """The first tensor is so small that it is summed in one collective."""
    sums = two_nodes["sums"]
    assert max(sums["errors"]) <= 1e-6
    assert sums["ranks_equal"] == [True] * 3
    assert sums["collectives"] == [1, 3, 3]


@pytest.mark.parametrize("case", ["direct", "mlp8", "mlp512", "node"])
def test_bytes_between_nodes_are_those_of_the_prompt(two_nodes: dict[str, Any], case: str) -> None:
    """The bytes do not depend on the encoder's width, nor on whether the backbone is sharded inside each node.

    The prompt crosses between the two nodes in both directions. The counts pass through a ring over the four ranks; two
    of its links cross between nodes.
    """
    sent, prompt, counts, embedding, norms = two_nodes[case]["bytes"], P * WIDTH * 4, 5 * 8, P * EMBEDDING * 4, 4 * 4
    crossing_counts = 2 * 2 * 3 * counts // 4
    assert sent["network_bytes_between_nodes"] == 2 * prompt + crossing_counts
    assert sent["network"]["between_nodes"] == {"prompt": {"all_reduce": 2 * prompt + crossing_counts}}
    inside = sent["network"]["inside_nodes"]["prompt"]
    assert inside["reduce_scatter"] == inside["all_gather"] == 2 * prompt
    of_encoder = 2 * all_reduce_bytes(2, prompt, embedding, norms) if case.startswith("mlp") else 0
    assert inside["all_reduce"] == crossing_counts + of_encoder


def test_backbone_bytes_over_two_nodes(two_nodes: dict[str, Any], measured: dict[str, Any]) -> None:
    """Sharded over all ranks, 3/4 of the weights pass each of four links, two of which are between nodes.

    Sharded inside nodes, 1/2 of the weights pass each link.
    """
    world, node = two_nodes["world"]["bytes"]["network"], two_nodes["node"]["bytes"]["network"]
    assert world["between_nodes"]["backbone"] == world["inside_nodes"]["backbone"]
    assert 3 * node["inside_nodes"]["backbone"]["all_gather"] == 4 * world["inside_nodes"]["backbone"]["all_gather"]
    whole = 4 * 2 * measured["backbone_parameters"]
    assert whole <= node["inside_nodes"]["backbone"]["all_gather"] <= 2 * whole


@pytest.mark.parametrize("case", ["direct", "mlp512", "world", "node"])
def test_the_meter_misses_no_collective_of_two_nodes(two_nodes: dict[str, Any], case: str) -> None:
    assert_same_collectives(two_nodes[case], 4)


def test_shard_groups(two_nodes: dict[str, Any]) -> None:
    groups = two_nodes["shard_groups"]
    expected = [[None, [rank // 2 * 2, rank // 2 * 2 + 1], [rank], None] for rank in range(4)]
    assert groups["members"] == [[*those, those[1]] for those in expected]
    assert groups["made_once"]
    assert "backbone.sharding_group_size: 4 ranks do not divide into groups of 3" in groups["refusal"]


@pytest.mark.parametrize("case", ["direct/nan", "direct/inf", "mlp/nan", "mlp/gradient"])
def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all(measured: dict[str, Any], world: int, case: str) -> None:
    result = measured[f"skipping/{case}"]
    assert result["changed"] == [True, True, False, True, True]  # parameters and moments, bit for bit
    assert result["skipped"] == [[0, 0, 1, 0, 0]] * world
    assert result["ranks_equal"]
    assert result["finite"]
    assert result["optimizer_steps"] == 4
    (note,) = result["notes"]
    assert note.startswith("step 3 skipped on all ranks: ")
    assert "nan" in note


def test_overflow_on_one_rank_lowers_the_loss_scale_on_all(measured: dict[str, Any], world: int) -> None:
    """The scale, a power of two, changes no bit of the trained parameters and the moments."""
    result = measured["skipping/mlp/scaled"]
    assert result["loss_scale"] == [[2.0**16] * 3 + [2.0**15] * 2] * world
    assert result["skipped"] == [[0, 0, 1, 0, 0]] * world
    assert result["ranks_equal"]
    assert result["states"] == measured["skipping/mlp/gradient"]["states"]
    assert result["notes"] == ["step 3 skipped on all ranks: a gradient overflowed; loss scale lowered to 32768"]


def test_ten_skipped_steps_in_a_row_end_the_run(measured: dict[str, Any], world: int) -> None:
    result = measured["giving_up/ten"]
    assert result["records"] == 2 + 9
    for message in result["raised"]:
        assert message.startswith("10 steps in a row")
    assert len(result["raised"]) == world


def test_nine_skipped_steps_in_a_row_do_not(measured: dict[str, Any], world: int) -> None:
    assert measured["giving_up/nine"] == {"raised": [""] * world, "records": 14}


@pytest.mark.parametrize("case", ["nodes_to_flat", "flat_to_nodes"])
def test_checkpoint_moves_between_arrangements_of_ranks(measured: dict[str, Any], world: int, case: str) -> None:
    if world < 4:
        pytest.skip("two nodes of two ranks, and four ranks of one node")
    assert measured[f"checkpoint/{case}"] == {"tensors": 20, "different": []}
