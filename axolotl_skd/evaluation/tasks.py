"""The names of the bundled lm-eval tasks and groups, read from their YAML files, without lm_eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

import yaml

from axolotl_skd.resources import resource_path


class _TaskLoader(yaml.SafeLoader):
    """A safe loader that reads lm-eval's `!function module.name` as plain text."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_scalar(node))


def available_tasks() -> list[str]:
    """The sorted names of the tasks and groups under `evals/`.

    Raises:
        FileNotFoundError: if the bundled folder is missing.
    """
    return sorted(_members())


def leaf_tasks(names: Iterable[str]) -> list[str]:
    """The tasks that `names` stand for, their groups taken apart, each once, in order.

    Raises:
        ValueError: for a name that is not bundled.
    """
    names = list(names)
    check_tasks(names)
    members = _members()

    def leaves(name: str) -> Iterator[str]:
        if members[name] is None:
            yield name
        for member in members[name] or ():
            yield from leaves(member)

    return list(dict.fromkeys(leaf for name in names for leaf in leaves(name)))


def _members() -> dict[str, list[str] | None]:
    """Name -> the members of a group, None for a task."""
    configs = (
        yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
        for path in resource_path("evals").rglob("*.yaml")
    )
    return {
        # A group's `task:` is the list of its members.
        config.get("group") or config["task"]: config["task"] if "group" in config else None
        for config in configs
        if isinstance(config, dict)
    }


def check_tasks(names: Iterable[str]) -> None:
    """Refuse task names that are not bundled.

    Raises:
        ValueError: naming each unknown task with the nearest known ones.
    """
    known = available_tasks()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"unknown evaluation task{'s' if len(unknown) > 1 else ''}: "
            + "; ".join(_with_suggestion(name, known) for name in unknown)
            + f". Available: {', '.join(known) or 'none'}."
        )


def _with_suggestion(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known)
    return f"{name!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else "")
