"""`tralign-fast chat MODEL`: a conversation in the terminal, with a model or with two at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from tralign_fast.command_line import PositionalParser
from tralign_fast.commands.generate import prompt_ids
from tralign_fast.commands.models import (
    base_of,
    best_device,
    check_model,
    is_adapter,
    load_model,
    load_tokenizer,
)
from tralign_fast.commands.samples import GREEDY

_HELP = "/new forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_START = "its start"


@dataclass
class Side:
    """A model in the conversation, and what was said in it."""

    name: str
    model: Any
    tokenizer: Any
    plain: bool = False  # its adapter is off
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, room: int) -> list[int]:
        """Token ids of the conversation; the oldest turns go where the model has no room."""
        system = self.messages[:1] if self.messages[0]["role"] == "system" else []
        turns = self.messages[len(system) :]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        while True:
            ids = _ids(self.tokenizer, [*system, *turns])
            if limit is None or len(ids) + room <= limit or len(turns) < 3:
                return ids
            turns = turns[2:]


def run_chat(arguments: list[str]) -> int:
    """Talks with a model; with --before, two models answer side by side.

    Raises:
        ValueError: no terminal, or no such model.
    """
    given = _parser().parse_args(arguments)
    if given.max_new_tokens < 1 or given.temperature < 0:
        raise ValueError("chat: expected --max_new_tokens ≥ 1 and --temperature ≥ 0")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(
            "chat: needs a terminal; without one tralign-fast generate MODEL --prompt TEXT answers"
        )
    with contextlib.suppress(ImportError):  # lines can be edited, and had again
        import readline  # noqa: F401
    sides = sides_of(given.model, given.adapter, given.before)
    print(f"{' and '.join(side.name for side in sides)}: {_HELP}")
    talk(sides, given, _lines())
    return 0


def _parser() -> PositionalParser:
    parser = PositionalParser(prog="tralign-fast chat", description=run_chat.__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder of a run, or hub id.")
    parser.add_argument("--adapter", help="Folder of an adapter, put on MODEL.")
    parser.add_argument(
        "--before", nargs="?", const=_START, metavar="BASE",
        help="A model that answers beside it; without a value the one that it started from.",
    )  # fmt: skip
    parser.add_argument("--system", help="What the conversation begins with.")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token.")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def sides_of(name: str, adapter: str | None, before: str | None) -> list[Side]:
    """The models that answer, what was before first.

    An adapter and its base are one model, whose adapter is off for the base's answers.

    Raises:
        ValueError: one of them is not there.
    """
    check_model(name)
    if adapter is not None and not is_adapter(adapter):
        raise ValueError(f"--adapter {adapter}: expected a folder with adapter_config.json")
    base = name if adapter is not None else base_of(name)
    after = adapter or name
    if before == _START:
        if base is None:
            raise ValueError(f"{name}: names no start; expected --before MODEL")
        before = base
    if before is not None:
        check_model(before)
    tokenizer, device = load_tokenizer(after, base), best_device()
    model = load_model(after, base=base, device=device, merged=False)
    sides = [Side(after, model, tokenizer)]
    if before is not None and is_adapter(after) and before == base:
        sides.insert(0, Side(before, model, tokenizer, plain=True))
    elif before is not None:
        own = load_tokenizer(before, base_of(before))
        sides.insert(0, Side(before, load_model(before, device=device), own))
    return sides


def talk(sides: list[Side], given: Any, lines: Iterator[str]) -> None:
    """Answers every line until they end, or one is /exit."""
    begin = [{"role": "system", "content": given.system}] if given.system else []
    for side in sides:
        side.messages = [*begin]
    for line in lines:
        words = line.strip()
        if words == "/exit":
            return
        if words == "/new":
            for side in sides:
                side.messages = [*begin]
        elif words.startswith("/") and " " not in words:
            print(_HELP)
        elif words:
            for side in sides:
                side.messages.append({"role": "user", "content": words})
            with contextlib.suppress(KeyboardInterrupt), _shown(sides) as show:
                for index, side in enumerate(sides):
                    answer(side, given, lambda text, index=index: show(index, text))
            for side in sides:  # stopped before it began: roles take turns
                if side.messages[-1]["role"] == "user":
                    side.messages.append({"role": "assistant", "content": ""})


@torch.no_grad()
def answer(side: Side, given: Any, show: Callable[[str], None]) -> None:
    """Generates one, and keeps what there is of it where it is stopped."""
    from transformers import set_seed

    streamer = _Streamer(side.tokenizer, show)
    ids = torch.tensor([side.prompt(given.max_new_tokens)], device=side.model.device)
    sampling = (
        {"do_sample": True, "temperature": given.temperature} if given.temperature else GREEDY
    )
    set_seed(given.seed)
    off = side.model.disable_adapter() if side.plain else contextlib.nullcontext()
    try:
        with off:
            side.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                max_new_tokens=given.max_new_tokens, pad_token_id=side.tokenizer.pad_token_id,
                use_cache=True, **sampling,
            )  # fmt: skip
    finally:
        side.messages.append({"role": "assistant", "content": streamer.text.strip()})


class _Streamer(TextStreamer):
    """Shows words as they are finished."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._show(text)


@contextlib.contextmanager
def _shown(sides: list[Side]) -> Iterator[Callable[[int, str], None]]:
    """A function of (which side, its next words) that prints them: of two in columns."""
    if len(sides) == 1:
        try:
            yield lambda _, text: print(text, end="", flush=True)
        finally:
            print("\n")
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = [""] * len(sides)

    def table() -> Table:
        columns = Table(expand=True)
        for side in sides:
            columns.add_column(Text(side.name), ratio=1, overflow="fold")
        columns.add_row(*(Text(text) for text in texts))
        return columns

    with Live(table(), console=Console(), auto_refresh=False) as live:

        def show(index: int, text: str) -> None:
            texts[index] += text
            live.update(table(), refresh=True)

        yield show


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("▸ ")
        except EOFError:
            print()
            return


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """By the chat template, or, where there is none, the texts one after the other."""
    if tokenizer.chat_template:
        try:
            return prompt_ids(tokenizer, messages)
        except Exception as error:  # Jinja's, where a model has no system prompt, say
            if not type(error).__module__.startswith("jinja2."):
                raise
            raise ValueError(f"chat: the model's chat template refuses this: {error}") from error
    return prompt_ids(tokenizer, "\n".join(message["content"] for message in messages))
