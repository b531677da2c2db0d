"""Score a model: ROUGE-L and exact match of sampled (or greedy) answers, and bits a byte of the references.

    python eval_rouge.py out/toy-byte_kd --data toy toy-phrasings --seeds 10 20 30

torchrun --nproc_per_node=8 -- eval_rouge.py … splits the rows over 8 processes; what is sampled then depends on their
number. As in the papers: sample at temperature 1, top-p 1, five seeds; ROUGE-L F1 × 100 with stemming, best over
references; mean ± standard deviation over seeds; "OOD" is the mean over every set but the one trained on.

Bits a byte: −log₂ p of an answer's tokens and EOS over its UTF-8 bytes, summed over rows before dividing: it compares
models whatever their tokenizers are, and moves less with the seed than ROUGE-L.

Notable here: `rouge_l` gives the rouge-score package's values; the longest common subsequence is computed with a row of
the dynamic program in one whole number, and every stem only once."""
import functools
import itertools
import json
import math
import re
import statistics
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from files import hub
from files.config import InputError, flag, parse
from files.rows import Row, read_rows
from methods.heads import label_nats
from model import load
from running import parallel
from running.answers import answer_rows, rows_that_fit, tell_cut_prompts
from running.checks import check_compiler
from running.generation import compile_steps
from tokenize_align import collate, encode_rows, load_tokenizer

