"""dskd_cma with conditional transport (arXiv 2012.14100) as the adversary: see discriminator.py."""

from dataclasses import replace

from methods.dskd_cma import METHOD as DSKD_CMA

METHOD = replace(DSKD_CMA, defaults=dict(adversary="ct"))
