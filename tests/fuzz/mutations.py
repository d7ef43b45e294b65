"""Damage: of bytes, and of values as JSON has them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63),
    *(10**30, -(10**400), "", " ", "\n", "x", "\ud83d", "\x00", "한국어", "\U0001f600", "x" * 3000),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, [{}], "null", "{", "{{ 1/0 }}"),
    *("{% for", "{{ x.y.z }}", "<|end_of_text|>", "../../x", "/dev/zero", "C:\\", "bfloat16"),
)


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, flipped bits, bytes put in, left out, doubled or swapped."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, min(64, len(data) - place)))
        match draw(
            st.sampled_from(["flip", "insert", "delete", "double", "cut", "strange", "fill"])
        ):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "delete":
                del data[place : place + length]
            case "double":
                data[place:place] = data[place : place + length]
            case "cut":
                del data[place:]
            case "strange":
                strange = draw(st.sampled_from(STRANGE))
                data[place:place] = json.dumps(strange).encode()
            case "fill":
                filler = draw(st.sampled_from([b"\x00", b"\xff", b"[", b"\n", b'"', b"9"]))
                data[place : place + length] = filler * length
    return bytes(data)


@st.composite
def damaged_values(draw: st.DrawFn, value: Any) -> Any:
    """A nested value with one to three parts replaced, left out, doubled, renamed or put in."""
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_damaged_once(value))
    return value


@st.composite
def _damaged_once(draw: st.DrawFn, value: Any) -> Any:  # noqa: PLR0911  (one a kind of damage)
    """Goes down to some part of the value; larger steps are likelier where there is more below."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: item for name, item in value.items() if name != key}
        match draw(st.sampled_from(["in", "in", "in", "leave out", "rename", "add"])):
            case "in":
                return {**value, key: draw(_damaged_once(value[key]))}
            case "leave out":
                return rest
            case "rename":
                return {**rest, draw(st.text(max_size=8)): value[key]}
            case _:
                return {**value, draw(st.text(max_size=8)): draw(strange_values())}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(["in", "in", "in", "leave out", "double", "swap"])):
            case "in":
                return [*value[:place], draw(_damaged_once(value[place])), *value[place + 1 :]]
            case "leave out":
                return [*value[:place], *value[place + 1 :]]
            case "double":
                return [*value[: place + 1], *value[place:]]
            case _:
                return [*value[place:], *value[:place]]
    return draw(strange_values())


def strange_values() -> st.SearchStrategy[Any]:
    """What a value may be when it is not what it should be."""
    return (
        st.sampled_from(STRANGE)
        | st.text(max_size=12)
        | st.integers()
        | st.floats()
        | st.just(deep(500))
    )


def as_json(value: Any) -> bytes:
    """JSON as careless writers make it: NaN, halves of surrogate pairs and long numbers too."""
    return json.dumps(value).encode()


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """JSON of damaged values, or the JSON's bytes damaged."""
    return damaged_values(value).map(as_json) | damaged_bytes(as_json(value))
