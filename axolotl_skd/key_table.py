"""The README's table of configuration keys, from the schema itself."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from axolotl_skd.config import Distillation


def key_table() -> str:
    """Markdown: key, type, default, meaning, one row per key of `distillation:`."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{key}` | {_type(field)} | {_default(field)} | {field.description} |"
        for key, field in _leaves(Distillation)
    ]
    return "\n".join(rows)


def _leaves(block: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in block.model_fields.items():
        nested = _block(field.annotation)
        if nested is not None:
            yield from _leaves(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _block(annotation: Any) -> type[BaseModel] | None:
    """The block that an annotation stands for, None if it allows for anything else but its absence."""
    members = [a for a in (get_args(annotation) or (annotation,)) if a is not type(None)]
    return members[0] if len(members) == 1 and _is_block(members[0]) else None


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(field)


def _bounds(field: FieldInfo) -> str:
    text = ""
    for bound in field.metadata:
        if isinstance(bound, Ge):
            text += f" >= {bound.ge}"
        elif isinstance(bound, Gt):
            text += f" > {bound.gt}"
        elif isinstance(bound, Le):
            text += f", <= {bound.le}"
    return text


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:  # a bounded member of a union
        fields = [extra for extra in arguments[1:] if isinstance(extra, FieldInfo)]
        return _type_name(arguments[0]) + "".join(map(_bounds, fields))
    if _is_block(annotation):
        return "`{" + ", ".join(annotation.model_fields) + "}`"
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " / ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return {"str": "text", "bool": "true / false", "int": "integer", "float": "number"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if default is None:
        return "-"
    if isinstance(default, tuple):
        return f"`[{', '.join(default)}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
