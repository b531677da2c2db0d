"""Score a model's answers: ROUGE-L and exact match over sampled (or greedy) generations.

    python eval_rouge.py out/toy-dskd_cma_ga --data toy toy-phrasings --seeds 10 20 30

torchrun --nproc_per_node=8 -- eval_rouge.py … splits the rows over 8 processes; what is sampled then depends on their number.
As in the papers: sample at temperature 1, top-p 1, five seeds; ROUGE-L F1 × 100 with stemming, best over references;
mean ± standard deviation over seeds; "OOD" is the mean over every set but the one trained on.

Notable here: `rouge_l` gives the rouge-score package's values; the longest common subsequence is computed with a row of the
dynamic program in one whole number, and every stem only once.
"""
import contextlib
import json
import re
import statistics
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import hub
import parallel
import porter
import toy
from config import flag, parse
from hub import InputError
from model import Decoder, load
from run_folder import Interrupted
from tokenize_align import Row, Tokenizer, encode_prompt, left_pad, load_tokenizer, read_rows


# ----------------------------------------------------------------------------------------------------------- scores

def _rouge_tokens(text: str, use_stemmer: bool) -> list[str]:
    """rouge-score's tokenization: lower case, runs of a–z and 0–9 are words, those over 3 letters are stemmed."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [porter.stem(w) if len(w) > 3 else w for w in words] if use_stemmer else words


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): one whole number is a row of the dynamic program.

    Bit i of `row` is 0 where the LCS of the first i + 1 words of a is one longer than that of the first i.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    row = everything = (1 << len(a)) - 1
    for word in b:
        if matches := row & positions.get(word, 0):
            row = (row + matches | row - matches) & everything
    return len(a) - row.bit_count()


def rouge_l(predictions: list[str], references: list[list[str] | str], use_stemmer: bool = True) -> list[float]:
    """ROUGE-L F1 (Lin, 2004) of each prediction against the best of its references, in [0, 1].

    references: a list of strings, or one string, for each prediction. F = 2 P R / (P + R), P = LCS / words predicted,
    R = LCS / words of the reference. Raises ValueError where the lists differ in length or a prediction has no reference.
    """
    references = [[r] if isinstance(r, str) else r for r in references]
    if len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} predictions need as many lists of at least one reference")
    words = [_rouge_tokens(p, use_stemmer) for p in predictions]
    pairs = [(i, _rouge_tokens(r, use_stemmer)) for i, group in enumerate(references) for r in group]
    best = [0.0] * len(predictions)
    for i, reference in pairs:
        if common := lcs_length(reference, words[i]):
            precision, recall = common / len(words[i]), common / len(reference)
            best[i] = max(best[i], 2 * precision * recall / (precision + recall))
    return best


def exact_match(predictions: list[str], references: list[list[str]]) -> list[bool]:
    """Whether a prediction equals one of its references after SQuAD's normalization but for articles, which stay: lower
    case, no punctuation, single spaces."""
    def normal(text):
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
    return [normal(p) in map(normal, group) for p, group in zip(predictions, references)]


# ---------------------------------------------------------------------------------------------------------- answers

def answer_batches(decoder: Decoder, tokenizer: Tokenizer, rows: list[Row], max_length: int, max_prompt_length: int, batch_size: int,
                   temperature: float, seed: int = 0, desc: str = "answering", done=()) -> Iterator[list[tuple[int, str, bool]]]:
    """Generate answers, a batch of prompts of like length at a time → lists of (number of the row, answer, whether it ended
    before the limit). Limits in tokens; temperature 0 is greedy. done: numbers of rows that need no answer any more."""
    device = decoder.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    limit = min(max_prompt_length, max_length - 1)
    prompts = [encode_prompt(row.prompt, tokenizer, limit)[0] or [tokenizer.eos_id] for row in rows]
    new_tokens = max_length - max(map(len, prompts))            # what the longest prompt leaves, for every row
    order = sorted(set(range(len(rows))) - set(done), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(rows), initial=len(rows) - len(order), desc=desc, unit="row", leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start:start + batch_size]
            ids, mask = left_pad([prompts[i] for i in part], tokenizer.eos_id)
            new = decoder.generate(ids.to(device), mask.to(device), new_tokens, temperature,
                                   eos_id=tokenizer.eos_id, generator=generator)
            answers = [tokens[:tokens.index(tokenizer.eos_id)] if tokenizer.eos_id in tokens else tokens for tokens in new.tolist()]
            yield [(i, tokenizer.decode(tokens).strip(), len(tokens) < new.size(1)) for i, tokens in zip(part, answers)]
            bar.update(len(part))


def answer(decoder: Decoder, tokenizer: Tokenizer, rows: list[Row], max_length: int, max_prompt_length: int,
           batch_size: int = 32, temperature: float = 1.0, seed: int = 0, desc: str = "answering", at_once=contextlib.nullcontext) -> list[str]:
    """An answer to every row's prompt, in the rows' order; the same seed and batch size give the same answers.

    Every process of torchrun answers a part of the rows and gets all answers; a sharded model needs its processes in step,
    so there each answers everything. at_once: a context in which Interrupted may be raised; it is raised in every process.
    """
    sharded = parallel.is_sharded(decoder)
    first, every = (0, 1) if sharded else (parallel.rank(), parallel.world())
    others = set(range(len(rows))) - set(range(first, len(rows), every))
    answers: dict[int, str] | None = {}
    try:
        with contextlib.nullcontext() if sharded else at_once():
            for batch in answer_batches(decoder, tokenizer, rows, max_length, max_prompt_length, batch_size, temperature,
                                        seed + 1_000_003 * first, desc, others):
                answers |= {i: text for i, text, _ in batch}
    except Interrupted:
        answers = None
    parts = parallel.gather(answers)
    if None in parts:
        raise Interrupted
    answers = {i: text for part in parts for i, text in part.items()}
    return [answers[i] for i in range(len(rows))]


def tell_cut_prompts(name: str, rows: list[Row], tokenizer: Tokenizer, limit: int) -> None:
    """Say how many prompts of a set exceed the limit, in tokens, where any does."""
    if cut := sum(encode_prompt(row.prompt, tokenizer, limit)[1] for row in rows):
        print(f"{name}: {cut} of {len(rows)} prompts cut to {limit} tokens")


# ------------------------------------------------------------------------------------------------------------- main

@dataclass
class Config:
    model: str = flag("", "checkpoint folder, a run's out_dir, or a model's name")
    data: list[str] = flag(["toy"], "data sets by name, folder or .jsonl file (their test split is scored)")
    seeds: list[int] = flag([10, 20, 30, 40, 50], "sampling seeds, one pass over the data each", at_least=0, at_most=2**40)
    num: int = flag(0, "score only the first N rows of each set (0: all)", at_least=0)
    greedy: bool = flag(False, "take the likeliest token instead of sampling; one pass")
    temperature: float = flag(1.0, "sampling temperature", at_least=1e-6)
    batch_size: int = flag(32, "prompts answered together", at_least=1)
    max_length: int = flag(0, "prompt and answer together, in tokens (0: 512, or all positions of a smaller model)", at_least=0)
    max_prompt_length: int = flag(256, "longer prompts are cut, in tokens", at_least=1)
    out_dir: str = flag("", "where rouge.json and the answers go (default: the checkpoint folder, or out/eval for a name)")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "weights' type: float32 on CPU, bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))


def main() -> None:
    with parallel.started():
        evaluate(parse(Config, __doc__, positional=("model",)))


def evaluate(config: Config) -> None:
    if not config.model:
        raise InputError("name a checkpoint: python eval_rouge.py CHECKPOINT_OR_NAME --data NAME …")
    with parallel.first_goes_first():
        toy.write_data_for(config.data)
    sets = {name: read_rows(hub.data_file(name, "test"))[:config.num or None] for name in config.data}
    device, dtype = hub.pick_device(config.device, config.dtype)
    decoder, tokenizer = load(config.model, dtype=dtype, device=device), load_tokenizer(config.model)
    hub.check_vocabulary(config.model, decoder.config.vocab_size, tokenizer.vocab_size)
    max_length = config.max_length or min(512, decoder.config.max_positions)
    if not 2 <= max_length <= decoder.config.max_positions:
        raise InputError(f"--max_length {max_length}: {config.model} has {decoder.config.max_positions} positions, and 2 is the least")
    trained_on = hub.trained_on(decoder.source)
    labels = {name: hub.label(name) for name in sets}
    if len(set(labels.values())) < len(labels):
        raise InputError(f"--data {' '.join(sets)}: the files of answers would have the same name {labels}; rename a set")
    out_dir = Path(config.out_dir or (decoder.source if Path(config.model).is_dir() else "out/eval/" + config.model.replace("/", "--")))
    out_dir.mkdir(parents=True, exist_ok=True)

    passes = [None] if config.greedy else config.seeds
    results = {}
    for name, rows in sets.items():
        tell_cut_prompts(name, rows, tokenizer, min(config.max_prompt_length, max_length - 1))
        scores, matches = [], []
        for seed in passes:
            answers = answer(decoder, tokenizer, rows, max_length, config.max_prompt_length, config.batch_size,
                             0.0 if seed is None else config.temperature, seed or 0, f"{name}, {'greedy' if seed is None else f'seed {seed}'}")
            each = rouge_l(answers, [row.outputs for row in rows])
            scores.append(100 * statistics.mean(each))
            matches.append(100 * statistics.mean(exact_match(answers, [row.outputs for row in rows])))
            if not parallel.is_first():
                continue
            with hub.atomic_write(out_dir / f"answers-{labels[name]}-{'greedy' if seed is None else f'seed{seed}'}.jsonl") as file:
                for row, text, score in zip(rows, answers, each):
                    file.write(json.dumps({"prompt": row.prompt, "answer": text, "output": row.outputs,
                                           "rouge_l": round(100 * score, 2)}, ensure_ascii=False) + "\n")
        results[name] = {"rows": len(rows), "rouge_l": statistics.mean(scores), "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                         "exact_match": statistics.mean(matches), "rouge_l_by_seed": scores}

    if not parallel.is_first():
        return
    others = [r["rouge_l"] for name, r in results.items() if not hub.same_data(name, trained_on)]
    summary = {"model": config.model, "seeds": passes, "trained_on": trained_on, "sets": results,
               "ood_mean": statistics.mean(others) if others and trained_on else None}
    with hub.atomic_write(out_dir / "rouge.json") as file:
        json.dump(summary, file, indent=2)

    print(f"{'set':<24}{'rows':>6}   ROUGE-L{'':>10}exact match")
    for name, r in results.items():
        print(f"{name:<24}{r['rows']:>6}   {r['rouge_l']:5.2f} ± {r['std']:4.2f}{'':>5}{r['exact_match']:6.2f} %"
              + ("   (trained on)" if hub.same_data(name, trained_on) else ""))
    if summary["ood_mean"] is not None:
        print(f"{'OOD mean':<24}{'':>6}   {summary['ood_mean']:5.2f}")
    print(f"wrote {out_dir / 'rouge.json'} and the answers beside it")


if __name__ == "__main__":
    hub.run(main)
