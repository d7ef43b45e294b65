"""Random configurations, drawn from the schema itself: valid, nearly valid, and far from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    load_settings,
    read_settings,
    write_settings,
)
from megatron_kanana.config.compose import GROUPS, available_choices, saved_settings

SECONDS = 60.0
FILE_NAME = "fuzz"


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A setting that holds a value.

    Attributes:
        name: dotted.
        hint: its declared type.
        metadata: its limits and choices.
    """

    name: str
    hint: Any
    metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a user might give.

    Attributes:
        words: of the command line.
        files: text of YAML files of the user's own folder, by group.
        world_size: processes.
        with_files: whether files are checked.
    """

    words: list[str]
    files: dict[str, str]
    world_size: int
    with_files: bool


def leaves(cls: type = Settings, prefix: str = "") -> list[Leaf]:
    """Every setting of the schema."""
    found: list[Leaf] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            found += leaves(typing.cast(type, hint), f"{name}.")
        else:
            found.append(Leaf(name, hint, field.metadata))
    return found


LEAVES = leaves()
JUNK = (
    *("null", "true", "nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1e-320", "0x10", "1_000"),
    *("''", '""', "[]", "{}", "[1,[2,{a:b}]]", "{a:1,b:{c:null}}", "[null]", "'\\n'", "'a\tb'"),
    *("???", "${", "${}", "${.}", "${..}", "${model}", "${seed}", "${oc.env:HOME}", "${oc.env:NO}"),
    *("${oc.env:NO,3}", "${oc.decode:'[1]'}", "${now:%Y}", "'${model.${run_name}}'", "\\${x}"),
    *("/dev/null", "/dev/zero", "fifo", "/proc/self/mem", "/", ".", "..", "~", "folder", "loop"),
    *(
        "dataset",
        "tokenizer",
        "converted",
        "tokenizer.model",
        "chat.jsonl",
        "text.txt",
        "x" * 5000,
        "a/" * 2500,
        "한국어",
        "\U0001f600",
        "é",
    ),
    *(
        "choice(1,2)",
        "range(1,3)",
        "glob(*)",
        "sort(3,1)",
        "int(3)",
        "str(3)",
        "json_str(3)",
        "a,b",
    ),
    *(str(10**30), str(-(10**30)), "9" * 5000, "1" + "0" * 308 + ".0", "yes", "on", "1:30:00"),
    *("!!python/object/apply:os.system [true]", "&a [*a]", "a: b: c", "[", "{", "'", '"', "\\"),
)


@functools.cache  # making one takes longer than to draw from it
def values(leaf: Leaf) -> st.SearchStrategy[Any]:
    """Values of the right type, mostly within the limits."""
    return _of_type(leaf.hint, leaf.metadata)


def _of_type(  # noqa: PLR0911  (one a kind of type)
    hint: Any, metadata: Mapping[str, Any]
) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(each for each in typing.get_args(hint) if each is not type(None))
        return st.none() | _of_type(inner, metadata)
    if dataclasses.is_dataclass(hint):
        of_class = {each.name: values(each) for each in leaves(typing.cast(type, hint))}
        return st.fixed_dictionaries({}, optional=of_class)
    if (container := typing.get_origin(hint)) in (list, dict):
        inner = _of_type(typing.get_args(hint)[-1], metadata)
        if container is list:
            return st.lists(inner, max_size=3)
        return st.dictionaries(texts(), inner, max_size=3)
    if "choices" in metadata:
        return st.sampled_from(metadata["choices"])
    if hint is bool:
        return st.booleans()
    if hint is str:
        return texts()
    return _numbers(hint, metadata)


def _numbers(hint: Any, metadata: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    least = metadata.get("minimum", metadata.get("above", 0))
    near = st.integers(int(least), int(min(metadata.get("maximum", 2**20), 2**20)) + 1)
    powers = st.integers(0, 62).map(lambda exponent: 2**exponent)
    integers = near | powers | st.integers()
    if hint is int:
        return integers
    return integers | st.floats() | st.floats(0, 1)


@functools.cache
def texts() -> st.SearchStrategy[str]:
    """Names of the folder, and any text."""
    return st.sampled_from(JUNK) | st.text(max_size=12) | st.from_regex(r"\A[a-z_]{1,9}\Z")


def _written(value: Any) -> str:
    """A value as a user writes it behind the equals sign."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        inner = ",".join(f"{_quoted(key)}:{_written(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _assignments() -> st.SearchStrategy[str]:
    leaf = st.sampled_from(LEAVES)
    good = leaf.flatmap(_assigned)
    junk = st.builds(lambda each, text: f"{each.name}={text}", leaf, st.sampled_from(JUNK))
    quoted = st.builds(lambda each, text: f"{each.name}={_quoted(text)}", leaf, texts())
    return good | good | junk | quoted


@functools.cache
def _assigned(leaf: Leaf) -> st.SearchStrategy[str]:
    return values(leaf).map(lambda value: f"{leaf.name}={_written(value)}")


def _names() -> st.SearchStrategy[str]:
    """Names that are no setting's: groups, parts, misspellings, and any text."""
    cut = st.sampled_from(LEAVES).flatmap(
        lambda each: st.integers(0, len(each.name)).map(lambda place: each.name[:place])
    )
    longer = st.sampled_from(LEAVES).map(lambda each: f"{each.name}.more")
    listed = st.sampled_from(LEAVES).map(lambda each: f"{each.name}[0]")
    return cut | longer | listed | st.sampled_from(GROUPS) | st.text(max_size=8)


def _words() -> st.SearchStrategy[str]:
    choices = [f"{group}={name}" for group in GROUPS for name in available_choices(group)]
    own = [f"{group}={FILE_NAME}" for group in GROUPS]
    prefixes = st.sampled_from(["", "", "", "", "+", "++", "~", "~~", "@"])
    other = st.builds(
        lambda name, sign, value: f"{name}{sign}{value}",
        _names(),
        st.sampled_from(["=", "==", "", ":", "=="]),
        st.sampled_from(JUNK) | st.text(max_size=8),
    )
    word = st.one_of(_assignments(), _assignments(), st.sampled_from(choices + own), other)
    return st.builds(lambda prefix, each: prefix + each, prefixes, word)


def _trees() -> st.SearchStrategy[Any]:
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | texts()
    return st.recursive(
        scalar,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalar, inner, max_size=3),
        max_leaves=8,
    )


def _files() -> st.SearchStrategy[str]:
    """YAML of a config group: of its settings, of anything, or no YAML at all."""
    of_group = st.sampled_from(LEAVES).flatmap(
        lambda leaf: values(leaf).map(
            lambda value: yaml.safe_dump({leaf.name.rsplit(".", 1)[-1]: value}, allow_unicode=True)
        )
    )
    defaults = st.sampled_from(
        [
            "defaults:\n  - _self_\n",
            "defaults:\n  - kanana_2_tiny\n  - _self_\n",
            f"defaults:\n  - {FILE_NAME}\n",
            "defaults: 3\n",
            "defaults:\n  - override /model: no\n",
            "defaults:\n  - override hydra/launcher: joblib\n",
            "defaults:\n  - /model: ${model}\n",
            "hydra:\n  searchpath: [pkg://antigravity]\n",
            "# @package _global_\nmodel: {num_layers: 3}\n",
            "# @package ${model}\na: 1\n",
            "# @package _global_\n_target_: os.system\n",
            "a: &a {b: *a}\n",
            "a: &a [1]\nb: *a\n",
            "? [1, 2]\n: 3\n",
            "<<: 3\n",
            "name: x\nname: y\n",
            "- a\n- b\n",
            "\x00",
            "",
            "---\na: 1\n---\nb: 2\n",
        ]
    )
    trees = _trees().map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))
    lines = st.builds(
        lambda leaf, text: f"{leaf.name.rsplit('.', 1)[-1]}: {text}\n",
        st.sampled_from(LEAVES),
        st.sampled_from(JUNK),
    )
    mixed = st.lists(of_group | of_group | lines | defaults, max_size=4).map("".join)
    return mixed | mixed | trees | st.text(max_size=40)


