"""Plain data between processes: what a student's code returns crosses as JSON and raw numbers, never as an object.

What arrives is built anew from numbers and text by our own NumPy, torch and `utils`, so a class that equals everything,
or a patched library, stays where it was made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import struct
import sys

from grading import PACKAGES

# Dataclasses that may cross, by name and fields. One that is added here is built in the judge as a student chose it.
CLASSES = {("peft.tuners.ia3.config", "IA3Config")}
MOST_BYTES = 256 << 20  # of one message
MOST_JSON = 8 << 20  # of its part that is not raw numbers
DEEPEST = 40
LONGEST_TYPE = 8  # characters of an array's type
NUMBERS = "?bhilqBHILQefdFD"  # NumPy's type codes that may cross: booleans, integers, floats, complex
TORCH_TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class NotPlainError(TypeError):
    """A value that is not plain data; the message names its class."""


def encode(value: object, buffers: list[bytes], depth: int = 0) -> object:
    """`value` as a JSON tree whose arrays lie in `buffers`. Raises NotPlainError for what is not plain data."""
    if depth > DEEPEST:
        raise NotPlainError("it is nested too deeply, or holds itself")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if (numbers := _encode_numbers(value, buffers)) is not None:
        return numbers
    for kind, plain in ((str, str.__str__), (int, int.__int__), (float, float.__float__)):
        if isinstance(value, kind):  # of a class derived from one of these, as an Enum is, the value crosses
            return plain(value)
    for kind, tag in ((list, "list"), (tuple, "tuple"), (set, "set")):
        if isinstance(value, kind):
            return [tag, [encode(item, buffers, depth + 1) for item in value]]
    if isinstance(value, dict):
        pairs = [[encode(k, buffers, depth + 1), encode(v, buffers, depth + 1)] for k, v in value.items()]
        return ["dict", pairs]
    if value is Ellipsis:
        return ["ellipsis"]
    kind = type(value)
    if (kind.__module__, kind.__qualname__) in CLASSES and dataclasses.is_dataclass(kind):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind) if f.init}
        tree = [[name, encode(item, buffers, depth + 1)] for name, item in fields.items()]
        return ["dataclass", kind.__module__, kind.__qualname__, tree]
    raise NotPlainError(f"it is a {kind.__module__}.{kind.__qualname__}, not plain data")


def _encode_numbers(value: object, buffers: list[bytes]) -> object:
    """An array, tensor or NumPy scalar as a tree; None for anything else."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.char in NUMBERS:
        tag = "array" if isinstance(value, numpy.ndarray) else "scalar"
        buffers.append(numpy.asarray(value).tobytes())
        return [tag, value.dtype.str, list(value.shape), len(buffers) - 1]
    if torch is not None and isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name in TORCH_TYPES and value.layout == torch.strided:
            flat = value.detach().cpu().contiguous().reshape(-1)
            buffers.append(flat.view(torch.uint8).numpy().tobytes())
            return ["tensor", name, list(value.shape), len(buffers) - 1]
    return None


