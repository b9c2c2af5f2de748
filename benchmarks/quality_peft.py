"""The PEFT side of ``benchmarks/quality.py``, which includes LoRA: a plain training loop over padded batches.

It reads the same outputs as the ptd side: the language model's loss, the label words at the pattern's mask (with ptd's
own readout), or the scores of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from quality_jobs import (
    BATCH_ROWS,
    EVAL_ROWS,
    HIDDEN,
    MAX_NEW_TOKENS,
    WARM_UP,
    Job,
    P,
    bytes_of,
    labels_by_head,
    sections_of,
)
from quality_tasks import LABELS, read_mrs, text_metrics
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from ptd.readouts import Ask
from ptd.types import Batch, Examples

INIT_TEXT = {
    "e2e": "Write one sentence about the restaurant that mentions every fact:",
    "sst2": "Say whether the review of a film is positive or negative:",
}
INIT_TEXT["sst2-encoder"] = INIT_TEXT["sst2"]
DEFAULT_RATES = {"lora": 2e-4}
OTHER_RATE = 1e-3
"""PEFT has no default learning rate. Its own comparison of methods (method_comparison/MetaMathQA in its repository)
trains prompts and prefixes with 1e-3 and LoRA with 1e-4. For LoRA, this benchmark uses the 2e-4 of QLoRA's smaller
models (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), because 80 steps are few."""
GRID_CENTRES = {"prefix": 1e-2, "prefix+mlp": 3e-3, "prompt": 1e-2, "prompt+text": 1e-2, "p_tuning": 3e-3}
LORA_CENTRE = 6e-4
"""The centres of the grids: rates that these methods need in few steps, several times the rates above."""


def default_rate(method: str) -> float:
    """Return the learning rate of PEFT's rows with the rate ``default``."""
    return DEFAULT_RATES.get(method.split()[0], OTHER_RATE)


def grid_centre(method: str) -> float:
    """Return the middle one of the three rates that are tried for PEFT."""
    return LORA_CENTRE if method.startswith("lora") else GRID_CENTRES[method]


