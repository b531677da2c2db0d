"""The embedded default: a small invented world, two tokenizers that really differ, a teacher and a student.

    python train.py             # writes all this under data/ and distils the toy teacher into the toy student
    python toy.py               # only writes the data and prints a few rows

The world: people with a town, a food, an animal, a trade and a colour each. None of these is certain: asked what Mira
eats, the world says plums with probability 0.6, bread with 0.25 and figs with 0.15, in one of three ways (0.5, 0.3,
0.2). Seven rows of ten ask for such a fact; the rest edit lists and words, calculate and rephrase. So of every answer
the true distribution is known, and a row's label is one draw from it:

    from the labels     the form of questions and answers, and of a fact the draws, six on average, that its rows hold
    from the teacher    the whole distribution: it has read 20,000 rows, every fact some 140 times, in all wordings

The student has only read 6,000 rows about other people. In dev and test every question is new, though its fact was
asked for in other words; a row holds the likely answers, the drawn one first, and the `truth`. Three sets stay out of
training entirely:

    toy-phrasings   the same kinds of task in words that training never uses
    toy-kinds       kinds of task that training does not have
    toy-asides      look-ups that tell another fact in passing

The models are ordinary folders in the hub's layout: the teacher a Llama with SentencePiece (1,000 pieces), the student
a GPT-2 with byte-level BPE (600 tokens), so that train.py needs no special case for them."""
import functools
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from files import hub
from files.config import InputError, parse
from files.tokenizer_config import GPT2_SPLIT
from tokenize_align import ALPHABET

SETS = ("toy", "toy-phrasings", "toy-kinds", "toy-asides")
WORLD_ROWS, CHILDHOOD_ROWS, TRAIN_ROWS, DEV_ROWS, TEST_ROWS, OOD_ROWS = 20_000, 6000, 800, 100, 300, 200
LOOKUP_SHARE = 0.7          # of every set but toy-kinds and toy-asides

TEACHER = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=1000,
               hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
               num_key_value_heads=3, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0,
               tie_word_embeddings=True, initializer_range=0.06, torch_dtype="float32")
STUDENT = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=600, n_embd=64, n_layer=2, n_head=4,
               n_positions=256, activation_function="gelu_new", layer_norm_epsilon=1e-5, initializer_range=0.02,
               attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, torch_dtype="float32")
# train.py's defaults where the student is the toy: a run takes a minute or two on two cores.
TRAINING = dict(method="byte_kd", epochs=48, lr=2e-3, projector_lr=3e-3, warmup_steps=20, max_length=96,
                max_prompt_length=72, eval_interval=150, probe_interval=60, select="bits")
# What the toy and train.py's caches leave in the toy's folders under data/: all that is deleted to make them anew.
OWN = r"(train|dev|test)\.jsonl|train-(states|by)-.+-[0-9a-f]+\.\w+|(student|teacher|sft)(-start|-run)?"
# Both are "pretrained" by train.py, on the sets world and childhood.
PRETRAINING = {"teacher": ["--data", "toy-world", "--epochs", "3", "--lr", "1e-3", "--warmup_steps", "50"],
               "student": ["--data", "toy-childhood", "--epochs", "8", "--lr", "3e-3", "--warmup_steps", "20"],
               "sft": []}           # the student fine-tuned alone, by the toy's defaults, to compare with
LIMITS = ["--max_length", "96", "--max_prompt_length", "72"]

# -------------------------------------------------------------------------------------------------------- the world
TOWNS = "Tolven Marrick Oslaw Pentiver Quillby Harnow Brisk Ferrin Dunmoor Ivelle Kasto Lunfar".split()
FOODS = "plums bread soup figs cheese rice pears honey nuts beans".split()
ANIMALS = "goat hen dog cat pony duck crow toad hare swan".split()
TRADES = "baker miller weaver smith potter sailor tailor farmer painter cooper".split()
COLOURS = "red blue green white black yellow brown grey pink gold".split()
ATTRIBUTES = {"town": TOWNS, "food": FOODS, "animal": ANIMALS, "trade": TRADES, "colour": COLOURS}

