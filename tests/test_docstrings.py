"""Every public name of the library says what it is: shapes, units, errors."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
import typing

import jax
import pytest

import fsn_jax
from fsn_jax.torus import Complex

MODULES = [
    importlib.import_module(f"fsn_jax.{module.name}")
    for module in pkgutil.walk_packages(fsn_jax.__path__)
]


def function_of(value):
    """Return the plain function behind a method, property or compiled function, or None."""
    value = value.fget if isinstance(value, property) else value
    value = inspect.unwrap(value) if callable(value) else value
    return value if inspect.isfunction(value) else None


def public_names():
    """Yield (name, object, docs): docs are its own docstring, its class's and its module's."""
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            own = value.__doc__ or ""
            if function := function_of(value):
                yield f"{module.__name__}.{name}", function, (own, module.__doc__)
            if not inspect.isclass(value):
                continue
            yield f"{module.__name__}.{name}", value, (own, module.__doc__)
            for attribute, member in vars(value).items():
                if attribute == "setup" or (attribute[0] == "_" and attribute != "__call__"):
                    continue  # setup is Flax's; a private name is nobody else's
                function = function_of(member)
                # What a dataclass or Flax adds was not written in this module.
                if function and function.__code__.co_filename == module.__file__:
                    docs = (function.__doc__ or "", own, module.__doc__)
                    yield f"{module.__name__}.{name}.{attribute}", function, docs


NAMES = {name: (value, docs) for name, value, docs in public_names()}
FUNCTIONS = {name: entry for name, entry in NAMES.items() if inspect.isfunction(entry[0])}


def test_the_names_were_found():
    assert len(NAMES) > 60
    for name in ("attention.FrustratedAttention.kappa", "coupling.coupling_update", "fsn.FSN"):
        assert f"fsn_jax.{name}" in NAMES


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_module_says_what_it_is(module):
    assert module.__doc__


def test_every_name_says_what_it_is():
    assert [name for name, (_, docs) in NAMES.items() if not docs[0].strip()] == []


SHAPE = re.compile(
    r"``\[[\w, .]+\]``|[a-z0-9]+\[[\w, ]+\]|scalar|elementwise|any shape|of the shape"
)


def shapeless(function):
    """Name the parameters that are arrays and whose annotation gives no shape."""
    hints = dict(inspect.signature(function).parameters.items())
    arrays = []
    for name, parameter in hints.items():
        kinds = {parameter.annotation, *typing.get_args(parameter.annotation)}
        if kinds & {jax.Array, Complex} and name != "key":
            arrays.append(name)
    return arrays


def test_every_array_has_a_shape():
    """In its annotation, or in words; a PRNG key has none."""
    missing = [
        name
        for name, (function, docs) in FUNCTIONS.items()
        if shapeless(function) and not SHAPE.search(docs[0])
    ]
    assert missing == []


def test_phases_have_a_unit():
    """Whatever takes or returns angles says radians: itself, its class or its module."""
    angles = {"theta", "dtheta", "angles"}
    missing = [
        name
        for name, (function, docs) in FUNCTIONS.items()
        if angles & inspect.signature(function).parameters.keys()
        and not any("radian" in doc for doc in docs)
    ]
    assert missing == []


def test_docstrings_name_the_errors():
    """A function with a raise statement names what it raises."""
    missing = []
    for name, (function, docs) in FUNCTIONS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        tries = [part for node in ast.walk(tree) if isinstance(node, ast.Try) for part in node.body]
        caught = {node for part in tries for node in ast.walk(part)}
        raised = {
            node.exc.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node not in caught
        } - {"NotImplementedError"}
        missing += [(name, error) for error in raised if error not in docs[0]]
    assert missing == []


@pytest.mark.parametrize("module", ["attention", "coupling", "fsn"])
def test_equations_have_a_source(module):
    assert "arXiv" in importlib.import_module(f"fsn_jax.{module}").__doc__
