"""Every exception class of Moray survives pickle: actors and worker processes raise across processes."""

import copyreg
import functools
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from house_rules import PACKAGES

# Modules of optional extras; without the extra installed they cannot be imported.
OPTIONAL = ("nixl", "opentelemetry")
TEXT = "sample {name}"
SAMPLES = {str: TEXT, str | None: TEXT, object: TEXT, int: 3, float: 1.5, bool: True, Path: Path("sample")}


def import_everything() -> None:
    for package in PACKAGES:
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, prefix=f"{package}."):
            if not module.name.endswith("__main__"):
                _import(module.name)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(OPTIONAL):
            raise


def exception_classes(root: type[BaseException] = BaseException) -> Iterator[type[BaseException]]:
    for cls in root.__subclasses__():
        yield from exception_classes(cls)
        if cls.__module__.split(".")[0] in PACKAGES:
            yield cls


def sample(cls: type[BaseException]) -> BaseException:
    """An instance with every parameter set, by its annotation."""
    if not inspect.isfunction(cls.__init__):
        return cls("sample")
    keywords: dict[str, object] = {}
    positional: list[object] = []
    for parameter in inspect.signature(cls, eval_str=True).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.append("sample")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(sample_argument(parameter))
        elif parameter.kind is not parameter.VAR_KEYWORD:
            keywords[parameter.name] = sample_argument(parameter)
    return cls(*positional) if positional else cls(**keywords)


def sample_argument(parameter: inspect.Parameter) -> object:
    wanted = parameter.annotation
    if inspect.isclass(wanted) and issubclass(wanted, BaseException):
        return sample(wanted)
    if wanted not in SAMPLES and parameter.default is parameter.empty:
        known = ", ".join(map(str, SAMPLES))
        pytest.fail(f"no sample for parameter {parameter}; annotate it as an exception or one of {known}")
    value = SAMPLES.get(wanted, parameter.default)
    return value.format(name=parameter.name) if isinstance(value, str) else value


def contents(value: object) -> object:
    """What must survive; errors compare by identity, so their contents are compared instead."""
    if not isinstance(value, BaseException):
        return value
    attributes = {key: contents(item) for key, item in vars(value).items()}
    return (type(value), str(value), [contents(item) for item in value.args], attributes)


def check_pickles(cls: type[BaseException]) -> None:
    error = sample(cls)
    assert contents(pickle.loads(pickle.dumps(error))) == contents(error)


def why_it_does_not_pickle(cls: type[BaseException]) -> str | None:
    try:
        check_pickles(cls)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - any failure is the finding
        return f"{cls.__module__}.{cls.__name__}: {error!r}; see __reduce__ in wire/errors.py"
    return None


def test_every_exception_pickles_with_message_and_attributes() -> None:
    import_everything()
    classes = sorted(set(exception_classes()), key=lambda cls: (cls.__module__, cls.__name__))
    assert len(classes) > 10
    assert [why for cls in classes if (why := why_it_does_not_pickle(cls))] == []


class _KeywordOnly(Exception):
    def __init__(self, *, wanted: str, given: int) -> None:
        super().__init__(f"{wanted} {given}")


class _Forgets(Exception):
    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.field = "set"

    def __reduce__(self) -> tuple[object, ...]:
        return (copyreg.__newobj__, (type(self), *self.args))


class _Odd(Exception):
    def __init__(self, where: functools.partial[int]) -> None:
        super().__init__(where)


@pytest.mark.parametrize("cls", [_KeywordOnly, _Forgets, _Odd], ids=lambda cls: cls.__name__)
def test_rule_catches(cls: type[BaseException]) -> None:
    assert why_it_does_not_pickle(cls)
