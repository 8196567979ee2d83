"""What an object that Python hands over is: its code, as far as no file has it, and its values.

A name alone does not tell two functions apart that one `def` made, nor an object from one with
other values, nor a notebook's function from what it became when a cell it calls was run again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from typing import Any

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_WRAPPED = (classmethod, staticmethod, property)
_CODE = (
    types.FunctionType,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MethodType,
    *_WRAPPED,
)
# What Python writes into every class.
_OF_ANY_CLASS = {"__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__"}


def digest_of(made: object, code_alone: bool = False) -> tuple[str, frozenset[str]]:
    """Return the SHA-256 of an object, and the modules that it takes from elsewhere.

    With `code_alone` values are passed over, which may be private data. What cannot be looked into
    is unlike anything else, itself at another time included.
    """
    told = _Told(code_alone)
    told.add(made)
    return told.sha256.hexdigest(), frozenset(told.modules)


class _Told:
    def __init__(self, code_alone: bool) -> None:
        self.sha256 = hashlib.sha256()
        self.modules: set[str] = set()
        self._code_alone = code_alone
        self._met: dict[int, tuple[int, object]] = {}  # with the object, whose id it keeps

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._say(type(value).__name__, repr(value))
            return
        known = self._met.get(id(value))
        if known is not None:
            self._say("met", str(known[0]))
            return
        self._met[id(value)] = len(self._met), value
        if isinstance(value, types.ModuleType):
            self.modules.add(value.__name__)
            self._say("module", value.__name__)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.FunctionType | type):
            self._add_definition(value)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodType):
            self._say("method", value.__qualname__)
            self.add(getattr(value, "__func__", None))
            self.add(value.__self__)
        elif isinstance(value, _WRAPPED):
            self._say("wrapped", type(value).__name__)
            parts = ("__func__", "fget", "fset", "fdel")
            self._add_all(getattr(value, part, None) for part in parts)
        else:
            self._add_value(value)

    def _say(self, *words: str) -> None:
        for word in words:
            part = word.encode("utf-8", "surrogatepass")
            self.sha256.update(len(part).to_bytes(8, "big") + part)

    def _add_all(self, values: Any) -> None:
        values = list(values)
        self._say(str(len(values)))
        for value in values:
            self.add(value)

    def _add_definition(self, value: Any) -> None:
        """Add a function or class: by its name where a file has it, or else by its code."""
        module = value.__module__ or ""
        self._say(type(value).__name__, value.__qualname__)
        if _is_in_a_file(value, module):
            self.modules.add(module)
            self._say(module)
        elif isinstance(value, type):
            self._add_all(value.__bases__)
            own = sorted((k, v) for k, v in vars(value).items() if k not in _OF_ANY_CLASS)
            self._say(*(name for name, _ in own))
            for _, each in own:
                self._add_reached(each)
        else:
            self.add(value.__code__)
            for each in (value.__defaults__, value.__kwdefaults__):
                self._add_reached(each)
            for cell in value.__closure__ or ():
                self._add_reached(_content(cell))
            there = value.__globals__
            for name in sorted(name for name in _names(value.__code__) if name in there):
                self._say(name)
                self._add_reached(there[name])
            if module in sys.modules and getattr(sys.modules[module], "__file__", None):
                self.modules.add(module)

    def _add_reached(self, value: Any) -> None:
        """Add what code has at hand, which may be private data where it is no code itself."""
        if self._code_alone and not isinstance(value, _CODE):
            self._say("value")
        else:
            self.add(value)

    def _add_code(self, code: types.CodeType) -> None:
        self._say(code.co_name, code.co_code.hex(), *code.co_names, *code.co_varnames)
        self._say(*code.co_freevars, *code.co_cellvars, str(len(code.co_consts)))
        for each in code.co_consts:  # literals
            if isinstance(each, types.CodeType):
                self.add(each)
            else:
                self._say(repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each))

    def _add_value(self, value: Any) -> None:
        if self._code_alone:
            self.add(type(value))
        elif isinstance(value, list | tuple):
            self._say(type(value).__qualname__)
            self._add_all(value)
        elif isinstance(value, dict):
            self._say(type(value).__qualname__)
            self._add_all(value)
            self._add_all(value.values())
        elif isinstance(value, set | frozenset):
            self._say("set", *sorted(digest_of(each)[0] for each in value))
        elif _is_tensor(value):
            whole = value.detach().cpu().contiguous()
            self._say("tensor", str(whole.dtype), str(tuple(whole.shape)), str(value.requires_grad))
            self.sha256.update(whole.reshape(-1).view(sys.modules["torch"].uint8).numpy().tobytes())
        else:
            self._add_state(value)

    def _add_state(self, value: Any) -> None:
        """Add any other object as Python would store it."""
        try:
            reduced = value.__reduce_ex__(4)
            if isinstance(reduced, str):
                self._say("global", reduced)
                self.add(type(value))
                return
            made, arguments, *more = reduced
            self.add(made)
            self.add(arguments)
            self._add_all(more[:1])
            self._add_all(list(more[1]) if len(more) > 1 and more[1] is not None else ())
            pairs = list(more[2]) if len(more) > 2 and more[2] is not None else ()
            self._add_all(each for pair in pairs for each in pair)
        except Exception:  # whatever its own code raises
            self.sha256.update(os.urandom(32))


def _is_in_a_file(value: Any, module: str) -> bool:
    """Say whether a module's name and the object's own stand for it: another would be elsewhere."""
    found: Any = sys.modules.get(module)
    if found is None or (getattr(found, "__file__", None) is None and module == "__main__"):
        return False
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function's code, and that of functions in it, looks up."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
