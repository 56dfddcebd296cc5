"""``python -m merfish.guides SITE``: build a static site of guides and API reference; needs the extra ``docs``."""

from __future__ import annotations

import argparse
import pkgutil
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merfish import __version__
from merfish._files import whole_file
from merfish.errors import InputError
from merfish.guides import GUIDES, read_guide

PACKAGES = ("merfish", "spatialvae")
SETTINGS: dict[str, Any] = {
    "project": "merfish and spatialvae",
    "version": __version__,
    "release": __version__,
    "extensions": ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"],
    "html_theme": "furo",
    "html_title": f"merfish {__version__}",
    "html_copy_source": False,
    "default_role": "code",
    "add_module_names": False,
    "python_maximum_signature_line_length": 100,
    "autodoc_member_order": "bysource",
    "highlight_language": "none",
}
INDEX = """\
# merfish and spatialvae

`merfish` decodes raw MERFISH images into molecules, cells and counts. `spatialvae` embeds cells together with their
neighbourhoods.

```{{toctree}}
:caption: Guides
{guides}
```

```{{toctree}}
:caption: Reference
:maxdepth: 1
{packages}
```
"""


def public_modules(package: str) -> list[str]:
    """Return the names of a package and its importable modules at any depth that do not begin with an underscore."""
    found = [package]
    for info in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        private = any(part.startswith("_") for part in info.name.split("."))
        if not private and (import_module(info.name).__doc__ or "").strip():
            found.append(info.name)
    return found


def public_names(package: str) -> list[str]:
    """Return directives that document what ``import package`` offers; autodoc does not find lazily loaded names."""
    module, lines = import_module(package), []
    for name in module.__all__:
        kind = "class" if isinstance(getattr(module, name), type) else "function"
        options = ["   :no-index:", "   :members:"] if kind == "class" else ["   :no-index:"]
        lines += [f".. auto{kind}:: {package}.{name}", *options, ""]
    return lines


def write_sources(folder: Path) -> None:
    """Write the pages that Sphinx reads: an index, the guides, and a page for each package and module."""
    packages = [name for name in PACKAGES if name == "merfish" or find_spec("torch") is not None]
    for name in GUIDES:
        (folder / f"{name}.md").write_text(read_guide(name), encoding="utf-8")
    for package in packages:
        modules = public_modules(package)
        for module in modules:
            lines = [module, "=" * len(module), "", f".. automodule:: {module}", "   :members:", ""]
            if module == package:
                lines += [*public_names(package), ".. toctree::", "   :maxdepth: 1", ""]
                lines += [f"   {name}" for name in modules[1:]]
            (folder / f"{module}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")
    index = INDEX.format(guides="\n".join(GUIDES), packages="\n".join(packages))
    (folder / "index.md").write_text(index, encoding="utf-8")


def build_site(site: Path) -> None:
    """Write the site to a folder, which is replaced. Raises InputError if Sphinx or its extensions are missing."""
    missing = [name for name in ("sphinx", "myst_parser", "furo") if find_spec(name) is None]
    if missing:
        raise InputError(f"the site needs {', '.join(missing)}: pip install 'merfish[docs]'")
    if site.exists() and not (site / "objects.inv").is_file():
        raise InputError(f"{site} exists and is not a site that Sphinx made; choose another folder")
    from sphinx.application import Sphinx

    with tempfile.TemporaryDirectory() as work, whole_file(site) as part:
        source = Path(work) / "source"
        source.mkdir()
        write_sources(source)
        Sphinx(source, None, part, Path(work) / "doctrees", "html", SETTINGS, status=None).build()


def main() -> None:
    """Build the site; invalid input ends with one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m merfish.guides", description="Build the documentation.")
    parser.add_argument("site", type=Path, metavar="SITE", help="folder to write")
    options = parser.parse_args()
    try:
        build_site(options.site)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"open {options.site / 'index.html'}")


if __name__ == "__main__":
    main()
