"""Functions of a chunk's logits that --compile makes a few kernels of on a GPU; plain PyTorch everywhere else.

What stands between two products of matrices is a dozen operations, each of which reads and writes a whole chunk of
logits; compiled (torch.compile), they are read once forward and once backward."""
import functools

import torch

compiling = False       # running/setup.py says so, for a run

def fused(function):
    """A decorator for a function of tensors and plain values that has no state."""
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def either(*args):
        return (compiled() if compiling else function)(*args)
    return either
