"""dskd_cma and an adversary that makes queries look like keys (DSKD-CMA-GA, arXiv 2603.22056): see
discriminator.py; as one plain function: methods/plain.py."""

from cma import USES, dskd_cma, make_modules
from methods import Method

METHOD = Method(
    loss=dskd_cma,
    make_modules=make_modules,
    uses=USES,
    attention="attention",
    defaults=dict(adversary="gan"),
)
