"""How Sphinx builds the site: the pages of this folder, and the API from docstrings."""

from importlib.metadata import version as installed_version

project = "MegaContext"
author = "The MegaContext authors"
project_copyright = author
release = version = installed_version("megacontext")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]

# Headings get the anchors that they have where Markdown is shown as it is.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
maximum_signature_line_length = 88
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"MegaContext {release}"
html_copy_source = False
html_show_sphinx = False
