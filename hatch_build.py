"""A build hook: compiles the C of the `compiled` backend into the wheel, if there is a compiler."""

from __future__ import annotations

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CPasses(BuildHookInterface):
    """Builds `mpcore/backends/_passes.c` for every level of this processor family.

    The libraries make a wheel one of a platform. Without a compiler it is one for any platform, and
    mpcore has its `cpu` backend for CPUs, which needs none.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the libraries; editable installs find them in the source tree.

        Args:
            version: "standard" or "editable".
            build_data: What the wheel is told.
        """
        root = Path(self.root)
        command = runpy.run_path(str(root / "mpcore" / "backends" / "_c_command.py"))
        if version == "editable":  # the source tree is what is imported
            built = command["build_in_place"]()
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="mpcore-")
            built = command["build_levels"](Path(self._folder.name))
            for path in built:
                build_data["force_include"][str(path)] = f"mpcore/backends/_built/{path.name}"
        if not built:
            self.app.display_warning(
                "no C compiler that works: mpcore is built without the compiled backend"
            )
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
