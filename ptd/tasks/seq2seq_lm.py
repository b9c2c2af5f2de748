"""``task.kind: seq2seq_lm``: generate text from text. Rows have a prompt and a completion.

The encoder of an encoder-decoder reads the prompt (``data.prompt_template``, marks allowed) with the tokenizer's own
special tokens. The decoder learns the completion as the tokenizer writes targets: ``… </s>`` (T5), ``<s> … </s>``
(BART), ``… </s> code`` with the code of the language (mBART).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ptd.config import DataConfig, TaskConfig
from ptd.data import marks_of
from ptd.data.checks import ROWS, notes_on_texts
from ptd.data.collecting import Columns, InMemory, Pieces, collect
from ptd.data.continuations import Reader
from ptd.data.fields import TEXT_OR_NUMBER, Column, check_column, cut_on_the_right, field_chunks
from ptd.data.filling import affixed, encode, fill, special_affixes
from ptd.data.templates import parse_template, prompt_template
from ptd.data.typed import how_typed
from ptd.readouts.language_model import LanguageModel
from ptd.tasks import TEXT_METRICS, register
from ptd.types import IGNORE_INDEX, Architecture, DataReport, Examples, HeadSettings, Output, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Seq2SeqLM:
    """Generates text from text. The loss is the language model's, over the completion's tokens."""

    output: Output = "seq2seq_lm"
    labels: tuple[str, ...] = ()
    cloze = False
    generates: Literal[True] = True
    metric_names = TEXT_METRICS

    def __init__(self, config: TaskConfig, data: DataConfig) -> None:
        self.config, self.data = config, data
        self.virtual_tokens = marks_of([data.prompt_template] if data.prompt_template is not None else [])

    def fit(self, rows: Dataset, what: str) -> Seq2SeqLM:
        return self

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        """Return the examples. ``source``: the prompts; ``labels``: the completions; ``tokens``: these, shifted right.

        The first of a sequence's ``tokens`` stands for the model's ``decoder_start_token_id``, which no tokenizer
        knows. It is the padding token (0 without one) or, if targets end in a language code, this code, with which the
        decoder then starts (`target_language`). Without ``labelled``, it is the only token.

        Prompts are cut on the right to ``max_length`` (their fields, not the template's own text), completions to
        ``max_target_length``; special and virtual tokens stay.
        """
        return collect(self._pieces(rows, tokenizer, what, labelled), columns)

    def _pieces(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str, labelled: bool) -> Pieces:
        language = target_language(tokenizer)
        start = next(token for token in (language, tokenizer.pad_token_id, 0) if token is not None)
        limit = self.data.max_target_length or self.data.max_length
        first_texts: list[str] = []
        for first, prompts, prompts_cut, completions in _chunks(
            rows, self.data, tokenizer, self.data.max_length, what, labelled
        ):
            empty = next((row for row, prompt in enumerate(prompts, first) if not prompt), None)
            if empty is not None:
                raise UserError(
                    f"row {empty} of {what} has a prompt without tokens, but the encoder needs at least one; fill in "
                    "the prompt or remove the row"
                )
            targets, cut = target_tokens(completions, tokenizer, limit) if labelled else ([[]] * len(prompts), 0)
            first_texts += completions[: ROWS - len(first_texts)]
            tokens = [[start, *target[:-1]] for target in targets]
            labels = [target or [IGNORE_INDEX] for target in targets]
            yield _piece(prompts, tokens, labels, prompts_cut, cut, labelled)
        if labelled:
            notes = notes_on_texts(first_texts, tokenizer, what=what)
            yield DataReport(0, 0, 0, notes=tuple(notes), ends=self.ends(tokenizer))

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> LanguageModel:
        return LanguageModel()

    def prompts(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, raw: bool = False
    ) -> list[list[int]]:
        """Return what the encoder reads: each text in the only field of ``data.prompt_template``, or as the prompt.

        ``raw``: each text is the whole prompt. Raises `UserError` if the template has virtual tokens and ``raw`` is
        set, which leaves no place for them, or if it also has several fields, which one text cannot fill.
        """
        template = None if self.data.prompt_template is None else parse_template(self.data.prompt_template)
        single = template is not None and len(set(template.fields)) == 1
        if template is not None and single and not raw:
            values = [(text,) * len(template.fields) for text in texts]
            return fill(template, values, tokenizer, special_affixes(tokenizer))[0]
        if template is not None and template.virtual_tokens:
            why = "--raw leaves no place for" if single else "a single typed text cannot fill"
            raise UserError(
                f"data.prompt_template: {template.source!r} places virtual tokens and has {len(template.fields)} "
                f"fields, which {why}; give rows with these columns (ptd eval)"
            )
        return whole_prompts(texts, tokenizer)[0]

    def how_typed(self, raw: bool) -> str | None:
        return how_typed(self.data, system=None, raw=raw)

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def prompts_and_references(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, what: str
    ) -> tuple[list[list[int]], list[str]]:
        """Return what the encoder reads for each row, as in training, and the reference text."""
        prompts: list[list[int]] = []
        references: list[str] = []
        reader = Reader(tokenizer)
        for _, encoded, _, texts in _chunks(rows, self.data, tokenizer, max_length, what, labelled=True):
            prompts += encoded
            references += map(reader.plain, texts)
        return prompts, references

    def facts(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude_unset=True)


def target_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[list[int]], int]:
    """Return completions as the tokenizer writes targets, with EOS, and how many were cut to ``limit`` tokens.

    Raises `UserError` for a tokenizer without EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so the model could not learn "
            "where a completion ends (set eos_token in its tokenizer_config.json)"
        )
    # Remove special tokens that the text itself contains, so that they are not repeated.
    opening, closing = _target_words(tokenizer)
    texts = [text.removeprefix(opening).removesuffix(closing) or text for text in texts]
    encoded: list[list[int]] = tokenizer(text_target=texts, verbose=False)["input_ids"]
    # A language code may follow EOS.
    own = [] if eos in tokenizer(text_target="a")["input_ids"][-2:] else [eos]
    long = [row for row, ids in enumerate(encoded) if len(ids) + len(own) > limit]
    if long:
        chosen = [texts[row] for row in long]
        with cut_on_the_right(tokenizer):
            shorter = tokenizer(text_target=chosen, truncation=True, max_length=limit - len(own))["input_ids"]
        for row, ids in zip(long, shorter, strict=True):
            encoded[row] = ids
    return [ids + own for ids in encoded], len(long)


