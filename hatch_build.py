"""Build hooks: the C of the `compiled` backend, and README's links where the repository is not."""

from __future__ import annotations

import platform
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# a link or a picture of a file: neither an address nor a place in the same page
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")


def platform_tag(system: str, machine: str, macos: str) -> str | None:
    """Returns the tag of a wheel with a library compiled here; None: there is to be no library.

    On Linux it is that of this machine alone, which `auditwheel repair` (`make build`) makes a
    manylinux. On macOS it is the running release and this processor: `sysconfig` says "universal2"
    of some Pythons, and the compiler makes a library of one processor. Elsewhere nobody has tried:
    the wheel is one for any platform, and mpcore has its `cpu` backend there.

    Args:
        system: What `sys.platform` calls it.
        machine: What `platform.machine()` calls it.
        macos: The release of macOS, such as "15.1".

    Example:
        >>> platform_tag("linux", "x86_64", ""), platform_tag("darwin", "arm64", "15.1")
        ('linux_x86_64', 'macosx_15_0_arm64')
        >>> platform_tag("win32", "AMD64", "") is None
        True
    """
    if system == "linux":
        return f"linux_{machine}"
    if system == "darwin" and int(macos.split(".")[0] or 0) >= 11:
        return f"macosx_{macos.split('.')[0]}_0_{machine}"
    return None


def absolute_links(text: str, repository: str) -> str:
    """Returns a page of the repository for readers elsewhere: on a package index for example.

    Args:
        text: Markdown.
        repository: Its address.

    Example:
        >>> absolute_links("[a](docs/a.md#b), ![c](c.svg), [d](https://d.org)", "https://x.org")
        '[a](https://x.org/blob/main/docs/a.md#b), ![c](https://x.org/raw/main/c.svg), [d](https://d.org)'
    """
    return _LINK.sub(
        lambda m: f"{m[1]}[{m[2]}]({repository}/{'raw' if m[1] else 'blob'}/main/{m[3]})", text
    )


class AbsoluteLinks(MetadataHookInterface):
    """Makes README.md the description of the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Reads README.md; its links lead to the address that `[project.urls]` calls Repository."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, metadata["urls"]["Repository"]),
        }


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
        tag = platform_tag(sys.platform, platform.machine(), platform.mac_ver()[0])
        if tag is None:
            built = []
        elif version == "editable":  # the source tree is what is imported
            built = command["build_in_place"]()
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="mpcore-")
            built = command["build_levels"](Path(self._folder.name))
            for path in built:
                build_data["force_include"][str(path)] = f"mpcore/backends/_built/{path.name}"
        if not built:
            self.app.display_warning(
                "no C compiler that works here: mpcore is built without the compiled backend, and "
                "takes PyTorch's own operations on a CPU"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
