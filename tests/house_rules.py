"""The house rules as functions over source text; tests/unit/house runs them over the repository.

Every rule takes text and gives back `Finding`s, so that the same function judges the repository and, in its
self-test, a snippet that breaks it.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("router", "workers", "model", "wire", "cluster")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 6

_MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
# fmt: off
_MUTABLE_CONSTRUCTORS = frozenset({
    "list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "ChainMap",
    "WeakSet", "WeakKeyDictionary", "WeakValueDictionary", "SimpleNamespace", "count", "cycle", "Lock",
    "RLock", "Event", "Condition", "Semaphore", "Queue", "local",
})
_MUTATING_METHODS = frozenset({
    "append", "extend", "insert", "remove", "pop", "popitem", "clear", "sort", "reverse", "update",
    "setdefault", "add", "discard", "difference_update", "intersection_update", "symmetric_difference_update",
    "appendleft", "popleft",
})
# fmt: on
_CONSTANT_NAME = re.compile(r"_?[A-Z][A-Z0-9_]*")
# What starts slowly: two of these cost more than everything else that `moray --help` does.
_SLOW_IMPORTS = ("torch", "ray", "kubernetes", "model", "workers")
_NOQA = re.compile(
    r"#\s*(noqa|type:\s*ignore)(?P<code>\s*:\s*[A-Z]+[0-9]+(?:[,\s]+[A-Z]+[0-9]+)*|\[[^]]*\])?(?P<why>.*)"
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that breaks a rule."""

    line: int
    message: str


def python_files(*folders: str) -> list[Path]:
    """Python files under these folders of the repository, generated ones left out, in a fixed order."""
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in files if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def check_file_length(source: str) -> list[Finding]:
    """A file has at most 500 lines."""
    num_lines = len(source.splitlines())
    if num_lines <= MAX_FILE_LINES:
        return []
    return [
        Finding(num_lines, f"{num_lines} lines; at most {MAX_FILE_LINES}: one file, one reason to be opened")
    ]


def check_function_lengths(source: str) -> list[Finding]:
    """A function has at most 80 lines, its docstring among them."""
    found = []
    for node in _functions(ast.parse(source)):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(
                Finding(node.lineno, f"{node.name}: {num_lines} lines; at most {MAX_FUNCTION_LINES}")
            )
    return found


def check_parameter_counts(source: str) -> list[Finding]:
    """A function has at most 6 parameters; self, cls, *args and **kwargs do not count.

    `noqa: PLR0913` with a reason lifts it, e.g. for a command whose parameters are its flags.
    """
    lines = source.splitlines()
    found = []
    for node in _functions(ast.parse(source)):
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        num_parameters = len(names) - (names[:1] in (["self"], ["cls"]))
        if num_parameters > MAX_PARAMETERS and "noqa: PLR0913" not in lines[node.lineno - 1]:
            found.append(
                Finding(node.lineno, f"{node.name}: {num_parameters} parameters; at most {MAX_PARAMETERS}")
            )
    return found


def check_no_mutable_globals(source: str) -> list[Finding]:
    """No state lives in a module: no mutable object behind a module's name, no `global`.

    A list, dict or set written out is fine under a CONSTANT_NAME that this module never changes.
    """
    tree = ast.parse(source)
    changed = _changed_names(tree)
    found = [
        Finding(node.lineno, "global statement") for node in ast.walk(tree) if isinstance(node, ast.Global)
    ]
    for name, value in _module_assignments(tree):
        if name == "__all__" or not _is_mutable(value):
            continue
        if isinstance(value, _MUTABLE_DISPLAYS) and _CONSTANT_NAME.fullmatch(name):
            if name in changed:
                found.append(
                    Finding(
                        value.lineno, f"{name} is a module's constant and is changed at line {changed[name]}"
                    )
                )
        else:
            wanted = "a tuple, frozenset, MappingProxyType, UPPER_CASE constant, or an owner passed down"
            found.append(Finding(value.lineno, f"mutable module global {name}; wanted {wanted}"))
    return found


def check_no_assert_or_print(source: str, *, is_print_allowed: bool = False) -> list[Finding]:
    """No `assert` (python -O drops it) and no `print` outside tests and the command line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(Finding(node.lineno, "assert outside tests; raise an error of wire/errors.py"))
        elif isinstance(node, ast.Name) and node.id == "print" and not is_print_allowed:
            found.append(
                Finding(node.lineno, "print outside the command line; use logging.getLogger(__name__)")
            )
    return found


def check_cli_imports(source: str) -> list[Finding]:
    """A module of cluster/cli imports nothing slow when it is loaded; only inside functions."""
    found = []
    for node in _load_time_nodes(ast.parse(source), into_classes=True):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        slow = [
            name for name in modules if name.split(".")[0] in _SLOW_IMPORTS and not name.endswith(".config")
        ]
        found += [Finding(node.lineno, f"imports {name} at load; do it inside the function") for name in slow]
    return found


def check_silencers_say_why(source: str) -> list[Finding]:
    """Each `noqa` and `type: ignore` has a code and, after it, a reason."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _NOQA.search(token.string) if token.type == tokenize.COMMENT else None
        if match and not (match["code"] and re.search(r"[a-z]{2}", match["why"])):
            wanted = "a code and a reason, e.g. `# noqa: PLR0913 - one parameter per flag`"
            found.append(Finding(token.start[0], f"{token.string!r}: wanted {wanted}"))
    return found


def check_package_owners(owners: Mapping[str, Sequence[str]]) -> list[Finding]:
    """No other installed distribution owns one of Moray's top-level names.

    Args:
        owners: top-level import name -> distributions that install it (`packages_distributions()`).
    """
    return [
        Finding(0, f"package name {name!r} is also installed by {', '.join(foreign)}")
        for name in PACKAGES
        if (foreign := sorted(set(owners.get(name, ())) - {"moray"}))
    ]


def _functions(tree: ast.AST) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _load_time_nodes(tree: ast.AST, *, into_classes: bool) -> Iterator[ast.AST]:
    """Every node that runs when the module is loaded: no function bodies, no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ClassDef) and not into_classes:
            continue
        yield node
        yield from _load_time_nodes(node, into_classes=into_classes)


def _module_assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in _load_time_nodes(tree, into_classes=False):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, _MUTABLE_DISPLAYS):
        return True
    if not isinstance(value, ast.Call):
        return False
    called = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return called in _MUTABLE_CONSTRUCTORS


def _changed_names(tree: ast.Module) -> dict[str, int]:
    """Names whose object is changed somewhere in the module, with the line where."""
    changed: dict[str, int] = {}
    for node in ast.walk(tree):
        owner: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = node.value
        elif isinstance(node, ast.AugAssign):
            owner = node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value if node.func.attr in _MUTATING_METHODS else None
        while isinstance(owner, ast.Subscript):
            owner = owner.value
        if isinstance(owner, ast.Name):
            changed.setdefault(owner.id, owner.lineno)
    return changed
