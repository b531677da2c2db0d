"""On-policy distillation (GKD, arXiv 2306.13649): in a share of the steps the student answers the
step's prompts itself, and the teacher judges its answers. No gradient goes through the sampling."""

import random
from dataclasses import replace

import torch

from data import Row
from methods.sft import sft
from runtime.generation import answer
from runtime.distributed import all_reduce
from tokenize_align import Example, encode_rows


def is_on_policy(config, step: int) -> bool:
    """A draw with the probability --on_policy that is the same in every process and on resume."""
    return random.Random(f"{config.seed}, {step}").random() < config.on_policy


def own_answers(
    config, student, tokenizers, examples: list[Example], rows: list[Row], step: int
) -> list[Example]:
    """The examples with what the student answers, sampled at temperature 1, in place of the data's,
    cut anew by both tokenizers. Their row is −1: they are new in every step."""
    seed = random.Random(f"{config.seed}, {step}, {examples[0].row}").getrandbits(63)
    generator = torch.Generator(student.embed.weight.device).manual_seed(seed)
    prompts = [example.student.ids[: example.student.prompt_length] for example in examples]
    max_new_tokens = config.max_length - max(map(len, prompts))
    answers = answer(student, tokenizers[0], prompts, max_new_tokens, generator=generator)
    answered = [
        replace(rows[example.row], outputs=[text], ended=ended)
        for example, (text, ended) in zip(examples, answers)
    ]
    result, _, _ = encode_rows(answered, *tokenizers, config.max_length, config.max_prompt_length)
    for example in result:
        example.row = -1
    return result


def on_policy_passes(config, passes: list, student, tokenizers, rows: list[Row]) -> list:
    """The forward passes of a step in which the student answers: cross-entropy on the data, and the
    method's terms, but for what labels teach, on the answers.

    passes: (loss function, Objective, examples, weight) of the data. Each kind is divided by its
    own number of tokens, of all processes."""
    on_data, on_answers, counts = [], [], torch.zeros(2)
    for loss, objective, examples, weight in passes:
        on_data.append((sft, objective, examples, weight))
        answered = own_answers(config, student, tokenizers, examples, rows, objective.step)
        on_answers.append((loss, answered, weight))
        counts[0] += weight * sum(len(e.student.response_ids) for e in answered)
        counts[1] += weight * sum(len(e.teacher.response_ids) for e in answered)
    num_student, num_teacher = all_reduce(counts.to(student.embed.weight.device)).tolist()
    of_answers = replace(
        objective,
        num_student_tokens=int(num_student),
        num_teacher_tokens=int(num_teacher),
        has_labels=False,
    )
    return on_data + [(loss, of_answers, answered, weight) for loss, answered, weight in on_answers]
