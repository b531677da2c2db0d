"""Score a model: ROUGE-L of its answers, bits per byte of the references.

    python eval_rouge.py out/toy-byte_kd --data toy toy-phrasings --seeds 10 20 30
    torchrun --nproc_per_node=8 eval_rouge.py out/gpt2 --data dolly     # the rows are shared

As in the papers: sampled at temperature 1, five seeds; ROUGE-L F1 × 100 with stemming, best over
references; mean ± standard deviation over seeds. "OOD" is the mean over every set but the one
trained on.

Bits per byte (BPB): −log₂ p of an answer's tokens and EOS over its UTF-8 bytes, summed over rows
before dividing. It compares models whatever their tokenizers are, and varies less with the seed
than ROUGE-L. `rouge_l` gives the rouge-score package's values."""

import json
import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import runtime.config  # first, so that Ctrl-C while starting is one line
import torch

from data import Row, read_split, same_data, trained_on
from hub.download import model_folder
from methods.blocks import token_nll
from model import load
from porter import stem
from prompts import FORMATS, prompt_text
from runtime import distributed
from runtime.config import InputError, flag, parse, run_script
from runtime.distributed import autocast, pick_device
from runtime.files import atomic_write, file_label
from runtime.generation import answer_rows, share_of
from runtime.progress import Progress
from tokenize_align import collate, encode_prompt, encode_rows, load_tokenizer

# ------------------------------------------------------------------------------------------ ROUGE-L


def rouge_tokens(text: str) -> list[str]:
    """rouge-score's words: runs of a–z and 0–9 in lower case, stemmed if longer than 3."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in words]


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): one whole number is a
    row of the table. Bit i of `row` is 0 where the LCS of a[:i + 1] is longer than that of a[:i].
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    everything = (1 << len(a)) - 1
    row = everything
    for word in b:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & everything
    return len(a) - row.bit_count()


def rouge_l(predictions: list[str], references: list) -> list[float]:
    """ROUGE-L F1 (Lin, 2004) of each prediction against the best of its references, in [0, 1].

    references: a string or a list of strings for each prediction. F = 2 P R / (P + R), P = LCS /
    words predicted, R = LCS / words of the reference. Raises ValueError where the lists differ in
    length or a prediction has no reference."""
    references = [[r] if isinstance(r, str) else r for r in references]
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions need as many lists of at least one reference"
        )
    scores = []
    for prediction, group in zip(predictions, references):
        predicted = rouge_tokens(prediction)
        best = 0.0
        for reference in group:
            words = rouge_tokens(reference)
            common = lcs_length(words, predicted)
            if common:
                precision, recall = common / len(predicted), common / len(words)
                best = max(best, 2 * precision * recall / (precision + recall))
        scores.append(best)
    return scores


# ------------------------------------------------------------------------------------ bits per byte


@torch.no_grad()
def answer_bits(
    decoder,
    tokenizer,
    rows: list[Row],
    max_length: int,
    max_prompt_length: int,
    batch_size: int = 32,
    desc: str = "bits",
) -> list[tuple[float, int, bool]]:
    """For each row's prompt and first answer: −log₂ p(answer, EOS), the answer's UTF-8 bytes, and
    whether all of it fits into max_length. Else what is left counts; (0, 0, False) where that is
    nothing.

    Logits are in float32. torchrun's processes share the rows."""
    mine = share_of(decoder, len(rows))
    of_mine = [rows[i] for i in mine]
    examples, _, _ = encode_rows(of_mine, tokenizer, tokenizer, max_length, max_prompt_length)
    examples.sort(key=lambda example: len(example.student.ids))
    device, training = decoder.embed.weight.device, decoder.training
    decoder.eval()
    head = decoder.head.weight.float()
    bits = {i: (0.0, 0, False) for i in mine}
    progress = Progress(len(examples), desc, "row")
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = collate(part, tokenizer.eos_id, tokenizer.eos_id)
        labels = batch["student_labels"].to(device)
        hidden = decoder(batch["student_ids"].to(device), batch["student_mask"].to(device))
        response = labels != -100
        with torch.autocast(device.type, enabled=False):
            nll = token_nll(hidden[response].float(), head, labels[response]).double().cpu()
        counts = [len(example.student.response_ids) for example in part]
        for example, of_example in zip(part, nll.split(counts)):
            num_bytes = example.student.spans[-1][1]
            whole = example.student.ids[-1] == tokenizer.eos_id
            bits[mine[example.row]] = float(of_example.sum()) / math.log(2), num_bytes, whole
        progress.update(len(part))
    progress.close()
    decoder.train(training)
    return distributed.gather_rows(bits)


def bits_per_byte(bits: list[tuple[float, int, bool]]) -> float:
    """Σ bits / Σ bytes. Raises InputError where every answer was cut to nothing."""
    num_bytes = sum(n for _, n, _ in bits)
    if not num_bytes:
        raise InputError("--max_length: is too small, no row that is scored has room for an answer")
    return sum(b for b, _, _ in bits) / num_bytes


