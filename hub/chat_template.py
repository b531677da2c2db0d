"""A model's own chat template, rendered as transformers renders it."""

import functools
import json
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hub.tokenizer_files import token_text
from runtime.config import InputError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Of templates that name the day, as Llama 3.2's does: a prompt is the same on every day.
TODAY = datetime(2024, 7, 26)
ANSWER = "The answer."  # stands for one where the turn's end is looked for


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant says; it changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """Jinja source that turns messages, [{"role", "content"}], into a text with control tokens."""

    def __init__(self, path: Path, source: str, special_tokens: dict[str, str]):
        self.path, self.source, self.special_tokens = path, source, special_tokens

    @functools.cached_property
    def template(self):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = TODAY.strftime
        environment.filters["tojson"] = to_json
        return environment.from_string(self.source)

    def _refuse(self, message: str):
        raise InputError(f"{self.path}: the chat template refuses these messages: {message}")

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The text up to where the assistant begins to answer. Raises InputError for messages that
        the template refuses (Gemma's knows no system)."""
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,  # Qwen3's answers would begin with thoughts
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InputError(f"{self.path}: the chat template cannot be used ({error})") from error

    def prompt_and_conversation(self) -> tuple[str, str]:
        """A question as a prompt, and the same question with ANSWER."""
        question = {"role": "user", "content": "A question?"}
        answer = {"role": "assistant", "content": ANSWER}
        return self.render([question]), self.render([question, answer], add_generation_prompt=False)

    def after_answer(self) -> str:
        """What follows an answer: the control token that ends the turn, and more."""
        _, conversation = self.prompt_and_conversation()
        return conversation.rpartition(ANSWER)[2]


def read_chat_template(folder: Path, settings: dict) -> ChatTemplate | None:
    """chat_template.jinja, or else the template in tokenizer_config.json (settings); None without
    either. Of several the one named "default"."""
    path, source = folder / "chat_template.jinja", None
    if path.exists():
        source = path.read_text(encoding="utf-8")
    else:
        path, source = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(source, list):
        source = {named["name"]: named["template"] for named in source}.get("default")
    if source is None:
        return None
    special_tokens = {}
    for name in SPECIAL_TOKENS:
        if token_text(settings, name) is not None:
            special_tokens[name] = token_text(settings, name)
    return ChatTemplate(path, source, special_tokens)
