"""What one row holds: text, messages, token ids, labels; and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from tralign_fast.data.columns import media_refusal

__all__ = ["BadRow", "Overlong"]

Row = dict[str, Any]
Content = Any  # str, or a list of messages, each a dict with a role

_PART_OF_TEXT = {"type", "text"}
# columns of what a model of text does not read
MEDIA = frozenset(
    ("image", "images", "pixel_values", "video", "videos", "audio", "audios", "speech")
)


class BadRow(Exception):
    """What is wrong with a row, and what was expected."""


class Overlong(BadRow):
    """Nothing is wrong with a row but that `max_length` leaves nothing to learn from it."""


def shown(value: Any) -> str:
    """A value's type and beginning, in one line."""
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"


def check_text_alone(row: Row) -> None:
    """Refuses images and the like: a model of text would be trained without them."""
    for column in sorted(MEDIA & row.keys()):
        value = row[column]
        if value is not None and not (isinstance(value, (list, str, dict)) and not value):
            raise BadRow(media_refusal(column))


def content_of(column: str, value: Any, may_be_empty: bool = False) -> Content:
    """`value` if it is text or messages.

    A text prompt may be empty (the tokenizer's BOS can stand for it), a completion may not.
    """
    if isinstance(value, str):
        if not value and not may_be_empty:
            raise BadRow(f"{column} is empty; expected text")
        return value
    if not isinstance(value, list):
        raise BadRow(f"{column} is {shown(value)}; expected text or a list of messages")
    if not value:
        raise BadRow(f"{column} is an empty list; expected at least one message")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(
                f"{column}[{i}] is {shown(message)}; expected a message with role and content"
            )
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(f"{column}[{i}]", content)
        elif not isinstance(content, str) and (content is not None or not _says_more(message)):
            raise BadRow(f"{column}[{i}] has the content {shown(content)}; expected text")
    if not may_be_empty and not any(_has_text(m.get("content")) or _says_more(m) for m in value):
        raise BadRow(f"{column} is empty: no message has any content; expected text")
    return value


def _check_parts(where: str, parts: list[Any]) -> None:
    """A content list is parts of text: a template of text would print others as Python does."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of the type {kind!r}" if isinstance(kind, str) else shown(part)
            raise BadRow(f"{where} has a part {what} in its content; expected parts of text")
        # a table gives every part the keys of all, None where it had none
        more = [key for key, v in part.items() if key not in _PART_OF_TEXT and v is not None]
        if more:
            raise BadRow(f"{where} has a part with {', '.join(more)}; expected parts of text")


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(part["text"] for part in content)
    return bool(content)


def _says_more(message: Row) -> bool:
    """Tool calls, reasoning and the like can stand in for content."""
    return any(value for key, value in message.items() if key not in ("role", "content"))


def part_lists(messages: list[Row]) -> list[list[Row]]:
    """The contents that are lists of parts."""
    return [m["content"] for m in messages if isinstance(m.get("content"), list)]


def one_kind(contents: dict[str, Content]) -> None:
    """Refuses a row whose prompt is text and whose completions are messages, or the reverse."""
    if len({isinstance(value, str) for value in contents.values()}) == 1:
        return
    kinds = [f"{c} is {'text' if isinstance(v, str) else 'messages'}" for c, v in contents.items()]
    raise BadRow(
        f"{', '.join(kinds)}; expected all to be text or all messages (remove the prompt column if "
        "the others hold the whole conversation)"
    )


def as_parts(messages: list[Row]) -> list[Row]:
    """Messages whose contents are lists of parts, as the templates of processors want them."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]


def differences(messages: list[Row], others: list[Row]) -> list[str]:
    """The fields in which two lists of messages differ, where None is as good as no field."""
    if len(messages) != len(others):
        return ["the number of messages"]
    fields = dict.fromkeys(key for message in [*messages, *others] for key in message)
    pairs = list(zip(messages, others, strict=True))
    return [f for f in fields if any(one.get(f) != other.get(f) for one, other in pairs)]


def split_prompt(chosen: Content, rejected: Content) -> tuple[Content, dict[str, Content]]:
    """What both begin with is the prompt; at least one character or message is left of each."""
    last = min(len(chosen), len(rejected)) - 1
    end = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    # tokenizers put the space before a word into the word's token, if the pair differs there at all
    if end and chosen[end] != rejected[end] and chosen[end - 1] == " ":
        end -= 1
    if end == 0 and not isinstance(chosen, str):
        raise BadRow(
            "chosen and rejected begin with different messages; expected both to hold the prompt, "
            "as there is no prompt column"
        )
    return chosen[:end], {"chosen": chosen[end:], "rejected": rejected[end:]}


def template_options(row: Row) -> Row:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRow(f"chat_template_kwargs is {shown(options)}; expected a dict")
    return options


def tools_of(row: Row) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except json.JSONDecodeError as error:
        raise BadRow(f"tools is {shown(tools)}; expected JSON, but {error}") from error


def label_of(row: Row) -> bool:
    label = row.get("label")
    if not isinstance(label, int) or label not in (0, 1):
        raise BadRow(f"label is {shown(label)}; expected True, False, 1 or 0")
    return bool(label)


def ids_of(column: str, row: Row, may_be_empty: bool = False) -> list[int]:
    """Token ids of a row that comes tokenised."""
    ids = row.get(column)
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise BadRow(f"{column} is {shown(ids)}; expected a list of token ids")
    if not ids and not may_be_empty:
        raise BadRow(f"{column} is empty; expected at least one token")
    return ids
