"""Sequence-level distillation (Kim & Rush, arXiv 1606.07947): cross-entropy on the teacher's
answers to the training prompts (runtime/teacher_answers.py)."""

from methods import Method
from methods.sft import sft

METHOD = Method(loss=sft, defaults=dict(kd_rate=0.0), answered_by_teacher=True)
