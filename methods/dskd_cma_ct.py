"""dskd_cma with conditional transport (arXiv 2012.14100) as the adversary: see discriminator.py."""

from cma import USES, dskd_cma, make_modules
from methods import Method

METHOD = Method(
    loss=dskd_cma,
    make_modules=make_modules,
    uses=USES,
    attention="attention",
    defaults=dict(adversary="ct"),
)
