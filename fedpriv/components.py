"""What a config names: models, data sets, clipping rules and all else that can be exchanged.

A component is a function or a class. A config names it by

- its registered name, such as `vit`;
- `package.module:object`, for your own: the module is installed, on PYTHONPATH, or a file beside
  the config, and the object a function or a class in it;
- an entry point of its kind's group, such as `fedpriv.models`;

and Python may hand over the object itself. Its options are checked before it is called: by the
class of options that it takes as its argument `options`, or else by its own signature, of which
every keyword is an option. What it asks for by the name of a fact, such as `input_shape`, it gets.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from fedpriv.errors import InputError
from fedpriv.failures import failure_of, told_as
from fedpriv.imports import command_for
from fedpriv.origins import Origin, module_beside, origin_of, origin_of_object
from fedpriv.sections import NO_BEARING, Section
from fedpriv.signatures import PLAIN, can_be_checked, is_plain, kept, parameters_of_call, types_of

_MADE_BY = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)

#: Stands for the module where an object that is made already was handed over.
GIVEN = "given"


class Options(Section):
    """What a config says of one component: its name, and options that are the component's own."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    #: Raised when equal options come to mean another component.
    version: ClassVar[int] = 1
    #: Whether they were only read, and nobody looked for their component.
    unread: ClassVar[bool] = False
    _component: Component | None = PrivateAttr(default=None)


@dataclass(frozen=True)
class LookUp:
    """Where components are looked for, and which of those from outside may be imported.

    Attributes:
        code: the folder of modules that are not installed; None for none.
        allowed: names from outside that may be imported; None for all. What this process was
            handed, or found before by a look-up of its own, is there whatever is allowed.
        reading: whether a finished run's config is only read: nothing from outside is looked for,
            and keys that components of an earlier version had are passed over.
    """

    code: Path | None = None
    allowed: Collection[str] | None = None
    reading: bool = False


@dataclass(frozen=True)
class Held:
    """The component of an object that is made already."""

    made: Any
    copies: bool

    def __call__(self) -> Any:
        """Return it, or a copy."""
        return copy.deepcopy(self.made) if self.copies else self.made


@dataclass(frozen=True)
class Component:
    """A component with its options.

    Attributes:
        kind: what kind of component it is.
        name: how configs name it.
        make: the function or class.
        options: the class that checks its options.
        origin: where it came from; None for fedpriv's own.
    """

    kind: Kind
    name: str
    make: Callable[..., Any]
    options: type[Options]
    origin: Origin | None

    @property
    def version(self) -> str:
        """What changes when equal options come to mean something else."""
        return f"fedpriv {self.options.version}" if self.origin is None else self.origin.version

    def told(self) -> str:
        """Return the name, and where it came from, in words."""
        return f"{self.name} ({self.origin.told()})" if self.origin else self.name

    def build(self, options: Options, **facts: Any) -> Any:
        """Call the component with its options, and with those of the `facts` that it asks for.

        Raises:
            InputError: it cannot be built so.
        """
        return self._called(self._arguments(options, facts))

    def bound(self, options: Options) -> Callable[..., Any]:
        """Return the component as a function of what it works on, its options given.

        A class is called with its options and makes that function; an object that is made already
        is it.
        """
        arguments = self._arguments(options, {})
        if inspect.isclass(self.make) or isinstance(self.make, Held):
            return cast(Callable[..., Any], self._called(arguments))
        return lambda *work: self.make(*work, **arguments)

    def _arguments(self, options: Options, facts: Mapping[str, Any]) -> dict[str, Any]:
        wanted = parameters_of_call(self.make)
        known = {**facts, **{name: getattr(options, name) for name in type(options).model_fields}}
        given = {name: known[name] for name in wanted if name in known}
        if "options" in wanted and "options" not in known:
            given["options"] = options
        return {**given, **(options.model_extra or {})}

    def _called(self, arguments: Mapping[str, Any]) -> Any:
        if self.origin is None:
            return self.make(**arguments)
        with told_as(f"{self.kind.key}.{self.kind.name_key}: {self.name} fails"):
            return self.make(**arguments)


