"""``megacontext ask`` and ``megacontext chat``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, Literal

from megacontext.cli.output import console, read_config, write_json
from megacontext.errors import InputError
from megacontext.evaluation.focus_picture import focus_bar, focus_legend
from megacontext.memory.opening import is_taken
from megacontext.runtime.engine import DecodedToken, Engine
from megacontext.runtime.session import DecodeConfig, Session, SessionConfig
from megacontext.tasks.documents import QUESTION_TEMPLATE, final_answer

TemplateName = Literal["auto", "question", "chat", "none"]


class TalkConfig(SessionConfig):
    """A session that is talked with.

    Attributes:
        template: how a message becomes a prompt: ``question`` as the bundled model was trained,
            ``chat`` by the tokenizer's chat template, ``none`` as it is; ``auto``: ``chat`` where
            there is such a template, else ``question``.
        decode: how answers are decoded.
    """

    template: TemplateName = "auto"
    decode: DecodeConfig = DecodeConfig()


def run_ask(arguments: argparse.Namespace) -> int:
    """Answers one question; the memory stays as it is."""
    config = _config(arguments)
    with Session(config) as session:
        engine = session.open(arguments.memory, writable=False)
        with engine.memory:
            prompt, options = _prompt(engine, config, arguments.question)
            answer, first = _write_answer(
                engine.generate(prompt, query=arguments.question, remember=False, **options)
            )
            if arguments.explain and first is not None:
                _print_focus(engine, first)
            result = {
                "answer": final_answer(answer),
                "written": answer.strip(),
                "edits": sum(len(record.edits) for record in engine.focus.records),
                "cost": engine.context.cost,
                "history_tokens": engine.memory.n_tokens,
            }
    write_json(arguments.json, result)
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Reads messages line by line, answers, and remembers both."""
    config = _config(arguments)
    turns = 0
    with Session(config) as session:
        exists = is_taken(arguments.memory)
        engine = (
            session.open(arguments.memory, writable=True)
            if exists
            else session.create(arguments.memory)
        )
        with engine.memory:
            if sys.stdin.isatty():
                console.print(
                    "Empty line or end of file ends; /state shows where the memory stands."
                )
            while message := _read_message():
                if message == "/state":
                    console.print(engine.state())
                    continue
                prompt, options = _prompt(engine, config, message)
                _write_answer(engine.generate(prompt, query=message, remember=True, **options))
                turns += 1
            tokens = engine.memory.n_tokens
    write_json(arguments.json, {"turns": turns, "history_tokens": tokens})
    return 0


def _config(arguments: argparse.Namespace) -> TalkConfig:
    for key, value in (("model", arguments.model), ("policy", arguments.focus)):
        if value is not None:
            arguments.overrides = [*arguments.overrides, f"{key}={value}"]
    return read_config(TalkConfig, arguments)


def _prompt(engine: Engine, config: TalkConfig, message: str) -> tuple[str, dict[str, Any]]:
    """The prompt of a message, and the options of :meth:`Engine.generate`."""
    options: dict[str, Any] = config.decode.options()
    tokenizer: Any = engine.base.tokenizer
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    template = config.template
    if template == "auto":
        template = "chat" if has_chat else "question"
    if template == "none":
        return message, options
    if template == "chat":
        if not has_chat:
            raise InputError(
                f"{config.model}: its tokenizer has no chat template; set template=none"
            )
        messages = [{"role": "user", "content": message}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(prompt), options
    if not options.get("stop"):
        options["stop"] = "\n"
    return QUESTION_TEMPLATE.format(question=message), options


def _write_answer(tokens: Iterator[DecodedToken]) -> tuple[str, int | None]:
    """Writes an answer as it comes; returns it with the place of its first token, if any."""
    answer, first = "", None
    for token in tokens:
        # Where a prompt ends without a space, the answer begins with one.
        text = token.text if answer else token.text.lstrip()
        sys.stdout.write(text)
        sys.stdout.flush()
        answer += text
        first = token.index if first is None else first
    sys.stdout.write("\n")
    return answer, first


def _read_message() -> str:
    if sys.stdin.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text ({error.reason})") from None


def _print_focus(engine: Engine, index: int) -> None:
    record = engine.explain(index).record
    columns = max(20, min(console.width - 2, 120))
    console.print(focus_bar(record.spans, max(1, record.cursor), columns))
    console.print(focus_legend(int(record.spans[:, 0].max())))
    size = engine.memory.identity.block_size
    # An answer waits for several refocuses, and the last often finds nothing left to do.
    before = [past for past in engine.focus.records if past.round <= record.round]
    for edit in (edit for past in before for edit in past.edits):
        text = ""
        if edit.kind == "expand":
            start = edit.steps[-1][1]
            text = " ".join(engine.base.decode(engine.memory.tokens(start, start + size)).split())
        console.print(
            f"{edit.kind} L{edit.level} [{edit.start:,}, {edit.end:,}) {edit.score:+.2f} nats "
            f"({edit.reason}) {text}",
            markup=False,
            soft_wrap=True,
        )
