"""Every model reads its own words: chat templates, added tokens, what ends an answer, and the rows
that people have. References are transformers and tokenizers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
import sample
import tokenize_align as ta
import train
from data import Row, alpaca_prompt, read_rows, read_splits
from hub.tokenizer_files import in_rank_order
from prompts import fit_prompt, prompt_text
from runtime.config import InputError
from runtime.generation import answer_rows, generate
from runtime.transformers_model import TransformersModel
from tests.helpers import FIXTURES, HOSTILE, close, flags, metrics, real_vocabularies
from tools import compress

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n{%- endif %}\n"
    '{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == '
    '"system" and not loop.first) or (message.role == "assistant") %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# template, its control tokens (BOS and EOS first), the token that ends an answer
TEMPLATES = {
    "qwen2.5": (QWEN, ["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], 3),
    "smollm2": (CHATML, ["<|im_start|>", "<|im_end|>"], 1),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
        + ["<|eot_id|>"],
        4,
    ),
    "mistral": (MISTRAL, ["<s>", "</s>"], 1),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], 3),
}
QUESTION = [{"role": "user", "content": " Where does Mira live?\nAnd  why? <|im_end|> "}]
TALK = [*QUESTION, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "é"}]


def added_token(token_id: int, content: str, **more) -> dict:
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(id=token_id, content=content) | off | more


def add_tokens(source: Path, folder: Path, tokens: list[str], settings: dict, **how) -> None:
    """A copy of a model, its tokenizer as a tokenizer.json with these tokens added, its embeddings
    grown."""
    reference = transformers.AutoTokenizer.from_pretrained(source)
    new = [transformers.AddedToken(token, normalized=False, **how) for token in tokens]
    reference.add_tokens(new, special_tokens=how.get("special", True))
    reference.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    decoder = transformers.AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(1)
    decoder.resize_token_embeddings(len(reference), mean_resizing=False)
    decoder.save_pretrained(folder)


@pytest.fixture(scope="session")
def chat_model(world, tmp_path_factory) -> Path:
    """The small toy student with ChatML."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    add_tokens(world / "student", folder, ["<|im_start|>", "<|im_end|>"], {})
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


# ------------------------------------------------------------------------------------ templates


def ids_are_the_conversations(ours, reference, answer: str) -> None:
    """An example's ids are those of its conversation, which transformers encodes in one piece."""
    question = QUESTION[0]["content"]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = reference.apply_chat_template(talk, tokenize=False)
    expected = reference(text, add_special_tokens=False).input_ids
    (example,), _, _ = ta.encode_rows([Row(question, [answer])], ours, ours, 300, 250)
    assert example.student.ids == expected[: len(example.student.ids)]
    ends = [end for _, end in example.student.spans]
    assert [start for start, _ in example.student.spans] == [0, *ends[:-1]]
    assert ends[-2:] == [len(answer)] * 2


@pytest.mark.parametrize("maker", TEMPLATES)
@pytest.mark.parametrize("kind", ("bytes", "sentencepiece"))
def test_chat_templates_equal_transformers(maker, kind, world, tmp_path):
    template, control, end = TEMPLATES[maker]
    source = world / ("student" if kind == "bytes" else "teacher")
    names = dict(bos_token=control[0], eos_token=control[1], chat_template=template)
    add_tokens(source, tmp_path, control, names)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    # (AutoTokenizer makes a Llama's pre-tokenizer anew, in place of the one in the file.)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ta.load_tokenizer(tmp_path)
    for messages in (QUESTION, TALK):
        text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        row = Row(messages[-1]["content"], ["x"], earlier=messages[:-1])
        assert prompt_text(row, "chat", ours.template) == text
        expected = reference(text, add_special_tokens=False).input_ids
        assert ours.prompt_ids(row) == expected
    assert ours.eos_id == reference.convert_tokens_to_ids(control[end])
    ids_are_the_conversations(ours, reference, "Mira lives here.  Not there.")
    if maker in ("gemma", "mistral"):
        with pytest.raises(InputError, match="refuses these messages"):
            ours.prompt_ids(Row("x", ["y"], earlier=[{"role": "system", "content": "z"}]))
        with pytest.raises(InputError, match="; the row is 'x'"):
            ta.encode_prompt(Row("x", ["y"], earlier=[{"role": "system", "content": "z"}]), ours, 9)


