"""Projectors that start from the tokens both vocabularies have (--projector_init shared), after
DSKDv2's idea (arXiv 2504.11426).

Tokens S with the same bytes on both sides have rows in both heads W and both embeddings E. By least
squares, with the smallest solution where there are several and biases of 0:

    P_t2s:  W_s[S] P_t2s ≈ W_t[S]           so that W_s P_t2s h_t ≈ W_t h_t on S
    P_s2t:  W_t[S] P_s2t ≈ W_s[S]           the same for the student
    P_q:    E_s[S] P_qᵀ ≈ E_t[S] / σ        both halves: a query looks like the key of equal tokens
    P_e:    E_t[S] P_eᵀ ≈ E_s[S]            (DWA-KD)
"""

import torch

from methods.shared_tokens import student_token_of
from runtime.config import InputError


def shared_tokens(student_tokenizer, teacher_tokenizer) -> list[tuple[int, int]]:
    """(student id, teacher id) of tokens with the same bytes, and of EOS.

    Raises InputError where EOS is all."""
    found = student_token_of(student_tokenizer, teacher_tokenizer)
    pairs = sorted((i, j) for j, i in enumerate(found) if i >= 0)
    if len(pairs) < 2:
        raise InputError("--projector_init shared: the two vocabularies have no token in common")
    return pairs


def least_squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The smallest X of those that minimize ‖A X − B‖."""
    return torch.linalg.lstsq(a, b, driver="gelsd").solution


@torch.no_grad()
def init_from_shared(projectors, student, teacher, pairs: list[tuple[int, int]]) -> None:
    """Set cma.Projectors from pairs of shared_tokens, on the CPU. Where P_t2s is given
    h_t / σ_h + E_t(y_t) / σ_y, it is multiplied by σ_h, the teacher's hidden_scale."""
    student_ids, teacher_ids = torch.tensor(pairs).unbind(1)
    head_s = student.head.weight.float().cpu()[student_ids]
    head_t = teacher.head.weight.float().cpu()[teacher_ids]
    embed_s = student.embed.weight.float().cpu()[student_ids]
    embed_t = teacher.embed.weight.float().cpu()[teacher_ids]
    σ_h = teacher.hidden_scale if projectors.value_over_σ else 1.0
    weights = {"t2s": σ_h * least_squares(head_s, head_t), "s2t": least_squares(head_t, head_s)}
    if projectors.query is not None:
        half = least_squares(embed_s, embed_t).t() / embed_t.std()
        weights["query"] = torch.block_diag(half, half)
    if projectors.dtw_embed is not None:
        weights["dtw_embed"] = least_squares(embed_t, embed_s).t()
    for name, weight in weights.items():
        projector = getattr(projectors, name)
        projector.weight.copy_(weight)
        projector.bias.zero_()
