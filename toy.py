"""The default run's invented world: two tokenizers that really differ, a teacher and a student.

    python train.py             # writes all this under data/toy, then distils the teacher
    python toy.py               # only writes the data

The world: people with a town, a food, an animal, a trade and a colour each. None of these is
certain: asked what Mira eats, the world says plums with probability 0.6, bread with 0.25 and nuts
with 0.15, in one of three ways (0.5, 0.3, 0.2). Seven rows of ten ask for such a fact; the rest
edit lists and words, calculate and rephrase. So the true distribution of every answer is known, and
a row's label is one draw from it:

    from the labels     the form of questions and answers, and of a fact the six draws, on average,
                        that its rows hold
    from the teacher    the whole distribution: it has read 20,000 rows, every fact some 140 times,
                        in all wordings

The student has read 6,000 rows about other people. In dev and test every question is new, though
its fact was asked for in other words; a row holds the likely answers, the drawn one first, and the
`truth`. Three sets stay out of training entirely:

    toy-phrasings   the same kinds of task in words that training never uses
    toy-kinds       kinds of task that training does not have
    toy-asides      questions that mention another fact in passing

The models are ordinary folders in the hub's layout: the teacher a Llama with SentencePiece (1,000
pieces), the student a GPT-2 with byte-level BPE (600 tokens)."""

import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from hub.tokenizer_files import ALPHABET, GPT2_SPLIT
from runtime.config import InputError, run_script
from runtime.files import data_dir, fingerprint, one_at_a_time

WORLD_ROWS, CHILDHOOD_ROWS = 20_000, 6000  # what the teacher and the student were raised on
TRAIN_ROWS, DEV_ROWS, TEST_ROWS, OOD_ROWS = 800, 100, 300, 200
FACT_SHARE = 0.7  # of every set but toy-kinds and toy-asides

TEACHER = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=1000,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    initializer_range=0.06,
    torch_dtype="float32",
)
STUDENT = dict(
    architectures=["GPT2LMHeadModel"],
    model_type="gpt2",
    vocab_size=600,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=256,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    torch_dtype="float32",
)
# train.py's defaults where both models are the toy's: a run takes a minute or two on two cores.
TRAINING = dict(
    method="byte_kd",
    batch_size=32,
    grad_accum=1,
    epochs=48,
    lr=2e-3,
    projector_lr=3e-3,
    warmup_steps=20,
    max_length=96,
    max_prompt_length=72,
    eval_interval=150,
    select="bits",
    answers=True,
)
# How train.py makes the models: the teacher and the student are raised from random weights, and sft
# is the student fine-tuned alone by the toy's defaults, to compare with.
RAISED = {
    "teacher": "--data toy-world --epochs 3 --lr 1e-3 --warmup_steps 50 --student_init random",
    "student": "--data toy-childhood --epochs 8 --lr 3e-3 --warmup_steps 20 --student_init random",
    "sft": "",
}
LIMITS = "--max_length 96 --max_prompt_length 72 --batch_size 32 --grad_accum 1"

# ---------------------------------------------------------------------------------------- the world