def decode(tree: object, buffers: list[bytes], depth: int = 0) -> object:
    """Inverse of `encode`, for trees from a process that is not trusted. Raises NotPlainError for anything odd."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    try:
        if depth > DEEPEST:
            raise ValueError
        tag, *rest = tree
        return _DECODERS[tag](rest, buffers, depth + 1)
    except NotPlainError:
        raise
    except Exception as error:
        raise NotPlainError("what arrived is not plain data") from error


def _items(rest: list, buffers: list[bytes], depth: int) -> list:
    return [decode(item, buffers, depth) for item in rest[0]]


def _decode_array(rest: list, buffers: list[bytes], _: int) -> object:
    import numpy

    if len(rest[0]) > LONGEST_TYPE or (kind := numpy.dtype(rest[0])).char not in NUMBERS:
        raise ValueError
    return numpy.frombuffer(_taken(buffers, rest[2]), kind).reshape([index(n) for n in rest[1]]).copy()


def _decode_tensor(rest: list, buffers: list[bytes], _: int) -> object:
    import torch

    kind, shape, data = _decode_dtype(rest), [index(n) for n in rest[1]], _taken(buffers, rest[2])
    if len(data) != math.prod(shape) * kind.itemsize:
        raise ValueError
    if not data:
        return torch.empty(shape, dtype=kind)
    if kind == torch.bool:
        return (torch.frombuffer(bytearray(data), dtype=torch.uint8) != 0).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)


def _decode_dtype(rest: list, *_: object) -> object:
    import torch

    if rest[0] not in TORCH_TYPES:
        raise ValueError
    return getattr(torch, rest[0])


def _decode_dataclass(rest: list, buffers: list[bytes], depth: int) -> object:
    if (rest[0], rest[1]) not in CLASSES:
        raise ValueError
    kind = _loaded(rest[0], rest[1])
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    values = {name: decode(value, buffers, depth) for name, value in rest[2]}
    if not values.keys() <= known:
        raise ValueError
    return kind(**values)


def trusted_error(module: object, name: object) -> type[Exception]:
    """An exception of the course's own packages by its name. Raises ValueError for any other class."""
    if not (isinstance(module, str) and isinstance(name, str)) or module.partition(".")[0] not in PACKAGES:
        raise ValueError(f"{module}.{name} may not cross")
    found = _loaded(module, name)
    if not issubclass(found, Exception):
        raise ValueError(f"{module}.{name} is no exception")
    return found


def _loaded(module: str, name: str) -> type:
    """A class of a module that is imported already: an import would run a file, and a student may have written it."""
    found = vars(sys.modules[module])[name] if module in sys.modules else None
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"{module}.{name} is no class of that module")
    return found


def _taken(buffers: list[bytes], number: object) -> bytes:
    """A buffer, once: else one of 100 MB, named forty times, would fill the memory."""
    data, buffers[number] = buffers[index(number)], None
    if data is None:
        raise ValueError
    return data


def index(value: object) -> int:
    """A number that counts something, as it arrived. Raises ValueError for any other value."""
    if type(value) is not int or value < 0:
        raise ValueError
    return value


_DECODERS = {
    "list": _items,
    "tuple": lambda *a: tuple(_items(*a)),
    "set": lambda *a: set(_items(*a)),
    "dict": lambda rest, *a: {decode(key, *a): decode(value, *a) for key, value in rest[0]},
    "ellipsis": lambda *_: ...,
    "array": _decode_array,
    "scalar": lambda *a: _decode_array(*a)[()],
    "tensor": _decode_tensor,
    "dataclass": _decode_dataclass,
}


def send(connection: socket.socket, message: object, buffers: list[bytes] | tuple = ()) -> None:
    """Send one message: a JSON value and raw buffers."""
    head = json.dumps(message).encode("utf-8", "replace")
    parts = [head, *buffers]
    sizes = struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts))
    connection.sendall(b"".join([sizes, *parts]))


def receive(connection: socket.socket) -> tuple[object, list[bytes]]:
    """Receive what `send` sent. Raises ConnectionError where the other end is gone, sends too much or no JSON."""
    (count,) = struct.unpack("<I", _exactly(connection, 4))
    if not 1 <= count <= 10_000:
        raise ConnectionError("the answer is damaged")
    sizes = struct.unpack(f"<{count}Q", _exactly(connection, 8 * count))
    if sum(sizes) > MOST_BYTES or sizes[0] > MOST_JSON:
        raise ConnectionError("the answer is too large")
    head, *buffers = [_exactly(connection, size) for size in sizes]
    try:
        return json.loads(head), buffers
    except (ValueError, RecursionError) as error:
        raise ConnectionError("the answer is damaged") from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise ConnectionError("the other process has ended")
        data += piece
    return bytes(data)
