"""CLA, a probe of the attention (arXiv 2603.22056): dskd_cma whose attention stays in the chunk of
text that both tokenizers cut out, judged by the positions' labels."""

from cma import USES, cross_model_loss, make_modules
from methods import Method
from methods.blocks import student_side, teacher_side


def chunk_loss(batch, student, teacher, modules, objective, kind: str = "chunk_attention"):
    """→ total, and the terms of cma.both_spaces. kind: of cma.align."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    chunks = batch["student_chunks"], batch["teacher_chunks"]
    total, terms, _ = cross_model_loss(s, t, modules, objective, kind, chunks)
    return total, terms


METHOD = Method(
    loss=chunk_loss,
    make_modules=make_modules,
    uses=USES,
    attention="chunk_attention",
)
