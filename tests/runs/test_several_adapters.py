"""Several adapters over one backbone: rows that name their adapters get what each adapter alone gives them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_backbone, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptd as library
from ptd.backbone import fingerprint
from ptd.checkpoint import Adapter, save_adapter
from ptd.commands.evaluate import evaluate
from ptd.commands.generate import generate, generate_rows
from ptd.commands.predict import predict
from ptd.config import DataConfig, TaskConfig
from ptd.runs.decoding import Decoding
from ptd.runs.several import ALONE
from ptd.tasks import make_task
from ptd.types import EmptyLayout, HeadSettings, LayerShape, PrefixLayout, SoftLayout, UserError

PREFIX = PrefixLayout((LayerShape(2, 8, 8), LayerShape(2, 8, 8)))
SOFT = SoftLayout(32)
SIZES = {"anna": 3, "ben": 8, "carl": 3, "dora": 1, "eve": 21}
TEMPLATES = {"anna": "{prompt}\n", "ben": "Q: {prompt} A: ", "dora": "{prompt} {adapter}"}
SHORT = Decoding(max_new_tokens=6)
WORDS = ["one", "three", "a much longer text", "x", "seven plus two is", "why?", "and so on, and so on"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save(folder: Path, backbone: Path, layout: Any, size: int, **more: Any) -> str:
    """Save an adapter whose prompt is drawn at random."""
    generator = torch.Generator().manual_seed(size + len(folder.name))
    flat = torch.empty(0, 0)
    if not isinstance(layout, EmptyLayout):
        flat = torch.randn(size, layout.width, generator=generator)
    facts = {"fingerprint": fingerprint(AutoModelForCausalLM.from_pretrained(backbone)), **more.pop("facts", {})}
    save_adapter(folder, Adapter(flat, layout, str(backbone), task_type="CAUSAL_LM", facts=facts, **more))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, backbone_dir: Path) -> dict[str, dict[str, str]]:
    """Save the adapters as prefixes and as soft tokens, each with its own template: kind -> name -> folder."""
    made: dict[str, dict[str, str]] = {"prefix": {}, "prompt": {}}
    for kind, layout in (("prefix", PREFIX), ("prompt", SOFT)):
        for name, size in SIZES.items():
            data = {"prompt_template": TEMPLATES[name]} if name in TEMPLATES else {}
            facts = {"task": {"kind": "causal_lm"}, "data": data}
            folder = tmp_path_factory.mktemp(kind) / name
            made[kind][name] = save(folder, backbone_dir, layout, size, facts=facts)
    return made


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Return shuffled rows, about equally many of each adapter, of an empty name and of a null."""
    names = [*SIZES, "", None]
    rows = [
        {"prompt": f"{WORDS[number % 5]} {number % 13}", "completion": WORDS[number % 7], "adapter": names[number % 7]}
        for number in range(count)
    ]
    random.Random(0).shuffle(rows)
    return rows


def of(rows: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    return [row for row in rows if (row["adapter"] or None) == name]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_200_shuffled_rows_continue_as_with_their_own_adapter_alone(
    tmp_path: Path, backbone_dir: Path, adapters: dict[str, dict[str, str]], kind: str
) -> None:
    rows = mixed_rows(200 if kind == "prefix" else 40)
    found = generate_rows(write(tmp_path / "all.jsonl", rows), adapter=adapters[kind], decoding=SHORT, batch_size=16)
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    texts: dict[str | None, list[str]] = {}
    for name in [*SIZES, None]:
        own = write(tmp_path / "own.jsonl", of(rows, name))
        where = {"adapter": None, "backbone": str(backbone_dir)} if name is None else {"adapter": adapters[kind][name]}
        texts[name] = [row["generated"] for row in generate_rows(own, **where, decoding=SHORT, batch_size=16)]
        assert [row["generated"] for row in found if (row["adapter"] or None) == name] == texts[name], name
    assert len({tuple(each) for each in texts.values()}) == len(texts)  # the adapters write different texts


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_losses_are_those_of_each_adapter_alone(
    tmp_path: Path, backbone_dir: Path, adapters: dict[str, dict[str, str]], kind: str, packing: bool
) -> None:
    rows, settings = mixed_rows(30), {"data": {"packing": packing}}
    data = write(tmp_path / "all.jsonl", rows)
    decoding = SHORT if packing else None
    found = evaluate(data, adapter=adapters[kind], batch_size=8, settings=settings, decoding=decoding)
    assert list(found["adapters"]) == [*SIZES, ALONE]
    total = 0.0
    for name in [*SIZES, None]:
        own = write(tmp_path / "own.jsonl", of(rows, name))
        where = {"adapter": None, "backbone": str(backbone_dir)} if name is None else {"adapter": adapters[kind][name]}
        alone = evaluate(own, **where, batch_size=8, settings=settings, decoding=decoding)
        assert found["adapters"][name or ALONE] == pytest.approx(alone, rel=1e-6)
        total += alone["loss"] * alone["supervised_tokens"]
    assert found["loss"] == pytest.approx(total / found["supervised_tokens"], rel=1e-6)
    assert len({round(each["loss"], 3) for each in found["adapters"].values()}) == len(SIZES) + 1
    if packing:
        assert found["generated"] == len(rows)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory, backbone_dir: Path) -> dict[str, str]:
    """Save three adapters that label rows: two prefixes with heads, and a head alone, with labels of their own."""
    made = {}
    for number, (name, labels) in enumerate(
        {"mood": ["good", "bad"], "size": ["s", "m", "l"], "plain": ["a", "b"]}.items()
    ):
        task = {"kind": "classification", "labels": labels}
        model = make_task(TaskConfig(**task), DataConfig(), "decoder")
        torch.manual_seed(number)
        readout = model.readout(tiny_tokenizer(), 32, HeadSettings())
        head: dict[str, Tensor] = {key: torch.randn_like(value) for key, value in readout.named_parameters()}
        layout = EmptyLayout() if name == "plain" else PREFIX
        method = {"name": "head"} if name == "plain" else {"name": "p_tuning_v2", "num_virtual_tokens": 2 + 3 * number}
        facts = {"method": method, "task": task}
        folder = tmp_path_factory.mktemp("labels") / name
        made[name] = save(folder, backbone_dir, layout, 2 + 3 * number, facts=facts, head=head)
    return made


