"""The table of methods: every method is a choice of options, and one function goes from a batch to its loss parts.

    --method dwa_kd                    is --alignment attention --weights entropy --dtw_weight 0.2
    --method dwa_kd --adversary gan    and any other combination that makes sense

A new divergence is a name and a branch in divergences.py. A new method is a line of METHODS, its name in the groups
below it where it belongs to one, its loss in a file of its own here, and two lines in `both_sides`; what α multiplies
comes back as "kd_loss"."""
from dataclasses import dataclass

import torch

import discriminator
from cma import ALIGNMENTS, WITH_QUERIES, dskd_cma
from files.config import InputError, flag
from methods import heads, soft_dtw
from methods.alm import alm_loss
from methods.byte_kd import byte_loss, byte_terms
from methods.divergences import DIVERGENCES
from methods.dual_space import Projectors, dskd
from methods.heads import Parts
from methods.mined import mined_loss
from methods.sides import Side, side_of
from methods.uld import uld_loss

# method → its options; the teacher-less and the older methods have none of them
METHODS = {
    "sft": {},                          # cross-entropy on the data, no teacher
    "seqkd": {},                        # cross-entropy on the teacher's answers
    "kd": {},                           # divergence between the two models' outputs (same vocabulary)
    "dskd": {},                         # distillation in both models' spaces (same vocabulary)
    "uld": {},                          # distance of sorted probabilities
    "mined": {},                        # positions and vocabularies matched by edit distance
    "byte_kd": dict(temperature=1.0, kd_rate=0.75),       # divergence between the next bytes that the two expect
    "alm": dict(temperature=100.0),     # the likelihood of every chunk of text, matched
    "dskd_clp": dict(alignment="chunk_mean"),
    "dskd_cla": dict(alignment="chunk_attention"),
    "dskd_cma": dict(alignment="attention"),
    "dskd_cma_ga": dict(alignment="attention", adversary="gan"),
    "dskd_cma_ct": dict(alignment="attention", adversary="ct"),
    "dwa_kd": dict(alignment="attention", weights="entropy", gate="confidence", dtw_weight=0.2),
}
WITHOUT_KD = ("sft", "seqkd")           # cross-entropy alone: α is 0
ONE_VOCABULARY = ("kd", "dskd")         # positions and tokens correspond one to one
LOGITS_ONLY = ("kd", "uld", "mined", "byte_kd", "alm")         # no projectors
KD_PARTS = ("kd_loss", "t2s_ce_loss", "t2s_kd_loss", "s2t_kd_loss", "byte_loss")        # what the total multiplies by α
OF_LABELS = ("nll_loss", "accuracy", "t2s_ce_loss", "t2s_acc", "s2t_acc", "teacher_acc")    # what only the data teaches
ADVERSARIES = {"gan": discriminator.Discriminator, "ct": discriminator.Transport, "energy": None}

@dataclass
class Options:
    """What is minimized. train.py adds the rest of its command line to these."""
    method: str = flag("dskd_cma_ga", "a preset of the next four options, see docs/methods.md", choices=tuple(METHODS))
    alignment: str = flag("none", "how positions of two tokenizers meet; none: one to one, or not at all",
                          choices=("none", *ALIGNMENTS))
    adversary: str = flag("none", "who matches keys and queries, see discriminator.py", choices=("none", *ADVERSARIES))
    value: str = flag("label", "what is attended to: the teacher's state and its label's embedding, or the state alone",
                      choices=("label", "hidden"))
    gate: str = flag("right", "when z_t2s teaches: where its first guess is right, always, or as it is confident",
                     choices=("right", "always", "confidence"))
    weights: str = flag("gate", "of the KD terms: the gate, or times DWA-KD's entropies", choices=("gate", "entropy"))
    dtw_weight: float = flag(0.0, "λ_DTW, weight of DWA-KD's soft-DTW terms (a number; dwa_kd: 0.2)", at_least=0)
    byte_weight: float = flag(0.0, "weight of byte_kd's KL, at T = 1, beside the dual-space terms (a number)",
                              at_least=0)
    divergence: str = flag("forward_kl", "distance between student and target, see methods/divergences.py",
                           choices=DIVERGENCES)
    align_on: str = flag("label",
                         "chunks are judged by a position's label token, or by its input token as in the release",
                         choices=("label", "input"))
    kd_rate: float = flag(0.5, "α, share of distillation in the loss (0 to 1)", at_least=0, at_most=1)
    temperature: float = flag(2.0, "T of the divergences (a number)", at_least=1e-3)
    ga_weight: float = flag(0.1, "λ_GA, weight of key-query matching (a number)", at_least=0)
    projector_init: str = flag("random",
                               "the projectors' first weights; shared: from the tokens both vocabularies have, see "
                               "methods/projector_init.py", choices=("random", "shared"))
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
    method, alignment = options.method, options.alignment
    across = "alignment" in METHODS[method]
    if across != (alignment != "none"):
        reason = f"needs one of {', '.join(ALIGNMENTS)}" if across else "has no alignment; start from dskd_cma"
        raise InputError(f"--method {method} --alignment {alignment}: this method {reason}")

    def refuse(field, unused, needs):
        if unused and getattr(options, field) != getattr(Options, field):
            raise InputError(f"--{field} {getattr(options, field)}: --method {method} has no use for it; it is for "
                             f"{needs}")
    refuse("adversary", not across, "dskd_cma or dskd_cla")
    for field in ("weights", "value", "gate", "dtw_weight", "byte_weight"):
        refuse(field, not across, "dskd_cma, dskd_cla or dskd_clp")
    refuse("projector_init", not across, "dskd_cma and those after it")
    refuse("align_on", not alignment.startswith("chunk"), "dskd_clp or dskd_cla")
    refuse("divergence", method in {*WITHOUT_KD, *LOGITS_ONLY} - {"kd"}, "kd or one of the dual-space methods")
    if across and alignment not in WITH_QUERIES and options.adversary != "none":
        raise InputError(f"--adversary {options.adversary}: --alignment {alignment} has no queries to match with keys")

