"""Hard prompts: pattern and verbalizer (PET, Schick & Schütze 2021, https://aclanthology.org/2021.eacl-main.20).

A pattern turns the row into a text with a mask, and the verbalizer maps each label to words. The language model's
scores of these words at the mask are the scores of the labels (§3.1). The method trains nothing: it evaluates
``task.patterns`` (several form an ensemble) and ``task.verbalizer`` zero-shot. Both keys belong to the task, so every
soft method (prompt, p_tuning, prefix) accepts them too, and is then trained with the same cloze loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptd.methods import Conditioner, NoPromptEncoder, TaskFacts, refuse_marks, register
from ptd.types import BackboneShape, UserError


@dataclass
class HardPromptConfig:
    """``name: hard_prompt`` has no keys: the patterns and the verbalizer are keys of the task."""


def check(config: HardPromptConfig, facts: TaskFacts) -> None:
    """Raise `UserError` unless the task reads its labels off words."""
    refuse_marks(config, facts)
    if not facts.cloze:
        raise UserError(
            f"method.name: hard_prompt reads labels off the language model's words, but this task (task.kind "
            f"{facts.kind}) does not; set task.kind: classification with a pattern that has {{mask}}, for example "
            'task.patterns: ["{text} It was {mask}."], and task.verbalizer, or choose another method'
        )


@register("hard_prompt", config=HardPromptConfig, check=check, has_prompt=False)
def build(
    config: HardPromptConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts
) -> NoPromptEncoder:
    """Return an encoder without a prompt."""
    return NoPromptEncoder()