ZEPHYR = (  # and TinyLlama's
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_an_answer_begins_as_in_a_conversation(world, tmp_path, capsys):
    """By a tokenizer.model, too: behind a line's end there is no SentencePiece space. Of a template
    whose prompts open a thought a note tells."""
    shutil.copytree(world / "teacher", tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text(ZEPHYR)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    ours = ta.load_tokenizer(tmp_path / "a")
    assert isinstance(ours, ta.SentencePiece)
    ids_are_the_conversations(ours, reference, "Mira lives here.  Not there.")
    assert "note" not in capsys.readouterr().out
    thinks = ZEPHYR.replace("<|assistant|>\n'", "<|assistant|>\n<think>\n'")
    (tmp_path / "a/chat_template.jinja").write_text(thinks)
    ta.load_tokenizer(tmp_path / "a")
    assert "lack what its prompts end with, '" in capsys.readouterr().out


@real_vocabularies
@pytest.mark.parametrize("legacy", (True, False))
def test_tokenizer_model_reads_a_template(legacy, tmp_path):
    """Mistral's [INST] between control tokens, by a tokenizer.json of the same pieces."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(FIXTURES / "tokenizers/llama2" / name, tmp_path / name)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    if legacy:
        reference.pre_tokenizer = None
        reference.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= dict(legacy=legacy, chat_template=MISTRAL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = ta.load_tokenizer(tmp_path)
    for messages in (TALK[1:], [*TALK[1:], *TALK[1:]]):
        messages = [{"role": "user", "content": "Where?"}, *messages]
        row = Row(messages[-1]["content"], ["x"], earlier=messages[:-1])
        text = prompt_text(row, "chat", ours.template)
        assert ours.prompt_ids(row) == reference.encode(text, add_special_tokens=False).ids
    assert ours.eos_ids == [2]


def test_formats():
    row = Row("Do it.", ["x"], input="this", is_instruction=True)
    assert prompt_text(row, "raw") == "Do it.\n\nthis"
    assert prompt_text(row, "auto") == prompt_text(row, "alpaca") == alpaca_prompt("Do it.", "this")
    complete = Row("Q: why?\nA:", ["x"], earlier=[{"role": "system", "content": "Be brief."}])
    assert prompt_text(complete, "auto") == "Be brief.\n\nQ: why?\nA:"
    assert prompt_text(complete, "alpaca") == "Be brief.\n\n" + alpaca_prompt("Q: why?\nA:")
    wrapped = Row(alpaca_prompt("Do it."), ["x"])
    assert prompt_text(wrapped, "alpaca") == wrapped.prompt


def test_long_prompts_keep_their_end(world):
    """Cut at one place in the text for both sides: the input's end, or the prompt's beginning."""
    sides = [ta.load_tokenizer(world / side, "alpaca") for side in ("student", "teacher")]
    with_input = Row("Count.", ["x"], input="one two three " * 50, is_instruction=True)
    alone = Row("four five six " * 50 + "seven?", ["x"], is_instruction=True)
    earlier = [dict(role=role, content="eight " * 90) for role in ("user", "assistant")]
    for row in (with_input, alone, Row("Nine?", ["x"], earlier=earlier)):
        (example,), cut, dropped = ta.encode_rows([row], *sides, 600, 300)
        assert (cut, dropped) == (1, 0)
        texts = []
        for tokenizer, side in zip(sides, (example.student, example.teacher)):
            assert 1 < side.prompt_length <= 300
            texts.append(tokenizer.decode(side.ids[: side.prompt_length]))
        assert texts[0] == texts[1] and texts[0].endswith("### Response:\n")
        assert texts[0].startswith(alpaca_prompt("x")[:40])
        assert (
            "Count.\n\n### Input:\none two" in texts[0]
            or "seven?\n" in texts[0]
            or "Nine?" in texts[0]
        )


def test_an_answer_is_cut_with_its_question():
    """Also where a conversation begins with the assistant, or a turn is the user's again."""
    turns = [dict(role=role, content=role) for role in ("assistant", "user", "user", "assistant")]
    row = Row("Who?", ["x"], earlier=[dict(role="system", content="s"), *turns])
    left = []

    def fits(row):
        left.append("".join(turn["role"][0] for turn in row.earlier))
        return not row.earlier[1:]

    fit_prompt(row, fits)
    assert list(dict.fromkeys(left)) == ["sauua", "suua", "sua", "s"]


def test_a_long_system_text_leaves_the_question(world):
    sides = [ta.load_tokenizer(world / side, "alpaca") for side in ("student", "teacher")]
    row = Row("What is 2+2?", ["4"], is_instruction=True)
    row.earlier = [{"role": "system", "content": "You are careful. " * 60}]
    (example,), cut, _ = ta.encode_rows([row], *sides, 600, 256)
    text = sides[0].decode(example.student.ids[: example.student.prompt_length])
    assert cut == 1 and text.startswith("You are careful.") and "What is 2+2?" in text


def test_templates_as_transformers_has_them(world, tmp_path):
    """The generation tag, tools and documents that are none, no thoughts, tojson's arguments; a
    template is not compiled where it is not used, and what it trips over is one line. But the day
    is always the same."""
    template = (
        "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% endfor %}{% if tools is not none %}TOOLS{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{{ {'é': 1} | tojson(ensure_ascii=True, separators=(',', ':')) }}"
    )
    shutil.copytree(world / "student", tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text(template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    ours = ta.load_tokenizer(tmp_path / "a")
    text = reference.apply_chat_template(QUESTION, tokenize=False, enable_thinking=False)
    assert ours.template.render(QUESTION) == text and "TOOLS" not in text and "<think>" in text
    (tmp_path / "a/chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert ta.load_tokenizer(tmp_path / "a").template.render(QUESTION) == "26 Jul 2024"
    (tmp_path / "a/chat_template.jinja").write_text("{{ 'a' + none }}")
    with pytest.raises(InputError, match="cannot be used"):
        ta.load_tokenizer(tmp_path / "a")
    assert ta.load_tokenizer(tmp_path / "a", "raw").encode("a")


def test_a_checkpoint_remembers_how_it_was_asked(chat_model, world, tmp_path, capsys):
    """chat where the folder has a template, with the token that ends the turn; raw where the rows
    are; sample.py asks alike, and with --raw as it is told."""
    shutil.copytree(chat_model / ".", tmp_path / "student")
    (tmp_path / "student/additional_chat_templates").mkdir()
    (tmp_path / "student/additional_chat_templates/tools.jinja").write_text("x")
    (tmp_path / "student/generation_config.json").write_text('{"eos_token_id": [599, 5]}')
    end = ta.load_tokenizer(chat_model).id_of["<|im_end|>"]
    chat = flags(world, tmp_path / "chat", "--max_steps", 2, method="sft")
    chat[chat.index("--student") + 1] = str(tmp_path / "student")
    train.main([*chat, "--max_length", "256", "--max_prompt_length", "250"])
    train.main(flags(world, tmp_path / "raw", "--max_steps", 2, method="sft"))
    best = tmp_path / "chat/best"
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        assert (best / name).read_text() == (tmp_path / "student" / name).read_text()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((best / name).read_text())["eos_token_id"] == [end, 599, 5]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(best)
    assert loaded.generation_config.eos_token_id == [end, 599, 5]
    asked = []
    real = sample.encode_prompt
    row_of = lambda row, tokenizer, limit: asked.append((row, tokenizer)) or real(
        row, tokenizer, limit
    )
    sample.encode_prompt = row_of
    try:
        for argv in (["chat"], ["raw"], ["chat", "--raw"]):
            sample.main([str(tmp_path / argv[0]), "Where?", "--max_new_tokens", "2", *argv[1:]])
    finally:
        sample.encode_prompt = real
    texts = [prompt_text(row, t.prompt_format, t.template) for row, t in asked]
    assert texts[0].endswith("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1:] == ["Where?", "Where?"]
    capsys.readouterr()


@pytest.mark.parametrize("family", ("gpt2", "qwen2.5"))
def test_a_distilled_chat_student_chats(family, chat_model, world, tmp_path):
    """In transformers' pipeline, with its own template, what sample.py would answer."""
    student = chat_model
    if family == "qwen2.5":
        student = tmp_path / "student"
        shutil.copytree(chat_model, student)
        config = transformers.Qwen2Config(
            vocab_size=602,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=[601, 599],
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(student)
        (student / "chat_template.jinja").write_text(QWEN)
    argv = flags(world, tmp_path / "run", "--max_steps", 3, "--max_length", 256, method="byte_kd")
    argv[argv.index("--student") + 1] = str(student)
    train.main([*argv, "--max_prompt_length", "200"])
    best = tmp_path / "run/best"
    pipe = transformers.pipeline("text-generation", str(best))
    asked = [{"role": "user", "content": "Which food does Mira like?"}]
    answer = pipe(asked, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    decoder, tokenizer = model.load(best), ta.load_tokenizer(best)
    rows = [Row(asked[0]["content"], ["x"])]
    (ours,) = answer_rows(decoder, tokenizer, rows, 256, 200, temperature=0.0)
    assert ours.startswith(answer) and answer


# ---------------------------------------------------------------------------------------- rows

ANSWERED = dict(prompt="Name a river.", output="Rhine")
CHAT = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Rhine"}]
SHAREGPT = [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "Rhine"}]


@pytest.mark.parametrize(
    "fields",
    [
        ANSWERED,
        dict(prompt="Name a river.", completion="Rhine"),
        dict(prompt="Name a river.", response="Rhine", id=3),
        dict(question="Name a river.", answer="Rhine"),
        dict(instruction="Name a river.", context="", response="Rhine", category="x"),
        dict(messages=CHAT),
        dict(conversations=SHAREGPT),
        dict(prompt=CHAT[:1], completion=CHAT[1:]),
        dict(prompt=alpaca_prompt("Name a river."), instruction="Name a river.", output="Rhine"),
    ],
)
def test_rows_as_people_have_them(fields, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(fields))
    (row,) = read_rows(file)
    assert (row.prompt, row.input, row.outputs, row.earlier) == ("Name a river.", "", ["Rhine"], [])
    named = fields.keys() & {"prompt"} and not isinstance(fields["prompt"], list)
    assert row.is_instruction == (not named or "instruction" in fields)


def test_nothing_of_a_row_is_dropped(tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    lines = [
        dict(prompt="Sum up.", input="A text.", output="x"),
        dict(prompt="Sum up: A text.", input="A text.", output="x"),
        dict(instruction="Do.", context="C", response="x", system="S", history=[["a", "b"]]),
        dict(messages=[dict(role="system", content="S"), *CHAT, *CHAT]),
        dict(prompt="no answer", output=" "),
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(file)
    assert "1 of 5 rows have an empty answer and are left out, the first in line 5" in (
        capsys.readouterr().out
    )
    assert [(row.prompt, row.input) for row in rows[:2]] == [
        ("Sum up.", "A text."),
        ("Sum up: A text.", ""),
    ]
    file.write_text(json.dumps(dict(messages=[dict(role="system", content=" "), CHAT[0]])))
    (row,) = read_rows(file, answered=False)
    assert (row.prompt, row.outputs, row.earlier) == ("Name a river.", [], [])
    assert [turn["content"] for turn in rows[2].earlier] == ["S", "a", "b"]
    assert [turn["content"] for turn in rows[3].earlier] == ["S", "Name a river.", "Rhine"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(prompt="x", output="y", history="abc"), "history must be a list"),
        (dict(prompt="x", output="y", history=[["a", None]]), '"history" must be'),
        (dict(prompt="x", output="y", history=["ab"]), "pairs"),
        (dict(messages=["Hi", "Hello"]), "a turn must be an object"),
        (dict(messages="Hi"), "the conversation is not JSON"),
        (dict(prompt="\ud83d", output="y"), "half a character"),
        (dict(messages=[dict(role="user", content=" "), CHAT[1]]), '"content" must be'),
        (dict(prompt="Two and two?", instruction="Be brief.", output="y"), "does not hold"),
        (dict(prompt="x", instruction=5, output="y"), '"instruction" must be a string'),
    ],
)
def test_rows_that_cannot_be_meant(fields, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "train.jsonl")


def test_rows_that_are_unusual(tmp_path):
    lines = [
        dict(prompt="Translate to German", input="man", output="Mann"),
        dict(instruction="Answer in French.", question="Two and two?", answer="quatre"),
        dict(instruction="Sum up.", input="A", context="B", output="x"),
        dict(prompt="x", output="y", history=CHAT, system="", input=" "),
        dict(messages=json.dumps(CHAT), system=""),
        dict(prompt=CHAT[:1], completion="Rhine"),
        dict(prompt="x", instruction=" ", output="y", truth="z"),
        dict(prompt=alpaca_prompt("Do.", "Rome"), instruction="Do.", input="Rome ", output="y"),
    ]
    (tmp_path / "train.json").write_text(json.dumps({"data": lines}, indent=1))
    rows = read_rows(tmp_path / "train.json")
    assert [(row.prompt, row.input) for row in rows[:3]] == [
        ("Translate to German", "man"),
        ("Answer in French.", "Two and two?"),
        ("Sum up.", "A\n\nB"),
    ]
    assert rows[3].earlier == CHAT and not rows[3].input
    assert [row.outputs for row in rows[4:6]] == [["Rhine"]] * 2 and not rows[4].earlier
    assert rows[6].prompt == "x" and not rows[6].is_instruction and not rows[6].truth
    assert rows[7].prompt == alpaca_prompt("Do.", "Rome") and not rows[7].input
    text = 'prompt,output\r\n"a","The Rhine.\u2028It is long."\r\n'
    (tmp_path / "train.csv").write_text(text, encoding="utf-8", newline="")
    assert read_rows(tmp_path / "train.csv")[0].outputs == ["The Rhine.\u2028It is long."]
    (tmp_path / "train.csv").write_text("prompt,output\na,the Rhine, the Elbe\n")
    with pytest.raises(InputError, match=":2: has more columns"):
        read_rows(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text('prompt,output\na,"the\nRhine"\nb,the Rhine, the Elbe\n')
    with pytest.raises(InputError, match=":4: has more columns"):
        read_rows(tmp_path / "train.csv")
    for text, message in (
        ("[{},\n {]", "train.json:2: not JSON"),
        ('{"data": [{},\n {]}', "train.json:2: not JSON"),
        ("3", "a list of rows, found 3"),
    ):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / "train.json")
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, lines[:2])))
    assert len(read_rows(tmp_path / "train.json")) == 2
    (tmp_path / "test").mkdir()
    (tmp_path / "test/data").mkdir()
    for name in ("train", "dev", "test", "train_1000", "data/train"):
        (tmp_path / f"test/{name}.jsonl").write_text(json.dumps(ANSWERED))
    assert [len(rows) for rows in read_splits(str(tmp_path / "test"), 1).values()] == [1, 1, 1]
    (tmp_path / "one").mkdir()
    (tmp_path / "one/my-rows.jsonl").write_text(json.dumps(ANSWERED))
    assert data.data_files(str(tmp_path / "one"), "train") == [tmp_path / "one/my-rows.jsonl"]
    (tmp_path / "one/my-rows.jsonl").rename(tmp_path / "one/test.jsonl")
    with pytest.raises(InputError, match="no train.jsonl in this folder .*, but test.jsonl"):
        data.data_files(str(tmp_path / "one"), "train")
    (tmp_path / "sizes/main").mkdir(parents=True)
    for name in ("train_100", "train-5000", "main/train"):
        (tmp_path / f"sizes/{name}.jsonl").write_text(json.dumps(ANSWERED))
    message = "but main/train.jsonl, train-5000.jsonl, train_100.jsonl"
    with pytest.raises(InputError, match=message):
        data.data_files(str(tmp_path / "sizes"), "train")


def test_files_and_folders_of_data(tmp_path, monkeypatch, capsys):
    """.json, .csv and .parquet; a validation split; a single file; a data set of the hub."""
    rows = [dict(prompt=f"{i}?", output=f"{i},\nyes") for i in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    import csv

    with open(tmp_path / "validation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "output"])
        writer.writeheader()
        writer.writerows(rows[:3])
    (tmp_path / "data").mkdir()
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(
        pyarrow.Table.from_pylist(rows[3:8]), tmp_path / "data/test-00000-of-00001.parquet"
    )
    splits = read_splits(str(tmp_path), 1)
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [40, 3, 5]
    assert splits["dev"][2].outputs == ["2,\nyes"] and splits["test"][0].prompt == "3?"

    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="not a parquet file"):
        read_rows(tmp_path / "pointer.parquet")

    splits = read_splits(str(tmp_path / "train.json"), 1)
    assert [len(splits[split]) for split in ("train", "dev")] == [38, 2] and "test" not in splits
    assert "no dev split, so 2 training rows" in capsys.readouterr().out
    assert splits != read_splits(str(tmp_path / "train.json"), 2)
    assert not {row.prompt for row in splits["dev"]} & {row.prompt for row in splits["train"]}

    import huggingface_hub

    def snapshot_download(name, repo_type, allow_patterns):
        assert (name, repo_type) == ("owner/set", "dataset")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert len(read_splits("owner/set", 1)["train"]) == 40
    with pytest.raises(InputError, match="no such folder, and the hub has no such"):
        data.data_files("owner/other", "train")


@pytest.mark.parametrize("changed", ("data", "teacher", "student"))
def test_resume_wants_what_the_run_began_with(changed, world, tmp_path):
    for name in ("data", "teacher", "student"):
        shutil.copytree(world / name, tmp_path / name)
    argv = flags(tmp_path, tmp_path / "run", "--max_steps", 2, method="uld")
    train.main(argv)
    if changed == "data":
        lines = (tmp_path / "data/train.jsonl").read_text().split("\n")
        (tmp_path / "data/train.jsonl").write_text("\n".join(lines[1:]))
    else:
        file = tmp_path / changed / "config.json"
        file.write_text(file.read_text().replace("{", '{"license": "none", ', 1))
    with pytest.raises(InputError, match=f"the {changed} of the run in .* changed"):
        train.main(["--out_dir", str(tmp_path / "run"), "--resume"])


def test_a_random_student_is_resumed_whatever_its_weights(world, tmp_path):
    """They may be downloaded later."""
    shutil.copytree(world / "student", tmp_path / "student")
    argv = flags(world, tmp_path / "run", "--max_steps", 1, "--student", tmp_path / "student")
    train.main([*argv, "--student_init", "random", "--method", "uld"])
    (tmp_path / "student/model.safetensors").unlink()
    train.main(["--out_dir", str(tmp_path / "run"), "--resume", "--max_steps", "2"])


# ---------------------------------------------------------------------------- tokens and ends


@pytest.mark.parametrize("side", ("student", "teacher"))
@pytest.mark.parametrize("how", ({}, dict(lstrip=True), dict(rstrip=True), dict(single_word=True)))
def test_added_words_are_text(side, how, world, tmp_path):
    add_tokens(world / side, tmp_path, ["Tolven", "<tool>"], {}, special=False, **how)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ta.load_tokenizer(tmp_path)
    for text in ("In Tolven  lives", "Tolven", "xTolvens <tool> Tolven\n", "é Tolven\u0301"):
        ids, spans = ours.encode_with_spans(text)
        assert ids == reference(text, add_special_tokens=False).input_ids, text
        assert spans[0][0] == 0 and spans[-1][1] == len(text.encode())
    word = ours.id_of["Tolven"]
    assert ours.decode([word]) == "Tolven" and ours.token_bytes(word) == b"Tolven"


def test_what_makes_a_tokenizer_another(world, tmp_path):
    first = ta.load_tokenizer(world / "student")
    for name in ("other_bos", "other_merges", "other_split"):
        shutil.copytree(world / "student", tmp_path / name)
    settings = json.loads((world / "student/tokenizer_config.json").read_text())
    (tmp_path / "other_bos/tokenizer_config.json").write_text(
        json.dumps(settings | dict(add_bos_token=True))
    )
    merges = (world / "student/merges.txt").read_text().strip().split("\n")
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (tmp_path / "other_merges/merges.txt").write_text("\n".join(merges))
    (tmp_path / "other_split/tokenizer_config.json").write_text(
        json.dumps(settings | dict(tokenizer_class="Qwen2Tokenizer"))
    )
    others = [ta.load_tokenizer(tmp_path / name) for name in ("other_bos", "other_merges")]
    assert others[0].prompt_ids(Row("a", ["b"])) != first.prompt_ids(Row("a", ["b"]))
    assert ta.same_vocabulary(first, others[0])  # BOS opens the prompt, it cuts nothing
    assert not ta.same_vocabulary(first, others[1])
    assert not ta.same_vocabulary(first, ta.load_tokenizer(tmp_path / "other_split"))


def bpe_file(folder: Path, vocabulary: list[str], merges, **model_fields) -> None:
    content = json.loads(
        tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={token: i for i, token in enumerate(vocabulary)},
                merges=merges,
                **model_fields,
            )
        ).to_str()
    )
    content["pre_tokenizer"] = dict(
        type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True
    )
    content["added_tokens"] = [added_token(len(vocabulary), "<eos>")]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


@pytest.mark.parametrize(
    "vocabulary, merges, how",
    [
        ("", [("a", "b"), ("b", "c"), ("a", "bc")], {}),  # "abc" is [ab, c], not [abc]
        ("", [("b", "c"), ("a", "b"), ("a", "bc")], {}),
        ("", [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], dict(ignore_merges=True)),
        ("abd", [("a", "b")], dict(ignore_merges=True)),
        ("?", [("a", "b")], dict(unk_token="?")),
    ],
)
def test_unusual_bpes_equal_the_library(vocabulary, merges, how, tmp_path):
    letters = [character for character in ta.ALPHABET if character not in "xyz?"]
    words = letters + [a + b for a, b in merges] + ([vocabulary] if vocabulary else [])
    bpe_file(tmp_path, list(dict.fromkeys(words)), merges, **how)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    ours = ta.load_tokenizer(tmp_path)
    for text in ("abc", "aabc bc abcabc", "abd ab", "wxyz abc", "日本 abc", *HOSTILE):
        ids, spans = ours.encode_with_spans(text)
        assert ids == reference.encode(text).ids, text
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert in_rank_order((("b", "c"), ("a", "bc"), ("a", "b")))
    assert not in_rank_order((("a", "b"), ("b", "c"), ("a", "bc")))


def test_sentencepiece_without_its_model_file(world, tmp_path):
    """As transformers 5 saves a Llama: a tokenizer.json, and the ids and spans stay; also where a
    piece is an added token, as Gemma's runs of spaces are."""
    transformers.AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path)
    shutil.copyfile(world / "teacher/config.json", tmp_path / "config.json")
    assert not (tmp_path / "tokenizer.model").exists()
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    piece = next(piece for piece in whole["model"]["vocab"] if re.fullmatch("▁[a-z]{4}", piece))
    added = added_token(whole["model"]["vocab"][piece], piece, special=False)
    whole["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    ours, before = ta.load_tokenizer(tmp_path), ta.load_tokenizer(world / "teacher")
    assert isinstance(ours, ta.LibraryTokenizer)
    for text in (*HOSTILE, "Which food does Mira like?", "e\u0301 ﬁ 你🙂"):
        ids, spans = before.encode_with_spans(text)
        if not text.startswith(("▁", " ")):  # "Metaspace" adds no second one
            assert ours.encode_with_spans(text) == (ids, spans), repr(text)
        assert ours.decode(ids) == before.decode(ids) or "\ufffd" in ours.decode(ids)
    assert [ours.token_bytes(i) for i in range(3, 1000)] == [
        before.token_bytes(i) for i in range(3, 1000)
    ]


def test_files_that_are_odd_but_right(world, tmp_path):
    """A tiktoken file called tokenizer.model; a pad token without an embedding; EOS in
    special_tokens_map.json alone; add_prefix_space false is refused where it cannot be honoured."""
    add_tokens(world / "student", tmp_path / "a", ["<x>"], {})
    (tmp_path / "a/tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    whole = json.loads((tmp_path / "a/tokenizer.json").read_text())
    whole["added_tokens"].append(added_token(700, "<pad>"))
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(whole))
    tokenizer = ta.load_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 601
    assert tokenizer.encode("figs") == ta.load_tokenizer(world / "student").encode("figs")
    settings = json.loads((world / "student/tokenizer_config.json").read_text())
    shutil.copytree(world / "student", tmp_path / "b")
    (tmp_path / "b/special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": settings.pop("eos_token")}})
    )
    (tmp_path / "b/tokenizer_config.json").write_text(json.dumps(settings))
    assert ta.load_tokenizer(tmp_path / "b").eos_id == 599
    shutil.copytree(world / "teacher", tmp_path / "c")
    settings = json.loads((tmp_path / "c/tokenizer_config.json").read_text())
    (tmp_path / "c/tokenizer_config.json").write_text(
        json.dumps(settings | dict(add_prefix_space=False))
    )
    with pytest.raises(InputError, match="add_prefix_space is false"):
        ta.load_tokenizer(tmp_path / "c")


