"""CLP, a probe of the attention (arXiv 2603.22056): in place of attention a position takes the mean
of the other side's positions in the same chunk of text. There are no queries."""

from functools import partial

from cma import USES, dskd_cma, make_modules
from methods import Method

METHOD = Method(
    loss=partial(dskd_cma, kind="chunk_mean"),
    make_modules=partial(make_modules, query=False),
    uses=tuple(option for option in USES if option not in ("adversary", "ga_weight", "ga_lr")),
    attention="chunk_mean",
)