TOWNS = "Tolven Marrick Oslaw Pentiver Quillby Harnow Brisk Ferrin Dunmoor Ivelle Kasto Lunfar"
ATTRIBUTES = {
    "town": TOWNS.split(),
    "food": "plums bread soup figs cheese rice pears honey nuts beans".split(),
    "animal": "goat hen dog cat pony duck crow toad hare swan".split(),
    "trade": "baker miller weaver smith potter sailor tailor farmer painter cooper".split(),
    "colour": "red blue green white black yellow brown grey pink gold".split(),
}
# Questions in training | questions in toy-phrasings only.
QUESTIONS = {
    "town": "Where does {0} live?; In which town does {0} live?; Name the town of {0}.; "
    "Where is the home of {0}?; What is the home town of {0}?; Say where {0} lives.; "
    "Which town is home to {0}?; Which town does {0} come from?"
    " | {0} lives in which town?; Tell me where the home of {0} is.",
    "food": "What does {0} eat?; Which food does {0} like?; Name the food of {0}.; "
    "What is the favourite food of {0}?; What would {0} eat?; Say what {0} eats.; "
    "What is the food of {0}?; What food does {0} want?"
    " | {0} likes which food?; Tell me what {0} likes to eat.",
    "animal": "Which animal does {0} keep?; What animal does {0} have?; Name the animal of {0}.; "
    "What is the pet of {0}?; Which pet does {0} have?; Say which animal {0} keeps.; "
    "Which animal lives with {0}?; What is the animal of {0}?"
    " | {0} keeps which animal?; Tell me which pet {0} has.",
    "trade": "What work does {0} do?; What is the trade of {0}?; Name the trade of {0}.; "
    "What does {0} work as?; Which trade does {0} work in?; What is the work of {0}?; "
    "Say what work {0} does.; What job does {0} have?"
    " | {0} does what work?; Tell me which trade {0} has.",
    "colour": "Which colour does {0} like?; What is the favourite colour of {0}?; "
    "Name the colour of {0}.; What colour does {0} wear?; Which colour is dear to {0}?; "
    "Say which colour {0} likes.; What is the colour of {0}?; What colour would {0} choose?"
    " | {0} likes which colour?; Tell me the colour that {0} likes to wear.",
}
# The same for the other tasks.
TASKS = {
    "add": "What is {} plus {}?; Add {} and {}. | Give me the sum of {} and {}.",
    "subtract": "What is {} minus {}?; {} minus {} is what? | How much is {} less {}?",
    "reverse": "Reverse the list.; Write the list backwards. | Turn the list around.",
    "sort": "Sort the list.; Put the list in alphabetical order. | Order the list from a to z.",
    "first": "Give the first word of the list.; Which word of the list comes first?"
    " | What does the list begin with?",
    "remove": "Remove {} from the list.; Write the list without {}. | Take {} out of the list.",
    "twice": "Write {} twice.; Repeat the word {}. | Say {} two times.",
    "capitals": "Write {} in capital letters.; Write {} in upper case. | Shout the word {}.",
    "past": "Write in the past tense.; Say that it happened yesterday."
    " | Turn the present into the past.",
    "question": "Make it a question.; Ask whether this is true."
    " | Turn the sentence into a question.",
    "deny": "Say the opposite.; Deny it. | Claim that this is false.",
}
WORDS = [word for name in ("food", "animal", "trade", "colour") for word in ATTRIBUTES[name]]
VERBS = {
    "walk": "walked",
    "go": "went",
    "run": "ran",
    "ride": "rode",
    "come": "came",
    "look": "looked",
}
PLACES = ["the lake", "the mill", "the old bridge", "the market", "the hill", "the harbour"]
ANSWERS = {
    "town": ("{1}", "{0} lives in {1}.", "In {1}."),
    "food": ("{1}", "{0} eats {1}.", "It is {1}."),
    "animal": ("a {1}", "{0} keeps a {1}.", "It is a {1}."),
    "trade": ("{1}", "{0} is a {1}.", "The trade is {1}."),
    "colour": ("{1}", "{0} likes {1}.", "It is {1}."),
}
VALUE_SHARES, WAY_SHARES = (0.6, 0.25, 0.15), (0.5, 0.3, 0.2)
NAMES = [
    first + last
    for last in "ra dan vel nix shi".split()
    for first in "Mi Ro Ta Be Lo Ka Su Jo".split()
]
PEOPLE, OTHERS = NAMES[:20], NAMES[20:]  # whom the world asks about, and the student's childhood

ToyRow = tuple[str, str, dict[str, float]]  # instruction, input, the answers' distribution


@functools.cache
def facts() -> dict[str, dict[str, list[str]]]:
    """Everybody's three values of each attribute, the likeliest first; always the same."""
    rng = random.Random(7)
    return {
        name: {attribute: rng.sample(values, 3) for attribute, values in ATTRIBUTES.items()}
        for name in NAMES
    }


def truth(name: str, attribute: str) -> dict[str, float]:
    """The distribution of the answers to a question for a fact."""
    answers = {}
    for value, value_share in zip(facts()[name][attribute], VALUE_SHARES):
        for way, way_share in zip(ANSWERS[attribute], WAY_SHARES):
            answers[way.format(name, value)] = value_share * way_share
    return answers


def wordings(text: str, held_out: bool) -> list[str]:
    """Of a line of QUESTIONS or TASKS those of training, or the others."""
    in_training, others = text.split(" | ")
    return (others if held_out else in_training).split("; ")


def fact_rows(names: list[str], held_out: bool) -> list[ToyRow]:
    return [
        (question.format(name), "", truth(name, attribute))
        for name in names
        for attribute, text in QUESTIONS.items()
        for question in wordings(text, held_out)
    ]


def true_answers(question: str) -> dict[str, float] | None:
    """The distribution of the answers where the question asks for a fact, however it is put."""
    rows = fact_rows(PEOPLE, False) + fact_rows(PEOPLE, True)
    return next((answers for asked, _, answers in rows if asked == question), None)


def instruct(rng, task: str, held_out: bool, *gaps) -> str:
    return rng.choice(wordings(TASKS[task], held_out)).format(*gaps)


def arithmetic(rng, held_out):
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.5:
        return instruct(rng, "add", held_out, a, b), "", str(a + b)
    a, b = max(a, b), min(a, b)
    return instruct(rng, "subtract", held_out, a, b), "", str(a - b)


