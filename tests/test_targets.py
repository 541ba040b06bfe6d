"""A `_target_` is judged from its source: wrong arguments are refused, working ones never are."""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from ddptrain.errors import Refused
from ddptrain.nearest import suggest
from ddptrain.targets import check_arguments

Node = dict[str, Any]
NUMBER = count()


def node(target: str, /, **arguments: Any) -> Node:
    return {"_target_": target, **arguments}


def refusal(given: Node, supplied: set[str] | None = None) -> str:
    with pytest.raises(Refused) as told:
        check_arguments("part", given, supplied or set())
    assert "\n" not in str(told.value)
    return str(told.value)


# --- what must be refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            node("torch.optim.AdamW", params=[], lrr=1),
            "unknown key part.lrr: torch.optim.AdamW takes no such argument; did you mean part.lr?",
        ),
        (node("torch.optim.AdamW", lr=1), "part.params: torch.optim.AdamW needs it"),
        (node("torch.optim.SGD", params=[], momentun=0), "did you mean part.momentum?"),
        (node("torch.optim.Adamm"), "did you mean torch.optim.Adam?"),
        (node("torch.nn.Linear", in_features=3), "part.out_features: torch.nn.Linear needs it"),
        (
            node("torch.nn.Linear", in_feature=3, out_features=3),
            "unknown key part.in_feature: torch.nn.Linear takes no such argument; "
            "did you mean part.in_features?",
        ),
        (
            node("torch.nn.Linear", in_features=3, out_features=3, bias="no"),
            "part.bias: expected bool, got 'no'",
        ),
        (node("torch.nn.Conv2d", in_channels=3, out_channels=3), "part.kernel_size"),
        (
            node("torch.nn.Linear", in_features="3", out_features=3),
            "part.in_features: expected int",
        ),
        (node("ddptrain.models.MLP", inputs=3, outputs=3, hiden=[3]), "did you mean part.hidden?"),
        (
            node("ddptrain.models.MLP", inputs=3, outputs=3),
            "part.hidden: ddptrain.models.MLP needs",
        ),
        (node("ddptrain.models.GPTT"), "did you mean ddptrain.models.GPT?"),
        (node("ddptrain.models.ConvNet", dropout="a"), "part.dropout: expected float, got 'a'"),
        (node("ddptrain.models.ConvNet", channels=True), "part.channels: expected int, got True"),
        (node("ddptrain.optim.schedules.Cosine", warmups=3), "did you mean part.warmup?"),
        (node("ddptrain.optim.schedules.Cosine", warmup=None), "part.warmup: expected float"),
        (node("ddptrain.optim.schedules.Cosinus"), "did you mean ddptrain.optim.schedules.Cosine?"),
        (node("ddptrain.data.sets.Digits"), "part.split: ddptrain.data.sets.Digits needs it"),
        (node("ddptrain.data.sets"), "ddptrain.data.sets is a module; name a class or function"),
        (node("torch"), "torch is a module; name a class or function in it"),
        (node("nowhere.Thing"), "part._target_: no module 'nowhere' for 'nowhere.Thing'"),
        (node("Thing"), "part._target_: no module 'Thing'"),
    ],
    ids=lambda value: value["_target_"] if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(given: Node, told: str) -> None:
    assert told in refusal(given)


def folder_with(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)


