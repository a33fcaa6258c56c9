"""Loading the command line loads neither torch nor Ray: `moray --help` answers at once."""

import subprocess
import sys

from house_rules import ROOT, python_files

SLOW = ("torch", "ray", "kubernetes")


def loaded_slow_modules(statement: str) -> set[str]:
    report = f"{statement}\nimport sys\nprint(*(name for name in {SLOW!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    return set(result.stdout.split())


def test_no_module_of_the_command_line_loads_torch_or_ray() -> None:
    files = [path for path in python_files("cluster/cli") if path.stem != "__main__"]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
    ]
    assert loaded_slow_modules("import " + ", ".join(names)) == set()


def test_a_slow_import_is_seen() -> None:
    assert loaded_slow_modules("import torch.version") == {"torch"}
