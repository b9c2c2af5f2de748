"""The PEFT side of ``benchmarks/methods.py``: its prompt methods in a plain training loop over padded batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods_tasks import LABELS, TAGS

if TYPE_CHECKING:
    from methods_cells import Cell

TASK_TYPES = {"intents": "SEQ_CLS", "entities": "TOKEN_CLS", "advert": "CAUSAL_LM"}
EVAL_BATCH = 30


def peft_config(method: str, task: str, tokens: int, hidden: int) -> Any:
    """PEFT's config of a method: the same re-parameterisation and, for ``prompt``, the like start as ptd's."""
    import peft

    common = {"task_type": TASK_TYPES[task], "num_virtual_tokens": tokens}
    if method == "prompt":
        return peft.PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
    if method == "p_tuning":
        network = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": hidden, "encoder_num_layers": 2}
        return peft.PromptEncoderConfig(**common, **network)
    projection = {"prefix_projection": True, "encoder_hidden_size": hidden} if method == "prefix + MLP" else {}
    return peft.PrefixTuningConfig(**common, **projection)


def load_model(task: str, backbone: str) -> Any:
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32}
    if task == "advert":
        return transformers.AutoModelForCausalLM.from_pretrained(backbone, **options)
    kind = "Sequence" if task == "intents" else "Token"
    labels = LABELS if task == "intents" else TAGS
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    return auto.from_pretrained(backbone, num_labels=len(labels), **options)


def run_peft(cell: Cell, backbone: str, folder: Path) -> dict[str, Any]:
    """Train and measure the cell; ``{"error": …}`` where PEFT cannot do it with this version of transformers."""
    import peft
    import torch
    from methods_cells import BATCH_ROWS, P, hidden_size
    from transformers import get_linear_schedule_with_warmup

    from ptd.data import Batches
    from ptd.engine.loop import peak_memory_bytes

    task = Rows(cell, backbone, folder)
    examples = task.examples("train")
    batches = Batches(examples, rank=0, world_size=1, per_device_batch_size=BATCH_ROWS, seed=cell.seed)
    torch.manual_seed(cell.seed)
    base = load_model(cell.task, backbone)
    hidden = hidden_size(cell.method, cell.task)
    model = peft.get_peft_model(base, peft_config(cell.method, cell.task, P[cell.task], hidden)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cell.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, cell.steps)
    seconds = 0.0
    for step in range(cell.steps):
        began = time.perf_counter()
        try:
            loss = model(**task.batch("train", batches.rows(step))).loss
        except ValueError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
    peak = peak_memory_bytes()
    model.eval()
    with torch.no_grad():
        metrics = task.measure(model, generate=cell.split == "test")
    return {
        **metrics,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "peak_memory_bytes": peak,
    }


class Rows:
    """The rows of a cell as padded batches with a tokenizer's attention mask, and what is measured on them."""

    def __init__(self, cell: Cell, backbone: str, folder: Path) -> None:
        from methods_cells import sections

        from ptd.backbone import load_tokenizer
        from ptd.config import BackboneConfig, data_config, task_config
        from ptd.data import load_rows
        from ptd.tasks import make_task

        self.cell, parts = cell, sections(cell)
        self.tokenizer = load_tokenizer(BackboneConfig(path=backbone))
        self.data = {name: load_rows(str(folder / f"{name}.jsonl"), "train", what=name) for name in ("train", "eval")}
        architecture = "decoder" if cell.task == "advert" else "encoder"
        task = make_task(task_config(parts["task"]), data_config(parts["data"]), architecture)  # type: ignore[arg-type]
        self.task = task.fit(self.data["train"], "train")
        self._examples = {name: self.task.tokenize(rows, self.tokenizer, what=name) for name, rows in self.data.items()}

    def examples(self, which: str) -> Any:
        return self._examples[which]

    def batch(self, which: str, rows: Sequence[int]) -> dict[str, Any]:
        """What Hugging Face models take: ids, mask and labels, padded on the right."""
        import torch

        found = [self._examples[which][row] for row in rows]
        width = max(len(tokens) for tokens, _ in found)
        ids = torch.full((len(found), width), self.tokenizer.pad_token_id or 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, (tokens, targets) in enumerate(found):
            ids[index, : len(tokens)], mask[index, : len(tokens)] = torch.tensor(tokens.tolist()), 1
            shift = 1 if self.cell.task == "advert" else 0  # these models shift labels themselves, ptd's are shifted
            labels[index, shift : len(tokens)] = torch.tensor(targets[: len(targets) - shift].tolist())
        if self.cell.task == "intents":
            labels = labels[:, 0]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _batches(self) -> Iterator[list[int]]:
        rows = range(len(self.data["eval"]))
        return (list(rows[begin : begin + EVAL_BATCH]) for begin in range(0, len(rows), EVAL_BATCH))

    def measure(self, model: Any, *, generate: bool) -> dict[str, float]:
        if self.cell.task == "advert":
            return self._text(model, generate)
        answers: list[dict[str, Any]] = []
        for rows in self._batches():
            batch = self.batch("eval", rows)
            choice = model(**batch).logits.argmax(-1)
            if self.cell.task == "intents":
                answers += [{"label": LABELS[index]} for index in choice.tolist()]
            else:
                answers += [
                    {"tags": [TAGS[index] for index in row[label != -100].tolist()]}
                    for row, label in zip(choice, batch["labels"], strict=True)
                ]
        return self.task.metrics(answers, self.data["eval"])

    def _text(self, model: Any, generate: bool) -> dict[str, float]:
        import torch
        from methods_cells import MAX_NEW_TOKENS

        from ptd.evaluate import text_metrics

        loss = weight = 0.0
        for rows in self._batches():
            batch = self.batch("eval", rows)
            count = int((batch["labels"] != -100).sum())
            loss, weight = loss + float(model(**batch).loss) * count, weight + count
        metrics = {"loss": loss / weight, "perplexity": math.exp(min(loss / weight, 700))}
        if not generate:
            return metrics
        prompts, references = self.task.prompts_and_references(
            self.data["eval"], self.tokenizer, max_length=self.task.data.max_length, what="eval"
        )
        # PEFT's generate ignores position ids with virtual tokens in front, so padding on the left would part them from
        # the text: only prompts of one length run together.
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(row)
        outputs = [""] * len(prompts)
        for rows in groups.values():
            ids = torch.tensor([prompts[row] for row in rows])
            mask = torch.ones_like(ids)
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                outputs[row] = text
        return {**metrics, **text_metrics(outputs, references)}