CHOOSING = """
    from typing import Any, Literal, Optional, Sequence, Union
    from elsewhere_{number} import Shape, Unknown

    Names = Literal["mean", "sum"]

    class Pool:
        def __init__(self, one: Names = "mean", many: Sequence[Names | dict[str, Any]] = (),
                     shape: Optional[Shape] = None, count: Union[int, Literal["all"]] = 1,
                     free: Names | str = "", unsure: Names | Unknown = "", other: Any = "") -> None:
            pass
"""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"one": "men"}, "part.one: {target} knows no 'men'; did you mean mean?"),
        ({"one": "max"}, "part.one: {target} knows no 'max'; there is mean, sum"),
        ({"many": ["sum", {"x": {}}, "summ"]}, "part.many: {target} knows no 'summ'"),
        ({"shape": "rond"}, "part.shape: {target} knows no 'rond'; did you mean round?"),
        ({"count": "al"}, "part.count: {target} knows no 'al'; did you mean all?"),
        ({"one": "sum", "many": ["mean", {"x": {}}], "shape": None, "count": 3}, None),
        ({"shape": "flat", "free": "x", "unsure": "x", "other": "x"}, None),
    ],
)
def test_texts_are_held_against_a_literal(
    given: Node, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = next(NUMBER)
    shapes = 'from typing import Literal\nShape = Literal["round", "flat"]\nUnknown = vars()'
    folder_with(f"elsewhere_{number}", shapes, tmp_path, monkeypatch)
    folder_with(f"choosing_{number}", CHOOSING.format(number=number), tmp_path, monkeypatch)
    target = f"choosing_{number}.Pool"
    if told is None:
        check_arguments("part", node(target, **given), set())
    else:
        assert told.format(target=target) in refusal(node(target, **given))


@pytest.mark.parametrize(
    "given",
    [
        node("torchmetrics.classification.BinaryAUROC", max_fprr=0.5),
        node("collections.Countr"),
        node("math.sqr"),
    ],
    ids=lambda given: given["_target_"],
)
def test_what_only_python_can_tell_is_left_to_it(given: Node) -> None:
    """It ends in **kwargs, is in a module that makes names at run time, or in no file at all."""
    check_arguments("part", given, set())


def test_supplied_arguments_are_neither_missing_nor_offered() -> None:
    check_arguments("optim", node("torch.optim.SGD", lr=1), {"params"})
    told = refusal(node("torch.optim.SGD", parms=1), {"params"})
    assert "params" not in told.replace("parms", "")


def test_a_partial_may_lack_arguments_but_not_invent_them() -> None:
    check_arguments("part", node("torch.nn.Linear", _partial_=True, bias=False), set())
    assert "biass" in refusal(node("torch.nn.Linear", _partial_=True, biass=False))


@pytest.mark.parametrize("key", ["_partial_", "_recursive_", "_convert_"])
def test_hydra_keys_are_no_arguments(key: str) -> None:
    value = {"_partial_": False, "_recursive_": False, "_convert_": "all"}[key]
    given = node("torch.nn.Linear", in_features=1, out_features=1, **{key: value})
    check_arguments("part", given, set())


def test_positional_arguments_are_left_to_python() -> None:
    check_arguments("part", node("torch.nn.Linear", _args_=[1, 2]), set())


def test_suggestions() -> None:
    assert suggest("lrr", ["lr", "betas"], "optim.") == "; did you mean optim.lr?"
    assert suggest("xyz", ["lr", "betas"]) == "; there is betas, lr"
    assert suggest("xyz", []) == ""


# --- what must never be refused: a user's own module -------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that writes a module, or a package, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: str | dict[str, str]) -> str:
        name = f"own_{next(NUMBER)}"
        if isinstance(files, str):
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(files))
        else:
            for file, text in files.items():
                path = tmp_path / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