def test_control_tokens_stay_out_of_texts(world, tmp_path):
    """A pad token without an embedding beside pieces; a word that is added twice."""
    add_tokens(world / "teacher", tmp_path / "a", ["<pad>"], {})
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | dict(vocab_size=1000)))
    assert ta.load_tokenizer(tmp_path / "a").vocab_size == 1000
    reference = transformers.AutoTokenizer.from_pretrained(world / "student")
    word = reference.convert_ids_to_tokens(300)
    reference.add_tokens([word])
    reference.save_pretrained(tmp_path / "b")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in ("Which food does Mira like?", f"{word} a{word}"):
        expected = reference(text, add_special_tokens=False).input_ids
        assert ta.load_tokenizer(tmp_path / "b").encode(text) == expected


def test_end_meets_end_of_base_and_instruct(chat_model, world, tmp_path):
    """kd between one vocabulary's two forms: a teacher that is the student has no distance, though
    their answers end differently."""
    shutil.copytree(chat_model, tmp_path / "base")
    argv = ["--teacher", chat_model, "--student", tmp_path / "base", "--method", "kd"]
    argv += ["--data", world / "data", "--out_dir", tmp_path / "run", "--max_steps", 1]
    argv += ["--prompt_format", "raw", "--max_length", 256, "--max_prompt_length", 200]
    argv += ["--batch_size", 4, "--grad_accum", 1, "--eval_num", 2]
    decoder = model.load(chat_model)
    tokenizers = [ta.load_tokenizer(chat_model, form) for form in ("chat", "raw")]
    assert tokenizers[0].eos_id != tokenizers[1].eos_id
    ours, theirs = tokenizers[1].eos_id, tokenizers[0].eos_id
    before = decoder.head.weight.detach().clone()
    train.exchange_ends(decoder, *tokenizers)
    assert torch.equal(decoder.head.weight[ours], before[theirs])
    assert torch.equal(decoder.embed.weight, before)  # what it reads stays
    assert tokenizers[0].eos_id == ours
    train.main([str(word) for word in [*argv, "--teacher_prompt_format", "chat"]])
    assert metrics(tmp_path / "run")[0]["kd_loss"] > 0