def configurations() -> st.SearchStrategy[Configuration]:
    """Any number of words, sometimes with files of one's own."""
    files = st.dictionaries(st.sampled_from(GROUPS), _files(), max_size=2)
    return st.builds(
        _with_choices,
        st.lists(_words(), max_size=6),
        st.one_of(st.just({}), st.just({}), files),
        st.sampled_from([1, 1, 1, 2, 3, 4, 8, 512]),
        st.booleans(),
    )


def _with_choices(
    words: list[str], files: dict[str, str], world_size: int, with_files: bool
) -> Configuration:
    chosen = [f"{group}={FILE_NAME}" for group in files]
    return Configuration([*chosen, *words], files, world_size, with_files)


def check_configuration(example: Configuration, folder: Path) -> str:
    """Compose and check it as the main job does.

    Args:
        example: what is given.
        folder: an existing folder for YAML files and saved settings.

    Returns:
        "accepted" or "refused".

    Raises:
        AssertionError: a message says too little, or accepted settings do not come back.
        Exception: anything else is a defect.
    """
    config_dir = folder / "conf"
    for group in GROUPS:
        path = config_dir / group / f"{FILE_NAME}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if group in example.files:
            path.write_bytes(example.files[group].encode("utf-8", errors="surrogatepass"))
    environment = Environment(world_size=example.world_size, local_world_size=example.world_size)

    def run(words: list[str]) -> Settings:
        return load_settings(words, environment, str(config_dir), with_files=example.with_files)

    settings = _told(run, example.words)
    if settings is None:
        return "refused"
    write_settings(folder, settings)
    saved = read_settings(folder)
    if example.with_files:
        assert saved_settings(saved, [], environment) == settings, "saved settings differ"
    return "accepted"


def _told(run: Callable[[list[str]], Settings], words: list[str]) -> Settings | None:
    """The settings, or None where every problem is told in full."""
    try:
        return run(words)
    except ConfigurationError as error:
        assert error.problems, "refused without a problem"
        for problem in error.problems:
            for part in (problem.setting, problem.reason, problem.remedy):
                assert isinstance(part, str) and part.strip(), f"a part is missing: {problem!r}"
        str(error).encode("utf-8", errors="backslashreplace")
        return None
