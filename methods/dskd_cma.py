"""DSKD with cross-model attention (arXiv 2406.17328), for any two tokenizers: see cma.py."""

from cma import USES, dskd_cma, make_modules
from methods import Method

METHOD = Method(loss=dskd_cma, make_modules=make_modules, uses=USES, attention="attention")