# ----------------------------------------------------------------------------- any teacher

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SMALL |= dict(max_position_embeddings=256, eos_token_id=2, bos_token_id=1, pad_token_id=0)
TEACHERS = {
    "pythia": lambda size: transformers.GPTNeoXConfig(vocab_size=size, **SMALL),
    "gemma3": lambda size: transformers.Gemma3TextConfig(
        vocab_size=size, **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=16
    ),
    "olmo2": lambda size: transformers.Olmo2Config(vocab_size=size, **SMALL),
    "phi3": lambda size: transformers.Phi3Config(vocab_size=size, **SMALL),
}


@pytest.mark.parametrize("maker", TEACHERS)
def test_teachers_of_other_architectures(maker, world, tmp_path, capsys):
    """Saved by transformers, read through it: they teach by byte_kd and dskd_cma, and answer."""
    size = ta.load_tokenizer(world / "teacher").vocab_size
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(TEACHERS[maker](size)).eval()
    folder = tmp_path / "teacher"
    reference.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(folder)
    teacher = model.load(folder)
    ids = torch.randint(3, size, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    close(teacher.logits(teacher(ids)).detach(), reference(ids).logits.detach(), 1e-5)
    expected = reference.generate(
        ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, eos_token_id=2
    )[:, 9:]
    found = generate(teacher, ids, mask, 12, temperature=0, eos_ids=[2])
    ended = (expected == 2).cumsum(1) - (expected == 2).long() > 0  # transformers pads after EOS
    assert ((found[:, : expected.size(1)] == expected) | ended).all()
    outside = model.load(folder, layers=False)
    kept = {outside.embed.weight, outside.head.weight}
    assert sum(p.numel() for p in outside.parameters()) == sum(p.numel() for p in kept)
    for method, *more in (("byte_kd", "--cache_teacher"), ("dskd_cma",)):
        argv = flags(world, tmp_path / method, "--max_steps", 2, *more, method=method)
        argv[argv.index("--teacher") + 1] = str(folder)
        train.main(argv)
        assert metrics(tmp_path / method)[0]["kd_loss"] > 0
    assert "is run by the transformers library" in capsys.readouterr().out
    for more in ([], ["--lora_rank", 4]):
        argv = flags(world, tmp_path / "student", *more, method="sft")
        argv[argv.index("--student") + 1] = str(folder)
        with pytest.raises(InputError, match="can only teach"):
            train.main(argv)
    with pytest.raises(InputError, match="is not written here"):
        compress.main([str(folder), "--out_dir", str(tmp_path / "cut")])


@pytest.mark.parametrize("maker", ("bloom", "mamba", "lora"))
def test_decoders_that_are_built_otherwise(maker, world, tmp_path):
    """No positions are named, no attention, or adapters lie between: run or refused in one line."""
    torch.manual_seed(0)
    if maker == "bloom":
        config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        teacher = model.load(tmp_path)
        assert teacher(torch.randint(0, 99, (2, 9))).shape == (2, 9, 32)
    elif maker == "mamba":
        config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="does not run token by token|cannot teach here"):
            model.load(tmp_path)
    else:
        peft = pytest.importorskip("peft")
        base = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
        ids = torch.randint(3, 99, (2, 9))
        seen = TransformersModel(adapted)
        close(seen.logits(seen(ids)).detach(), adapted(ids).logits.detach(), 1e-5)


@pytest.mark.parametrize("kind", ("bias", "cap"))
def test_teachers_with_more_than_a_head_are_refused(kind, tmp_path):
    if kind == "bias":
        config = transformers.PhiConfig(vocab_size=99, **SMALL)
    else:
        config = transformers.Gemma2Config(
            vocab_size=99, **SMALL, num_key_value_heads=2, head_dim=8
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="and nothing else"):
        model.load(tmp_path)
