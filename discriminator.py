"""Key-query matching by an adversary (DSKD-CMA-GA, arXiv 2603.22056), which learns to tell keys from queries while the
queries' projector learns to fool it through gradient reversal R (arXiv 1505.07818): identity forward, −1 × gradient
backward. Keys are constants. Three kinds:

gan, a discriminator C (keys are 1, queries 0):
    C(v): highway u = g·relu(H v) + (1 − g)·v, g = σ(H v);  dropout;  Linear;  LeakyReLU 0.1;  Linear → 1
    GA = mean over valid K of BCE(C(K), 1) + mean over valid Q of BCE(C(R(Q)), 0)
ct, conditional transport (arXiv 2012.14100), which makes it dear to carry the one set to the other:
    f(v) = unit(Linear LeakyReLU Linear highway(v))      n(v) = unit(Linear LeakyReLU Linear v), the navigator
    c_ij = ‖f(K_i) − f(R(Q_j))‖      d_ij = n(K_i)·n(R(Q_j))
    CT = −½ mean_j Σ_i c_ij softmax_i(d)_ij − ½ mean_i Σ_j c_ij softmax_j(d)_ij, i and j in one example
energy, no adversary at all but the distance of the two sets (Székely & Rizzo 2013), which has no weights to saturate:
    ED = 2 E‖K − Q‖ − E‖K − K'‖ − E‖Q − Q'‖, in the keys' root mean square distance from their mean

The adversary is trained here, with its own learning rate. (In the release its weights stay as they were drawn: --ga_lr
0.)"""
import torch
import torch.nn as nn
import torch.nn.functional as F

MOST_PAIRED = 1024      # keys, and queries, in an energy distance

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

class Highway(nn.Module):
    """u = g·relu(H v) + (1 − g)·v with g = σ(H v): (..., size) → (..., size)."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        transformed = self.linear(v)
        gate = transformed.sigmoid()
        return gate * transformed.relu() + (1 - gate) * v

class Discriminator(nn.Module):
    """C: (N, size) → (N,) logits of "this is a key". size = 2 d_t."""

    def __init__(self, size: int, hidden_size: int = 768, dropout: float = 0.1):
        super().__init__()
        self.highway = Highway(size)
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, 1)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.leaky_relu(self.linear1(self.dropout(self.highway(v))), 0.1)).squeeze(-1)

class Transport(nn.Module):
    """f and the navigator n of conditional transport: (..., size) → two sets of unit vectors (..., hidden_size)."""

    def __init__(self, size: int, hidden_size: int = 768):
        super().__init__()
        self.highway = Highway(size)
        self.feature1, self.feature2 = nn.Linear(size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.navigator1, self.navigator2 = nn.Linear(size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = self.feature2(F.leaky_relu(self.feature1(self.highway(v)), 0.1))
        navigator = self.navigator2(F.leaky_relu(self.navigator1(v), 0.1))
        return F.normalize(feature.float(), dim=-1), F.normalize(navigator.float(), dim=-1)

def gan(discriminator: Discriminator, keys: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """The discriminator's losses and successes, as SUMS: keys (N_t, 2 d_t), queries (N_s, 2 d_t) of valid positions.
    → adversary_key_loss and _acc over keys, adversary_query_loss and _acc over queries (the accuracies are counts).
    GA = adversary_key_loss / N_t + adversary_query_loss / N_s."""
    key_logits = discriminator(keys.detach()).float()
    query_logits = discriminator(reverse_gradient(queries)).float()
    return {"adversary_key_loss": F.softplus(-key_logits).sum(), "adversary_key_acc": (key_logits > 0).sum(),
            "adversary_query_loss": F.softplus(query_logits).sum(), "adversary_query_acc": (query_logits <= 0).sum()}

def energy(keys: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """The energy distance of keys (N_t, 2 d_t) and queries (N_s, 2 d_t), of at most MOST_PAIRED evenly chosen tokens a
    side; every pair of them counts. → adversary_query_loss, N_s · ED, so that its mean over tokens is ED, and a key
    loss of 0. Keys are constants."""
    with torch.autocast(keys.device.type, enabled=False):
        some = [x.float()[::-(-len(x) // MOST_PAIRED)] for x in (keys.detach(), queries)]
        deviation = (some[0] - some[0].mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
        between, *within = (torch.cdist(a, b).mean() for a, b in ((some[0], some[1]), (some[0],) * 2, (some[1],) * 2))
        distance = (2 * between - sum(within)) / deviation
    return {"adversary_key_loss": torch.zeros_like(distance), "adversary_query_loss": len(queries) * distance}

def conditional_transport(transport: Transport, keys: torch.Tensor, queries: torch.Tensor, key_mask: torch.Tensor,
                          query_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two halves of CT as SUMS, over keys i and over queries j: keys (B, T, 2 d_t), queries (B, S, 2 d_t), masks
    (B, T) and (B, S), true on valid positions.

    → adversary_key_loss, adversary_query_loss; CT = adversary_key_loss / N_t + adversary_query_loss / N_s, a mean over
    all tokens of the batch, whichever example they are in."""
    key_feature, key_navigator = transport(keys.detach())           # what is not valid is left out below
    query_feature, query_navigator = transport(reverse_gradient(queries))
    with torch.autocast(keys.device.type, enabled=False):
        cost = (2 - 2 * key_feature @ query_feature.transpose(1, 2)).clamp(min=1e-12).sqrt()       # (B, T, S)
        closeness = (key_navigator @ query_navigator.transpose(1, 2)).masked_fill(
            ~(key_mask[:, :, None] & query_mask[:, None, :]), -1e5)
        to_queries, to_keys = (-0.5 * (cost * closeness.softmax(dim)).sum(dim) for dim in (2, 1))
    return {"adversary_key_loss": (to_queries * key_mask).sum(), "adversary_query_loss": (to_keys * query_mask).sum()}
