"""Recipes that export real architectures to ONNX with seeded weights: no download, the same file on every run.

``python -m attncompile.models NAME --out FILE`` on the command line, ``export(name, out)`` from Python. Importing this
package imports neither torch nor transformers; building a recipe does.
"""

from attncompile.models.export import export
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.registry import NAMES, recipe

__all__ = ["NAMES", "Built", "Options", "Recipe", "export", "recipe"]
