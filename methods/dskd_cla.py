"""CLA, a probe of the attention (arXiv 2603.22056): dskd_cma whose attention stays in the chunk of
text that both tokenizers cut out, judged by the positions' labels."""

import torch

from cma import USES, cross_model_loss, make_modules
from methods import Method
from methods.blocks import student_side, teacher_side


class ChunksOfRow:
    """Adds student_chunks (N_s,), teacher_chunks (N_t,): each position's chunk in its row."""

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        pass

    def __call__(self, examples, device) -> dict[str, torch.Tensor]:
        student = [chunk for example in examples for chunk in example.student.chunks]
        teacher = [chunk for example in examples for chunk in example.teacher.chunks]
        return {
            "student_chunks": torch.tensor(student, device=device),
            "teacher_chunks": torch.tensor(teacher, device=device),
        }


def chunk_loss(batch, student, teacher, modules, objective, kind: str = "chunk_attention"):
    """→ total, and the terms of cma.both_spaces. kind: of cma.align."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    chunks = batch["student_chunks"], batch["teacher_chunks"]
    total, terms, _ = cross_model_loss(s, t, modules, objective, kind, chunks)
    return total, terms


METHOD = Method(
    loss=chunk_loss,
    make_modules=make_modules,
    batch_extras=ChunksOfRow,
    uses=USES,
    attention="chunk_attention",
)