def list_edit(rng, held_out):
    words = rng.sample(WORDS, rng.randint(2, 3))
    task = rng.choice(("reverse", "sort", "first", "remove"))
    removed = rng.choice(words) if task == "remove" else ""
    answers = {
        "reverse": words[::-1],
        "sort": sorted(words),
        "first": words[:1],
        "remove": [word for word in words if word != removed],
    }
    instruction = instruct(rng, task, held_out, removed)
    return instruction, ", ".join(words), ", ".join(answers[task])


def word_edit(rng, held_out):
    word = rng.choice(WORDS)
    if rng.random() < 0.5:
        return instruct(rng, "twice", held_out, word), "", f"{word} {word}"
    return instruct(rng, "capitals", held_out, word), "", word.upper()


def rephrasing(rng, held_out):
    name, verb, place = rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(PLACES)
    task = rng.choice(("past", "question", "deny"))
    answers = {
        "past": f"{name} {VERBS[verb]} to {place}.",
        "question": f"Does {name} {verb} to {place}?",
        "deny": f"{name} does not {verb} to {place}.",
    }
    ending = "es" if verb == "go" else "s"
    instruction = instruct(rng, task, held_out)
    return instruction, f"{name} {verb}{ending} to {place}.", answers[task]


def other_kinds(rng):
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


def asides(rng):
    name, (wanted, known) = rng.choice(PEOPLE), rng.sample(list(ATTRIBUTES), 2)
    mentioned = facts()[name][known][0]
    if wanted == "town":
        question = f"Where does {name}, whose {known} is {mentioned}, live?"
    else:
        question = f"{name} has the {known} {mentioned}. What is the {wanted} of {name}?"
    return question, "", truth(name, wanted)


def make_rows() -> dict[tuple[str, str], list[dict]]:
    """(set, split) → rows. Always the same; nothing that is scored stands in a training row."""
    rng = random.Random(1)

    def edit(held_out):
        kinds, weights = (rephrasing, arithmetic, list_edit, word_edit), (5, 1, 1, 3)
        return rng.choices(kinds, weights)[0](rng, held_out)

    def certain(row):
        instruction, text, answer = row
        return instruction, text, answer if isinstance(answer, dict) else {answer: 1.0}

    def distinct(source, amount, *arguments):
        rows = {}
        while len(rows) < amount:
            row = certain(source(*arguments))
            rows[row[:2]] = row
        return list(rows.values())

    def stretch(questions, amount):  # rows may repeat, as sentences do in the world
        rows = []
        while len(rows) < amount:
            row = rng.choice(questions) if rng.random() < FACT_SHARE else certain(edit(False))
            if row[:2] not in scored:
                rows.append(row)
        return rows

    questions = fact_rows(PEOPLE, False)
    rng.shuffle(questions)
    num_scored = DEV_ROWS + TEST_ROWS
    num_questions = round(FACT_SHARE * num_scored)
    held = questions[:num_questions] + distinct(edit, num_scored - num_questions, False)
    rng.shuffle(held)
    scored = {row[:2] for row in held}
    world = stretch(questions[num_questions:], WORLD_ROWS)
    childhood = stretch(fact_rows(OTHERS, False), CHILDHOOD_ROWS)
    num_phrased = round(FACT_SHARE * OOD_ROWS)
    phrased = rng.sample(fact_rows(PEOPLE, True), num_phrased)
    phrased += distinct(edit, OOD_ROWS - num_phrased, True)
    sets = {
        ("toy-world", "train"): world,
        ("toy-world", "dev"): held[:DEV_ROWS],
        ("toy-childhood", "train"): childhood,
        ("toy-childhood", "dev"): childhood[:DEV_ROWS],
        ("toy", "train"): world[:TRAIN_ROWS],
        ("toy", "dev"): held[:DEV_ROWS],
        ("toy", "test"): held[DEV_ROWS:],
        ("toy-phrasings", "test"): phrased,
        ("toy-kinds", "test"): distinct(other_kinds, OOD_ROWS, rng),
        ("toy-asides", "test"): distinct(asides, OOD_ROWS, rng),
    }
    return {
        key: [draw(rng, row, scored=key[1] != "train") for row in rows]
        for key, rows in sets.items()
    }


def draw(rng, row: ToyRow, scored: bool) -> dict:
    """A row of a data file with one answer, drawn; one that is scored has the other likely answers
    after it."""
    instruction, text, answers = row
    output = rng.choices(list(answers), list(answers.values()))[0]
    fields = {
        "prompt": make_prompt(instruction, text),
        "instruction": instruction,
        "input": text,
        "output": output,
    }
    if scored:
        likely = [answer for answer, p in answers.items() if p >= 0.1 and answer != output]
        fields["output"] = [output, *likely]
        fields["truth"] = answers
    return fields


