"""dskd_cma and an adversary that makes queries look like keys (DSKD-CMA-GA, arXiv 2603.22056): see
discriminator.py; as one plain function: methods/plain.py."""

from dataclasses import replace

from methods.dskd_cma import METHOD as DSKD_CMA

METHOD = replace(DSKD_CMA, defaults=dict(adversary="gan"))
