"""The site: `make docs` builds it from the Markdown pages, the notebooks and the docstrings. It executes no page.

Pages are read on a code host too, so what only the site needs stands here and in `_site/`: the tables of contents, the
links from names in code to the reference, and the reference. Tests execute the pages and compare what they print.
"""

import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_site"))

project = "stepc"
author = "The stepc contributors"
copyright = author
version = release = metadata.version("stepc")

# The sources are the repository, so that links between its pages are the same there and here.
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    ".github/CONTRIBUTING.md",
    "benchmarks/README.md",
    "docs/**",
    "examples/**/README.md",
    "notebooks/*.ipynb",
    "tests/*/RESULTS.md",
]
exclude_patterns = ["docs/_*", ".venv", "runs", "dist", "build", "**/__pycache__", "**/.*_checkpoints"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "contents",  # those below are in `_site/`
    "docstrings",
    "links",
    "reference",
]
nb_execution_mode = "off"
myst_heading_anchors = 3
# A plain block is an output. Its language is none.
highlight_language = "text"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
python_display_short_literal_types = True

# The inventories hold the names that pages and docstrings mention, in version 1 of the format, which is text: a name,
# what it is, its page. To refresh one, print the inventory of the library with `python -m sphinx.ext.intersphinx
# https://docs.jax.dev/en/latest/objects.inv` and copy the pages of these names.
intersphinx_mapping = {
    name: (address, str(HERE / "_site" / "inventories" / f"{name}.txt"))
    for name, address in {
        "jax": "https://docs.jax.dev/en/latest/",
        "numpy": "https://numpy.org/doc/stable/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "python": "https://docs.python.org/3/",
    }.items()
}

smartquotes = False  # "nan" in a docstring is a string
html_theme = "sphinx_book_theme"  # that of jax and flax
html_title = "stepc"
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/stepc/stepc",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search is in the sidebar
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
