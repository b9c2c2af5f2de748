"""Write the model card of an adapter (README.md): what it is, how it was trained and measured, and how to load it.

The front matter holds what the Hugging Face hub reads (library, base model, tags, pipeline). The card contains no paths
of the machine that trained the adapter, only the names of files and folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ptd.checkpoint.files import write_atomically

NAME = "README.md"
MARK = "<!-- Written by ptd with the adapter; remove this line to keep your changes when it is saved again. -->"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PIPELINES = {
    "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
    "classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
"""The hub's pipeline tag for each kind of task."""
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
WRITES = {"causal_lm", "seq2seq_lm"}
SOMEWHERE = "PATH_OF_THE_BACKBONE"
LONGEST = 200
"""Longest value from an adapter that the card shows, in characters."""


@dataclass(frozen=True)
class Subject:
    """What a card describes.

    ``obstacle``: why PEFT cannot load the prompt (None: it can); ``head_left``: the export left out a trained head;
    ``facts``: what the adapter records of its run, of which anything may be missing or damaged.
    """

    backbone: str
    revision: str | None
    task_type: str | None
    peft_type: str | None
    num_virtual_tokens: int
    prompt_numbers: int
    head_numbers: int
    obstacle: str | None
    head_left: bool
    facts: Mapping[str, Any]

    def section(self, name: str) -> dict[str, Any]:
        return _section(self.facts, name)

    @property
    def method(self) -> str | None:
        name = self.section("method").get("name")
        return name if isinstance(name, str) else None

    @property
    def kind(self) -> str | None:
        """The kind of the task; None if it is not recorded."""
        kind = self.section("task").get("kind")
        return kind if isinstance(kind, str) else None

    @property
    def writes(self) -> bool:
        return self.kind in WRITES or (self.kind is None and self.task_type in CLASSES)

    @property
    def hub_id(self) -> str | None:
        """The hub id of the backbone; None for a backbone in a folder."""
        return self.backbone if HUB_ID.fullmatch(self.backbone) else None

    @property
    def model_class(self) -> str:
        """The transformers class of the model that the prompt was tuned on."""
        if self.task_type in CLASSES:
            return CLASSES[self.task_type]
        return "AutoModelForMaskedLM" if "{mask" in str(self.section("task").get("patterns")) else "AutoModel"

    @property
    def load_model(self) -> str:
        revision = f", revision={_word(self.revision)!r}" if self.revision else ""
        return f'model = {self.model_class}.from_pretrained("{self.hub_id or SOMEWHERE}"{revision})'


def write_card(folder: Path, text: str) -> None:
    """Write the card, unless the folder has one that a person or PEFT wrote."""
    path = folder / NAME
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_atomically(path, text)


