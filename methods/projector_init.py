"""Projectors that start from the tokens which both vocabularies have (--projector_init shared), after DSKDv2's idea.

Tokens S with the same bytes on both sides have rows in both heads W and both embeddings E. By least squares

    P_t2s:  W_s[S] P_t2s ≈ W_t[S]              so that W_s P_t2s h_t ≈ W_t h_t: what the teacher says stays what it says
    P_s2t:  W_t[S] P_s2t ≈ W_s[S]              the same for the student
    P_q:    E_s[S] P_qᵀ ≈ E_t[S] / σ           for both halves: a query looks like the key of the same two tokens
    P_e:    E_t[S] P_eᵀ ≈ E_s[S]               (DWA-KD)

with the smallest solution where there are several, and biases of 0: attention finds equal tokens from the first step.
"""
import torch

from files.config import InputError
from methods.dual_space import Projectors

def shared_tokens(student_tokenizer, teacher_tokenizer) -> list[tuple[int, int]]:
    """Tokens with the same bytes, as (student id, teacher id); of several the first. InputError where there is none."""
    of_bytes: dict[bytes, int] = {}
    for i in range(teacher_tokenizer.vocab_size):
        of_bytes.setdefault(teacher_tokenizer.token_bytes(i), i)
    pairs = {text: (i, of_bytes[text]) for i in reversed(range(student_tokenizer.vocab_size))
             if (text := student_tokenizer.token_bytes(i)) and text in of_bytes}
    if not pairs:
        raise InputError("--projector_init shared: the two vocabularies have no token in common")
    return sorted(pairs.values())

@torch.no_grad()
def init_from_shared(projectors: Projectors, student, teacher, pairs: list[tuple[int, int]]) -> None:
    """Set the projectors from pairs of shared_tokens, on the CPU. student, teacher: decoders. P_t2s is given
    h_t / σ_h + E_t(y_t) / σ_y, so it is multiplied by σ_h, the root mean square of the final norm's weights."""
    ids = [torch.tensor(side) for side in zip(*pairs)]

    def rows(layer, i):
        return layer.weight[i.to(layer.weight.device)].float().cpu()

    def solve(a, b):                    # the smallest X for which |A X − B| is least
        return torch.linalg.lstsq(a, b, driver="gelsd").solution
    head_s, head_t = rows(student.head, ids[0]), rows(teacher.head, ids[1])
    embed_s, embed_t = rows(student.embed, ids[0]), rows(teacher.embed, ids[1])
    scale = teacher.norm.weight.float().cpu().square().mean().sqrt()
    weights = {"t2s": scale * solve(head_s, head_t), "s2t": solve(head_t, head_s)}
    if projectors.query is not None:
        half = solve(embed_s, embed_t).t() / embed_t.std()
        weights["query"] = torch.block_diag(half, half)
    if projectors.dtw_embed is not None:
        weights["dtw_embed"] = solve(embed_t, embed_s).t()
    for name, weight in weights.items():
        projector = getattr(projectors, name)
        projector.weight.copy_(weight)
        projector.bias.zero_()