def test_labels_are_those_of_each_adapter_alone(tmp_path: Path, classifiers: dict[str, str]) -> None:
    labels = {"mood": "good", "size": "m", "plain": "b"}
    names = [*classifiers] * 4
    rows = [{"text": WORDS[n % 7], "label": labels[name], "adapter": name} for n, name in enumerate(names)]
    data = write(tmp_path / "all.jsonl", rows)
    found, metrics = predict(data, adapter=classifiers, batch_size=5), evaluate(data, adapter=classifiers, batch_size=5)
    for name, folder in classifiers.items():
        own = write(tmp_path / "own.jsonl", of(rows, name))
        for row, want in zip(of(found, name), predict(own, adapter=folder, batch_size=5), strict=True):
            assert row["predicted_label"] == want["predicted_label"]
            assert row["probabilities"] == pytest.approx(want["probabilities"], rel=1e-5)
        assert metrics["adapters"][name] == pytest.approx(evaluate(own, adapter=folder, batch_size=5), rel=1e-5)
    losses = [metrics["adapters"][name]["loss"] for name in classifiers]
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert "accuracy" not in metrics, "the adapters have different labels"
    shuffled = [{**row, "label": ["good", "bad"][n % 5 % 2], "adapter": "ab"[n % 2]} for n, row in enumerate(rows)]
    data = write(tmp_path / "same.jsonl", shuffled)
    together = evaluate(data, adapter=dict.fromkeys("ab", classifiers["mood"]), batch_size=5)
    alone = evaluate(data, adapter=classifiers["mood"], batch_size=5)
    assert {key: together[key] for key in alone} == pytest.approx(alone, rel=1e-6)
    with pytest.raises(UserError, match="names no adapter, but without one the backbone has no trained head"):
        predict(write(tmp_path / "none.jsonl", [{"text": "a", "adapter": ""}]), adapter=classifiers)


def test_typed_prompts_name_their_adapter(ptd: Any, backbone_dir: Path, adapters: dict[str, dict[str, str]]) -> None:
    folders = adapters["prefix"]
    named = [word for name in ("anna", "ben") for word in ("--adapter", f"{name}={folders[name]}")]
    one = ptd("generate", "--adapter", folders["ben"], "--max-new-tokens", 6, "hello")
    assert ptd("generate", *named, "--use", "ben", "--max-new-tokens", 6, "hello").out == one.out
    several = generate(["hello", "hello", "hello"], adapter=folders, use=["ben", None, "anna"], decoding=SHORT)
    alone = generate(["hello"], adapter=None, backbone=str(backbone_dir), decoding=SHORT)
    assert several[:2] == [one.out.removesuffix("\n"), *alone]
    assert several[2:] == generate(["hello"], adapter=folders["anna"], decoding=SHORT)


