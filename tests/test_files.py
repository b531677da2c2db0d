"""Models, tokenizers and data as users have them: what is read, and what is refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import tokenize_align as ta
from data import alpaca_prompt, data_files, git_blob_id, read_rows
from hub.download import MODELS, model_folder
from prompts import prompt_text
from runtime.config import InputError
from tests.helpers import FIXTURES, HOSTILE, close, real_vocabularies, reference_model

ROW = {"prompt": "p", "output": "o"}


# ------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1]", "must be an object like"),
        ("{}", "no prompt"),
        ('{"prompt": "", "output": "x"}', '"prompt" must be'),
        ('{"prompt": "p"}', "no output .found: prompt.; a row is, for example, ."),
        ('{"prompt": "p", "input": [1], "output": "x"}', '"input" must be'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "a question and an answer"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "a turn must have a role"),
        (
            '{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}',
            "the last turns must be",
        ),
        ('{"prompt": "p", "output": 3}', '"output" must be'),
        ('{"prompt": "p", "output": [3]}', '"output" must be'),
        ('{"instruction": 5, "output": "x"}', '"instruction" must be'),
    ],
)
def test_rows_that_are_wrong(line, message, tmp_path):
    """Named by file and line."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        read_rows(file, answered=True)
    assert str(error.value).startswith(f"{file}:2: ")