#: All kinds, by the key at which a config has them.
KINDS: dict[str, Kind] = {}


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of component: where a config has it, and which are known by name.

    Attributes:
        key: where a config has it.
        noun: what to call one.
        registered: `module:object` of those known by name.
        base: `module:Class` of the options that all of the kind have.
        facts: what a component may ask for by name, besides its options.
        works_on: how many arguments the finished component works on; its options come after.
        group: entry points in this group are known by name too; "" for none.
        name_key: the key that holds its name.
        default: the component of a section that has no name.
        copies: whether each that is built of an object made already is a copy of it.
        only_own: why none may come from outside; "" where they may.
        private: whether the values of one handed over are private: what tells data sets apart is
            their own digest, which is kept where nobody may publish it.
        refused: names that are known and cannot be chosen, each with the reason.
    """

    key: str
    noun: str
    registered: dict[str, str | Callable[..., Any]]
    base: str
    facts: tuple[str, ...] = ()
    works_on: int = 0
    group: str = ""
    name_key: str = "name"
    default: str | None = None
    copies: bool = True
    only_own: str = ""
    private: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    _found: dict[str, Component] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        KINDS[self.key] = self

    def find(self, name: str, look_up: LookUp = LookUp()) -> Component:
        """Return the component called `name`.

        Raises:
            InputError: there is none, it may not be imported here, or its signature does not fit.
        """
        if name in self.registered:
            return self._own(name)
        if (found := self._found.get(name)) is not None and not _is_stale(found, look_up):
            return found
        entry = None if ":" in name else self._entry_point(name)
        if ":" not in name and entry is None:
            raise InputError(self._unknown(name))
        if self.only_own:
            raise InputError(f"a {self.noun} from outside has no proof: {self.only_own}")
        if look_up.allowed is not None and name not in look_up.allowed:
            raise InputError(
                f"this node does not import {name}, which is not in its own list of components; "
                "its operator can add it to the node's config: components='...'"
            )
        make = entry.load() if entry else _imported(name, look_up.code)
        return self.take(name, make, origin_of(make, name, look_up.code, self.private))

    def take(self, name: str, make: Callable[..., Any], origin: Origin) -> Component:
        """Make an object from outside known as `name` in this process, and return it.

        Raises:
            InputError: its signature does not fit.
        """
        component = Component(self, name, make, self._options_of(name, make), origin)
        self._found[name] = component
        return component

    def give(self, made: Any) -> str:
        """Make an object that Python hands over known here, and return its name.

        Raises:
            InputError: it is none, or its signature does not fit.
        """
        if isinstance(made, _MADE_BY):
            name = f"{made.__module__}:{made.__qualname__}"
            origin = origin_of(made, name, None, self.private)
            if getattr(made, "__closure__", None) is not None:
                name = self._unlike_others(name, made, None)
            return self.take(name, made, origin).name
        if isinstance(made, (*PLAIN, list, dict, tuple)):
            raise InputError(f"write the name of a {self.noun}, got {made!r}")
        origin = origin_of_object(made, self.private)
        # Of private data only the code has a digest: two data sets may share it.
        alike = None if self.private else origin
        name = self._unlike_others(f"{GIVEN}:{type(made).__name__}", made, alike)
        return self.take(name, Held(made, self.copies), origin).name

    def _unlike_others(self, name: str, made: Any, origin: Origin | None) -> str:
        """Return a name that no other object has here: two models may well be of one class.

        Objects of one digest are one object; None says that it has none.
        """
        each = name
        for number in itertools.count(2):
            known = self._found.get(each)
            if known is None or known.make is made or getattr(known.make, "made", None) is made:
                return each
            if origin is not None and origin.source and known.origin == origin:
                return each
            each = f"{name}-{number}"
        return each

    def of(self, options: Options) -> Component:
        """Return the component that the checked `options` are for."""
        if options.unread:
            raise InputError(f"{self.key}: {getattr(options, self.name_key)} was not looked for")
        return options._component or self.find(getattr(options, self.name_key))

    def parse(self, value: Any, look_up: LookUp = LookUp()) -> Options:
        """Return the checked options of what a config says.

        Raises:
            ValidationError: there is no such component, or it has no such options.
        """
        base = cast(type[Options], _object(self.base))
        if isinstance(value, base):
            value._component = self.of(value)
            return value
        if isinstance(value, Section):
            raise ValueError(f"these are not the options of a {self.noun}")
        document = self._document(value)
        name = document.get(self.name_key)
        if look_up.reading and isinstance(name, str):
            return self._read(name, document, look_up)
        if name is None:
            raise _at(self.name_key, f"write the name of a {self.noun}", value)
        try:
            if not isinstance(name, str):
                name = self.give(name)
            component = self.find(name, look_up)
        except InputError as error:
            raise _at(self.name_key, str(error), name) from None
        document[self.name_key] = name
        options = component.options.model_validate(document, context=look_up)
        options._component = component
        return options

    def _read(self, name: str, document: Mapping[str, Any], look_up: LookUp) -> Options:
        if name in self.registered:
            own = self._own(name)
            read = own.options.model_validate(_known(document, own.options), context=look_up)
            read._component = own
            return read
        base = cast(type[Options], _object(self.base))
        unread = create_model(f"{base.__name__} of {name}", __base__=base, __module__=__name__)
        unread.unread = True
        return _open(unread).model_validate(document)

    def _document(self, value: Any) -> dict[str, Any]:
        """Return what a config says, which may be a name alone, as a section with a name."""
        section = dict(value) if isinstance(value, Mapping) else {self.name_key: value}
        return {self.name_key: self.default, **section}

    def names(self) -> list[str]:
        """Return the names that are known without a module, sorted."""
        there = entry_points(group=self.group) if self.group else ()
        return sorted({*self.registered, *(entry.name for entry in there)})

    def _own(self, name: str) -> Component:
        where = self.registered[name]
        make = _object(where) if isinstance(where, str) else where
        if (found := self._found.get(name)) is None or found.make is not make:
            found = Component(self, name, make, self._options_of(name, make), None)
            self._found[name] = found
        return found

    def _entry_point(self, name: str) -> EntryPoint | None:
        return next(iter(entry_points(group=self.group, name=name)), None) if self.group else None

    def _unknown(self, name: str) -> str:
        if name in self.refused:
            return f"{name} is refused: {self.refused[name]}"
        known = self.names()
        if not known:
            return f"unknown {self.noun} {name!r}; write package.module:object"
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        own = "" if self.only_own or close else "; write package.module:object for your own"
        return f"unknown {self.noun} {name!r}, known are {', '.join(known)}{hint}{own}"

    def _options_of(self, name: str, make: Callable[..., Any]) -> type[Options]:
        """Return the class of options that `make` takes, or one that is made of its signature."""
        base = cast(type[Options], _object(self.base))
        parameters = parameters_of_call(make)
        hints = types_of(make)
        if "options" in parameters and inspect.isclass(wanted := hints.get("options")):
            if not issubclass(wanted, base):
                raise InputError(f"{name}: its options must be a {base.__name__}")
            return wanted
        work = list(parameters)[: self.works_on] if not inspect.isclass(make) else []
        fields: dict[str, Any] = {}
        for parameter in parameters.values():
            known = parameter.name in work or parameter.name in self.facts
            if known or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            if parameter.name in base.model_fields:
                if parameter.name == self.name_key:
                    raise InputError(
                        f"{name} has an argument {parameter.name}, but in a config that key is "
                        "the component's name; wrap it in a function without this argument"
                    )
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise InputError(
                    f"{name}: {parameter.name} cannot be passed by keyword; wrap it in a function"
                )
            hint = kept(hints.get(parameter.name, Any))
            if parameter.default is parameter.empty:
                if not can_be_checked(hint):
                    kind = getattr(hint, "__name__", hint)
                    raise InputError(
                        f"{name} needs {parameter.name}, a {kind}, which "
                        "a config cannot hold; write a function of plain options that makes it and "
                        f"returns the {self.noun}, and name that (docs/extending.md)"
                    )
                fields[parameter.name] = (hint, ...)
            elif is_plain(parameter.default):
                fields[parameter.name] = (hint if can_be_checked(hint) else Any, parameter.default)
        others = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        made = create_model(
            f"{base.__name__} of {name}", __base__=base, __module__=__name__, **fields
        )
        return _open(made) if others else made


@dataclass(frozen=True)
class Slot:
    """Marks the field of a config in which a component of `kind` is: `Annotated[X, Slot(KIND)]`.

    Attributes:
        kind: its kind.
        optional: whether null stands for none.
        later: whether the slot came after configs that have none: what it holds by default is then
            no component of theirs, and a run's fingerprint stays.
    """

    kind: Kind
    optional: bool = False
    later: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._parsed,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )

    def _parsed(self, value: Any, info: core_schema.ValidationInfo) -> Options | None:
        if value is None and self.optional:
            return None
        return self.kind.parse(value, info.context or LookUp())

    def known(self) -> list[type[Options]]:
        """Return the classes of options of all that are registered."""
        return [self.kind.find(name).options for name in sorted(self.kind.registered)]

    def with_key(self, key: str) -> list[str]:
        """Return the registered components that have an option of this name."""
        names = sorted(self.kind.registered)
        return [name for name in names if key in self.kind.find(name).options.model_fields]

    def options_of(self, value: Any) -> type[Options]:
        """Return the class of the options of what a config says, whose component is there."""
        name = self.kind._document(value)[self.kind.name_key]
        name = name if isinstance(name, str) else self.kind.give(name)
        return (self.kind._found.get(name) or self.kind.find(name)).options

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        known = [handler(each.__pydantic_core_schema__) for each in self.known()]
        known += [{"type": "null"}] if self.optional else []
        if self.kind.only_own:
            return {"anyOf": known}
        key = self.kind.name_key
        outside = {
            "type": "object",
            "description": f"A {self.kind.noun} of your own, with its options.",
            "properties": {
                key: {"type": "string", "pattern": ":", "description": "package.module:object"}
            },
            "required": [key],
        }
        return {"anyOf": [*known, outside]}


@dataclass(frozen=True)
class Named:
    """Marks a field that holds the name of a component whose options lie elsewhere.

    Only names from outside, `package.module:object`, are looked up when a config is read.
    """

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._found, handler(source))

    def _found(self, name: str, info: core_schema.ValidationInfo) -> str:
        look_up = info.context or LookUp()
        if ":" in name and not look_up.reading:
            try:
                self.kind.find(name, look_up)
            except InputError as error:
                raise PydanticCustomError("component", "{reason}", {"reason": str(error)}) from None
        return name


def slots(
    section: BaseModel, prefix: str = "", bearing: bool = False
) -> list[tuple[str, Component]]:
    """Return the components of a config, each with the key that it is at.

    `bearing` leaves out those that bear on nothing that a run releases.
    """
    found: list[tuple[str, Component]] = []
    for name, about in type(section).model_fields.items():
        value = getattr(section, name)
        if bearing and NO_BEARING in about.metadata:
            continue
        mark = next((each for each in about.metadata if isinstance(each, Slot | Named)), None)
        if isinstance(mark, Named) and ":" in value:
            found.append((prefix + name, mark.kind.find(value)))
        elif isinstance(mark, Slot) and isinstance(value, Options):
            by_default = mark.later and getattr(value, mark.kind.name_key) == mark.kind.default
            if not by_default:
                found.append((prefix + name, mark.kind.of(value)))
                found += slots(value, f"{prefix}{name}.", bearing)
        elif isinstance(value, BaseModel):
            found += slots(value, f"{prefix}{name}.", bearing)
    return found


def outside(section: BaseModel) -> dict[str, Component]:
    """Return the components of a config that are not fedpriv's own, by key."""
    return {key: found for key, found in slots(section) if found.origin is not None}


