"""byte_kd in a transformers Trainer: a teacher and a student with different tokenizers.

python examples/trainer.py TEACHER STUDENT train.jsonl OUT_DIR      # hub ids or folders
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import read_rows  # noqa: E402
from distillation import DistillationLoss  # noqa: E402


class DistillationTrainer(Trainer):
    def __init__(self, *args, loss_function, **more):
        super().__init__(*args, **more)
        self.loss_function = loss_function

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, terms = self.loss_function(inputs["rows"])
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({name: float(value) for name, value in terms.items()})
        return (loss, terms) if return_outputs else loss


def main(teacher_name, student_name, data_file, out_dir, **more):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name)
    student = AutoModelForCausalLM.from_pretrained(student_name)
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student_name, teacher_name)]
    arguments = TrainingArguments(
        out_dir,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        logging_steps=10,
        remove_unused_columns=False,  # rows reach the loss as they are
        **more,
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        train_dataset=read_rows(Path(data_file)),
        data_collator=lambda rows: {"rows": rows},
        processing_class=tokenizers[0],
        loss_function=DistillationLoss("byte_kd", student, teacher, *tokenizers),
    )
    trainer.train()
    trainer.save_model(out_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
