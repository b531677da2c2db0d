"""DWA-KD (arXiv 2602.21669): dskd_cma weighted by entropy, and soft-DTW between the two sequences.

    g = ramp · max softmax(z_t2s) · w_s, and w_t in the teacher's space (cma.entropy_weights)
    DTW = Σ over two layers of the soft-DTW divergence (methods/soft_dtw.py):
          E_s(y_s) against P_e(E_t(y_t)), and h_s against P_t2s(h_t)

The cost between the two sides, and only that, is raised by BAND_PENALTY outside a soft band:
|j − c_i| > BAND_WIDTH + BAND_ENTROPY · H_i, where a_i is row i of the attention, H_i its entropy in
nats and c_i = BAND_BLEND · Σ_j j·a_ij + (1 − BAND_BLEND) · i · len_t/len_s."""

from functools import partial

import torch

from cma import USES, cross_model_loss, entropy_weights, make_modules
from methods import Method
from methods.blocks import student_side, teacher_side
from methods.soft_dtw import dtw_divergences

# The paper's numbers. Costs are cosine distances, positions tokens.
RAMP_STEPS = 300  # until g has its full weight
GAMMA_START, GAMMA_END, GAMMA_STEPS = 2.0, 0.8, 3570
BAND_WIDTH, BAND_ENTROPY, BAND_PENALTY, BAND_BLEND = 5.0, 2.0, 1.0, 0.7


def gamma_at(step: int) -> float:
    """γ of soft-DTW after so many optimizer steps: linear, then constant."""
    progress = min(1.0, step / GAMMA_STEPS)
    return GAMMA_START + progress * (GAMMA_END - GAMMA_START)


def ramp_at(step: int) -> float:
    return min(1.0, (step + 1) / RAMP_STEPS)


def band_penalty(
    attention: torch.Tensor, student_counts: torch.Tensor, teacher_counts: torch.Tensor
) -> torch.Tensor:
    """What the cost between the sides is raised by outside the band: attention (B, S, T), lengths
    (B,) → (B, S, T). A row of zeros, which nothing is aligned with, is centred on the diagonal."""
    rows = attention.detach().float()
    i = torch.arange(rows.size(1), device=rows.device).float()
    j = torch.arange(rows.size(2), device=rows.device).float()
    diagonal = i * (teacher_counts / student_counts)[:, None]  # (B, S)
    # Without @, which autocast would compute in bfloat16.
    attended, mass = (rows * j).sum(-1), rows.sum(-1)
    centre = BAND_BLEND * attended + (1 - BAND_BLEND * mass) * diagonal
    reach = BAND_WIDTH + BAND_ENTROPY * torch.special.entr(rows).sum(-1)
    outside = (j - centre[..., None]).abs() > reach[..., None]
    return BAND_PENALTY * outside.float()


def dwa_kd(batch, student, teacher, modules, objective):
    """→ total, the terms of cma.both_spaces, dtw_embed_loss and dtw_hidden_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    projectors, step = modules["projectors"], objective.step
    w_s, w_t = entropy_weights(s, t)
    total, terms, alignment = cross_model_loss(
        s, t, modules, objective, gate="confidence", weights=(ramp_at(step) * w_s, w_t)
    )

    student_counts = torch.tensor(s.counts, device=s.labels.device)
    teacher_counts = torch.tensor(t.counts, device=t.labels.device)
    with torch.no_grad():
        label_embed = t.embed(t.labels)
    embeddings = s.pad(s.embed(s.labels)), t.pad(projectors.dtw_embed(label_embed))
    states = s.pad(s.hidden), t.pad(projectors.t2s(t.hidden))
    penalty = band_penalty(alignment.t2s_weights, student_counts, teacher_counts)
    embed, hidden = dtw_divergences(
        [embeddings, states], student_counts, teacher_counts, gamma_at(step), penalty
    )
    terms |= objective.per_student_token({"dtw_embed_loss": embed, "dtw_hidden_loss": hidden})
    return total + objective(dtw=embed + hidden), terms


METHOD = Method(
    loss=dwa_kd,
    make_modules=partial(make_modules, dtw_embed=True),
    uses=(*USES, "dtw_weight"),
    attention="attention",
    defaults=dict(dtw_weight=0.2),
)