def test_rows_of_a_file_on_the_command_line(ptd: Any, tmp_path: Path, adapters: dict[str, dict[str, str]]) -> None:
    """Rows need no completions, and another column may name the adapters."""
    folders = adapters["prefix"]
    named = [word for name in ("anna", "ben") for word in ("--adapter", f"{name}={folders[name]}")]
    rows = [{"prompt": "hello", "tenant": name} for name in ("ben", None, "anna", "ben")]
    options = ("--data", write(tmp_path / "rows.jsonl", rows), "--adapter-column", "tenant", "--max-new-tokens", 6)
    outcome = ptd("generate", *named, *options)
    assert outcome.code == 0, outcome.err
    found = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(row["prompt"], row["tenant"]) for row in found] == [(row["prompt"], row["tenant"]) for row in rows]
    want = generate(["hello"] * 4, adapter=folders, use=[row["tenant"] for row in rows], decoding=SHORT)
    assert [row["generated"] for row in found] == want


def test_from_python_rows_of_a_batch_name_their_adapters(
    backbone_dir: Path, adapters: dict[str, dict[str, str]], backend_for_one: str
) -> None:
    folders = {name: adapters["prefix"][name] for name in ("anna", "eve")}
    model = AutoModelForCausalLM.from_pretrained(backbone_dir)
    ids = torch.randint(5, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    tuned = library.load(model, folders)
    with tuned.use(["eve", None, "anna"]):
        found = model.generate(ids, **options)
    with pytest.raises(UserError, match="nothing says which"):
        model(ids)
    with pytest.raises(UserError, match="there is no adapter 'bob'; the adapters are anna, eve"), tuned.use(["bob"]):
        pass
    tuned.remove()
    assert torch.equal(found[1], plain[1])
    for row, name in ((0, "eve"), (2, "anna")):
        one = library.load(model, folders[name])
        with pytest.raises(UserError, match="single prompt"), one.use(["eve"]):
            pass
        assert torch.equal(model.generate(ids, **options)[row], found[row])
        one.remove()
    with pytest.warns(UserWarning, match="use backend auto"):
        library.load(model, folders, attention=backend_for_one).remove()
    with pytest.raises(UserError, match="of two kinds"):
        library.load(model, {"a": folders["anna"], "b": adapters["prompt"]["ben"]})


def test_what_cannot_be_used_together_is_refused_with_its_name(
    ptd: Any, tmp_path: Path, backbone_dir: Path, adapters: dict[str, dict[str, str]], classifiers: dict[str, str]
) -> None:
    anna, ben = (adapters["prefix"][name] for name in ("anna", "ben"))
    other = save(tmp_path / "other", save_backbone(tmp_path / "backbone", seed=1), PREFIX, 3)
    half = save(tmp_path / "half", backbone_dir, PREFIX, 3, facts={"backbone_config": {"dtype": "bfloat16"}})
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": "y", "adapter": n} for n in ("a", "zoe")])
    both = ("--adapter", f"a={anna}", "--adapter", f"b={ben}")
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "x", "completion": "y"}])
    cases = {
        "row 2 of .*rows.jsonl names the adapter 'zoe', but --adapter gives a, b": (*both, "--data", rows),
        "has no column 'adapter'": (*both, "--data", bare),
        f"--adapter {ben}: has no name": ("--adapter", f"a={anna}", "--adapter", ben, "--data", rows),
        "the name a is given to": ("--adapter", f"a={anna}", "--adapter", f"a={ben}", "--data", rows),
        "of two kinds": ("--adapter", f"a={anna}", "--adapter", f"b={adapters['prompt']['ben']}", "--data", rows),
        "--adapter b: the adapter was made for another backbone": (
            "--adapter", f"a={anna}", "--adapter", f"b={other}", "--data", rows,
        ),
        "--adapter b=/nowhere: ": ("--adapter", f"a={anna}", "--adapter", "b=/nowhere", "--data", rows),
        "a was trained with backbone.dtype": ("--adapter", f"a={anna}", "--adapter", f"b={half}", "--data", rows),
        "a: causal_lm, b: classification": (
            "--adapter", f"a={anna}", "--adapter", f"b={classifiers['mood']}", "--data", rows,
        ),
        "write it as NAME=FOLDER": ("--adapter", f"={anna}", "--data", rows),
        "no adapter": ("--adapter", f"no adapter={anna}", "--data", rows),
        "--use: say which adapter continues the prompts: a, b": (*both, "hello"),
        "--use names the adapter 'c'": (*both, "--use", "c", "hello"),
        "give them as --adapter NAME=FOLDER": ("--adapter", anna, "--use", "a", "hello"),
    }  # fmt: skip
    for message, arguments in cases.items():
        outcome = ptd("generate", *arguments)
        assert outcome.code != 0
        assert _matches(message, outcome.err), (message, outcome.err)


def _matches(pattern: str, text: str) -> bool:
    """Return whether the parts of the pattern, separated by ``.*``, occur in the text in order."""
    text = " ".join(text.split())
    for part in pattern.split(".*"):
        place = text.find(part)
        if place < 0:
            return False
        text = text[place + len(part) :]
    return True
