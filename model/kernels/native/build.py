"""Compiles the native kernels: `python -m model.kernels.native.build`; installing Moray does the same.

One library a kind of processor, all of one source; which one runs is decided when it is loaded. Imports
nothing but the standard library: it runs before anything is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARIES = Path(__file__).parent / "lib"
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-shared",
    "-Wall",
    # gcc 12 sees uninitialised values in its own headers, and endless loops where a count is known to be 0.
    "-Wno-maybe-uninitialized",
    "-Wno-aggressive-loop-optimizations",
)
BUILD_S = 600


@dataclass(frozen=True)
class Variant:
    """A library for one kind of processor."""

    name: str
    flags: tuple[str, ...]
    machines: tuple[str, ...] | None
    """Where it can run, as `platform.machine()` says it; None = everywhere."""


VARIANTS = (
    Variant("avx512", ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"), ("x86_64", "AMD64")),
    Variant("avx2", ("-march=x86-64-v3",), ("x86_64", "AMD64")),
    Variant("plain", (), None),
)
"""The best first."""


class BuildFailed(Exception):
    """No compiler, or it refused the source; the text says which."""


def library_path(name: str, *, folder: Path = LIBRARIES) -> Path:
    """Where the library of a variant lies; its name says of which source it is: no old one is run."""
    return folder / f"moray_{name}-{_source_digest()}.so"


def _source_digest() -> str:
    digest = hashlib.sha256(repr((FLAGS, VARIANTS)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def build(*, folder: Path = LIBRARIES, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Compiles every variant that this machine may run; returns the libraries.

    Args:
        folder: where they go; a library is put in place only when it is whole.
        environ: CXX names the compiler.

    Raises:
        BuildFailed: no compiler, or it could not compile any of them.
    """
    compiler = environ.get("CXX") or next((name for name in ("g++", "c++") if shutil.which(name)), None)
    if compiler is None:
        raise BuildFailed("no C++ compiler found: install g++, or name one in CXX")
    folder.mkdir(parents=True, exist_ok=True)
    machine = platform.machine()
    wanted = [v for v in VARIANTS if v.machines is None or machine in v.machines]
    libraries: list[Path] = []
    failures: list[BuildFailed] = []
    for variant in wanted:
        try:
            libraries.append(_compile(compiler, variant, folder))
        except BuildFailed as error:  # an old compiler does not know a newer processor's flags
            failures.append(error)
    if not libraries:
        raise failures[0]
    for old in folder.glob("*.so"):
        if old not in libraries:
            old.unlink()
    return libraries


def _compile(compiler: str, variant: Variant, folder: Path) -> Path:
    path = library_path(variant.name, folder=folder)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
    command = [compiler, *FLAGS, *variant.flags, *sources, "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{compiler}: {error}") from error
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise BuildFailed(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    partial.replace(path)
    return path


def main() -> int:
    """Builds and says what; 1 when there is nothing to run."""
    try:
        libraries = build()
    except BuildFailed as error:
        sys.stderr.write(f"native kernels not built, torch computes everything: {error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in libraries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