def kl_to_truth(
    decoder, tokenizer, rows: list[Row], max_length: int, max_prompt_length: int, batch_size: int
) -> float | None:
    """KL(truth ‖ model) in bits per answer, the mean over rows, whose `truth` is known; None where
    an answer is cut."""
    answers = [replace(row, outputs=[answer]) for row in rows for answer in row.truth]
    bits = answer_bits(
        decoder, tokenizer, answers, max_length, max_prompt_length, batch_size, "KL to the truth"
    )
    total = 0.0
    probabilities = [p for row in rows for p in row.truth.values()]
    for p, (of_answer, _, whole) in zip(probabilities, bits):
        if not whole:
            return None
        total += p * (math.log2(p) + of_answer)
    return total / len(rows)


def scores_of(
    decoder,
    tokenizer,
    rows: list[Row],
    max_length: int,
    max_prompt_length: int,
    desc: str,
    seeds: tuple[int, ...] = (),
    answers: bool = True,
) -> dict[str, float]:
    """What train.py scores: bits per byte of the first references and, with answers, ROUGE-L × 100
    of greedy ones, or the mean over answers sampled with these seeds at temperature 1."""
    limits = max_length, max_prompt_length
    bits = answer_bits(decoder, tokenizer, rows, *limits)
    scores = {"bits_per_byte": bits_per_byte(bits)}
    if not answers:
        return scores
    rouge = []
    for seed in seeds or (0,):
        given = answer_rows(
            decoder,
            tokenizer,
            rows,
            *limits,
            seed=seed,
            desc=desc,
            temperature=1.0 if seeds else 0.0,
        )
        rouge += rouge_l(given, [row.outputs for row in rows])
    scores["rouge_l"] = 100 * statistics.mean(rouge)
    return scores


def has_rouge_words(rows: list[Row]) -> bool:
    """Whether any reference has a word that ROUGE-L counts; Chinese, say, has none."""
    return any(rouge_tokens(output) for row in rows for output in row.outputs)


# ------------------------------------------------------------------------------------------- script

SETTINGS = (  # into rouge.json
    "seeds",
    "num",
    "temperature",
    "max_length",
    "max_prompt_length",
    "no_repeat_ngram",
    "prompt_format",
)


@dataclass
class Config:
    model: str = flag("", "A checkpoint's folder, a run's out_dir, or a model's name.")
    data: list[str] = flag(
        [],
        "Sets by name, folder or file; of a folder its test split. Without it: what the checkpoint "
        "was trained on.",
    )
    seeds: list[int] = flag([10, 20, 30, 40, 50], "Sampling seeds, one pass each.")
    num: int = flag(0, "Score the first rows of each set only; 0: all.", minimum=0)
    temperature: float = flag(1.0, "Sampling temperature; 0: greedy answers only.", minimum=0)
    batch_size: int = flag(32, "Prompts that are answered together.", minimum=1)
    max_length: int = flag(
        0,
        "Tokens of prompt and reference, and of an answer, which has at most 256 besides; 0: 512, "
        "or all a model has.",
        minimum=0,
    )
    max_prompt_length: int = flag(256, "Prompts are cut to this many tokens.", minimum=1)
    prompt_format: str = flag(
        "auto", "How prompts are put; auto: as the model was trained.", choices=FORMATS
    )
    no_repeat_ngram: int = flag(
        0, "No answer repeats so many tokens of itself or its prompt; 0: any may.", minimum=0
    )
    out_dir: str = flag(
        "",
        "Where rouge.json and the answers go. Without it: the checkpoint's "
        "folder, or out/eval/NAME.",
    )
    device: str = flag("auto", "Where to run.", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "auto: bfloat16 on GPUs that have it, else float32.",
        choices=("auto", "float32", "bfloat16"),
    )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv, positional=("model",))
    if not config.model:
        raise InputError("name a checkpoint: python eval_rouge.py CHECKPOINT --data NAME …")
    device, dtype = pick_device(config.device, config.dtype)
    distributed.init(device)
    with distributed.first_goes_first():
        folder = model_folder(config.model)
        trained = trained_on(folder)
        config.data = config.data or [own_data(folder, trained)]
        if any(name.startswith("toy") for name in config.data):
            import toy

            toy.write_data()
        sets = {name: read_split(name, "test")[: config.num or None] for name in config.data}
    decoder = load(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder, config.prompt_format)
    if config.temperature == 0:
        config.seeds = []
    positions = decoder.config.max_positions
    config.max_length = config.max_length or min(512, positions)
    if config.max_length > positions:
        raise InputError(
            f"--max_length {config.max_length}: {config.model} has {positions} positions"
        )
    out_dir = Path("out/eval") / config.model.replace("/", "--")
    if config.out_dir or Path(config.model).is_dir():
        out_dir = Path(config.out_dir or decoder.source)
    out_dir.mkdir(parents=True, exist_ok=True)

    results = {}
    with autocast(device, dtype):
        for name, rows in sets.items():
            results[name] = score_set(config, decoder, tokenizer, name, rows, out_dir)
    if not distributed.is_first():
        return
    others = [name for name in results if trained and not same_data(name, trained)]
    summary = {"model": config.model, "trained_on": trained, "sets": results}
    summary["settings"] = {name: getattr(config, name) for name in SETTINGS}
    if others:
        for measure in ("rouge_l", "bits_per_byte"):
            summary[f"ood_{measure}"] = statistics.mean(results[name][measure] for name in others)
    with atomic_write(out_dir / "rouge.json") as file:
        json.dump(summary, file, indent=2)
    with_kl = any(scores["kl_to_truth"] is not None for scores in results.values())
    print(
        f"{'set':<24}{'rows':>6}   bits per byte   ROUGE-L        greedy"
        f"{'   KL(truth ‖ model)' if with_kl else ''}"
    )
    for name, scores in results.items():
        known, kl = "", scores["kl_to_truth"]
        if kl is not None:
            known = f"{kl:13.2f} bits"
        if same_data(name, trained):
            known += "   (in domain)"
        print(
            f"{name:<24}{scores['rows']:>6}{scores['bits_per_byte']:16.3f}   "
            f"{scores['rouge_l']:5.2f} ± {scores['std']:4.2f}{scores['rouge_l_greedy']:9.2f}{known}"
        )
    if others:
        print(
            f"{'OOD mean':<30}{summary['ood_bits_per_byte']:16.3f}   "
            f"{summary['ood_rouge_l']:5.2f}"
        )
    print(f"wrote {out_dir / 'rouge.json'} and the answers beside it")


