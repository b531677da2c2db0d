"""best/README.md: what a checkpoint is, how it was made and how it is loaded."""

from pathlib import Path

from data import Row
from hub.download import hub_id
from prompts import prompt_text
from runtime.files import atomic_write


def question_for(data: str) -> str:
    """Something to ask a model that was trained on a set."""
    return "Which food does Mira like?" if data.startswith("toy") else "Name three rivers."


def how_to_load(folder: Path, prompt_format: str, data: str) -> str:
    """The lines of Python by which transformers loads a checkpoint and asks it something."""
    question = question_for(data)
    if prompt_format == "chat":
        asked = [{"role": "user", "content": question}]
    elif data.startswith("toy"):
        import toy

        asked = toy.make_prompt(question)
    else:
        asked = prompt_text(Row(question, [], is_instruction=True), prompt_format)
    return (
        "from transformers import pipeline\n"
        f'model = pipeline("text-generation", "{folder}")\n'
        f"print(model({asked!r})[0]['generated_text'])"
    )


def write_model_card(
    folder: Path, config, command: str, prompt_format: str, results: dict, num_rows: dict
) -> None:
    """results: model → split → scores, num_rows: split → rows that were scored."""
    splits = list(num_rows)
    is_of_hub = config.student != "toy" and not Path(config.student).exists()
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {hub_id(config.student)}"] if is_of_hub else []),
        "tags: [knowledge-distillation, nanodskd]",
        "---",
        "",
        f"# {Path(config.student).name}, by {Path(config.method).stem}",
        "",
        "| | |",
        "|---|---|",
        f"| student | {config.student} |",
        f"| teacher | {config.teacher or 'none'} |",
        f"| method | {config.method} |",
        f"| data | {config.data} |",
        f"| prompts | {prompt_format} |",
        "",
    ]
    for measure, title in (("bits_per_byte", "bits per byte"), ("rouge_l", "ROUGE-L")):
        if measure not in results["student"]["dev"]:
            continue
        lines += [
            f"| {title} | {' | '.join(f'{s} ({num_rows[s]} rows)' for s in splits)} |",
            "|---" * (len(splits) + 1) + "|",
        ]
        for name, of_model in results.items():
            values = [f"{of_model[split][measure]:.3f}" for split in splits]
            lines.append(f"| {name} | {' | '.join(values)} |")
        lines.append("")
    lines += ["Trained by nanoDSKD:", "", "```bash", command, "```", "", "```python"]
    lines += [how_to_load(folder, prompt_format, config.data), "```", ""]
    with atomic_write(folder / "README.md") as file:
        file.write("\n".join(lines))