def make_modules(options: Options, student, teacher):
    """What learns beside the student in the dual-space methods: the projectors, and the adversary or None; (None, None)
    in all others. student, teacher: decoders. options: Options or a run's settings."""
    if options.method in (*WITHOUT_KD, *LOGITS_ONLY):
        return None, None
    sizes, query = (student.config.hidden_size, teacher.config.hidden_size), options.alignment in WITH_QUERIES
    adversary = ADVERSARIES.get(options.adversary)
    return Projectors(*sizes, query, dtw_embed=options.dtw_weight > 0), adversary and adversary(2 * sizes[1])

def distill(options: Options, batch, student, teacher, projectors, adversary, step: int,
            factors: dict[str, float], learns: str = "all") -> Parts:
    """Forward both models and compute the method's loss parts, each a SUM over valid positions (of which side: see
    `terms`).

    student and teacher have .embed, .head and forward(ids) → hidden; where the batch holds teacher_hidden (B, T, d_t),
    on the grid of valid positions, the teacher's forward is not called. step: optimizer steps done so far. factors:
    what the total multiplies nll_loss and the parts of kd_loss by, see methods/heads.py. learns: "all" of the method;
    with --on_policy from the data's "labels" cross-entropy alone, from the student's own "answers" what needs none."""
    learner = side_of(batch, "student", student.embed)
    learner.hidden, learner.head = learner.valid.grid(student(batch["student_ids"])), student.head.weight
    if options.method in WITHOUT_KD or learns == "labels":
        return heads.sft(learner, factors)
    guide = side_of(batch, "teacher", teacher.embed)
    guide.head, guide.hidden = teacher.head.weight, batch.get("teacher_hidden")
    if guide.hidden is None:
        with torch.no_grad():
            guide.hidden = guide.valid.grid(teacher(batch["teacher_ids"]))
    if learns == "all":
        return both_sides(options, batch, learner, guide, projectors, adversary, step, factors)
    factors = {name: factor for name, factor in factors.items() if name not in OF_LABELS}
    parts = both_sides(options, batch, learner, guide, projectors, adversary, step, factors)
    return {name: part for name, part in parts.items() if name not in OF_LABELS}

def both_sides(options: Options, batch, learner: Side, guide: Side, projectors, adversary, step: int,
               factors: dict[str, float]) -> Parts:
    """A method's parts, from the student's side of a batch and the teacher's."""
    if options.method == "kd":
        return heads.kd(learner, guide, options, factors)
    if options.method == "dskd":
        return dskd(learner, guide, projectors, options, factors)
    if options.method in ("uld", "mined"):
        labels = heads.sft(learner, factors) if "nll_loss" in factors else {}
        if options.method == "uld":
            return labels | uld_loss(learner, guide, factors, batch.get("common"))
        mapping = batch["pairs"], batch["vocabulary_map"]
        return labels | mined_loss(learner, guide, *mapping, options.temperature, factors)
    if options.method == "byte_kd":
        return byte_loss(learner, guide, batch["next_bytes"], options.temperature, factors)
    if options.method == "alm":
        return alm_loss(learner, guide, batch["text_chunks"], options.temperature, factors)
    next_bytes = byte_terms(guide, batch["next_bytes"], 1.0) if options.byte_weight else None
    parts, aligned = dskd_cma(learner, guide, projectors, options, step, factors, next_bytes)
    if options.adversary in ("gan", "energy"):
        keys, queries = guide.valid.pack(aligned.keys), learner.valid.pack(aligned.queries)
        parts |= discriminator.gan(adversary, keys, queries) if adversary else discriminator.energy(keys, queries)
    if options.adversary == "ct":
        masks = guide.valid.mask, learner.valid.mask
        parts |= discriminator.conditional_transport(adversary, aligned.keys, aligned.queries, *masks)
    if options.dtw_weight:
        parts |= soft_dtw.dtw_losses(learner, guide, projectors, aligned, options, step)
    return parts

def terms(parts: Parts, n: dict[str, int]):
    """CE, KD, GA and DTW of the total, from the parts and the step's numbers of valid tokens; 0 where a pass has no
    such term. Keys are the teacher's positions, everything else is divided by the number of the student's; where it
    answers for itself, n["labels"] are the data's."""
    ce, kd = parts.get("nll_loss", 0.0) / n.get("labels", n["student"]), parts.get("kd_loss", 0.0) / n["student"]
    ga = dtw = 0.0
    if "adversary_key_loss" in parts:
        ga = parts["adversary_key_loss"] / n["teacher"] + parts["adversary_query_loss"] / n["student"]
    if "dtw_embed_loss" in parts:
        dtw = (parts["dtw_embed_loss"] + parts["dtw_hidden_loss"]) / n["student"]
    return ce, kd, ga, dtw
