"""``upweight new``: a recipe to start from."""

from importlib import resources
from pathlib import Path

from upweight.cli.show import say
from upweight.errors import StoreError

__all__ = ["new"]


def new(recipe: Path) -> int:
    """Write the template where there is nothing yet.

    Raises:
        StoreError: the file exists, is not a .py file, or cannot be written.
    """
    if recipe.suffix != ".py":
        raise StoreError(f"A recipe is a Python file, got {recipe}. Give it a name ending in .py.")
    text = resources.files("upweight.cli").joinpath("recipe_template.txt").read_text("utf-8")
    try:
        with recipe.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise StoreError(f"{recipe} exists and is left as it is. Choose another name.") from error
    except OSError as error:
        raise StoreError(
            f"Cannot write {recipe}: {error.strerror}. Choose another place."
        ) from error
    say(f"Wrote {recipe}. Try it: upweight run {recipe}")
    return 0