# ----------------------------------------------------------------------------------------------------------- scores
def _rouge_tokens(text: str, use_stemmer: bool) -> list[str]:
    """rouge-score's tokenization: lower case, runs of a–z and 0–9 are words, those over 3 letters are stemmed."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(w) if len(w) > 3 else w for w in words] if use_stemmer else words

def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): one whole number is a row of the table. Bit
    i of `row` is 0 where the LCS of the first i + 1 words of a is one longer than that of the first i."""
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
    references: a string or a list for each prediction. F = 2 P R / (P + R), P = LCS / words predicted, R = LCS / words
    of the reference. Raises ValueError where the lists differ in length or a prediction has no reference."""
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
    """Whether a prediction is one of its references in lower case, without punctuation (SQuAD's, but articles stay)."""
    def normal(text):
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
    return [normal(p) in map(normal, group) for p, group in zip(predictions, references)]

# --------------------------------------------------------------------------------------------------------------- bits
@torch.no_grad()
def answer_bits(decoder, tokenizer, pairs: list[tuple[str, str]], max_length: int, max_prompt_length: int,
                batch_size: int = 32, desc: str = "bits") -> list[tuple[float, int]]:
    """For each (prompt, answer): −log₂ p(answer, EOS), and the answer's UTF-8 bytes; where max_length cuts it, of what
    is left, and (0, 0) where that is nothing. torchrun's processes share the work."""
    first, every = parallel.share(decoder)
    rows = [Row(prompt, [answer]) for prompt, answer in pairs[first::every]]
    examples = encode_rows(rows, tokenizer, tokenizer, max_length, max_prompt_length)[0]
    examples.sort(key=lambda example: len(example.student.ids))
    bits, training, device = [(0.0, 0)] * len(rows), decoder.training, decoder.embed.weight.device
    decoder.eval()
    for start in tqdm(range(0, len(examples), batch_size), desc=desc, leave=False, delay=2):
        part = examples[start:start + batch_size]
        batch = collate(part, tokenizer.eos_id, tokenizer.eos_id)
        labels = batch["student_labels"].to(device)
        states, labels = decoder(batch["student_ids"].to(device))[labels != -100], labels[labels != -100]
        nats = label_nats(states, decoder.head.weight, labels).double().cpu()
        for example, tokens in zip(part, nats.split([example.student.valid for example in part])):
            bits[example.row] = float(tokens.sum()) / math.log(2), example.student.spans[-1][1]
    decoder.train(training)
    parts = parallel.gather(bits)
    return [parts[i % every][i // every] for i in range(len(pairs))]

def bits_per_byte(bits: list[tuple[float, int]]) -> float:
    """Σ bits / Σ bytes: what the answers cost, whichever tokens they are cut into."""
    return sum(b for b, _ in bits) / max(1, sum(n for _, n in bits))

def kl_to_truth(decoder, tokenizer, rows: list[Row], max_length: int, max_prompt_length: int,
                batch_size: int) -> float | None:
    """KL(truth ‖ model) in bits an answer, the mean over rows, which have a `truth`; None where one is cut."""
    pairs = [(row.prompt, answer) for row in rows for answer in row.truth]
    bits = answer_bits(decoder, tokenizer, pairs, max_length, max_prompt_length, batch_size, "KL to the truth")
    if any(n < len(answer.encode()) for (_, answer), (_, n) in zip(pairs, bits)):
        return None                                 # of an answer that is cut the model's probability is not known
    truth = [p for row in rows for p in row.truth.values()]
    return sum(p * (math.log2(p) + b) for p, (b, _) in zip(truth, bits)) / len(rows)

# ---------------------------------------------------------------------------------------------------------- stemmer
# Porter's (An algorithm for suffix stripping, 1980) in the dialect of the rouge-score package: NLTK's, whose departures
# are marked. As in the paper: m is the measure of a stem, [C](VC)^m[V]; *v*: contains a vowel; *o: ends cvc.
IRREGULAR = {"sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
             "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning",
             "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}

STEP2 = [("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
         ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
         ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
         ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")]
STEP3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
STEP4 = ["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate",
         "iti", "ous", "ive", "ize"]

def _shape(word: str) -> str:
    """'c' or 'v' for every letter; y is a consonant at the start and after a vowel."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and shape.endswith("c")
        shape += "v" if vowel else "c"
    return shape

def _measure(stem: str) -> int:
    return _shape(stem).count("vc")

def _ends_cvc(stem: str) -> bool:
    shape = _shape(stem)
    return shape.endswith("cvc") and stem[-1] not in "wxy" or shape == "vc"      # NLTK: or the whole stem is vc

def _replace(word: str, rules: list[tuple[str, str]], least: int) -> str:
    """The first suffix that fits decides: it is replaced if what stands before it has measure ≥ least."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            before = word[:len(word) - len(suffix)]
            return before + replacement if _measure(before) >= least else word
    return word

def _step1a(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]      # NLTK: dies → die, but flies → fli
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word

def _step1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]      # NLTK: died → die, but spied → spi
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix) and "v" in _shape(word[:-len(suffix)]):
            word = word[:-len(suffix)]
            break
    else:
        return word
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _ends_cvc(word) else word

def _step1c(word: str) -> str:
    # NLTK: y → i only after a consonant that is not the whole stem (happy → happi, enjoy → enjoy, by → by)
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c" else word

def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:      # NLTK: first, and then step 2 again
        return _step2(word[:-2])
    if word.endswith("logi") and _measure(word[:-3]) > 0:      # NLTK
        return word[:-1]
    return _replace(word, STEP2, 1)

def _step4(word: str) -> str:
    for suffix in STEP4:
        if word.endswith(suffix):
            before = word[:-len(suffix)]
            fits = _measure(before) > 1 and (suffix != "ion" or before[-1] in "st")
            return before if fits else word
    return word

def _step5(word: str) -> str:
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or m == 1 and not _ends_cvc(word[:-1]):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word

@functools.lru_cache(1 << 16)
def stem(word: str) -> str:
    """The stem of a lower-case word of letters and digits."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    return _step5(_step4(_replace(_step2(_step1c(_step1b(_step1a(word)))), STEP3, 1)))

# ------------------------------------------------------------------------------------------------------------- main
@dataclass
class Config:
    model: str = flag("", "checkpoint folder, a run's out_dir, or a model's name")
    data: list[str] = flag(["toy"], "data sets by name, folder or .jsonl file (their test split is scored)")
    seeds: list[int] = flag([10, 20, 30, 40, 50], "sampling seeds, one pass each", at_least=0, at_most=2**40)
    num: int = flag(0, "score only the first N rows of each set (0: all)", at_least=0)
    greedy: bool = flag(False, "take the likeliest token instead of sampling; one pass")
    temperature: float = flag(1.0, "sampling temperature (0: as --greedy)", at_least=0)
    batch_size: int = flag(32, "prompts answered together (0: on a GPU as many as its memory takes; the answers change "
                               "with it)", at_least=0)
    compile: bool = flag(False, "compile the step to one more token; pays where a set is large")
    max_length: int = flag(0, "prompt and answer in tokens (0: 512, or all positions of a smaller model)", at_least=0)
    max_prompt_length: int = flag(256, "longer prompts are cut, in tokens", at_least=1)
    out_dir: str = flag("", "where the results go (default: the checkpoint folder, or out/eval for a name)")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: float32 on CPU, bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))

    @property
    def passes(self) -> list[int | None]:
        """The seed of every pass over the rows; greedy answers need one pass and no seed."""
        return [None] if self.greedy or not self.temperature else self.seeds

def main() -> None:
    with parallel.started():
        evaluate(parse(Config, __doc__, positional=("model",)))

def evaluate(config: Config) -> None:
    """Answer and score every set, write the answers and rouge.json, print the table."""
    if not config.model:
        raise InputError("name a checkpoint: python eval_rouge.py CHECKPOINT_OR_NAME --data NAME …")
    with parallel.first_goes_first():
        toy.write_data_for(config.data)
    sets = {name: read_rows(hub.data_file(name, "test"))[:config.num or None] for name in config.data}
    device, dtype = hub.pick_device(config.device, config.dtype)
    decoder, tokenizer = load(config.model, dtype=dtype, device=device), load_tokenizer(config.model)
    hub.check_vocabulary(config.model, decoder.config.vocab_size, tokenizer.vocab_size)
    if config.compile:
        check_compiler(device)
        compile_steps(decoder)
    positions = decoder.config.max_positions
    config.max_length = config.max_length or min(512, positions)
    if not 2 <= config.max_length <= positions:
        raise InputError(f"--max_length {config.max_length}: {config.model} has {positions} positions; the least is 2")
    config.batch_size = config.batch_size or rows_that_fit(decoder, config.max_length)
    trained_on = hub.trained_on(decoder.source)
    labels = {name: hub.label(name) for name in sets}
    if len(set(labels.values())) < len(labels):
        raise InputError(f"--data {' '.join(sets)}: their answers' files would have one name {labels}; rename a set")
    default = decoder.source if Path(config.model).is_dir() else "out/eval/" + config.model.replace("/", "--")
    out_dir = Path(config.out_dir or default)
    hub.claim(out_dir, "rouge.json", {"seeds", "sets"}, [])
    for name, seed in itertools.product(sets, config.passes):
        answers_file(out_dir, name, seed)
    out_dir.mkdir(parents=True, exist_ok=True)

    results = {name: score_set(config, decoder, tokenizer, name, rows, out_dir) for name, rows in sets.items()}
    if not parallel.is_first():
        return
    others = [r for name, r in results.items() if not hub.same_data(name, trained_on)] if trained_on else []
    summary = {"model": config.model, "seeds": config.passes, "trained_on": trained_on, "sets": results,
               "ood_mean": statistics.mean(r["rouge_l"] for r in others) if others else None,
               "ood_bits_per_byte": statistics.mean(r["bits_per_byte"] for r in others) if others else None}
    with hub.atomic_write(out_dir / "rouge.json") as file:
        json.dump(summary, file, indent=2)
    print(f"{'set':<24}{'rows':>6}   bits a byte   ROUGE-L{'':>10}exact match   KL(truth ‖ model)")
    for name, r in results.items():
        known = "" if r["kl_to_truth"] is None else f"{r['kl_to_truth']:12.2f} bits"
        print(f"{name:<24}{r['rows']:>6}{r['bits_per_byte']:14.3f}   {r['rouge_l']:5.2f} ± {r['std']:4.2f}{'':>5}"
              f"{r['exact_match']:6.2f} % {known}" + ("   (trained on)" if hub.same_data(name, trained_on) else ""))
    if others:
        print(f"{'OOD mean':<24}{'':>6}{summary['ood_bits_per_byte']:14.3f}   {summary['ood_mean']:5.2f}")
    print(f"wrote {out_dir / 'rouge.json'} and the answers beside it")

def answers_file(out_dir: Path, name: str, seed: int | None) -> Path:
    """Where the answers to a set go. Raises InputError where something else is there."""
    path = out_dir / f"answers-{hub.label(name)}-{'greedy' if seed is None else f'seed{seed}'}.jsonl"
    if path.exists() and not re.match(r'\{"prompt": .*"rouge_l": [\d.]+\}$', open(path, encoding="utf-8").readline()):
        raise InputError(f"{path}: is there already and holds no answers; pass another --out_dir")
    return path

def score_set(config: Config, decoder, tokenizer, name: str, rows: list[Row], out_dir: Path) -> dict:
    """One set, answered with every seed → its part of rouge.json. The answers are written into out_dir."""
    tell_cut_prompts(name, rows, tokenizer, min(config.max_prompt_length, config.max_length - 1))
    references, scores, matches = [row.outputs for row in rows], [], []
    limits = config.max_length, config.max_prompt_length, config.batch_size
    bits = answer_bits(decoder, tokenizer, [(row.prompt, row.outputs[0]) for row in rows], *limits, f"{name}, bits")
    if without := bits.count((0.0, 0)):
        told = f"{name}: {without} of {len(rows)} prompts leave no room for an answer within {config.max_length} tokens"
        if without == len(rows):
            raise InputError(f"{told}; pass a shorter --max_prompt_length")
        print(f"{told}; left out of bits a byte")
    for seed in config.passes:
        temperature, desc = (0.0, "greedy") if seed is None else (config.temperature, f"seed {seed}")
        answers = answer_rows(decoder, tokenizer, rows, config.max_length, config.max_prompt_length, config.batch_size,
                              temperature, seed or 0, f"{name}, {desc}")
        each = rouge_l(answers, references)
        scores.append(100 * statistics.mean(each))
        matches.append(100 * statistics.mean(exact_match(answers, references)))
        if parallel.is_first():
            with hub.atomic_write(answers_file(out_dir, name, seed)) as file:
                for row, text, score in zip(rows, answers, each):
                    line = dict(prompt=row.prompt, answer=text, output=row.outputs, rouge_l=round(100 * score, 2))
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    known = kl_to_truth(decoder, tokenizer, rows, *limits) if all(row.truth for row in rows) else None
    return {"rows": len(rows), "bits_per_byte": bits_per_byte(bits), "kl_to_truth": known,
            "bits": [round(b, 4) for b, _ in bits], "bytes": [n for _, n in bits],
            "rouge_l": statistics.mean(scores), "rouge_l_by_seed": scores,
            "std": statistics.stdev(scores) if len(scores) > 1 else 0.0, "exact_match": statistics.mean(matches)}

def quick_scores(decoder, tokenizer, rows: list[Row], config, desc: str, at_once) -> dict[str, float]:
    """ROUGE-L × 100 of greedy answers, the mean over rows, and bits a byte of the first references. config: its limits
    in tokens; at_once: as in answer_rows."""
    bits = answer_bits(decoder, tokenizer, [(row.prompt, row.outputs[0]) for row in rows], config.max_length,
                       config.max_prompt_length)
    answers = answer_rows(decoder, tokenizer, rows, config.max_length, config.max_prompt_length, temperature=0.0,
                          desc=desc, at_once=at_once)
    return {"rouge_l": 100 * sum(rouge_l(answers, [row.outputs for row in rows])) / len(answers),
            "bits_per_byte": bits_per_byte(bits)}

if __name__ == "__main__":
    hub.run(main)