def own_data(folder: Path, trained: str | None) -> str:
    """What a checkpoint was trained on. Raises InputError where it is unknown, or one file, whose
    rows it has seen."""
    if trained is None:
        raise InputError(f"{folder}: name what is to be scored with --data")
    if Path(trained).is_file():
        raise InputError(f"{folder}: was trained on {trained}; name rows apart from it with --data")
    return trained


def score_set(
    config: Config, decoder, tokenizer, name: str, rows: list[Row], out_dir: Path
) -> dict:
    """Answer one set with every seed, write the answers → the set's part of rouge.json."""
    limit = min(config.max_prompt_length, config.max_length - 1)
    cut = sum(encode_prompt(row, tokenizer, limit)[1] for row in rows)
    if cut:
        distributed.print_first(f"{name}: {cut} of {len(rows)} prompts cut to {limit} tokens")
    limits = config.max_length, config.max_prompt_length, config.batch_size
    bits = answer_bits(decoder, tokenizer, rows, *limits, f"{name}, bits")
    no_room = sum(num_bytes == 0 for _, num_bytes, _ in bits)
    if no_room:
        distributed.print_first(
            f"{name}: {no_room} of {len(rows)} prompts leave no "
            f"room for an answer within {config.max_length} tokens; left out "
            "of bits per byte"
        )
    references = [row.outputs for row in rows]
    rouge_by_row = {}  # pass → rows
    for seed in [None, *config.seeds]:
        label = "greedy" if seed is None else f"seed{seed}"
        answers = answer_rows(
            decoder,
            tokenizer,
            rows,
            *limits,
            seed=seed or 0,
            desc=f"{name}, {label}",
            temperature=0.0 if seed is None else config.temperature,
            no_repeat_ngram=config.no_repeat_ngram,
        )
        by_row = [100 * score for score in rouge_l(answers, references)]
        rouge_by_row[label] = by_row
        if distributed.is_first():
            with atomic_write(out_dir / f"answers-{file_label(name)}-{label}.jsonl") as file:
                for row, text, score in zip(rows, answers, by_row):
                    prompt = prompt_text(row, tokenizer.prompt_format, tokenizer.template)
                    line = dict(prompt=prompt, answer=text, output=row.outputs, rouge_l=score)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    greedy = rouge_by_row.pop("greedy")
    sampled = list(rouge_by_row.values()) or [greedy]
    by_seed = [statistics.mean(by_row) for by_row in sampled]
    kl = None
    if all(row.truth for row in rows):
        kl = kl_to_truth(decoder, tokenizer, rows, *limits)
    return {
        "rows": len(rows),
        "bits_per_byte": bits_per_byte(bits),
        "kl_to_truth": kl,
        "rouge_l": statistics.mean(by_seed),
        "rouge_l_by_seed": by_seed,
        "std": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
        "rouge_l_greedy": statistics.mean(greedy),
        "bits_by_row": [b for b, _, _ in bits],
        "bytes_by_row": [n for _, n, _ in bits],
        "rouge_l_by_row": [statistics.mean(scores) for scores in zip(*sampled)],
        "rouge_l_greedy_by_row": greedy,
    }


if __name__ == "__main__":
    run_script(main)
