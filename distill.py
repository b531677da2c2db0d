"""Every method as a choice of options, and the loss parts of one: two forward passes, then the concept files.

    --method dwa_kd                    is --alignment attention --weights entropy --dtw_weight 0.2
    --method dwa_kd --adversary gan    and any other combination that makes sense

What each option adds to KD stands in cma.py, discriminator.py, soft_dtw.py and baselines.py.
"""
from dataclasses import dataclass

import torch

import baselines
import discriminator
import soft_dtw
from cma import ALIGNMENTS, DIVERGENCES, Projectors, Valid, dskd, dskd_cma, kd, sft
from config import flag
from hub import InputError

# method → its options; the teacher-less and the older methods have none of them
METHODS = {
    "sft": {},                          # cross-entropy on the data, no teacher
    "seqkd": {},                        # cross-entropy on the teacher's answers
    "kd": {},                           # divergence between the two models' outputs (same vocabulary)
    "dskd": {},                         # distillation in both models' spaces (same vocabulary)
    "uld": {},                          # distance of sorted probabilities
    "mined": {},                        # positions and vocabularies matched by edit distance
    "dskd_clp": dict(alignment="chunk_mean"),
    "dskd_cla": dict(alignment="chunk_attention"),
    "dskd_cma": dict(alignment="attention"),
    "dskd_cma_ga": dict(alignment="attention", adversary="gan"),
    "dskd_cma_ct": dict(alignment="attention", adversary="ct"),
    "dwa_kd": dict(alignment="attention", weights="entropy", dtw_weight=0.2),
}
ADVERSARIES = {"gan": discriminator.Discriminator, "ct": discriminator.Transport}


@dataclass
class Options:
    """What is minimized. train.py adds the rest of its command line to these."""
    method: str = flag("dskd_cma_ga", "a preset of the next four options, see the README's table", choices=tuple(METHODS))
    alignment: str = flag("none", "how positions of two tokenizers meet; none: one to one, or not at all", choices=("none", *ALIGNMENTS))
    adversary: str = flag("none", "who matches keys and queries, see discriminator.py", choices=("none", *ADVERSARIES))
    weights: str = flag("gate", "of the KD terms: where z_t2s is right, or DWA-KD's confidence and entropy", choices=("gate", "entropy"))
    dtw_weight: float = flag(0.0, "weight of DWA-KD's soft-DTW terms (a number; dwa_kd: 0.2)", at_least=0)
    divergence: str = flag("forward_kl", "distance between student and target, see cma.py", choices=DIVERGENCES)
    align_on: str = flag("label", "chunks are judged by a position's label token, or by its input token as in the release", choices=("label", "input"))
    kd_rate: float = flag(0.5, "α, share of distillation in the loss (0 to 1)", at_least=0, at_most=1)
    temperature: float = flag(2.0, "T of the divergences (a number)", at_least=1e-3)
    ga_weight: float = flag(0.1, "λ_GA, weight of key-query matching (a number)", at_least=0)
    projector_init: str = flag("random", "the projectors' first weights; shared: from the tokens both vocabularies have, see projector_init.py",
                               choices=("random", "shared"))
    ramp_steps: int = flag(300, "optimizer steps until the entropy-weighted term has its full weight", at_least=0)
    dtw_gamma_start: float = flag(2.0, "γ of soft-DTW at the first step (cosine distance)", at_least=0.01, at_most=10)
    dtw_gamma_end: float = flag(0.8, "γ at the end (cosine distance)", at_least=0.01, at_most=10)
    dtw_gamma_steps: int = flag(3570, "optimizer steps from the one to the other", at_least=0)
    dtw_band: float = flag(5.0, "half the width of the band around the attention, in positions", at_least=0)
    dtw_entropy: float = flag(2.0, "positions by which a nat of the attention's entropy widens the band", at_least=0)
    dtw_penalty: float = flag(1.0, "cost added outside the band (cosine distance)", at_least=0)
    dtw_blend: float = flag(0.7, "the band's centre: 1 the attention's, 0 the diagonal", at_least=0, at_most=1)


def check_options(options: Options) -> None:
    """Raise InputError where an option means nothing to the method, or two of them exclude each other."""
    across = "alignment" in METHODS[options.method]
    if across != (options.alignment != "none"):
        raise InputError(f"--method {options.method} --alignment {options.alignment}: " + (
            f"this method needs one of {', '.join(ALIGNMENTS)}" if across else "this method has no alignment; start from dskd_cma"))
    without_alignment = options.alignment == "none"
    for field, unused, needs in (
            ("adversary", without_alignment, "dskd_cma or dskd_cla"), ("weights", without_alignment, "dskd_cma, dskd_cla or dskd_clp"),
            ("dtw_weight", without_alignment, "dskd_cma, dskd_cla or dskd_clp"), ("align_on", not options.alignment.startswith("chunk"), "dskd_clp or dskd_cla"),
            ("projector_init", without_alignment, "dskd_cma and those after it"),
            ("divergence", options.method in ("sft", "seqkd", "uld", "mined"), "kd or one of the dual-space methods")):
        if unused and getattr(options, field) != getattr(Options, field):
            raise InputError(f"--{field} {getattr(options, field)}: --method {options.method} has no use for it; it is for {needs}")
    if options.alignment == "chunk_mean" and options.adversary != "none":
        raise InputError(f"--adversary {options.adversary}: --alignment chunk_mean has no queries that could be matched with keys")


