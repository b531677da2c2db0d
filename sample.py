"""Ask a model something: the answer is printed while it is generated.

    python sample.py out/toy-byte_kd "Which food does Mira like?"       # and what is true
    python sample.py smollm2 "Name three rivers." --temperature 0
    python sample.py out/toy-byte_kd                # asks for instructions until an empty line

The instruction is put as the model's prompts were in its training by train.py, else into its chat
template, else into Alpaca's; with --raw it is the prompt as it stands."""

from dataclasses import dataclass

import runtime.config  # first, so that Ctrl-C while starting is one line
import torch

from data import TOY_SETS, Row, trained_on
from model import load
from runtime.config import InputError, flag, parse, run_script
from runtime.generation import stream
from runtime.distributed import pick_device
from tokenize_align import encode_prompt, left_pad, load_tokenizer


@dataclass
class Config:
    model: str = flag("", "A checkpoint's folder, a run's out_dir, or a model's name.")
    instruction: str = flag("", "What to do; without one, it is asked for in a loop.")
    input: str = flag("", "The text that the instruction is about.")
    raw: bool = flag(False, "Put no template around the instruction.")
    temperature: float = flag(1.0, "0 takes the likeliest token, 1 samples.", minimum=0)
    top_p: float = flag(
        1.0, "Sample from the likeliest tokens with this probability together.", minimum=1e-6
    )
    max_new_tokens: int = flag(256, "The longest answer, in tokens.", minimum=1)
    seed: int = flag(1, "Of the sampling.", minimum=0)
    device: str = flag("auto", "Where to run.", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "auto: bfloat16 on GPUs that have it, else float32.",
        choices=("auto", "float32", "bfloat16"),
    )


def row_of(config: Config, instruction: str, is_toy: bool) -> Row:
    if is_toy:
        import toy

        return Row(toy.make_prompt(instruction, config.input), [])
    return Row(instruction, [], input=config.input, is_instruction=True)


def print_answer(decoder, tokenizer, config: Config, row: Row, generator) -> None:
    """Print the answer, token by token; a character split over tokens waits until it is whole."""
    positions = decoder.config.max_positions
    limit = positions - min(config.max_new_tokens, positions // 2)
    prompt, cut = encode_prompt(row, tokenizer, limit)
    if cut:
        print(f"(the prompt is cut to {limit} tokens)")
    device = decoder.embed.weight.device
    ids, mask = left_pad([prompt], tokenizer.eos_id)
    tokens, shown = [], ""
    for new in stream(
        decoder,
        ids.to(device),
        mask.to(device),
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        tokenizer.eos_ids,
        generator,
    ):
        if int(new) in tokenizer.eos_ids:
            break
        tokens.append(int(new))
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown) :])


def print_truth(config: Config, row: Row, generator) -> None:
    """Of the toy: what its teacher answers, and the world's answers with their shares."""
    import toy

    folder = toy.model_folder("teacher")
    if folder.exists():
        print("the teacher:  ", end="")
        teacher = load(folder, device=generator.device)
        print_answer(teacher, load_tokenizer(folder), config, row, generator)
    answers = toy.true_answers(config.instruction)
    if answers:
        shares = [f"{answer} ({share:.2f})" for answer, share in answers.items()]
        print(f"the truth:    {', '.join(shares)}")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv, positional=("model", "instruction"))
    if not config.model:
        raise InputError('name a model: python sample.py CHECKPOINT_OR_NAME "instruction"')
    device, dtype = pick_device(config.device, config.dtype)
    decoder = load(config.model, dtype=dtype, device=device)
    tokenizer = load_tokenizer(config.model, "raw" if config.raw else "auto")
    generator = torch.Generator(device).manual_seed(config.seed)
    is_toy = trained_on(decoder.source) in TOY_SETS
    if config.instruction:
        row = row_of(config, config.instruction, is_toy)
        print_answer(decoder, tokenizer, config, row, generator)
        if is_toy:
            print_truth(config, row, generator)
        return
    while True:
        try:
            instruction = input("instruction> ").strip()
        except EOFError:
            return
        if not instruction:
            return
        print_answer(decoder, tokenizer, config, row_of(config, instruction, is_toy), generator)


if __name__ == "__main__":
    run_script(main)