def _open(options: type[Options]) -> type[Options]:
    """Let a class of options take any key."""
    options.model_config["extra"] = "allow"
    options.model_rebuild(force=True)
    return options


def _known(document: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Return what a document has of a section's keys."""
    kept = {}
    for key, value in document.items():
        if key in section.model_fields:
            about = section.model_fields[key]
            inner: Any = about.annotation
            own = any(isinstance(each, Slot) for each in about.metadata)
            deeper = isinstance(value, Mapping) and inspect.isclass(inner) and not own
            kept[key] = _known(value, inner) if deeper and issubclass(inner, Section) else value
    return kept


def _at(key: str, reason: str, value: Any) -> ValidationError:
    """Return an error of validation at `key`, whose text is `reason` alone."""
    kind = PydanticCustomError("component", "{reason}", {"reason": reason})
    details = InitErrorDetails(type=kind, loc=(key,), input=value)
    return ValidationError.from_exception_data("component", [details])


def _dumped(options: Options | None, info: core_schema.SerializationInfo) -> dict[str, Any] | None:
    return (
        None
        if options is None
        else options.model_dump(
            mode=info.mode, exclude_defaults=info.exclude_defaults, exclude_unset=info.exclude_unset
        )
    )


def _object(where: str) -> Any:
    """Return fedpriv's own object at `module:object`."""
    module, _, path = where.partition(":")
    return _attribute(__import__(module, fromlist=["_"]), path)


def _attribute(module: Any, path: str) -> Any:
    found = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _imported(name: str, code: Path | None) -> Callable[..., Any]:
    """Return the object that `package.module:object` names.

    Raises:
        InputError: there is none, or its module cannot be imported.
    """
    where, _, path = name.partition(":")
    if not where or not path:
        raise InputError(f"write package.module:object, such as mine:cnn, got {name!r}")
    if where in (GIVEN, "__main__") or "<" in path:
        raise InputError(
            f"{name} was handed over by a script or a notebook, and is known only there; continue "
            "from there, or write it into a module"
        )
    try:
        module = module_beside(where, code)
    except ModuleNotFoundError as error:
        if command := command_for(error.name or ""):
            raise InputError(f"{name} needs {error.name}: {command}") from None
        if error.name not in (where, where.split(".")[0]):
            raise InputError(f"{where} needs {error.name}, which is not installed") from None
        beside = f" or as a file in {code}" if code else ""
        raise InputError(
            f"there is no module {where}: it must be installed, on PYTHONPATH{beside}"
        ) from None
    except InputError:
        raise
    except SystemExit as error:  # a script, which ends where it is imported
        raise InputError(f"{where} cannot be imported: it ends the program ({error})") from None
    except Exception as error:
        raise InputError(f"{where} cannot be imported: {failure_of(error)}") from error
    try:
        made = _attribute(module, path)
    except AttributeError:
        there = [each for each in vars(module) if not each.startswith("_")]
        close = difflib.get_close_matches(path, there, n=1)
        hint = f"; did you mean {where}:{close[0]}?" if close else ""
        raise InputError(f"the module {where} has no {path}{hint}") from None
    if not callable(made):
        raise InputError(f"{name} is neither a function nor a class")
    return cast(Callable[..., Any], made)


def _is_stale(component: Component, look_up: LookUp) -> bool:
    """Say whether a component that was found before is another one now."""
    return component.origin is not None and component.origin.changed(look_up.code)