def target_language(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the language code that ends targets after EOS and starts the decoder (mBART); None: there is none."""
    behind = tokenizer(text_target="a")["input_ids"][-2:]
    return behind[1] if len(behind) == 2 and behind[0] == tokenizer.eos_token_id != behind[1] else None


def target_opening(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that begins targets (BART's ``<s>``, mBART-50's language); None: there is none."""
    bare = tokenizer(text_target="a", add_special_tokens=False)["input_ids"]
    full = tokenizer(text_target="a")["input_ids"]
    first: int = full[0]
    return first if bare and full[: len(bare)] != bare and first in tokenizer.all_special_ids else None


def _target_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the texts of the special token that begins targets and of EOS, which a completion may itself contain."""
    opening = target_opening(tokenizer)
    first = "" if opening is None else str(tokenizer.convert_ids_to_tokens(opening))
    return first, str(tokenizer.eos_token or "")


def _piece(
    prompts: list[list[int]],
    tokens: list[list[int]],
    labels: list[list[int]],
    prompts_cut: int,
    completions_cut: int,
    labelled: bool,
) -> Examples:
    """Return the examples of consecutive rows, with the report on both sides."""
    read, given, wanted = (np.fromiter(chain.from_iterable(side), dtype=np.int32) for side in (prompts, tokens, labels))
    nothing = np.full_like(read, IGNORE_INDEX)
    source = Examples(read, nothing, _offsets(prompts), DataReport(len(prompts), len(read), 0, prompts_cut=prompts_cut))
    supervised = len(given) if labelled else 0
    report = DataReport(len(prompts), len(given) + len(read), supervised, prompts_cut, completions_cut)
    return Examples(given, wanted, _offsets(tokens), report, source=source)


def _offsets(sequences: list[list[int]]) -> np.ndarray:
    return np.cumsum([0, *map(len, sequences)], dtype=np.int64)


def _chunks(
    rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str, labelled: bool
) -> Iterator[tuple[int, list[list[int]], int, list[str]]]:
    """Yield the first row's number, the encoder's prompts, how many were cut, and the completions if ``labelled``."""
    fields, prompts_of = _prompt_fields(rows, data, what)
    completion = data.columns.get("completion", "completion")
    needed = dict(fields)
    if labelled:
        check_column(rows, "completion", completion, what)
        needed[_COMPLETION] = Column(completion)
    for first, chunk in field_chunks(rows, needed, what):
        prompts, cut = prompts_of(chunk, first, tokenizer, max_length)
        yield first, prompts, cut, chunk.get(_COMPLETION, [])


_COMPLETION = "the completion"
"""A field name for the completion, because a template may have a column named completion."""

_PromptsOf = Callable[[dict[str, list[Any]], int, Any, int], tuple[list[list[int]], int]]


def _prompt_fields(rows: Dataset, data: DataConfig, what: str) -> tuple[dict[str, Column], _PromptsOf]:
    """Return the fields of a prompt, and the function that turns a chunk of them into prompts and counts cut ones."""
    template = prompt_template(data, rows.column_names, what)
    if template is None:
        column = data.columns.get("prompt", "prompt")

        def plain(
            chunk: dict[str, list[Any]], first: int, tokenizer: PreTrainedTokenizerBase, max_length: int
        ) -> tuple[list[list[int]], int]:
            return whole_prompts(chunk["prompt"], tokenizer, max_length)

        return {"prompt": Column(column, may_be_blank=True)}, plain

    if not template.fields:
        raise UserError(f"data.prompt_template: {template.source!r} is the same for every row; add a {{column}} field")

    def filled(
        chunk: dict[str, list[Any]], first: int, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[list[int]], int]:
        values = template.values({name: chunk[name] for name in template.fields}, first, what)
        return fill(template, values, tokenizer, special_affixes(tokenizer), max_length=max_length)

    columns = (Column(name, TEXT_OR_NUMBER, may_be_blank=True, used_by=template.key) for name in template.fields)
    return {column.name: column for column in columns}, filled


def whole_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[list[list[int]], int]:
    """Return texts between the tokenizer's special tokens, cut on the right to ``max_length``; and count cut ones."""
    head, tail = special_affixes(tokenizer)
    whole = [affixed(ids, head, tail) for ids in encode(tokenizer, list(texts))]
    encoded = [ids[len(head) : len(ids) - len(tail)] for ids in whole]
    room = None if max_length is None else max(0, max_length - len(head) - len(tail))
    cut = 0 if room is None else sum(len(ids) > room for ids in encoded)
    return [head + ids[:room] + tail for ids in encoded], cut


@register("seq2seq_lm")
def build(config: TaskConfig, data: DataConfig, architecture: Architecture) -> Seq2SeqLM:
    if architecture != "encoder-decoder":
        other = "causal_lm" if architecture == "decoder" else "classification"
        raise UserError(
            f"task.kind: seq2seq_lm needs an encoder-decoder, but the backbone is a{'n' * (architecture == 'encoder')} "
            f"{architecture}; set task.kind: {other}"
        )
    return Seq2SeqLM(config, data)
