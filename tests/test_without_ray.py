"""The door to Ray Train where something that it needs is not installed."""

import pytest

from tests.hidden import run

SCRIPT = """
try:
    import lightning_adpsgd.ray
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hidden", "extra"), [(("ray",), "ray"), (("ray", "lightning", "pytorch_lightning"), "lightning")]
)
def test_the_error_names_the_extra_that_is_missing(hidden, extra):
    assert f"pip install 'lightning-adpsgd[{extra}]'" in run(SCRIPT, *hidden)
