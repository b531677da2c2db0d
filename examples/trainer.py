"""byte_kd in a transformers Trainer: a teacher and a student with different tokenizers.

python examples/trainer.py TEACHER STUDENT train.jsonl OUT_DIR      # hub ids or folders
torchrun --nproc_per_node=8 examples/trainer.py …                   # the same on several GPUs"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import read_rows  # noqa: E402
from distillation import DistillationLoss  # noqa: E402


class StudentWithLoss(torch.nn.Module):
    """What Trainer trains: the student and what learns beside it, with the loss as its output."""

    def __init__(self, student, loss_function):
        super().__init__()
        self.student, self.loss_function = student, loss_function

    def forward(self, rows, return_loss=True):
        return {"loss": self.loss_function(rows)[0]}


class DistillationTrainer(Trainer):
    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            self.model.student.save_pretrained(output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)


def main(teacher_name, student_name, data_file, out_dir, method="byte_kd", **more):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name)
    student = AutoModelForCausalLM.from_pretrained(student_name, dtype=torch.float32)
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student_name, teacher_name)]
    arguments = TrainingArguments(
        out_dir,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=10,
        prediction_loss_only=True,
        **more,
    )
    trainer = DistillationTrainer(
        StudentWithLoss(student, DistillationLoss(method, student, teacher, *tokenizers)),
        arguments,
        train_dataset=read_rows(Path(data_file)),
        data_collator=lambda rows: {"rows": rows},
        processing_class=tokenizers[0],
    )
    trainer.train()
    trainer.save_model(out_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
