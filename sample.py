"""Ask a model something: the answer is printed as it is generated.

    python sample.py out/toy-byte_kd "Which food does Mira like?"
    python sample.py smollm2 "Name three rivers." --temperature 0
    python sample.py out/toy-byte_kd                          # asks for instructions until an empty line or Ctrl-D

The instruction is put into Alpaca's template, as in training; the toy's models were trained without one."""
import sys
from dataclasses import dataclass

import torch

import toy
from files import hub
from files.config import InputError, flag, parse
from files.rows import make_prompt
from model import load
from running.generation import stream
from tokenize_align import encode_prompt, left_pad, load_tokenizer

@dataclass
class Config:
    model: str = flag("", "checkpoint folder, a run's out_dir, or a model's name")
    instruction: str = flag("", "what to do; without one, it is asked for in a loop")
    input: str = flag("", "text that the instruction is about")
    temperature: float = flag(1.0, "0 takes the likeliest token, 1 samples as the model was trained", at_least=0)
    top_p: float = flag(1.0, "sample from the likeliest tokens with this probability together", at_least=1e-6)
    top_k: int = flag(0, "sample from the k likeliest tokens (0: all)", at_least=0)
    max_new_tokens: int = flag(256, "longest answer, in tokens", at_least=1)
    seed: int = flag(1, "of the sampling", at_least=0, at_most=2**40)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "weights' type: float32 on CPU, bfloat16 on CUDA",
                      choices=("auto", "float32", "bfloat16"))

def tell(decoder, tokenizer, config: Config, instruction: str, generator: torch.Generator) -> None:
    """Print the answer to one instruction, token by token; a character split over tokens waits until it is whole."""
    device = decoder.embed.weight.device
    template = toy.make_prompt if hub.trained_on(decoder.source) in toy.SETS else make_prompt
    text = template(instruction, config.input).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    limit = decoder.config.max_positions - min(config.max_new_tokens, decoder.config.max_positions // 2)
    prompt, was_cut = encode_prompt(text, tokenizer, limit)
    if was_cut:
        print(f"(the prompt is cut to {limit} tokens)", file=sys.stderr)
    ids, mask = left_pad([prompt], tokenizer.eos_id)
    tokens, shown = [], ""
    for new in stream(decoder, ids.to(device), mask.to(device), config.max_new_tokens, config.temperature, config.top_p,
                      config.top_k, tokenizer.eos_id, generator):
        if int(new) == tokenizer.eos_id:
            break
        tokens.append(int(new))
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown):])

def main() -> None:
    config = parse(Config, __doc__, positional=("model", "instruction"))
    if not config.model:
        raise InputError('name a model: python sample.py CHECKPOINT_OR_NAME "instruction"')
    device, dtype = hub.pick_device(config.device, config.dtype)
    decoder, tokenizer = load(config.model, dtype=dtype, device=device), load_tokenizer(config.model)
    hub.check_vocabulary(config.model, decoder.config.vocab_size, tokenizer.vocab_size)
    generator = torch.Generator(device).manual_seed(config.seed)
    if config.instruction:
        tell(decoder, tokenizer, config, config.instruction, generator)
        return
    while True:
        try:
            instruction = input("instruction> ").strip()
        except EOFError:
            print()
            return
        if not instruction:
            return
        tell(decoder, tokenizer, config, instruction, generator)

if __name__ == "__main__":
    hub.run(main)
