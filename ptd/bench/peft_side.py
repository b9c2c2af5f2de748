"""PEFT's side of a benchmark: train PEFT's model of the same prompt in a plain training loop, on given rows.

``as-run``: random batches padded on the right, SDPA, the backbone's dtype, AdamW. ``best``: the same with batches of
rows of similar length; on a GPU also flash-attention 2 if it is installed, the layers as the run has them (with Liger's
kernels), and the fastest batch size that fits; on a CPU with an allocator that keeps freed memory (`ENVIRONMENT`).
``compiled``: as ``best``, with compiled layers.
"""

from __future__ import annotations

import time
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptd.backbone import fusion_of, load_model
from ptd.bench.flops import AttentionLayer, Formula, observed, padded_load
from ptd.bench.memory import PeakMemory
from ptd.bench.sides import ENVIRONMENT, Facts, Setting, StepTiming, Workload
from ptd.checkpoint.peft_format import PREFIX_TYPES
from ptd.config import RunConfig
from ptd.config.deepspeed import apply_deepspeed
from ptd.data.batches import padded_batch
from ptd.engine.phases import PhaseClock
from ptd.inject import compile_each
from ptd.types import IGNORE_INDEX, UserError


class PeftSide:
    """The process that trains with PEFT, from what `PtdSide.hand_over` returned."""

    def __init__(self, config: RunConfig, material: Workload, setting: Setting) -> None:
        if find_spec("peft") is None:
            raise UserError("--against peft: PEFT is not installed; pip install peft")
        import peft

        config, _ = apply_deepspeed(config)
        self.config, self.setting = config, setting
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.examples, self.pad_token_id = material.examples, material.pad_token_id
        self.memory = PeakMemory(self.device)
        # PEFT's users run transformers' own layers; compiled layers need no other kernels.
        backbone = config.backbone.model_copy(update={} if setting == "best" else {"liger": False})
        base = load_model(backbone, device=self.device)
        if setting == "compiled":
            compile_each(base)
        self.attention, self.layers = base.config._attn_implementation, fusion_of(backbone, self.device.type).by
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[material.peft_type]
        settings = material.fields | _shared(config, cls) | {"inference_mode": False, "task_type": "CAUSAL_LM"}
        settings.pop("peft_version", None)
        try:
            self.model = peft.get_peft_model(base, cls(**settings)).train()
        except ValueError as error:  # e.g. prefix-tuning with gradient checkpointing
            raise UserError(f"--against peft: PEFT refuses this run: {error}") from error
        self.encoder = self.model.prompt_encoder["default"]
        _start(self.encoder, {name: torch.from_numpy(value) for name, value in material.prompt.items()}, config)
        self.prefix = material.peft_type in PREFIX_TYPES
        self.virtual_tokens = int(settings["num_virtual_tokens"])
        self.parameters = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.micro_rows = train.per_device_train_batch_size
        self.clock = PhaseClock(self.device)
        self.formula, self.uncounted = self._count(material.attention)

    def close(self) -> None:
        """Do nothing: this side holds no open resources."""

    def facts(self) -> Facts:
        settings = {
            "setting": self.setting,
            "batches": "padded, random" if self.setting == "as-run" else "padded, rows of similar length together",
            "rows": self.micro_rows,
            "gradient_accumulation_steps": self.config.train.gradient_accumulation_steps,
            "attention": self.attention,
            "compiled": self.setting == "compiled",
            "layers": self.layers,
            "optimizer": "AdamW" + (" (fused)" if self.device.type == "cuda" else ""),
            "environment": ENVIRONMENT[self.setting] if self.device.type == "cpu" else {},
        }
        dtype = str(self.model.base_model.dtype).removeprefix("torch.")
        return Facts(self.device.type, dtype, torch.get_num_threads(), settings, self.uncounted)

    def check(self, rows: np.ndarray, gradient: np.ndarray) -> dict[str, float]:
        """Return the mean loss of these rows, and the relative difference of the prompt's gradient to ``gradient``."""
        outputs: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs.append(output)

        handle = self.encoder.register_forward_hook(keep)
        loss = self._forward_backward(self._batches(rows))
        handle.remove()
        self.optimizer.zero_grad(set_to_none=True)
        # Each row has its own copy of the prompt.
        own = torch.stack([output.grad.float().sum(0) for output in outputs if output.grad is not None]).sum(0).cpu()
        other = torch.from_numpy(gradient)
        return {"loss": float(loss), "gradient": float((own - other).norm() / other.norm())}

    def take(self, rows: np.ndarray) -> StepTiming:
        """Take and measure one optimizer step on these rows."""
        self.memory.reset()
        self.clock.start("data")
        batches = self._batches(rows)
        loss = self._forward_backward(batches)
        self.clock.begin("optimizer")
        if self.config.train.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(loss) if self.setting == "as-run" else None  # timed, because users log it
        seconds, phases = self.clock.stop()
        return StepTiming(
            seconds,
            phases,
            int(self.examples.lengths(rows).sum()),
            sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches),
            float(loss) if value is None else value,
            self.memory.peak(),
            sum(batch["input_ids"].numel() for batch in batches),
            None if self.formula is None else sum(self.formula.flops(self._load(batch)) for batch in batches),
        )

    def fit(self, most: int) -> dict[str, Any]:
        """Find the fastest attention and number of rows per micro-batch, up to ``most``, that fit in memory.

        The longest rows of the data have to fit. Returns the choice, and the tokens/s of what was tried.
        """
        longest = np.argsort(-self.examples.lengths(), kind="stable")
        typical = longest[len(longest) // 2 :]
        tried: dict[str, dict[int, float]] = {}
        best: tuple[float, str, int] = (0.0, self.attention, self.micro_rows)
        for attention in _attentions(self.device):
            self.model.base_model.set_attn_implementation(attention)
            rows = self.config.train.per_device_train_batch_size
            while rows <= max(most, self.config.train.per_device_train_batch_size):
                self.micro_rows = rows
                try:
                    self._forward_backward(self._batches(longest[:rows]))
                    rate = self._rate(typical[:rows])
                except (torch.OutOfMemoryError, ValueError, RuntimeError):  # too large, or unsupported by this model
                    break
                finally:
                    self.optimizer.zero_grad(set_to_none=True)
                tried.setdefault(attention, {})[rows] = rate
                best = max(best, (rate, attention, rows))
                rows *= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        _, self.attention, self.micro_rows = best
        self.model.base_model.set_attn_implementation(self.attention)
        return {"tried": tried, "attention": self.attention, "rows": self.micro_rows}

    def _rate(self, rows: np.ndarray) -> float:
        """Return the useful tokens per second of a forward and backward pass."""
        batches = self._batches(rows)
        for repetition in range(2):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            self._forward_backward(batches)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if repetition == 1:
                return int(self.examples.lengths(rows).sum()) / (time.perf_counter() - began)
        raise AssertionError

    def _batches(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        """Return padded micro-batches as Hugging Face models take them: each label at its own token, unshifted."""
        found = []
        for begin in range(0, len(rows), self.micro_rows):
            batch = padded_batch(self.examples, rows[begin : begin + self.micro_rows], self.pad_token_id)
            labels = torch.full_like(batch.labels, IGNORE_INDEX)
            labels[:, 1:] = batch.labels[:, :-1]
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": labels}
            found.append(given)
        return found

    def _forward_backward(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Accumulate the gradient of the mean loss over all supervised tokens; return that mean."""
        counts = [1]
        if len(batches) > 1:
            counts = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
        total = torch.zeros((), device=self.device)
        for batch, count in zip(batches, counts, strict=True):
            self.clock.begin("forward")
            placed = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            loss = self.model(**placed).loss * (count / sum(counts))
            self.clock.begin("backward")
            loss.backward()
            total += loss.detach()
        return total

    def _load(self, batch: dict[str, Tensor]) -> Any:
        count, width = batch["input_ids"].shape
        return padded_load(count, width, self.virtual_tokens, prefix=self.prefix)

    def _count(self, layers: tuple[AttentionLayer, ...]) -> tuple[Formula | None, str | None]:
        (batch,) = self._batches(np.arange(1))
        try:
            linear = observed(self.model.base_model, self._load(batch), lambda: self._forward_backward([batch]))
        except LookupError as error:
            return None, str(error)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        # PEFT concatenates the prefix's keys and values with the tokens' own, so the gradient passes through both.
        joined = tuple(AttentionLayer(each.heads, each.key_dim, each.value_dim, each.kind, True) for each in layers)
        return Formula(linear, joined, self.config.backbone.gradient_checkpointing), None


def _shared(config: RunConfig, peft_config: Any) -> dict[str, Any]:
    """Return the settings with the same name in the method's configuration and in PEFT's (``prefix_projection``)."""
    settings, names = config.method_config(), {field.name for field in fields(peft_config)}
    given = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name in names}
    # PEFT names its choices (LSTM, MLP) in capitals.
    return {k: v.upper() if isinstance(v, str) else v for k, v in given.items() if v is not None}


def _start(encoder: Any, prompt: dict[str, Any], config: RunConfig) -> None:
    """Copy the values of ptd's prompt encoder to PEFT's; raise `UserError` if PEFT's parameters differ in shape."""
    mine = {"embedding.weight" if name == "embedding" else name: value for name, value in prompt.items()}
    theirs = encoder.state_dict()
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
        shown = [", ".join(f"{name} {list(value.shape)}" for name, value in each.items()) for each in (mine, theirs)]
        raise UserError(
            f"--against peft: PEFT builds the prompt encoder of method {config.method_name} differently, so the two "
            f"sides would not do the same work: ptd's has {shown[0]}, PEFT's has {shown[1]}. With a prefix MLP, set "
            "method.embedding_size to the width of PEFT's; otherwise compare a prompt that is trained directly"
        )
    encoder.load_state_dict(mine)


def _attentions(device: torch.device) -> list[str]:
    return ["sdpa"] + ["flash_attention_2"] * (device.type == "cuda" and find_spec("flash_attn") is not None)