LOOKUPS = {     # attribute → questions in training | questions only in toy-phrasings
    "town": "Where does {0} live?; In which town does {0} live?; Name the town of {0}.; Where is the home of {0}?; "
            "What is the home town of {0}?; Say where {0} lives.; Which town is home to {0}?; "
            "Which town does {0} come from? | {0} lives in which town?; Tell me where the home of {0} is.",
    "food": "What does {0} eat?; Which food does {0} like?; Name the food of {0}.; What is the favourite food of {0}?; "
            "What would {0} eat?; Say what {0} eats.; What is the food of {0}?; What food does {0} want?"
            " | {0} likes which food?; Tell me what {0} likes to eat.",
    "animal": "Which animal does {0} keep?; What animal does {0} have?; Name the animal of {0}.; "
              "What is the pet of {0}?; Which pet does {0} have?; Say which animal {0} keeps.; "
              "Which animal lives with {0}?; What is the animal of {0}?"
              " | {0} keeps which animal?; Tell me which pet {0} has.",
    "trade": "What work does {0} do?; What is the trade of {0}?; Name the trade of {0}.; What does {0} work as?; "
             "Which trade does {0} work in?; What is the work of {0}?; Say what work {0} does.; What job does {0} have?"
             " | {0} does what work?; Tell me which trade {0} has.",
    "colour": "Which colour does {0} like?; What is the favourite colour of {0}?; Name the colour of {0}.; "
              "What colour does {0} wear?; Which colour is dear to {0}?; Say which colour {0} likes.; "
              "What is the colour of {0}?; What colour would {0} choose?"
              " | {0} likes which colour?; Tell me the colour that {0} likes to wear."}
EDITS = {       # the same for the other tasks
    "add": "What is {} plus {}?; Add {} and {}. | Give me the sum of {} and {}.",
    "subtract": "What is {} minus {}?; {} minus {} is what? | How much is {} less {}?",
    "reverse": "Reverse the list.; Write the list backwards. | Turn the list around.",
    "sort": "Sort the list.; Put the list in alphabetical order. | Order the list from a to z.",
    "first": "Give the first word of the list.; Which word of the list comes first? | What does the list begin with?",
    "remove": "Remove {} from the list.; Write the list without {}. | Take {} out of the list.",
    "twice": "Write {} twice.; Repeat the word {}. | Say {} two times.",
    "capitals": "Write {} in capital letters.; Write {} in upper case. | Shout the word {}.",
    "past": "Write in the past tense.; Say that it happened yesterday. | Turn the present into the past.",
    "question": "Make it a question.; Ask whether this is true. | Turn the sentence into a question.",
    "deny": "Say the opposite.; Deny it. | Claim that this is false."}
WORDS = FOODS + ANIMALS + TRADES + COLOURS
VERBS = {"walk": "walked", "go": "went", "run": "ran", "ride": "rode", "come": "came", "look": "looked"}
PLACES = "the lake;the mill;the old bridge;the market;the hill;the harbour".split(";")

ANSWERS = {"town": ("{1}", "{0} lives in {1}.", "In {1}."), "food": ("{1}", "{0} eats {1}.", "It is {1}."),
           "animal": ("a {1}", "{0} keeps a {1}.", "It is a {1}."), "colour": ("{1}", "{0} likes {1}.", "It is {1}."),
           "trade": ("{1}", "{0} is a {1}.", "The trade is {1}.")}
VALUE_SHARES, WAY_SHARES = (0.6, 0.25, 0.15), (0.5, 0.3, 0.2)
NAMES = [a + b for b in "ra dan vel nix shi".split() for a in "Mi Ro Ta Be Lo Ka Su Jo".split()]
PEOPLE, OTHERS = NAMES[:20], NAMES[20:]         # whom the world asks about, and the student's childhood

Row = tuple[str, str, dict[str, float]]         # instruction, input, the answers' distribution