def make_modules(options: Options, student_size: int, teacher_size: int):
    """What learns beside the student in the dual-space methods: the projectors, and the adversary or None. Sizes: d_s, d_t.
    options: Options or a run's settings."""
    projectors = Projectors(student_size, teacher_size, query=options.alignment in ("attention", "chunk_attention"), dtw_embed=options.dtw_weight > 0)
    return projectors, None if options.adversary == "none" else ADVERSARIES[options.adversary](2 * teacher_size)


def distill(options: Options, batch, student, teacher, projectors, adversary, step: int) -> dict[str, torch.Tensor]:
    """Forward both models and compute the method's loss parts, each a sum over valid positions: "loss", (1 − α) CE + α KD,
    which alone has the gradient of nll_loss, kd_loss and what these are made of; with an adversary adversary_key_loss and
    adversary_query_loss; with DTW dtw_embed_loss and dtw_hidden_loss.

    student and teacher have .embed, .head and forward(ids) → hidden; where the batch holds teacher_hidden (B, T, d_t), on
    the grid of valid positions, the teacher's forward is not called. step: optimizer steps done so far.
    """
    student_valid = Valid(batch["student_labels"])
    h_s, head_s = student_valid.grid(student(batch["student_ids"])), student.head.weight
    labels = student_valid.labels
    if options.method in ("sft", "seqkd"):
        return sft(student_valid.pack(h_s), head_s, labels)
    teacher_valid, head_t = Valid(batch["teacher_labels"]), teacher.head.weight
    if "teacher_hidden" in batch:
        h_t = batch["teacher_hidden"]
    else:
        with torch.no_grad():
            h_t = teacher_valid.grid(teacher(batch["teacher_ids"]))
    if options.method in ("uld", "mined"):
        parts = sft(student_valid.pack(h_s), head_s, labels, 1 - options.kd_rate)
        sides = h_s, head_s, h_t, head_t
        other = baselines.uld(*sides, student_valid.mask, teacher_valid.mask, options.kd_rate) if options.method == "uld" else \
            baselines.mined(*sides, batch["partners"], batch["vocabulary_map"], options.temperature, options.kd_rate)
        return parts | other | {"loss": parts["loss"] + other["loss"]}
    one_to_one = student_valid.pack(h_s), head_s, teacher_valid.pack(h_t), head_t, labels
    if options.method == "kd":
        return kd(*one_to_one, options.divergence, options.temperature, options.kd_rate)
    if options.method == "dskd":
        return dskd(*one_to_one, projectors, options.divergence, options.temperature, options.kd_rate)
    ramp = min(1.0, (step + 1) / options.ramp_steps) if options.ramp_steps else 1.0
    parts, aligned = dskd_cma(batch, student_valid, teacher_valid, h_s, student.embed, head_s, h_t, teacher.embed, head_t, projectors, options.divergence,
                              options.temperature, options.kd_rate, options.alignment, options.weights == "entropy", ramp)
    if options.adversary == "gan":
        parts |= discriminator.gan(adversary, teacher_valid.pack(aligned.keys), student_valid.pack(aligned.queries))
    elif options.adversary == "ct":
        parts |= discriminator.conditional_transport(adversary, aligned.keys, aligned.queries, teacher_valid.mask, student_valid.mask)
    if options.dtw_weight:
        parts |= _dtw(options, batch, student, projectors, student_valid, teacher_valid, h_s, h_t, aligned, step)
    return parts


def _dtw(options: Options, batch, student, projectors, student_valid, teacher_valid, h_s, h_t, aligned, step: int) -> dict[str, torch.Tensor]:
    """DWA-KD's two soft-DTW divergences: label embeddings, and final hidden states, both in the student's space."""
    lengths_s, lengths_t = student_valid.mask.sum(1), teacher_valid.mask.sum(1)
    outside = soft_dtw.band_penalty(aligned.weights, lengths_s, lengths_t, options.dtw_band, options.dtw_entropy, options.dtw_penalty, options.dtw_blend)
    label_embed = student.embed(student_valid.grid(batch["student_labels"]))
    pairs = [(label_embed, projectors.dtw_embed(aligned.teacher_label_embed)), (h_s, projectors.t2s(h_t))]
    embed, hidden = soft_dtw.dtw_divergences(pairs, lengths_s, lengths_t, gamma(options, step), outside)
    return {"dtw_embed_loss": embed, "dtw_hidden_loss": hidden}


def gamma(options: Options, step: int) -> float:
    """soft-DTW's γ after `step` optimizer steps: linear, then constant."""
    progress = min(1.0, step / options.dtw_gamma_steps) if options.dtw_gamma_steps else 1.0
    return options.dtw_gamma_start + progress * (options.dtw_gamma_end - options.dtw_gamma_start)


def total(options: Options, parts: dict[str, torch.Tensor], n: dict[str, int]) -> torch.Tensor:
    """The loss: (1 − α) · CE + α · KD + λ_GA · (adversary) + λ_DTW · (DTW), from sums and the numbers of valid tokens."""
    loss = parts["loss"] / n["student"]
    if "adversary_key_loss" in parts:
        loss = loss + options.ga_weight * (parts["adversary_key_loss"] / n["teacher"] + parts["adversary_query_loss"] / n["student"])
    if "dtw_embed_loss" in parts:
        loss = loss + options.dtw_weight * (parts["dtw_embed_loss"] + parts["dtw_hidden_loss"]) / n["student"]
    return loss