def card(about: Subject) -> str:
    """Return the text of the card."""
    title = f"{_word(about.method or about.peft_type or 'adapter')} for {_name(about.backbone) or 'a backbone'}"
    lines = [_front_matter(about), MARK, "", f"# {title}", "", _summary(about), ""]
    lines += [*_table("", _figures(about)), *_data(about), *_evaluation(about), *_method(about)]
    lines += [*_with_ptd(about), *_with_peft(about), *_versions(about.facts)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def _front_matter(about: Subject) -> str:
    from huggingface_hub import ModelCardData  # imported here: it is slow, and only writing needs it

    tags = ["ptd", "prompt-tuning"]
    tags += [about.method.replace("_", "-")] if about.method else []
    tags += ["peft"] if about.obstacle is None else []
    tags += [f"base_model:adapter:{about.hub_id}"] if about.hub_id else []
    data = ModelCardData(
        base_model=about.hub_id,
        library_name="peft" if about.obstacle is None and not about.head_numbers else "ptd",
        pipeline_tag=PIPELINES.get(about.kind or ""),
        tags=list(dict.fromkeys(tags)),
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(about: Subject) -> str:
    parts = [f"a prompt of {about.num_virtual_tokens} virtual tokens"] if about.num_virtual_tokens else []
    parts += ["a trained head"] if about.head_numbers else []
    what = " and ".join(parts) or "the description of a prompt without trained weights"
    return f"This folder holds {what} for a frozen backbone, made with ptd. The backbone's weights are not in it."


def _figures(about: Subject) -> dict[str, Any]:
    loaded = about.section("backbone_config")
    stored = loaded.get("dtype") if loaded.get("quantization") in (None, "none") else loaded["quantization"]
    return {
        "backbone": _name(about.backbone),
        "revision": about.revision,
        "fingerprint of the backbone": about.facts.get("fingerprint"),
        "backbone weights during training": stored,
        "task": about.kind,
        "virtual tokens": about.num_virtual_tokens or None,
        "parameters of the prompt": about.prompt_numbers or None,
        "parameters of the head": about.head_numbers or None,
    }


def _data(about: Subject) -> list[str]:
    data, training = about.section("data"), about.section("training")
    rows = {
        "training data": _name(data.get("train")),
        "rows": training.get("rows"),
        "tokens": training.get("tokens"),
        "supervised positions": training.get("supervised_tokens"),
        "held-out data": _name(data.get("eval")),
    }
    return _table("## Data", rows)


def _evaluation(about: Subject) -> list[str]:
    metrics = _section(about.section("training"), "evaluation")
    step = metrics.pop("step", None)
    return _table("## Evaluation" + ("" if step is None else f" after step {_word(step)}"), metrics)


def _method(about: Subject) -> list[str]:
    settings = about.section("method")
    return _table("## Method", {"method": settings.pop("name", None), **settings})


def _with_ptd(about: Subject) -> list[str]:
    lines = ["## Use with ptd", "", "`ADAPTER` stands for the path of this folder."]
    backbone = "" if about.hub_id else f" --backbone {SOMEWHERE}"
    if about.head_left:
        lines += ["", "The head that was trained with the prompt is not in this folder: PEFT's format cannot hold it."]
    elif about.writes:
        lines += _code("bash", f'ptd generate --adapter ADAPTER{backbone} "your prompt"')
        lines += _code("bash", f"ptd eval --adapter ADAPTER{backbone} --data rows.jsonl")
    elif about.kind is not None:
        lines += _code("bash", f"ptd predict --adapter ADAPTER{backbone} --data rows.jsonl")
        given = "" if about.hub_id else f', backbone="{SOMEWHERE}"'
        answers = f'answers = ptd.predict("rows.jsonl", adapter="ADAPTER"{given})'
        return [*lines, *_code("python", "import ptd", "", answers), ""]
    if about.num_virtual_tokens:
        imports = ("import ptd", f"from transformers import {about.model_class}", "")
        use = 'tuned = ptd.load(model, "ADAPTER")  # raises an error for another backbone'
        lines += _code("python", *imports, about.load_model, use)
    return [*lines, ""]


def _with_peft(about: Subject) -> list[str]:
    lines = ["## Use with PEFT", ""]
    if about.obstacle is not None:
        return [*lines, f"PEFT cannot load this adapter: {about.obstacle}.", ""]
    if about.head_numbers or about.head_left:
        lines += ["PEFT loads only the prompt, without the trained head:"]
    whole = "  # for an encoder-decoder: its get_encoder()" if about.model_class == "AutoModel" else ""
    imports = ("from peft import PeftModel", f"from transformers import {about.model_class}", "")
    use = 'model = PeftModel.from_pretrained(model, "ADAPTER")'
    return [*lines, *_code("python", *imports, about.load_model + whole, use), ""]


def _versions(facts: Mapping[str, Any]) -> list[str]:
    versions = _section(facts, "versions")
    if not versions:
        return []
    # PEFT adds its own version under this heading when it saves into the folder.
    return ["### Framework versions", "", *(f"- {_word(name)} {_word(value)}" for name, value in versions.items()), ""]


def _code(language: str, *lines: str) -> list[str]:
    return ["", f"```{language}", *lines, "```"]


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in rows.items() if value is not None}
    if not known:
        return []
    body = [f"| {_word(name)} | {_word(value)} |" for name, value in known.items()]
    return [*([title, ""] if title else []), "| | |", "|---|---|", *body, ""]


def _section(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = facts.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _name(path: Any) -> str | None:
    """Return the last part of a path of any operating system; a hub id (at most two parts) is returned unchanged."""
    if not isinstance(path, str) or not path:
        return None
    if HUB_ID.fullmatch(path):
        return path
    return PureWindowsPath(path).name or PurePath(path).name or None


def _word(value: Any) -> str:
    """Return a value as one line of a table, with markup escaped."""
    text = " ".join(str(value).split())
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return re.sub(r"([\\`|<>\[\]*])", r"\\\1", text)
