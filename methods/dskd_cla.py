"""CLA, a probe of the attention (arXiv 2603.22056): dskd_cma whose attention stays in the chunk of
text that both tokenizers cut out, judged by the positions' labels."""

from dataclasses import replace
from functools import partial

from cma import dskd_cma
from methods.dskd_cma import METHOD as DSKD_CMA

METHOD = replace(
    DSKD_CMA, loss=partial(dskd_cma, kind="chunk_attention"), attention="chunk_attention"
)