def test_rows(tmp_path):
    file = tmp_path / "train.jsonl"
    lines = [ROW, {"prompt": "a\u2028b", "output": ["x", " ", "", "y"]}]
    lines += [{"prompt": None, "instruction": "do", "input": "this", "output": "z"}]
    text = "\ufeff" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8")
    rows = read_rows(file)
    texts = [prompt_text(row, "auto") for row in rows]
    assert texts == ["p", "a\u2028b", alpaca_prompt("do", "this")]
    assert [row.outputs for row in rows] == [["o"], ["x", "y"], ["z"]]
    file.write_bytes(b'{"prompt": "\xff", "output": "x"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        read_rows(file)


def test_our_template_is_the_data_sets():
    file = FIXTURES / "data/dolly/train.jsonl"
    if not file.exists():
        pytest.skip(f"no real data in {FIXTURES}")
    for line in file.read_text(encoding="utf-8").split("\n")[:200]:
        if line:
            row = json.loads(line)
            assert row["prompt"] == alpaca_prompt(row["instruction"], row.get("input", ""))


def test_data_is_checked_after_the_download(tmp_path, monkeypatch):
    content = json.dumps(ROW).encode() + b"\n"
    blob = tmp_path / "blob"
    blob.write_bytes(content)
    monkeypatch.setenv("NANODSKD_CACHE", str(tmp_path))
    monkeypatch.setitem(data.DATASETS, ("dolly", "train"), ("x.jsonl", git_blob_id(blob)))

    def fetch(url, path):
        path.write_bytes(content[:sent])

    monkeypatch.setattr(data.urllib.request, "urlretrieve", fetch)
    for sent, good in ((5, False), (len(content), True), (0, True)):  # the last is not fetched
        if good:
            assert read_rows(data_files("dolly", "train")[0])[0].prompt == "p"
            continue
        with pytest.raises(InputError, match="cut or was changed"):
            data_files("dolly", "train")
        assert not list((tmp_path / "dolly").iterdir())
    # git's id of "hello\n"
    blob.write_bytes(b"hello\n")
    assert git_blob_id(blob) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_names_of_data_and_models(tmp_path, monkeypatch):
    for name, split, message in (
        ("vicuna", "train", "for scoring only"),
        (str(tmp_path), "train", "no train.jsonl"),
        ("nothing", "test", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            data_files(name, split)
    assert data_files(str(tmp_path), "test", required=False) == []
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW))
    assert data_files(str(tmp_path / "x.jsonl"), "test") == [tmp_path / "x.jsonl"]

    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository == "a/gone":
            raise type("RepositoryNotFoundError", (Exception,), {})()
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_folder("qwen") == tmp_path
    assert [repository for repository, _ in asked] == [MODELS["qwen"]] * 2
    assert {"config.json", "model*.safetensors"} <= set(asked[0][1])
    assert "model*.safetensors" not in asked[1][1]
    assert model_folder("owner/name", weights=False) == tmp_path and len(asked) == 3
    assert model_folder("qwen") == tmp_path and "model*.safetensors" in asked[3][1]
    for name, message in (("a/gone", "no such public repository"), ("gpt5", "not a hub id")):
        with pytest.raises(InputError, match=message):
            model_folder(name)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="no checkpoint yet"):
        model_folder(tmp_path)
    for name in ("last", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        assert model_folder(tmp_path) == tmp_path / name


# ------------------------------------------------------------------------------- tokenizers


@real_vocabularies
def test_vocabulary_and_merges_equal_tokenizer_json(tmp_path):
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(FIXTURES / "tokenizers/gpt2" / file, tmp_path / file)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 50256}')
    a, b = ta.load_tokenizer(tmp_path), ta.load_tokenizer(FIXTURES / "tokenizers/gpt2")
    assert all(a.encode(text) == b.encode(text) for text in HOSTILE)
    assert ta.same_vocabulary(a, b)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": "{"}, "not JSON"),
        ({"tokenizer.json": '{"model": {"type": "WordPiece"}}'}, "library refuses it"),
        ({"tokenizer.json": "{}"}, "damaged"),
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "unknown"),
    ],
)
def test_tokenizer_files_that_are_wrong(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        ta.load_tokenizer(tmp_path)


def test_an_end_that_texts_have_stays_in_them(world, tmp_path):
    """A config whose eos_token_id is an ordinary token: transformers' defaults, or a line's end."""
    shutil.copytree(world / "student", tmp_path / "student")
    plain = ta.load_tokenizer(world / "student")
    longest = max(plain.encode("Mira eats figs."), key=lambda i: len(plain.token_bytes(i)))
    assert len(plain.token_bytes(longest)) > 1
    ends = [plain.eos_id, plain.encode("\n")[0], longest]
    (tmp_path / "student/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = ta.load_tokenizer(tmp_path / "student")
    text = "Mira eats figs.\nMira eats figs."
    assert found.encode(text) == plain.encode(text) and found.decode(found.encode(text)) == text
    assert set(ends) <= set(found.eos_ids)


def test_end_of_sequence_must_be_a_piece(world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher/tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(InputError, match="im_end"):
        ta.load_tokenizer(tmp_path / "teacher")


def test_ids_that_only_the_model_has_are_no_text(world):
    for side in ("student", "teacher"):
        tokenizer = ta.load_tokenizer(world / side)
        ids = tokenizer.encode("figs") + [tokenizer.vocab_size, tokenizer.eos_id]
        assert tokenizer.decode(ids) == "figs"


# ----------------------------------------------------------------------------------- models


def change_config(folder, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("gpt2", dict(architectures=["NewLM"], model_type="new"), "transformers cannot load it"),
        ("gpt2", dict(activation_function="relu"), "relu"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        ("gpt2", dict(rotary_pct=0.25), "rotary_pct"),
        ("gpt2", dict(n_layer="absent"), "n_layer"),
        ("gpt2", dict(n_layer=3), "missing"),
        ("gpt2", dict(n_layer=1), "extra"),
        ("gpt2", dict(vocab_size=98), "wte"),
        ("gpt2", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("llama2", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        ("llama2", dict(hidden_act="gelu"), "gelu"),
        ("llama2", dict(partial_rotary_factor=0.5), "partial_rotary"),
    ],
)
def test_configs_that_are_not_implemented(family, change, message, tmp_path):
    reference_model(family, tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(InputError, match=message):
        model.load(tmp_path)


@torch.no_grad()
def test_llama_reads_both_dialects_shards_and_pickles(tmp_path):
    reference = reference_model("llama3", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    config["torch_dtype"] = config.pop("dtype")
    state, ids = load_file(tmp_path / "a/model.safetensors"), torch.randint(0, 97, (2, 20))
    names = sorted(state)
    for kind in ("shards", "pickle"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if kind == "pickle":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            places = {}
            for number, part in ((1, names[:5]), (2, names[5:])):
                file = f"model-0000{number}-of-00002.safetensors"
                save_file({name: state[name] for name in part}, folder / file)
                places |= dict.fromkeys(part, file)
            index = json.dumps({"weight_map": places})
            (folder / "model.safetensors.index.json").write_text(index)
        decoder = model.load(folder)
        close(decoder.logits(decoder(ids)), reference(ids).logits)
    (tmp_path / "shards/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="not there"):
        model.load(tmp_path / "shards")


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without the prefix, with mask buffers, a copy of the tied head, and harmless fields."""
    reference = reference_model("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, file)
    change_config(tmp_path, dict(n_special=0, output_past=True, unsloth_fixed=True))
    change_config(tmp_path, dict(tokenizer_class="GPT2Tokenizer", do_sample=True, top_p=0.9))
    decoder, ids = model.load(tmp_path), torch.randint(0, 97, (2, 9))
    close(decoder.logits(decoder(ids)).detach(), reference(ids).logits.detach())


def test_an_absent_sliding_window_is_transformers_default(tmp_path):
    reference_model("mistral", tmp_path)
    for value, window in ((5, 5), (None, None), ("absent", 4096)):
        change_config(tmp_path, {"sliding_window": value})
        assert model.load(tmp_path).config.sliding_window == window


@torch.no_grad()
def test_mistral_slides_as_in_transformers(tmp_path):
    """In all layers, whatever use_sliding_window says; layers of two kinds are another model's."""
    transformers = pytest.importorskip("transformers")
    reference_model("mistral", tmp_path)
    change_config(tmp_path, {"sliding_window": 4, "use_sliding_window": False})
    ids = torch.randint(0, 97, (2, 20))
    decoder = model.load(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(decoder.logits(decoder(ids)), reference(ids).logits)
    kinds = ["sliding_attention", "full_attention"]
    change_config(tmp_path, {"layer_types": (kinds * decoder.config.num_layers)[:2]})
    with pytest.raises(InputError, match="Ministral"):
        model.load(tmp_path)


def test_random_init_has_the_config_and_its_own_weights(tmp_path):
    reference_model("gpt2", tmp_path)
    torch.manual_seed(3)
    a, b = model.load(tmp_path, init="random"), model.load(tmp_path)
    assert a.config == b.config and a.head.weight is a.embed.weight
    assert abs(a.embed.weight.std().item() - 0.02) < 0.002
    assert abs(a.layers[0].attn.c_proj.weight.std().item() - 0.02 / 2) < 0.002
    assert not torch.equal(a.embed.weight, b.embed.weight)


def test_damaged_weights(tmp_path):
    state = reference_model("gpt2", tmp_path).state_dict()
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for cut in (0, 4, 1000, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(InputError, match="model.safetensors"):
            model.load(tmp_path)
    weights = {name: x for name, x in state.items() if "lm_head" not in name}
    save_file({name: x.to(torch.int8) for name, x in weights.items()}, file)
    with pytest.raises(InputError, match="quantized"):
        model.load(tmp_path)
    name = "transformer.h.0.ln_1.weight"
    save_file(weights | {name: weights[name] * float("nan")}, file)
    with pytest.raises(InputError, match="not finite"):
        model.load(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="no weights"):
        model.load(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not plain weights"):
        model.load(tmp_path)


class Evil:
    """A pickle that would call a function when it is read."""

    def __reduce__(self):
        return print, ("unpickled",)