WORKING: dict[str, tuple[str | dict[str, str], str, Node]] = {
    "class": (
        "class Thing:\n    def __init__(self, a: int, *, b: float = 1): ...",
        "Thing", {"a": 1, "b": 2},
    ),
    "class without __init__": ("class Thing: ...", "Thing", {}),
    "class with *args": ("class Thing:\n    def __init__(self, *args): ...", "Thing", {}),
    "class with __new__ and __init__": (
        """
        class Thing:
            def __new__(cls, *args, **more): return super().__new__(cls)
            def __init__(self, a): ...
        """, "Thing", {"a": 1},
    ),
    "inherited __init__": (
        """
        class Base:
            def __init__(self, a, **more): ...
        class Between(Base):
            x = 1
        class Thing(Between): ...
        """, "Thing", {"a": 1, "z": 2},
    ),
    "inherited from a base that is an attribute of a module": (
        """
        from torch import nn
        class Mixin: ...
        class Thing(nn.Linear, Mixin): ...
        """, "Thing", {"in_features": 1, "out_features": 2},
    ),
    "first base unknown, second known": (
        {
            "__init__.py": """
                from . import far
                class Near:
                    def __init__(self, b): ...
                class Thing(far.Far, Near): ...
            """,
            "far.py": "class Far:\n    def __init__(self, a): ...",
        }, "Thing", {"a": 1},
    ),
    "first base without __init__, second with": (
        """
        class Mixin: ...
        class Base:
            def __init__(self, a): ...
        class Thing(Mixin, Base): ...
        """, "Thing", {"a": 1},
    ),
    "generic class": (
        """
        from typing import Generic, TypeVar
        T = TypeVar("T")
        class Thing(Generic[T]):
            def __init__(self, a: T): ...
        """, "Thing", {"a": 1},
    ),
    "overloaded function": (
        """
        from typing import overload
        @overload
        def thing(a: int) -> int: ...
        @overload
        def thing(a: str, b: int) -> str: ...
        def thing(a, b=0): return a
        """, "thing", {"a": "x", "b": 1},
    ),
    "overloaded __init__": (
        """
        import typing
        class Thing:
            @typing.overload
            def __init__(self, a: int) -> None: ...
            @typing.overload
            def __init__(self, a: str, b: int) -> None: ...
            def __init__(self, a, b=0): ...
        """, "Thing", {"a": "x", "b": 1},
    ),
    "defined twice": (
        "def thing(a): return a\ndef thing(b): return b", "thing", {"b": 1},
    ),
    "replaced by assignment": (
        """
        class Thing:
            def __init__(self, a): ...
        class Better:
            def __init__(self, a, b): ...
        Thing = Better
        """, "Thing", {"a": 1, "b": 2},
    ),
    "replaced under a condition": (
        """
        def thing(a): return a
        if True:
            def thing(b): return b
        """, "thing", {"b": 2},
    ),
    "replaced by a later import": (
        {
            "__init__.py": "def thing(a): return a\nfrom .other import thing",
            "other.py": "def thing(b): return b",
        }, "thing", {"b": 1},
    ),
    "decorator that changes the arguments": (
        """
        def with_default(function):
            def inner(a, extra=0): return function(a)
            return inner
        @with_default
        def thing(a): return a
        """, "thing", {"a": 1, "extra": 2},
    ),
    "decorator that supplies an argument": (
        """
        def supplied(function):
            return lambda b: function(1, b)
        @supplied
        def thing(a, b): return a
        """, "thing", {"b": 2},
    ),
    "class decorator that changes the arguments": (
        """
        def renamed(cls):
            return lambda size: cls(size, size)
        @renamed
        class Thing:
            def __init__(self, width, height): ...
        """, "Thing", {"size": 2},
    ),
    "decorated __init__": (
        """
        def doubled(method):
            return lambda self, size: method(self, size, size)
        class Thing:
            @doubled
            def __init__(self, width, height): ...
        """, "Thing", {"size": 2},
    ),
    "metaclass that changes the arguments": (
        """
        class Meta(type):
            def __call__(cls, size): return super().__call__(size, size)
        class Thing(metaclass=Meta):
            def __init__(self, width, height): ...
        """, "Thing", {"size": 1},
    ),
    "inherited metaclass": (
        """
        class Meta(type):
            def __call__(cls, size): return super().__call__(size, size)
        class Base(metaclass=Meta): ...
        class Thing(Base):
            def __init__(self, width, height): ...
        """, "Thing", {"size": 1},
    ),
    "static method": (
        "class Thing:\n    @staticmethod\n    def make(a, b): return a", "Thing.make",
        {"a": 1, "b": 2},
    ),
    "class method": (
        "class Thing:\n    @classmethod\n    def make(cls, a, b): return a", "Thing.make",
        {"a": 1, "b": 2},
    ),
    "inherited class method": (
        """
        class Base:
            @classmethod
            def make(cls, a): return a
        class Thing(Base): ...
        """, "Thing.make", {"a": 1},
    ),
    "nested class": (
        "class Thing:\n    class Inner:\n        def __init__(self, a): ...", "Thing.Inner",
        {"a": 1},
    ),
    "dataclass": (
        """
        from dataclasses import dataclass, field
        @dataclass(frozen=True)
        class Base:
            a: int
            b: list = field(default_factory=list)
        @dataclass(frozen=True)
        class Thing(Base):
            c: float = 1.0
        """, "Thing", {"a": 1, "b": [], "c": 2},
    ),
    "dataclass with keyword-only fields": (
        """
        from dataclasses import KW_ONLY, dataclass
        @dataclass
        class Thing:
            a: int
            _: KW_ONLY
            b: int = 1
        """, "Thing", {"a": 1, "b": 2},
    ),
    "dataclass with class variables": (
        """
        import typing
        from dataclasses import dataclass
        from typing import ClassVar
        @dataclass
        class Thing:
            one: ClassVar[int]
            other: typing.ClassVar[int]
            quoted: "ClassVar[int]"
            a: int
        """, "Thing", {"a": 1},
    ),
    "dataclass with a parameter for __post_init__": (
        """
        from dataclasses import InitVar, dataclass, field
        @dataclass
        class Thing:
            a: InitVar[int]
            b: int = field(init=False)
            def __post_init__(self, a): self.b = a
        """, "Thing", {"a": 1},
    ),
    "dataclass with its own __init__": (
        """
        from dataclasses import dataclass
        @dataclass
        class Thing:
            a: int
            def __init__(self, other): self.a = other
        """, "Thing", {"other": 1},
    ),
    "dataclass without a made __init__": (
        """
        from dataclasses import dataclass
        class Base:
            def __init__(self, other): ...
        @dataclass(init=False)
        class Thing(Base):
            a: int
        """, "Thing", {"other": 1},
    ),
    "dataclass of a class that is none": (
        """
        from dataclasses import dataclass
        class Base:
            def __init__(self, other): ...
        @dataclass
        class Thing(Base):
            a: int
        """, "Thing", {"a": 1},
    ),
    "class of a dataclass": (
        """
        from dataclasses import dataclass
        @dataclass
        class Base:
            a: int
        class Thing(Base):
            b: int = 2
        """, "Thing", {"a": 1},
    ),
    "dataclass by another name": (
        """
        import dataclasses
        record = dataclasses.dataclass(kw_only=True)
        @record
        class Thing:
            a: int = 0
        """, "Thing", {"a": 1},
    ),
    "a decorator that only sounds like dataclass": (
        """
        def no_dataclass(cls): return cls
        @no_dataclass
        class Thing:
            table: dict
            def __init__(self, a): ...
        """, "Thing", {"a": 1},
    ),
    "named tuple": (
        "from typing import NamedTuple\nclass Thing(NamedTuple):\n    a: int\n    b: int = 0",
        "Thing", {"a": 1},
    ),
    "typed dict": (
        "from typing import TypedDict\nclass Thing(TypedDict):\n    a: int", "Thing", {"a": 1},
    ),
    "enum": (
        "from enum import Enum\nclass Thing(Enum):\n    one = 1", "Thing", {"value": 1},
    ),
    "enum of text": (
        "from enum import StrEnum\nclass Thing(StrEnum):\n    one = 'a'", "Thing", {"value": "a"},
    ),
    "alias": ("class A:\n    def __init__(self, a): ...\nThing = A", "Thing", {"a": 1}),
    "two names at once": ("class Other: ...\nthing, other = (lambda a: a), 1", "thing", {"a": 1}),
    "chained assignment": ("class Other: ...\nother = thing = lambda a: a", "thing", {"a": 1}),
    "made by globals()": ("globals()['thing'] = lambda a: a", "thing", {"a": 1}),
    "made by globals().update": ("globals().update(thing=lambda a: a)", "thing", {"a": 1}),
    "made by setattr": (
        "import sys\nsetattr(sys.modules[__name__], 'thing', lambda a: a)", "thing", {"a": 1},
    ),
    "made by exec": ("exec('def thing(a): return a')", "thing", {"a": 1}),
    "made by a global statement": (
        "def fill():\n    global thing\n    thing = lambda a: a\nfill()", "thing", {"a": 1},
    ),
    "made by a loop": (
        "for name in ('thing',):\n    globals()[name] = lambda a: a", "thing", {"a": 1},
    ),
    "made in an assignment expression": ("print(end=(thing := str)())", "thing", {}),
    "made by a match": (
        "match 1:\n    case 1:\n        def thing(a): return a", "thing", {"a": 1},
    ),
    "made by __getattr__": (
        "def __getattr__(name):\n    if name == 'thing': return lambda a: a\n"
        "    raise AttributeError(name)", "thing", {"a": 1},
    ),
    "imported under try": (
        "try:\n    from nowhere import thing\nexcept ImportError:\n    def thing(a): return a",
        "thing", {"a": 1},
    ),
    "partial": (
        "from functools import partial\ndef f(a, b): return a\nthing = partial(f, b=1)",
        "thing", {"a": 1},
    ),
    "callable object": (
        "class C:\n    def __call__(self, a): return a\nthing = C()", "thing", {"a": 1},
    ),
    "class of an imported module": ("import torch.nn", "torch.nn.ReLU", {}),
    "function of an imported package": ("import os.path", "os.path.basename", {"p": "a"}),
    "re-export under another name": (
        {
            "__init__.py": "from .inner import thing as other",
            "inner.py": "def thing(a, *, b=1): return a",
        }, "other", {"a": 1, "b": 2},
    ),
    "star import": (
        {
            "__init__.py": "from .inner import *\nfrom .more import *",
            "inner.py": "def other(b): return b",
            "more.py": "def thing(a): return a",
        }, "thing", {"a": 1},
    ),
    "two star imports, of which the last counts": (
        {
            "__init__.py": "from .inner import *\nfrom .more import *",
            "inner.py": "def thing(b): return b",
            "more.py": "def thing(a): return a",
        }, "thing", {"a": 1},
    ),
    "star import of what __all__ allows": (
        {
            "__init__.py": "from .inner import *\nfrom .more import *",
            "inner.py": "def thing(a): return a",
            "more.py": "__all__ = ['other']\ndef thing(b): return b\ndef other(c): return c",
        }, "thing", {"a": 1},
    ),
    "module of a package": (
        {"__init__.py": "", "inner.py": "def thing(a): return a"}, "inner.thing", {"a": 1},
    ),
    "module of a package that is not imported": (
        {"__init__.py": "x = 1", "deep/__init__.py": "", "deep/er.py": "def thing(a): return a"},
        "deep.er.thing", {"a": 1},
    ),
    "package without __init__": ({"inner.py": "def thing(a): return a"}, "inner.thing", {"a": 1}),
    "function that hides the module it is in": (
        {
            "__init__.py": "from .thing import thing",
            "thing.py": "def thing(a): return a",
        }, "thing", {"a": 1},
    ),
    "class in a module that is bound to another name": (
        {
            "__init__.py": "from . import inner as renamed",
            "inner.py": "def thing(a): return a",
        }, "renamed.thing", {"a": 1},
    ),
    "import of an import of an import": (
        {
            "__init__.py": "from .a import thing",
            "a.py": "from .b import thing",
            "b.py": "from .c.d import thing",
            "c/__init__.py": "",
            "c/d.py": "def thing(a): return a",
        }, "thing", {"a": 1},
    ),
    "circular imports": (
        {
            "__init__.py": "from .a import *\nfrom .a import thing",
            "a.py": "from . import *\ndef thing(a): return a",
        }, "thing", {"a": 1},
    ),
    "default of None without saying so": (
        "def thing(size: int = None, name: str = None): return size", "thing",
        {"size": None, "name": None},
    ),
    "nested target where a number is expected": (
        "def thing(size: int, rate: float): return size", "thing",
        {"size": {"_target_": "builtins.int"}, "rate": {"_target_": "builtins.float"}},
    ),
    "whole number where a float is expected": (
        "def thing(rate: float): return rate", "thing", {"rate": 1},
    ),
    "optional and union types": (
        "from typing import Optional, Union\n"
        "def thing(a: Optional[int], b: Union[int, str], c: 'int | None', d: int | None = 3): ...",
        "thing", {"a": None, "b": "x", "c": None, "d": None},
    ),
    "argument of a framework's key": ("def thing(_a_): return _a_", "thing", {"_a_": 1}),
    "a byte order mark": ("\ufeffdef größe(länge): return länge", "größe", {"länge": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKING)
def test_what_works_in_a_users_module_is_never_refused(case: str, module: Any) -> None:
    files, target, arguments = WORKING[case]
    if case.startswith("made "):
        files = f"class Other: ...\n{files}"  # so that the module has names, but not this one
    given = node(f"{module(files)}.{target}", **arguments)
    instantiate(given)
    check_arguments("part", given, set())


REFUSED: dict[str, tuple[str | dict[str, str], str, Node, str]] = {
    "typo": ("class Thing:\n    def __init__(self, width): ...", "Thing", {"widht": 1},
             "did you mean part.width?"),
    "typo in a class of torch's": (
        "from torch import Tensor, nn\nclass Thing(nn.Module):\n"
        "    def __init__(self, width: int, start: Tensor | None = None):\n"
        "        super().__init__()",
        "Thing", {"width": 1, "strat": 1}, "did you mean part.start?",
    ),
    "type in a class of torch's": (
        "from torch import nn\nclass Thing(nn.Linear):\n"
        "    def __init__(self, width: int):\n        super().__init__(width, width)",
        "Thing", {"width": "wide"}, "part.width: expected int, got 'wide'",
    ),
    "missing in a class of torch's": (
        "from torch import nn\nclass Thing(nn.Module):\n    def __init__(self, width: int): ...",
        "Thing", {}, "part.width",
    ),
    "typo behind inheritance": (
        "class Base:\n    def __init__(self, width): ...\nclass Thing(Base): ...",
        "Thing", {"widht": 1}, "did you mean part.width?",
    ),
    "typo behind a re-export": (
        {"__init__.py": "from .a import Thing",
         "a.py": "class Thing:\n    def __init__(self, width): ..."},
        "Thing", {"widht": 1}, "did you mean part.width?",
    ),
    "typo behind a star import": (
        {"__init__.py": "from .a import *", "a.py": "def thing(width): ..."},
        "thing", {"widht": 1}, "did you mean part.width?",
    ),
    "typo in a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass Thing:\n    width: int",
        "Thing", {"widht": 1}, "did you mean part.width?",
    ),
    "typo in a class method": (
        "class Thing:\n    @classmethod\n    def make(cls, width): ...",
        "Thing.make", {"widht": 1}, "did you mean part.width?",
    ),
    "unknown name": ("class Thing: ...", "Thingy", {}, "Thing?"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_fails_in_a_users_module_is_refused(case: str, module: Any) -> None:
    files, target, arguments, told = REFUSED[case]
    given = node(f"{module(files)}.{target}", **arguments)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, it does not work
        instantiate(given)
    assert told in refusal(given)


def test_nothing_of_the_users_is_imported(module: Any) -> None:
    name = module("raise SystemExit('imported')\ndef thing(a): ...")
    check_arguments("part", node(f"{name}.thing", a=1), set())
    assert name not in sys.modules


# --- what must never be refused: everything that is installed ----------------------------------

LIBRARIES = [
    *("torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.utils", "torch.nn.parallel"),
    *("torch.optim", "torch.optim.lr_scheduler", "torch.optim.swa_utils", "torch.utils.data"),
    *("torch.distributions", "torchmetrics", "torchmetrics.classification"),
    *(
        "torchmetrics.regression",
        "torchmetrics.functional",
        "torchmetrics.functional.classification",
    ),
    *("sklearn.datasets", "sklearn.linear_model", "sklearn.preprocessing", "sklearn.ensemble"),
    *("numpy", "numpy.random", "collections", "functools", "itertools", "pathlib"),
    *("random", "logging", "hydra.utils", "safetensors.torch"),
    *("ddptrain.tasks", "ddptrain.models", "ddptrain.data.sets", "ddptrain.optim.schedules"),
]


def signatures(library: str) -> Iterator[tuple[str, inspect.Signature]]:
    """The public classes and functions of a module whose signature Python itself knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(library)
        for name in dir(module):
            thing = getattr(module, name)
            home = str(getattr(thing, "__module__", ""))
            known = inspect.isclass(thing) or inspect.isroutine(thing)
            is_enum = inspect.isclass(thing) and issubclass(thing, Enum)
            # What a module happens to import from typing is nobody's target.
            if name.startswith("_") or not known or is_enum or home in ("typing", "_io", "io"):
                continue
            try:
                yield f"{library}.{name}", inspect.signature(thing)
            except (ValueError, TypeError):
                continue


def calls(target: str, signature: inspect.Signature) -> Iterator[Node]:
    """Two valid calls by keyword: with all parameters, and with as few as possible."""
    parameters = signature.parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        return
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = object()
    given = {p.name: anything if p.default is p.empty else p.default for p in by_name}
    simple = {name: value for name, value in given.items() if value is not anything}
    # A required argument's value is not known, so its type is not put to the test.
    yield node(target, _partial_=True, **simple)
    is_all_named = len(by_name) == len(parameters)
    required = {p.name: None for p in by_name if p.default is p.empty}
    if is_all_named and all(p.annotation is p.empty for p in by_name if p.default is p.empty):
        yield node(target, **required)


@pytest.mark.parametrize("library", LIBRARIES)
def test_valid_calls_of_libraries_are_never_refused(library: str) -> None:
    tried, refused = 0, []
    for target, signature in signatures(library):
        for given in calls(target, signature):
            tried += 1
            try:
                check_arguments("part", given, set())
            except Refused as error:
                refused.append(str(error))
    assert tried >= 2
    assert not refused, f"{len(refused)} of {tried}, such as {refused[:5]}"


@pytest.mark.parametrize(
    "given",
    [
        node(
            "torch.optim.AdamW", lr=1e-3, betas=[0.9, 0.999], weight_decay=0, fused=True, params=[]
        ),
        node("torch.optim.SGD", lr=1, momentum=0.9, nesterov=True, params=[]),
        node("torch.nn.LSTM", input_size=3, hidden_size=4, num_layers=2, batch_first=True),
        node("torch.nn.GRU", input_size=3, hidden_size=4, dropout=0.1),
        node("torch.nn.Linear", in_features=3, out_features=4, bias=False),
        node("torch.nn.Conv2d", in_channels=3, out_channels=4, kernel_size=3, padding="same"),
        node("torch.nn.modules.linear.Linear", in_features=3, out_features=4),
        node("torch.nn.TransformerEncoderLayer", d_model=8, nhead=2, batch_first=True),
        node("torch.nn.CrossEntropyLoss", label_smoothing=0.1, reduction="sum"),
        node("torch.nn.Sequential", _args_=[]),
        node("torch.utils.data.TensorDataset", _args_=[]),
        node("torch.utils.data.Subset", dataset=[1, 2], indices=[0]),
        node("torch.arange", end=3),
        node("torch.manual_seed", seed=3),
        node("torch.nn.utils.weight_norm", module=None, name="weight"),
        node("torch.nn.utils.spectral_norm", module=None, name="weight"),
        node("torch.Tensor.view", _args_=[]),
        node("torchmetrics.Accuracy", task="multiclass", num_classes=3),
        node("torchmetrics.classification.BinaryAUROC", thresholds=None),
        node("torchmetrics.functional.classification.accuracy", preds=1, target=1, task="binary"),
        node("torchmetrics.MeanMetric", nan_strategy="ignore"),
        node("sklearn.datasets.load_digits", n_class=3, return_X_y=True),
        node("sklearn.linear_model.LogisticRegression", C=1.0, max_iter=5),
        node("sklearn.neighbors._kd_tree.KDTree", _args_=[[[1.0]]]),
        node("sklearn.preprocessing.StandardScaler"),
        node("numpy.arange", start=1, stop=3),
        node("numpy.random.default_rng", seed=3),
        node("numpy.random._generator.default_rng", seed=3),
        node("numpy.float32", _args_=[1]),
        node("collections.OrderedDict", a=1),
        node("collections.Counter", a=1),
        node("functools.partial", _args_=["x"]),
        node("builtins.dict", a=1),
        node("math.sqrt", _args_=[4]),
        node("pathlib.Path", _args_=["x"]),
        node("datetime.timedelta", days=1),
        node("decimal.Decimal", value="1"),
        node("random.Random", _args_=[3]),
        node("hydra.utils.get_class", path="torch.nn.Linear"),
        node("logging.getLogger", name="x"),
        node("ddptrain.tasks.Classification", model=None, classes=3),
        node("ddptrain.tasks.classification.Classification", model=None, classes=3),
        node("ddptrain.Loss", sum=1, count=2),
        node("ddptrain.tasks.task.Loss", sum=1, count=2, logs={}),
        node("ddptrain.data.sets.StandardLibrary", split="train", context=3),
        node("ddptrain.data.Table", split="train", path={"train": "a.csv"}, target="y", inputs=3),
        node("ddptrain.data.TextFolder", split="train", folder="texts", length=3),
    ],
    ids=lambda given: given["_target_"],
)
def test_common_targets_are_not_refused(given: Node) -> None:
    check_arguments("part", given, set())