def peft_config(method: str, task: str, backbone: str) -> Any:
    """Return PEFT's configuration of a method: its defaults, except for the settings that the comparison fixes."""
    import peft

    common: dict[str, Any] = {"task_type": "SEQ_CLS" if task == "sst2-encoder" else "CAUSAL_LM"}
    if method.startswith("lora"):
        rank = int(method.removeprefix("lora r"))
        return peft.LoraConfig(**common, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    common["num_virtual_tokens"] = P
    if method == "prompt":
        return peft.PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
    if method == "prompt+text":
        text = {"prompt_tuning_init_text": INIT_TEXT[task], "tokenizer_name_or_path": backbone}
        return peft.PromptTuningConfig(**common, prompt_tuning_init="TEXT", **text)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(**common, encoder_reparameterization_type="LSTM")
    mlp = {"prefix_projection": True, "encoder_hidden_size": HIDDEN} if method == "prefix+mlp" else {}
    return peft.PrefixTuningConfig(**common, **mlp)


@dataclass(frozen=True)
class Read:
    """The result of a batch: the sum of its losses, the number of losses, and the number of correctly labelled rows."""

    loss: Tensor
    weight: float
    right: int = 0


class Plain:
    """A task's rows as padded batches, and the measurement of a Hugging Face model, with or without PEFT, on them.

    ptd tokenises the rows, so both sides have the same tokens. ``examples`` maps the name of each file to its rows.
    """

    def __init__(self, job: Job) -> None:

        from ptd.backbone import load_tokenizer
        from ptd.config import BackboneConfig, data_config, task_config
        from ptd.data import load_rows
        from ptd.tasks import make_task
        from ptd.types import HeadSettings

        self.by_head = labels_by_head(job.cell.method, job.cell.task)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(BackboneConfig(path=job.backbone))
        sections = sections_of(job)
        architecture: Any = "encoder" if job.cell.task == "sst2-encoder" else "decoder"
        self.task = make_task(task_config(sections["task"]), data_config(sections["data"]), architecture)
        self.examples: dict[str, Examples] = {}
        for name in ("train", "development", "test"):
            rows = load_rows(str(Path(job.data) / f"{name}.jsonl"), "train", what=name)
            self.examples[name] = self.task.tokenize(rows, self.tokenizer, what=name)
        self.writes = self.task.generates
        self.cloze = None
        if not (self.writes or self.by_head):
            self.cloze = self.task.readout(self.tokenizer, 0, HeadSettings()).to(self.device)

    def batch(self, name: str, rows: Sequence[int]) -> Batch:
        """Return these rows of the file ``name`` as a batch, padded on the right."""
        import numpy as np

        from ptd.data.batches import padded_batch

        return padded_batch(self.examples[name], np.array(rows), self.tokenizer.pad_token_id or 0)

    def read(self, model: Any, batch: Batch) -> Read:
        """Run one forward pass; the loss is fp32 and differentiable with respect to the trained parameters."""
        given = {
            "input_ids": batch.input_ids.to(self.device),
            "attention_mask": batch.attention_mask.long().to(self.device),
        }
        if self.writes:
            labels = torch.full_like(batch.labels, -100)
            labels[:, 1:] = batch.labels[:, :-1]  # these models shift labels; ptd's are shifted already
            loss = model(**given, labels=labels.to(self.device)).loss
            return Read(loss * batch.supervised_tokens, float(batch.supervised_tokens))
        if self.by_head:
            targets = batch.labels[:, 0].to(self.device)  # ptd stores the label at the first position
            scores = model(**given).logits.float()
            right = int((scores.argmax(-1) == targets).sum())
            return Read(cross_entropy(scores, targets, reduction="sum"), float(len(targets)), right)
        assert self.cloze is not None
        width = batch.input_ids.shape[1]

        def run(_: Batch, ask: Ask) -> Tensor:
            logits = model(**given).logits[:, -width:].flatten(0, 1)  # without the leading virtual tokens
            found: Tensor = logits[ask.positions.to(logits.device)]
            return found

        reading = self.cloze(run, batch, True)
        rows = batch.labels.view(len(batch.rows), -1)
        targets = [int(row[row != -100][0]) for row in rows]
        right = sum(int(score.argmax()) == target for score, target in zip(reading.scores, targets, strict=True))
        return Read(reading.loss, float(reading.weight), right)

    @torch.no_grad()
    def measure(self, model: Any, name: str) -> dict[str, float]:
        """Return ``loss``, the mean over all predictions in the rows ``name``, and ``accuracy`` for rows with labels or
        ``supervised_tokens`` for texts."""

        rows = range(len(self.examples[name]))
        reads = [
            self.read(model, self.batch(name, rows[begin : begin + EVAL_ROWS]))
            for begin in range(0, len(rows), EVAL_ROWS)
        ]
        weight = sum(read.weight for read in reads)
        found = {"loss": sum(float(read.loss) for read in reads) / weight}
        if self.writes:
            return {**found, "supervised_tokens": int(weight)}
        return {**found, "accuracy": 100 * sum(read.right for read in reads) / len(rows)}

    @torch.no_grad()
    def texts(self, model: Any, mrs: Sequence[str], *, one_length: bool) -> dict[str, str]:
        """Return mr -> its greedy continuation. ``one_length``: a batch holds only prompts of the same length.

        PEFT ignores position ids when virtual tokens come before the text, so left padding would separate them from the
        text.
        """

        prompts = self.task.prompts(list(mrs), self.tokenizer)  # type: ignore[union-attr]
        groups: dict[int, list[int]] = {}
        for number, prompt in sorted(enumerate(prompts), key=lambda each: len(each[1])):
            groups.setdefault(len(prompt) if one_length else 0, []).append(number)
        end = self.tokenizer.eos_token_id
        found: dict[str, str] = {}
        for numbers in _chunks(groups.values(), EVAL_ROWS):
            width = max(len(prompts[number]) for number in numbers)
            ids = torch.full((len(numbers), width), self.tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(numbers):
                begin = width - len(prompts[number])
                ids[row, begin:], mask[row, begin:] = torch.tensor(prompts[number]), 1
            output = model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=self.tokenizer.pad_token_id or 0,
            )  # fmt: skip
            written = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            found |= {mrs[number]: text for number, text in zip(numbers, written, strict=True)}
        return found


def _chunks(groups: Any, size: int) -> Iterator[list[int]]:
    for group in groups:
        yield from (group[begin : begin + size] for begin in range(0, len(group), size))


def load_base(backbone: str, task: str) -> Any:
    """Load the model that users of PEFT would load, in its stored dtype."""
    import transformers

    if task == "sst2-encoder":
        auto: Any = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(backbone, dtype="auto", num_labels=len(LABELS))
    return transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype="auto")


def run_peft(job: Job) -> dict[str, Any]:
    """Train and measure the cell; returns the same as `quality_cells.run_cell`."""
    import peft
    from transformers import get_linear_schedule_with_warmup

    from ptd.data import Batches
    from ptd.engine.records import peak_memory_bytes

    cell = job.cell
    assert cell.learning_rate is not None
    plain = Plain(job)
    batches = Batches(
        plain.examples["train"], rank=0, world_size=1, per_device_batch_size=BATCH_ROWS, seed=cell.seed
    )  # used only for the order of the rows
    torch.manual_seed(cell.seed)
    base = load_base(job.backbone, cell.task).to(plain.device)
    model = peft.get_peft_model(base, peft_config(cell.method, cell.task, job.backbone)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cell.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARM_UP * job.steps), job.steps)
    seconds, tokens, last = 0.0, 0, 0.0
    for step in range(job.steps):
        began = time.perf_counter()
        batch = plain.batch("train", batches.rows(step))
        read = plain.read(model, batch)
        loss = read.loss / read.weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = float(loss.detach())
        seconds += time.perf_counter() - began
        tokens += batch.tokens
    result: dict[str, Any] = {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "learning_rate": cell.learning_rate,
        "train_loss": last,
    }
    model.save_pretrained(str(Path(job.folder) / "adapter"))
    result["adapter_bytes"] = bytes_of(Path(job.folder) / "adapter")
    model.eval()
    result |= plain.measure(model, "test")
    development = plain.measure(model, "development")
    result |= {f"development_{name}": development[name] for name in ("loss", "accuracy") if name in development}
    if cell.task == "e2e":
        mrs = read_mrs(Path(job.data))
        result |= text_metrics(plain.texts(model, list(mrs), one_length=not cell.method.startswith("lora")), mrs)
    return result
