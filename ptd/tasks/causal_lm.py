"""``task.kind: causal_lm``: continue a text. Rows have the form ``data.format``; the loss is the language model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ptd.config import DataConfig, TaskConfig
from ptd.data import marks_of, prompts_and_references, tokenize
from ptd.data.chat import Chat, common_system
from ptd.data.collecting import Columns, InMemory
from ptd.data.typed import how_typed, typed
from ptd.readouts.language_model import LanguageModel
from ptd.tasks import TEXT_METRICS, register
from ptd.types import Architecture, Examples, HeadSettings, Output, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class CausalLM:
    """Continues text with a decoder."""

    output: Output = "causal_lm"
    labels: tuple[str, ...] = ()
    cloze = False
    generates: Literal[True] = True
    metric_names = TEXT_METRICS

    def __init__(self, config: TaskConfig, data: DataConfig) -> None:
        self.config, self.data = config, data
        self.virtual_tokens = marks_of([data.prompt_template] if data.prompt_template is not None else [])

    def fit(self, rows: Dataset, what: str) -> CausalLM:
        """Learn the system message if all conversations begin with the same; typed prompts then begin with it."""
        column = self.data.columns.get("messages", "messages")
        if self.data.format != "messages" or self.config.system is not None or column not in rows.column_names:
            return self
        system = common_system(rows[column])
        return self if system is None else CausalLM(self.config.model_copy(update={"system": system}), self.data)

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        return tokenize(rows, self.data, tokenizer, max_length=self.data.max_length, what=what, columns=columns)

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> LanguageModel:
        return LanguageModel()

    def prompts(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, raw: bool = False
    ) -> list[list[int]]:
        return typed(tokenizer, self.data, texts, system=self.config.system or None, raw=raw)

    def how_typed(self, raw: bool) -> str | None:
        return how_typed(self.data, system=self.config.system or None, raw=raw)

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        end = Chat(tokenizer).end() if self.data.format == "messages" and tokenizer.chat_template else None
        found = (tokenizer.eos_token_id, None if end is None else tokenizer.convert_tokens_to_ids(end))
        return tuple(token for token in found if token is not None)

    def prompts_and_references(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, what: str
    ) -> tuple[list[list[int]], list[str]]:
        return prompts_and_references(rows, self.data, tokenizer, max_length, what=what)

    def facts(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_unset=True)


@register("causal_lm")
def build(config: TaskConfig, data: DataConfig, architecture: Architecture) -> CausalLM:
    if architecture != "decoder":
        other = "seq2seq_lm" if architecture == "encoder-decoder" else "classification"
        raise UserError(
            f"task.kind: causal_lm needs a decoder, but the backbone is an {architecture}; set task.kind: {other}"
        )
    return CausalLM(config, data)