@functools.cache
def facts() -> dict[str, dict[str, list[str]]]:
    """Of everybody, for each attribute the three values, the likeliest first; always the same."""
    rng = random.Random(7)
    return {name: {attribute: rng.sample(values, 3) for attribute, values in ATTRIBUTES.items()} for name in NAMES}

def truth(name: str, attribute: str) -> dict[str, float]:
    """The distribution of the answers to a question for a fact."""
    return {way.format(name, value): p * q for value, p in zip(facts()[name][attribute], VALUE_SHARES)
            for way, q in zip(ANSWERS[attribute], WAY_SHARES)}

def wordings(text: str, held_out: bool) -> list[str]:
    """Of a line of LOOKUPS or EDITS those of training or the others."""
    return text.split(" | ")[held_out].split("; ")

def _lookups(names: list[str], held_out: bool) -> list[Row]:
    return [(question.format(name), "", truth(name, attribute)) for name in names
            for attribute, text in LOOKUPS.items() for question in wordings(text, held_out)]

def _ask(rng, task: str, held_out: bool, *gaps) -> str:
    return rng.choice(wordings(EDITS[task], held_out)).format(*gaps)

def _arithmetic(rng, held_out):
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.5:
        return _ask(rng, "add", held_out, a, b), "", str(a + b)
    a, b = max(a, b), min(a, b)
    return _ask(rng, "subtract", held_out, a, b), "", str(a - b)

def _list_edit(rng, held_out):
    words = rng.sample(WORDS, rng.randint(2, 3))
    task = rng.choice(("reverse", "sort", "first", "remove"))
    gone = rng.choice(words) if task == "remove" else ""
    answers = {"reverse": words[::-1], "sort": sorted(words), "first": words[:1],
               "remove": [word for word in words if word != gone]}
    return _ask(rng, task, held_out, gone), ", ".join(words), ", ".join(answers[task])

def _string_edit(rng, held_out):
    word = rng.choice(WORDS)
    if rng.random() < 0.5:
        return _ask(rng, "twice", held_out, word), "", f"{word} {word}"
    return _ask(rng, "capitals", held_out, word), "", word.upper()

def _rephrasing(rng, held_out):
    name, verb, place = rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(PLACES)
    task = rng.choice(("past", "question", "deny"))
    answer = {"past": f"{name} {VERBS[verb]} to {place}.", "question": f"Does {name} {verb} to {place}?",
              "deny": f"{name} does not {verb} to {place}."}[task]
    return _ask(rng, task, held_out), f"{name} {verb}{'es' if verb == 'go' else 's'} to {place}.", answer

def _kinds(rng):
    words = rng.sample(WORDS, rng.randint(2, 3))
    kind = rng.randrange(4)
    if kind == 0:
        return "Give the last word of the list.", ", ".join(words), words[-1]
    if kind == 1:
        words = [word for word in words if word != "honey"]
        return "Add honey to the list.", ", ".join(words), ", ".join([*words, "honey"])
    if kind == 2:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return f"Which is larger, {a} or {b}?", "", str(max(a, b))
    return "Write the list in capital letters.", ", ".join(words), ", ".join(words).upper()

def _asides(rng):
    name, (wanted, known) = rng.choice(PEOPLE), rng.sample(list(ATTRIBUTES), 2)
    told = facts()[name][known][0]
    if wanted == "town":
        return f"Where does {name}, whose {known} is {told}, live?", "", truth(name, "town")
    return f"{name} has the {known} {told}. What is the {wanted} of {name}?", "", truth(name, wanted)

