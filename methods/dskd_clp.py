"""CLP, a probe of the attention (arXiv 2603.22056): in place of attention a position takes the mean
of the other side's positions in the same chunk of text. There are no queries."""

from functools import partial

from cma import Projectors
from methods import Method
from methods.dskd_cla import ChunkIds, chunk_loss


def make_modules(options, student_config, teacher_config):
    sizes = student_config.hidden_size, teacher_config.hidden_size
    return {"projectors": Projectors(*sizes, query=False)}


METHOD = Method(
    loss=partial(chunk_loss, kind="chunk_mean"),
    make_modules=make_modules,
    batch_extras=ChunkIds,
    uses=(
        "kd_rate",
        "temperature",
        "divergence",
        "projector_init",
        "projector_lr",
        "cache_teacher",
    ),
)
