"""What a recipe's parts refuse when they are made: figures out of range, in one wording."""

from ralf.train.recipe_text import RecipeError


def between(name: str, value: float, low: float, high: float) -> None:
    """From low to high, both allowed; NaN is neither."""
    if not low <= value <= high:
        raise RecipeError(f"{name} should be from {low} to {high}, not {value}")


def at_least(name: str, value: int, least: int) -> None:
    """No fewer."""
    if value < least:
        raise RecipeError(f"{name} should be {least} or more, not {value}")


def above_zero(name: str, value: float) -> None:
    """Above 0 and finite."""
    if not 0 < value < float("inf"):
        raise RecipeError(f"{name} should be above 0 and finite, not {value}")
