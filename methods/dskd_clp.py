"""CLP, a probe of the attention (arXiv 2603.22056): in place of attention a position takes the mean
of the other side's positions in the same chunk of text. There are no queries."""
from cma import Projectors, cross_model_loss
from methods import Method
from methods.blocks import student_side, teacher_side
from methods.dskd_cla import ChunkIds


def dskd_clp(batch, student, teacher, modules, objective):
    """→ total, and the terms of cma.both_spaces."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    chunks = batch["student_chunks"], batch["teacher_chunks"]
    total, terms, _ = cross_model_loss(s, t, modules, objective, "chunk_mean", chunks)
    return total, terms


def make_modules(options, student_config, teacher_config):
    return {"projectors": Projectors(student_config.hidden_size, teacher_config.hidden_size,
                                     query=False)}


METHOD = Method(loss=dskd_clp, make_modules=make_modules, batch_extras=ChunkIds,
                uses=("kd_rate", "temperature", "divergence", "projector_init", "projector_lr",
                      "cache_teacher"))