def make_rows() -> dict[tuple[str, str], list[dict]]:
    """(set, split) → rows. Always the same; nothing that is scored stands in a training row."""
    rng = random.Random(1)

    def edit(held_out):
        kind = rng.choices((_rephrasing, _arithmetic, _list_edit, _string_edit), (5, 1, 1, 3))[0]
        instruction, text, answer = kind(rng, held_out)
        return instruction, text, {answer: 1.0}

    def distinct(source, amount, *arguments):
        rows = {}
        while len(rows) < amount:
            row = source(*arguments)
            rows[row[:2]] = row if isinstance(row[2], dict) else (*row[:2], {row[2]: 1.0})
        return list(rows.values())

    def stretch(lookups, amount):               # rows may repeat, as sentences do in the world
        rows = []
        while len(rows) < amount:
            row = rng.choice(lookups) if rng.random() < LOOKUP_SHARE else edit(False)
            rows += [row] * (row[:2] not in scored)
        return rows
    lookups, scored_rows, phrased = _lookups(PEOPLE, False), DEV_ROWS + TEST_ROWS, round(LOOKUP_SHARE * OOD_ROWS)
    rng.shuffle(lookups)
    asked = round(LOOKUP_SHARE * scored_rows)
    held = lookups[:asked] + distinct(edit, scored_rows - asked, False)
    rng.shuffle(held)
    scored = {row[:2] for row in held}
    world, childhood = stretch(lookups[asked:], WORLD_ROWS), stretch(_lookups(OTHERS, False), CHILDHOOD_ROWS)
    sets = {("toy-world", "train"): world, ("toy-world", "dev"): held[:DEV_ROWS],
            ("toy-childhood", "train"): childhood, ("toy-childhood", "dev"): childhood[:DEV_ROWS],
            ("toy", "train"): world[:TRAIN_ROWS], ("toy", "dev"): held[:DEV_ROWS], ("toy", "test"): held[DEV_ROWS:],
            ("toy-phrasings", "test"): rng.sample(_lookups(PEOPLE, True), phrased)
            + distinct(edit, OOD_ROWS - phrased, True),
            ("toy-kinds", "test"): distinct(_kinds, OOD_ROWS, rng),
            ("toy-asides", "test"): distinct(_asides, OOD_ROWS, rng)}
    return {key: [drawn(rng, row, key[1] != "train") for row in rows] for key, rows in sets.items()}

def drawn(rng, row: Row, scored: bool) -> dict:
    """A row of a data file with one answer, drawn; one that is scored has the other likely answers behind it."""
    instruction, text, answers = row
    output = rng.choices(list(answers), list(answers.values()))[0]
    likely = [answer for answer, p in answers.items() if p >= 0.1 and answer != output]
    return {"prompt": make_prompt(instruction, text), "instruction": instruction, "input": text,
            "output": [output, *likely] if scored else output, **({"truth": answers} if scored else {})}

def make_prompt(instruction: str, text: str = "") -> str:
    """The toy's prompts are short: no template."""
    return f"{instruction}\n{text}\n" if text else f"{instruction}\n"

