"""Key-query matching by an adversary (DSKD-CMA-GA, arXiv 2603.22056). It learns to tell keys from
queries, while the queries' projector learns to fool it through gradient reversal R (1505.07818):
identity forward, −1 × gradient backward. Keys are constants. Two kinds:

gan, a discriminator C (keys are 1, queries 0):
    C(v): highway u = g·relu(H v) + (1 − g)·v, g = σ(H v); dropout; Linear; LeakyReLU; Linear → 1
    GA = mean over K of BCE(C(K), 1) + mean over Q of BCE(C(R(Q)), 0)
ct, conditional transport (2012.14100), which makes it expensive to carry one set to the other:
    f(v) = unit(Linear LeakyReLU Linear highway(v))     n(v) = unit(Linear LeakyReLU Linear v)
    c_ij = ‖f(K_i) − f(R(Q_j))‖                         d_ij = n(K_i)·n(R(Q_j))
    CT = −½ mean_j Σ_i c_ij softmax_i(d)_ij − ½ mean_i Σ_j c_ij softmax_j(d)_ij, within an example

The adversary is trained here, with its own learning rate. In the release its weights stay as they
were drawn: --ga_lr 0."""

import torch
import torch.nn as nn
import torch.nn.functional as F

ADVERSARIES = ("none", "gan", "ct")


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def reverse_gradient(x: torch.Tensor) -> torch.Tensor:
    """R: x itself, but the gradient changes its sign on the way back."""
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
        hidden = F.leaky_relu(self.linear1(self.dropout(self.highway(v))), 0.1)
        return self.linear2(hidden).squeeze(-1)


class Transport(nn.Module):
    """f and the navigator n of conditional transport: (..., size) → two sets of unit vectors."""

    def __init__(self, size: int, hidden_size: int = 768):
        super().__init__()
        self.highway = Highway(size)
        self.feature1 = nn.Linear(size, hidden_size)
        self.feature2 = nn.Linear(hidden_size, hidden_size)
        self.navigator1 = nn.Linear(size, hidden_size)
        self.navigator2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = self.feature2(F.leaky_relu(self.feature1(self.highway(v)), 0.1))
        navigator = self.navigator2(F.leaky_relu(self.navigator1(v), 0.1))
        return F.normalize(feature.float(), dim=-1), F.normalize(navigator.float(), dim=-1)


def make_adversary(kind: str, size: int) -> nn.Module | None:
    """size: 2 d_t. None for the kind "none"."""
    if kind == "gan":
        return Discriminator(size)
    if kind == "ct":
        return Transport(size)
    return None


def gan(discriminator: Discriminator, keys: torch.Tensor, queries: torch.Tensor):
    """BCE and accuracy of each key (N_t, size) and each query (N_s, size) → two dicts of terms,
    (N_t,) and (N_s,)."""
    key_logits = discriminator(keys.detach()).float()
    query_logits = discriminator(reverse_gradient(queries)).float()
    return (
        {"adversary_key_loss": F.softplus(-key_logits), "adversary_key_acc": key_logits > 0},
        {
            "adversary_query_loss": F.softplus(query_logits),
            "adversary_query_acc": query_logits <= 0,
        },
    )


def conditional_transport(
    transport: Transport,
    keys: torch.Tensor,
    queries: torch.Tensor,
    key_mask: torch.Tensor,
    query_mask: torch.Tensor,
):
    """The two halves of CT: keys (B, T, size), queries (B, S, size), their masks (B, T), (B, S)
    → two dicts of terms, (N_t,) and (N_s,)."""
    key_feature, key_navigator = transport(keys.detach())
    query_feature, query_navigator = transport(reverse_gradient(queries))
    both = key_mask[:, :, None] & query_mask[:, None, :]  # (B, T, S)
    with torch.autocast(keys.device.type, enabled=False):
        cost = 2 - 2 * key_feature @ query_feature.mT  # squared
        cost = cost.clamp(min=1e-12).sqrt()
        closeness = (key_navigator @ query_navigator.mT).masked_fill(~both, -1e5)
        of_keys = -0.5 * (cost * closeness.softmax(2)).sum(2)
        of_queries = -0.5 * (cost * closeness.softmax(1)).sum(1)
    return (
        {"adversary_key_loss": of_keys[key_mask]},
        {"adversary_query_loss": of_queries[query_mask]},
    )


def key_query_loss(
    kind: str, adversary, keys: torch.Tensor, queries: torch.Tensor, student, teacher, objective
):
    """GA: λ_GA · GA as a part of the total, and its terms for the log.

    keys (B, T, 2 d_t), queries (B, S, 2 d_t): rows of the two Sides. The means are over the tokens
    of the whole optimizer step."""
    n_s, n_t = objective.num_student_tokens, objective.num_teacher_tokens
    if kind == "gan":
        of_keys, of_queries = gan(adversary, teacher.unpad(keys), student.unpad(queries))
    else:
        of_keys, of_queries = conditional_transport(
            adversary, keys, queries, teacher.mask, student.mask
        )
    of_keys = {name: values.sum() for name, values in of_keys.items()}
    of_queries = {name: values.sum() for name, values in of_queries.items()}
    ga = of_keys["adversary_key_loss"] / n_t + of_queries["adversary_query_loss"] / n_s
    terms = objective.per_teacher_token(of_keys) | objective.per_student_token(of_queries)
    return objective(ga=ga), terms
