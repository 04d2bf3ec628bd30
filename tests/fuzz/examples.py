"""A valid value of any message type, with every field filled, from the type alone."""

import re
from typing import Any

import msgspec
from msgspec import inspect


def example(kind: Any) -> Any:
    """In plain values, ready to be encoded."""
    return _example(inspect.type_info(kind), 0)


def encoded(kind: Any) -> list[bytes]:
    """MessagePack of valid messages: one for each alternative of a union."""
    info = inspect.type_info(kind)
    kinds = info.types if isinstance(info, inspect.UnionType) else (info,)
    messages = [msgspec.msgpack.encode(_example(one, 0)) for one in kinds]
    for message in messages:
        msgspec.msgpack.decode(message, type=kind)
    return messages


def _example(info: inspect.Type, depth: int) -> Any:
    match info:
        case inspect.Metadata(type=inner):
            return _example(inner, depth)
        case inspect.StructType():
            return _struct(info, depth)
        case inspect.UnionType(types=kinds):
            # The most telling alternative, but no endless recursion.
            telling = [kind for kind in kinds if not isinstance(kind, inspect.NoneType)]
            return _example(telling[0], depth) if depth < 6 else None
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            count = max(info.min_length or 0, min(2, info.max_length or 2)) if depth < 6 else 0
            return [_example(item, depth + 1) for _ in range(count)]
        case inspect.TupleType(item_types=items):
            return [_example(item, depth + 1) for item in items]
        case inspect.DictType(key_type=key, value_type=value):
            return {_example(key, depth): _example(value, depth + 1)}
        case inspect.FrozenSetType(item_type=item) | inspect.SetType(item_type=item):
            return [_example(item, depth + 1)]
        case inspect.LiteralType(values=values):
            return values[0]
        case inspect.StrType():
            examples = ("a" * max(info.min_length or 0, 1), "a.json", "model.safetensors")
            return next(text for text in examples if re.search(info.pattern or "", text))
        case inspect.BytesType():
            return b"\x01" * max(info.min_length or 0, 1)
        case inspect.BoolType():
            return True
        case inspect.NoneType():
            return None
        case inspect.IntType():
            return max(info.ge or 0, 1) if info.gt is None else int(info.gt) + 1
        case inspect.FloatType():
            least = max(info.ge or 0, 0.5) if info.gt is None else info.gt + 0.5
            return float(least if info.le is None else min(least, info.le))
        case inspect.AnyType():
            return {"any": [1]}
        case _:
            raise TypeError(f"no example for {info}")


def _struct(info: inspect.StructType, depth: int) -> Any:
    fields = [(f.encode_name, _example(f.type, depth + 1)) for f in info.fields]
    if info.array_like:
        tag = [] if info.tag is None else [info.tag]
        return [*tag, *(value for _, value in fields)]
    tagged = {} if info.tag is None else {info.tag_field: info.tag}
    return {**tagged, **dict(fields)}
