"""Hard prompts: pattern and verbalizer (PET, Schick & Schütze 2021, https://aclanthology.org/2021.eacl-main.20).

A pattern turns the row into a text with a gap, the verbalizer maps each label to words, and the language model's own
scores of these words at the gap are the scores of the labels (§3.1). Nothing is trained: it is the zero-shot
evaluation of ``task.patterns`` (several make an ensemble) and ``task.verbalizer``. Both belong to the task, so every
soft method (prompt, p_tuning, prefix) takes them as well and is then trained through the same cloze loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptd.methods import Conditioner, NoPromptEncoder, TaskFacts, refuse_marks, register
from ptd.types import BackboneShape, UserError


@dataclass
class HardPromptConfig:
    """``name: hard_prompt`` has no keys: the pattern and its words are the task's."""


def check(config: HardPromptConfig, facts: TaskFacts) -> None:
    """The task has to read its labels off words."""
    refuse_marks(config, facts)
    if not facts.cloze:
        raise UserError(
            f"method.name: hard_prompt reads labels off the language model's words, which this task (task.kind "
            f"{facts.kind}) does not do; set task.kind: classification with a pattern that has {{mask}}, for example "
            'task.patterns: ["{text} It was {mask}."], and task.verbalizer, or choose another method'
        )


@register("hard_prompt", config=HardPromptConfig, check=check, has_prompt=False)
def build(
    config: HardPromptConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts
) -> NoPromptEncoder:
    """Nothing is put beside the tokens."""
    return NoPromptEncoder()
