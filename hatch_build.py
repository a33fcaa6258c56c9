"""Builds the native kernels while the package is built or installed; without a compiler there are none."""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "model/kernels/native/build.py"


class KernelsHook(BuildHookInterface):  # type: ignore[misc]  # hatchling is there only while building
    """Puts the libraries into the wheel, which then belongs to this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, or says why not."""
        spec = importlib.util.spec_from_file_location("moray_build", Path(self.root) / BUILD)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(BUILD)
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            libraries = kernels.build()
        except kernels.BuildFailed as error:
            self.app.display_warning(f"native kernels not built, torch computes everything: {error}")
            return
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