# ------------------------------------------------------------------------------------------ the tokenizers and models
def _train_byte_level_bpe(words: Counter, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte pair encoding (Sennrich et al., 2016): merge the most frequent neighbours until `size` tokens are there.
    words: word as a tuple of tokens → how often. Returns vocabulary and merges in GPT-2's alphabet; EOS comes last."""
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    merges = []
    while len(vocabulary) < size - 1:
        pairs = Counter()
        for word, often in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += often
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocabulary["".join(best)] = len(vocabulary)
        merged = Counter()
        for word, often in words.items():
            new, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                new.append("".join(word[i:i + step]))
                i += step
            merged[tuple(new)] += often
        words = merged
    return vocabulary | {"<|endoftext|>": len(vocabulary)}, merges

def _write_student(folder: Path, texts: list[str]) -> None:
    import regex                        # comes with tiktoken, whose patterns need it
    character = {byte: c for c, byte in ALPHABET.items()}
    words = Counter(word for text in texts for word in regex.findall(GPT2_SPLIT, text))
    words = Counter({tuple(character[b] for b in word.encode()): often for word, often in words.items()})
    vocabulary, merges = _train_byte_level_bpe(words, STUDENT["vocab_size"])
    eos = vocabulary["<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STUDENT | dict(bos_token_id=eos, eos_token_id=eos), indent=2))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    settings = dict(tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

def _write_teacher(folder: Path, texts: list[str]) -> None:
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=TEACHER["vocab_size"],
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = TEACHER | dict(vocab_size=size, bos_token_id=1, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    settings = dict(tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=False, bos_token="<s>",
                    eos_token="</s>", unk_token="<unk>", legacy=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

# ---------------------------------------------------------------------------------------------------------- preparing
def folder(side: str) -> Path:
    """Where the toy's "teacher" or "student" is kept."""
    return hub.DATA_DIR / "toy" / side

def write_data_for(names: list[str]) -> None:
    """Write the toy's data when one of the names of --data is a toy set. A change of this file makes it all anew."""
    mark, made_by = hub.DATA_DIR / "toy" / "made_by.txt", hub.sha256(Path(__file__))
    if not set(names) & {*SETS, "toy-world", "toy-childhood"} or mark.exists() and mark.read_text() == made_by:
        return
    rows = make_rows()
    for path in [path for name in {name for name, _ in rows} for path in (hub.DATA_DIR / name).glob("*")]:
        if re.fullmatch(OWN, path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for (name, split), content in rows.items():
        (hub.DATA_DIR / name).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (hub.DATA_DIR / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    texts = [text for name in ("toy-world", "toy-childhood") for row in rows[name, "train"]
             for text in (row["prompt"], row["output"])]
    _write_student(folder("student-start"), texts)
    _write_teacher(folder("teacher-start"), texts)
    mark.write_text(made_by)

def prepare(sides: list[str], machine: list[str]) -> None:
    """Write data and tokenizers, and pretrain the sides with train.py unless that was done before (minutes, once).
    machine: flags of train.py that say where."""
    if sides:
        write_data_for(["toy"])
    for side in sides:
        run = hub.DATA_DIR / "toy" / f"{side}-run"
        if folder(side).exists():
            continue
        print(f"preparing the toy {side}, once; it is kept in {folder(side)}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--out_dir", str(run), *machine]
        begin = ["toy"] if side == "sft" else [str(folder(f"{side}-start")), "--student_init", "random", *LIMITS]
        anew = ["--method", "sft", "--overwrite", *PRETRAINING[side], "--student", *begin]
        begun = (run / "last").exists() or (run / "last.previous").exists()
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        # standard output has a table that says nothing here; the progress bar stays
        result = subprocess.run([*command, *(["--resume"] if begun else anew)], stdout=subprocess.DEVNULL, env=alone)
        if begun and result.returncode == 2:            # begun by another version of train.py, say
            result = subprocess.run([*command, *anew], stdout=subprocess.DEVNULL, env=alone)
        if result.returncode:
            raise InputError(f"preparing the toy {side} ended with exit code {result.returncode}; try it again")
        # as the papers' teacher, this one was fine-tuned on the data: the world holds the toy's training rows
        training = json.loads((run / "best" / "training.json").read_text()) | {"data": "toy"}
        (run / "best" / "training.json").write_text(json.dumps(training, indent=2))
        (run / "best" / "checksums.json").unlink()
        (run / "best").rename(folder(side))
        shutil.rmtree(run)

def prepare_for(settings) -> None:
    """All of the toy that a run with these settings of train.py needs: its models, and the student fine-tuned alone."""
    sides = [side for side in ("student", "teacher") if getattr(settings, side) == "toy"]
    sides += ["sft"] if settings.student == "toy" and settings.method != "sft" else []
    prepare(sides, ["--device", settings.device, "--num_threads", str(settings.num_threads)])

@dataclass
class Config:
    pass                                    # no flags but --help

def main() -> None:
    parse(Config, __doc__)
    write_data_for(list(SETS))
    for name in SETS:
        lines = hub.data_file(name, "test").read_text(encoding="utf-8").splitlines()
        print(f"\n{name}/test: {len(lines)} rows")
        for row in map(json.loads, lines[:5]):
            print(f"  {row['instruction']}{' | ' + row['input'] if row['input'] else ''}  →  {row['output'][0]}")

if __name__ == "__main__":
    hub.run(main)
