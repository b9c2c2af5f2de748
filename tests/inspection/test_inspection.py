"""``ptd inspect``: what it reports about a prompt, without and with rows, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import runpy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCAB, save_backbone, tiny_model, tiny_tokenizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from peft import PromptTuningConfig, get_peft_model

from ptd.checkpoint import Adapter, save_adapter
from ptd.commands.evaluate import evaluate
from ptd.inspection import inspect, write_inspection
from ptd.inspection.effects import POINTS, enough, sizes_to_try
from ptd.inspection.figures import figures
from ptd.inspection.geometry import describe_tensors, layer_names
from ptd.inspection.tables import sections
from ptd.types import EmptyLayout, LayerShape, PrefixKV, PrefixLayout, SoftLayout, UserError

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))
P, HIDDEN, ROWS, SELF, saved = support.P, support.HIDDEN, support.ROWS, support.SELF, support.saved


# ---- the prompt by itself


def test_rank_and_norm() -> None:
    """Ranks and norms are right for one direction, for one per token, and for two, one with nine times the energy."""
    one = torch.ones(P, 2, 8)
    four = torch.eye(P, 16).view(P, 2, 8)
    two = torch.zeros(P, 2, 8)
    two[0, 0, 0], two[1, 0, 1] = 3.0, 1.0
    found = describe_tensors(PrefixKV((one, two), (four, one)), (SELF, SELF))
    by_name = {(each["layer"], each["part"]): each for each in found}
    flat, full, uneven = (by_name[key] for key in (("layer 0", "key"), ("layer 0", "value"), ("layer 1", "key")))
    assert (flat["effective_rank"], flat["rank_90"], flat["norm"]) == (pytest.approx(1), 1, pytest.approx(8**0.5))
    assert (full["effective_rank"], full["rank_90"], full["norm"]) == (pytest.approx(P), P, pytest.approx(0.5))
    assert uneven["energy"][0] == pytest.approx(0.9)
    assert uneven["rank_90"] == 1, "exactly 90 % is enough"
    assert uneven["effective_rank"] == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_names_of_layers() -> None:
    encoder, decoder, cross = (LayerShape(2, 8, 8, kind) for kind in ("encoder", "decoder", "cross"))
    assert layer_names((SELF, SELF)) == ["layer 0", "layer 1"]
    wanted = ["encoder 0", "encoder 1", "decoder 0", "cross 0", "decoder 1", "cross 1"]
    assert layer_names((encoder, encoder, decoder, cross, decoder, cross)) == wanted


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5"])  # gemma3 scales its embeddings, t5 shares them
def test_nearest_tokens(tmp_path: Path, family: str) -> None:
    backbone = save_backbone(tmp_path / "backbone", family)
    model = tiny_model(family)
    chosen = [40, 77, VOCAB - 1, 6]
    flat = model.get_input_embeddings().weight.detach()[chosen] * torch.tensor([[0.1], [1.0], [3.0], [-1.0]])
    adapter = saved(tmp_path / "adapter", backbone, SoftLayout(HIDDEN), flat, task={})
    nearest = inspect(adapter)["nearest"]
    assert [each["near"][0]["id"] for each in nearest][:3] == chosen[:3]
    for each in nearest[:3]:
        assert each["near"][0]["cosine"] == pytest.approx(1, abs=1e-5)
        assert each["near"][0]["token"] == tiny_tokenizer().decode([each["near"][0]["id"]])
    for each in nearest:
        cosines = [near["cosine"] for near in each["near"]]
        assert len(cosines) == 3
        assert cosines == sorted(cosines, reverse=True)
    assert nearest[3]["near"][0]["cosine"] < 0.999, "the opposite direction is not near"


def test_without_rows_a_prefix_needs_no_backbone(tmp_path: Path) -> None:
    adapter = saved(tmp_path, Path("nowhere"), PrefixLayout((SELF, SELF)))
    found = inspect(adapter)
    assert (found["data"], found["nearest"]) == (None, None)
    assert "no vocabulary token" in found["notes"][0]
    assert [each["layer"] for each in found["tensors"]] == ["layer 0", "layer 0", "layer 1", "layer 1"]
    assert {path.name for path in write_inspection(found, tmp_path / "out")} == {
        "inspect.json",
        "norms.png",
        "ranks.png",
        "index.html",
    }


# ---- on rows


def test_losses_are_those_of_ptd_eval(of_prefix: dict[str, Any], rows: Path) -> None:
    whole = evaluate(str(rows), adapter=of_prefix["folder"])
    assert of_prefix["loss"]["whole"] == pytest.approx(whole["loss"], rel=1e-6)
    assert of_prefix["loss"]["supervised_tokens"] == whole["supervised_tokens"]
    keep = {point["tokens"]: point["loss"] for point in of_prefix["keep"]}
    assert sorted(keep) == [0, 1, 2, 3, 4]
    assert keep[P] == pytest.approx(whole["loss"], rel=1e-6)
    assert keep[0] == of_prefix["loss"]["none"] != pytest.approx(keep[P], abs=1e-3)


def test_tokens_are_ranked_by_what_hiding_them_costs(of_prefix: dict[str, Any]) -> None:
    ranked = sorted(of_prefix["tokens"], key=lambda each: each["rank"])
    changes = [each["loss_change"] for each in ranked]
    assert changes == sorted(changes, reverse=True)
    assert len({round(change, 6) for change in changes}) == P
    # Hiding the token with the last rank is the same as keeping all other tokens.
    keep = {point["tokens"]: point["loss"] for point in of_prefix["keep"]}
    assert keep[P - 1] == pytest.approx(of_prefix["loss"]["whole"] + changes[-1], rel=1e-6)


def test_attention_adds_up(of_prefix: dict[str, Any]) -> None:
    layers = of_prefix["attention"]
    assert [layer["layer"] for layer in layers] == ["layer 0", "layer 1"]
    shares = [share for layer in layers for share in layer["all"]]
    assert len(shares) == 8
    assert sum(each["attention"] for each in of_prefix["tokens"]) == pytest.approx(sum(shares) / 8, rel=1e-6)
    assert all(layer["supervised"] != layer["all"] for layer in layers)


def test_rows_are_spread_over_the_file(of_prefix: dict[str, Any], rows: Path) -> None:
    assert of_prefix["data"] | {"tokens": 0} == {"file": "rows.jsonl", "rows": 12, "rows_in_file": 12, "tokens": 0}
    few = inspect(of_prefix["folder"], data=str(rows), rows=3)
    assert few["data"]["rows"] == 3
    some = rows.with_name("some.jsonl")
    some.write_text("".join(json.dumps(ROWS[index]) + "\n" for index in (0, 6, 11)), encoding="utf-8")
    assert evaluate(str(some), adapter=of_prefix["folder"])["loss"] == pytest.approx(few["loss"]["whole"], rel=1e-6)


def test_an_encoder_decoder_has_three_kinds_of_attention(tmp_path: Path, rows: Path) -> None:
    backbone = save_backbone(tmp_path / "t5", "t5")
    kinds = ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]
    prefix = PrefixLayout(tuple(LayerShape(4, 12, 12, kind) for kind in kinds))
    task = {"kind": "seq2seq_lm"}
    found = inspect(saved(tmp_path / "prefix", backbone, prefix, task=task), data=str(rows))
    assert [layer["kind"] for layer in found["attention"]] == kinds
    assert [layer["supervised"] is None for layer in found["attention"]] == [kind == "encoder" for kind in kinds]
    soft = inspect(saved(tmp_path / "soft", backbone, SoftLayout(HIDDEN), task=task), data=str(rows))
    assert [layer["all"] is None for layer in soft["attention"]] == [kind == "decoder" for kind in kinds]
    assert len(soft["nearest"]) == P
    for each in (found, soft):
        assert all(abs(token["loss_change"]) > 1e-5 for token in each["tokens"])
        check_figures(each)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
def test_an_adapter_of_peft(tmp_path: Path, backbone_dir: Path, rows: Path) -> None:
    torch.manual_seed(3)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = get_peft_model(tiny_model("llama"), config)
    theirs.save_pretrained(tmp_path)
    found = inspect(str(tmp_path), data=str(rows), backbone=str(backbone_dir), settings={"data": {"max_length": 64}})
    assert (found["method"], found["peft_type"], found["num_virtual_tokens"]) == (None, "PROMPT_TUNING", P)
    assert len(found["tokens"]) == len(found["nearest"]) == P
    check_figures(found)


@pytest.mark.parametrize(("count", "expected"), [(1, [0, 1]), (16, list(range(17))), (200, None)])
def test_sizes_of_the_curve(count: int, expected: list[int] | None) -> None:
    sizes = sizes_to_try(count)
    assert (sizes[0], sizes[-1]) == (0, count)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= POINTS + 1
    assert expected is None or sizes == expected


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [([5, 3, 1.1, 1.0, 1.0], 2), ([5, 1, 3, 1, 1], 3), ([1, 1, 1, 1, 1], None), ([1, 2, 3, 4, 5], None)],
)
def test_how_many_tokens_are_enough(losses: list[float], wanted: int | None) -> None:
    assert enough([{"tokens": size, "loss": loss} for size, loss in enumerate(losses)]) == wanted


# ---- what is written


class Page(HTMLParser):
    """Record the sources that a page refers to, and assert that its elements close in order."""

    VOID = ("meta", "link", "img", "source", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.headings = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings += data + "\n"


def test_the_page_holds_everything(of_prefix: dict[str, Any], tmp_path: Path) -> None:
    files = {path.name: path for path in write_inspection(of_prefix, tmp_path / "out" / "here")}
    names = {"keep", "tokens", "attention", "attention_supervised", "norms", "ranks"}
    assert set(files) == {"inspect.json", "index.html", *(f"{name}.png" for name in names)}
    assert json.loads(files["inspect.json"].read_text(encoding="utf-8")) == of_prefix
    text = files["index.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert len(re.findall(r'<svg[^>]* class="plot"', text)) == len(names)
    assert all(source.startswith(("data:", "#")) for source in page.sources), "no network, no other files"
    assert len(page.headings.splitlines()) == 4
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def check_figures(found: dict[str, Any]) -> None:
    """Assert that every axis is labelled, that no text is cut off, and that tick labels of an axis do not overlap."""
    for name, figure in figures(found).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = canvas.get_width_height()
        for axes in figure.axes:
            assert axes.get_ylabel() or axes.get_label() == "<colorbar>", name
            assert axes.get_xlabel(), name
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
                boxes = [box for box in boxes if axes.bbox.padded(9).overlaps(box)]
                if not any(label.get_rotation() for label in labels):
                    assert not any(a.overlaps(b) for a, b in pairwise(boxes)), name
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip() and text.get_figure() is not None:
                box = text.get_window_extent()
                inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
                assert inside or text in _ticks_beyond(figure), (name, text.get_text())


def _ticks_beyond(figure: Any) -> set[Text]:
    """Return the labels of ticks outside the axis limits, which are not drawn."""
    beyond = set()
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not min(limits) <= tick.get_loc() <= max(limits):
                    beyond |= {tick.label1, tick.label2}
    return beyond


def test_figures_are_labelled(of_prefix: dict[str, Any]) -> None:
    check_figures(of_prefix)


def test_many_layers_and_tokens_stay_readable(of_prefix: dict[str, Any]) -> None:
    for layers, heads, tokens in ((80, 64, 128), (1, 1, 1)):
        kept = sizes_to_try(tokens)
        check_figures(support.large(of_prefix, layers=layers, heads=heads, tokens=tokens, kept=kept))


# ---- refusals


@pytest.mark.parametrize(("head", "said"), [({}, "nothing was trained"), ({"w": torch.ones(1)}, "a head")])
def test_an_adapter_without_a_prompt_is_refused(tmp_path: Path, head: dict[str, torch.Tensor], said: str) -> None:
    save_adapter(tmp_path, Adapter(torch.empty(0, 0), EmptyLayout(), "x", head=head))
    with pytest.raises(UserError, match=said):
        inspect(str(tmp_path))


def test_a_folder_that_cannot_be_written(of_prefix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output: cannot write into .*file"):
        write_inspection(of_prefix, tmp_path / "file")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([5, 3, 1.1, 1.0, 1.0], "The 2 most useful of 4 tokens keep 95 %.* Fewer tokens may be enough"),
        ([5, 4, 3, 2, 1.0], "The 4 most useful of 4 tokens.* It may be worth trying more tokens"),
        ([5, 4, 0.5, 2, 1.0], r"With 2 tokens the loss \(0\.5000\) is lower than with all tokens"),
        ([1, 1, 1, 1, 1.0], "the prompt does not lower the loss"),
    ],
)
def test_what_is_said_of_the_number_of_tokens(of_prefix: dict[str, Any], losses: list[float], said: str) -> None:
    keep = [{"tokens": size, "loss": loss} for size, loss in enumerate(losses)]
    loss = of_prefix["loss"] | {"whole": losses[-1], "none": losses[0]}
    text = sections(of_prefix | {"keep": keep, "loss": loss, "enough": enough(keep)})[0].text
    assert re.search(said, text), text
