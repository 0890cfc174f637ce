"""Number of Hypothesis examples: ``pytest --hypothesis-profile NAME``, see conftest.py."""

from hypothesis import settings

_USUAL = 100  # Hypothesis's own default, and the default profile's


def examples(usual: int) -> int:
    """Return a number of examples, scaled as the profile scales the usual number."""
    return usual * settings().max_examples // _USUAL
