from __future__ import annotations

import builtins
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

here = Path(__file__).parent
sys.path[:0] = [str(here.parent), str(here / "_ext")]

project = "hypergrad"
author = "The hypergrad authors"
copyright = "2026, The hypergrad authors"
release = version = metadata.version("hypergrad-torch")

extensions = [
    "myst_parser",
    "offline_math",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"hypergrad {release}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# The build reads nothing from the network, so the names of other packages cannot be looked up;
# every other name must resolve.
nitpicky = True
FOREIGN = "torch|numpy|scipy|gymnasium|matplotlib|collections|typing|pathlib|os|enum|abc"
nitpick_ignore_regex = [
    (r"py:.*", rf"({FOREIGN})\..*"),
    # What a sketch knows of what it left out is its own affair.
    (r"py:class", r"hypergrad\.solvers\.complement\.Complement"),
    # The two loops that AmIGO and stocBiO share are described with each of them.
    (r"py:class", r"hypergrad\.bilevel\.single_loop\.steppers\.InnerLoops"),
    # An implicitly differentiated solver is made by its decorator, from what the caller gave.
    (r"py:class", r"hypergrad\.bilevel\.implicit_rules\.Configuration"),
    # Annotations of the agents name internal classes; public names are resolved below.
    (r"py:class", r"hypergrad_rl\.\w+\.\w+"),
    (r"py:.*", "|".join(name for name in dir(builtins) if not name.startswith("_"))),
    (r"py:.*", "Tensor|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|optional|Pull"),
]

PACKAGES = ("hypergrad", "hypergrad_rl")


def resolve_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """Find ``hypergrad.operators.base.LinearOperator`` under its public name.

    Annotations name the module that defines a class; the pages document it where users import it.
    """
    target = str(node.get("reftarget", ""))
    # "Raises: NonFiniteError" is a public name too, also where it is not said of which package.
    package, *parts = (target if "." in target else f"hypergrad.{target}").split(".")
    if node.get("refdomain") != "py" or package not in PACKAGES:
        return None
    public: Any = import_module(package).__all__
    domain: Any = env.get_domain("py")
    for start, part in enumerate(parts):
        name = ".".join([package, *parts[start:]])  # with what follows: hypergrad.Solution.value
        if part in public and name in domain.objects:
            found: nodes.Node | None = domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
            return found
    return None


def escape_norm_bars(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Let ``|v|`` in a docstring be a norm: reStructuredText takes it for a substitution."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = line.split("``")  # every second piece is literal
            pieces[::2] = [re.sub(r"\|(?=\S)", r"\\|", piece) for piece in pieces[::2]]
            lines[number] = "``".join(pieces)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape_norm_bars)
    app.connect("missing-reference", resolve_public_name)
