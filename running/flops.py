"""Floating-point operations of a step, and what share of the machine's peak they are (MFU).

A multiplication of (m, k) by (k, n) is 2·m·k·n operations. What counts is what the method needs: no padding, nothing
that is computed again to save memory, full attention as in the PaLM paper (arXiv 2204.02311).

    decoder, forward      2 · (weights of its layers) · tokens + 4 · layers · width · Σ rows length²
    decoder, backward     twice that, with LoRA (lora.py) once; the teacher has none
    student's head        z_s: 6 · N_s · d_s · V_s (forward, and backward to states and weight); z_t2s: 4 (to states)
    teacher's head        z_t: 2 · N_t · d_t · V_t;   z_s2t: 4
    attention A           Q Kᵀ and the two mixtures: 4 · Σ rows S·T · 2d_t, then 6 · Σ S·T · (d_s + d_t)
    discriminator         6 · (N_t + N_s) · weights, but 4 · N_t for the first layer, whose keys need no gradient
    projectors            s2t: 6 · N_s · d_s · d_t; their inputs need no gradient: t2s: 4 · N_t · d_t · d_s,
                          query: 4 · N_s · 2d_s · 2d_t"""
import re
import time

import torch

from cma import WITH_QUERIES
from methods.table import LOGITS_ONLY, WITHOUT_KD
from tokenize_align import Example

# Dense bfloat16 with float32 sums, in TFLOP/s, from the makers' data sheets; names as the driver has them, whole, but
# for "NVIDIA" in front. The first that fits counts; a part of a card (MIG) and any other are measured.
PEAK = {r"GB200|GB300": 2500, r"B200|B300": 2250, r"H200|GH200 .*|H100( 80GB)? HBM[23]e?|H800": 989,
        r"H200 NVL|H100 NVL": 835, r"(H100|H800) PCIe": 756, r"H20": 148,
        r"A[18]00-(SXM4?|PCIE|PG509)-\d+GB|A[18]00 80GB PCIe": 312, r"A30": 165, r"A40": 150, r"A10": 125, r"A10G": 70,
        r"A2": 18, r"L40S": 362, r"L40": 181, r"L4": 121, r"RTX 6000 Ada Generation": 364, r"RTX A6000": 155,
        r"RTX A5000": 111, r"GeForce RTX 5090": 209, r"GeForce RTX 4090": 165, r"GeForce RTX 4080": 97,
        r"GeForce RTX 3090": 71}

def decoder_flops(decoder, sequences: list) -> int:
    """Forward operations of a Decoder's layers over some tokenize_align.Sequence, each but its last token."""
    config = decoder.config
    weights = sum(p.numel() for name, p in decoder.named_parameters() if name.startswith("layers.") and p.dim() > 1)
    lengths = [len(s.ids) - 1 for s in sequences]
    width = config.num_heads * config.head_dim
    return 2 * weights * sum(lengths) + 4 * config.num_layers * width * sum(length ** 2 for length in lengths)

def step_flops(options, student, teacher, examples: list[Example], cached: bool = False) -> int:
    """Operations of one optimizer step over these examples, forward and backward. cached: the teacher's layers don't
    run. Conditional transport, soft-DTW and ULD's sorting are left out: a few hundredths."""
    n_s, n_t = (sum(getattr(e, side).valid for e in examples) for side in ("student", "teacher"))
    d_s, v_s = student.config.hidden_size, student.config.vocab_size
    of_weights = int(student.embed.weight.requires_grad)        # 0 with LoRA, whose own products are small
    layers = decoder_flops(student, [e.student for e in examples])
    total = (2 + of_weights) * layers + (4 + 2 * of_weights) * n_s * d_s * v_s
    if options.method in WITHOUT_KD:
        return total
    d_t, v_t = teacher.config.hidden_size, teacher.config.vocab_size
    total += (0 if cached else decoder_flops(teacher, [e.teacher for e in examples])) + 2 * n_t * d_t * v_t
    if options.method in LOGITS_ONLY:
        return total
    total += 4 * n_s * d_s * v_s + 4 * n_t * d_t * v_t + 4 * n_t * d_t * d_s + 6 * n_s * d_s * d_t
    if options.alignment != "none":
        crossings = sum(e.student.valid * e.teacher.valid for e in examples)
        query = options.alignment in WITH_QUERIES
        if options.adversary == "gan":
            first, rest = (2 * d_t) ** 2, 2 * d_t * 768 + 768
            total += 4 * n_t * first + 6 * n_t * rest + 6 * n_s * (first + rest)
        total += query * (16 * n_s * d_s * d_t + 8 * crossings * d_t) + (4 + 2 * query) * crossings * (d_s + d_t)
    return total

def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second that the device can do: from the data sheet, or measured with a large product of matrices."""
    if device == "cuda" and dtype == torch.bfloat16 and (known := known_peak(torch.cuda.get_device_name())):
        return known
    size, times = 8192 if device == "cuda" else 2048, []
    a = torch.full((size, size), 0.01, dtype=dtype, device=device)      # not random: a run's numbers stay its own
    for _ in range(6):                                                  # the first one is slow
        if device == "cuda":
            first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            a @ a
            second.record()
            second.synchronize()
            times.append(first.elapsed_time(second) / 1e3)
        else:
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
    return 2 * size ** 3 / min(times)

def known_peak(name: str) -> float | None:
    """Operations a second of a card by its whole name, where a data sheet tells them."""
    name = name.removeprefix("NVIDIA ").strip()
    return next((1e12 * teraflops for known, teraflops in PEAK.items() if re.fullmatch(known, name)), None)