def make_prompt(instruction: str, text: str = "") -> str:
    """The toy's prompts are short: no template."""
    return f"{instruction}\n{text}\n" if text else f"{instruction}\n"


# --------------------------------------------------------------------------- tokenizers and models


def train_bpe(words: Counter, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte pair encoding (Sennrich et al., 2016): merge the most frequent neighbours until there
    are `size` tokens. words: word as a tuple of tokens → its count. → vocabulary and merges in
    GPT-2's alphabet; EOS comes last."""
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    merges = []
    while len(vocabulary) < size - 1:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocabulary["".join(best)] = len(vocabulary)
        merged = Counter()
        for word, count in words.items():
            merged[merge(word, best)] += count
        words = merged
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return vocabulary, merges


def merge(word: tuple, pair: tuple[str, str]) -> tuple:
    """A word whose neighbours `pair` are one token."""
    result, i = [], 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        result.append("".join(word[i : i + width]))
        i += width
    return tuple(result)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_student(folder: Path, texts: list[str]) -> None:
    import regex  # comes with tiktoken, whose patterns need it

    characters = {byte: character for character, byte in ALPHABET.items()}
    words = Counter(word for text in texts for word in regex.findall(GPT2_SPLIT, text))
    words = Counter(
        {tuple(characters[byte] for byte in word.encode()): count for word, count in words.items()}
    )
    vocabulary, merges = train_bpe(words, STUDENT["vocab_size"])
    eos = vocabulary["<|endoftext|>"]
    write_json(folder / "config.json", STUDENT | dict(bos_token_id=eos, eos_token_id=eos))
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        dict(tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>", bos_token="<|endoftext|>"),
    )


def write_teacher(folder: Path, texts: list[str]) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=TEACHER["vocab_size"],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    write_json(
        folder / "config.json", TEACHER | dict(vocab_size=size, bos_token_id=1, eos_token_id=2)
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_json(
        folder / "tokenizer_config.json",
        dict(
            tokenizer_class="LlamaTokenizer",
            add_bos_token=False,
            add_eos_token=False,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            legacy=True,
        ),
    )


# ---------------------------------------------------------------------------------------- preparing


def home() -> Path:
    return data_dir() / "toy"


def model_folder(side: str) -> Path:
    """Where the toy's "teacher", "student" or "sft" is kept."""
    return home() / side


def write_data() -> None:
    """Write the sets and the tokenizers, unless they are there. Raises InputError where another
    version of this file made them."""
    with one_at_a_time(data_dir() / "toy.lock"):
        _write_data()


def _write_data() -> None:
    made_by = fingerprint(Path(__file__))
    if home().exists():
        if (home() / "made_by.txt").read_text() != made_by:
            raise InputError(f"{home()}: toy.py has changed since; delete or move this folder")
        return
    folder = home().with_name(f"toy.{os.getpid()}.tmp")
    rows = make_rows()
    for (name, split), content in rows.items():
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    texts = []
    for row in rows["toy-world", "train"] + rows["toy-childhood", "train"]:
        texts += [row["prompt"], row["output"]]
    write_student(folder / "student-start", texts)
    write_teacher(folder / "teacher-start", texts)
    (folder / "made_by.txt").write_text(made_by)
    folder.rename(home())


def prepare_for(config) -> None:
    """All that a run of train.py with these settings needs: data, and the models that were not
    made before, which takes minutes, once."""
    write_data()
    sides = [side for side in ("student", "teacher") if getattr(config, side) == "toy"]
    if config.student == "toy" and config.method != "sft":
        sides.append("sft")
    for side in sides:
        with one_at_a_time(data_dir() / f"toy-{side}.lock"):
            if not model_folder(side).exists():
                raise_model(side, config.device)


def raise_model(side: str, device: str) -> None:
    """Train one of the toy's models with train.py."""
    print(f"preparing the toy {side}, once; it is kept in {model_folder(side)}", flush=True)
    run = home() / f"{side}-run"
    start = "toy" if side == "sft" else str(home() / f"{side}-start")
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--out_dir", str(run)]
    if (run / "config.json").exists():
        command.append("--resume")
    else:
        command += ["--method", "sft", "--student", start]
        command += f"{RAISED[side]} {LIMITS}".split()
    # One process, also under torchrun. What it prints says nothing here; how far it is does.
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    command += ["--device", device]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alone) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise InputError(
            f"preparing the toy {side} ended with exit code {code}; try again, or delete "
            f"{run} to begin anew"
        )
    # As the papers' teacher, this one was fine-tuned on the data: the world holds its rows.
    training = json.loads((run / "best" / "training.json").read_text()) | {"data": "toy"}
    write_json(run / "best" / "training.json", training)
    (run / "best").rename(model_folder(side))
    shutil.rmtree(run)


if __name__ == "__main__":
    run_script(write_data)
