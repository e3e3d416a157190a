"""The embedded default: a closed world with exact scores, preference pairs on it, and a tiny base model."""

from lora_prefvec.sandbox.pairs import PARTS
from lora_prefvec.sandbox.pairs import load as load_pairs
from lora_prefvec.sandbox.rated import load as load_rated
from lora_prefvec.sandbox.scorers import AXES, SCORERS, Scorer, scores
from lora_prefvec.sandbox.scorers import load as load_scorer
from lora_prefvec.sandbox.world import KINDS, TASKS, Task, prompts, task_of, tasks

__all__ = [
    "AXES",
    "KINDS",
    "PARTS",
    "SCORERS",
    "TASKS",
    "Scorer",
    "Task",
    "load_pairs",
    "load_rated",
    "load_scorer",
    "prompts",
    "scores",
    "task_of",
    "tasks",
]
