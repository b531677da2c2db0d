"""Key-query matching by generative-adversarial learning (DSKD-CMA-GA, arXiv 2603.22056).

A discriminator C tells keys (label 1) from queries (label 0); the queries' projector learns to fool it through
gradient reversal R (arXiv 1505.07818): identity forward, −1 × gradient backward. Keys are constants.

    C(v): g = σ(H v);  u = g·relu(H v) + (1 − g)·v;  dropout;  Linear;  LeakyReLU 0.1;  Linear → 1
    GA = mean over valid K of BCE(C(K), 1) + mean over valid Q of BCE(C(R(Q)), 0)

C is trained here, with its own learning rate. (In the release its weights stay as they were drawn.)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def reverse_gradient(x: torch.Tensor) -> torch.Tensor:
    """R: x itself, but the gradient changes sign on its way back."""
    return _Reverse.apply(x)


class Discriminator(nn.Module):
    """C: (N, size) → (N,) logits of "this is a key". size = 2 d_t."""

    def __init__(self, size: int, hidden_size: int = 768, dropout: float = 0.1):
        super().__init__()
        self.highway = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, 1)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        transformed = self.highway(v)
        gate = transformed.sigmoid()
        u = gate * transformed.relu() + (1 - gate) * v
        return self.linear2(F.leaky_relu(self.linear1(self.dropout(u)), 0.1)).squeeze(-1)


def gan(discriminator: Discriminator, keys: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adversary's losses and successes, as SUMS: keys (N_t, 2 d_t), queries (N_s, 2 d_t) of valid positions.

    → ga_key_loss and ga_key_acc over keys, ga_query_loss and ga_query_acc over queries (the accuracies are counts).
    GA = ga_key_loss / N_t + ga_query_loss / N_s.
    """
    key_logits = discriminator(keys.detach()).float()
    query_logits = discriminator(reverse_gradient(queries)).float()
    return {"ga_key_loss": F.softplus(-key_logits).sum(), "ga_key_acc": (key_logits > 0).sum(),
            "ga_query_loss": F.softplus(query_logits).sum(), "ga_query_acc": (query_logits <= 0).sum()}
