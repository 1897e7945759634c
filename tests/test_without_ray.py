"""The door to Ray Train where Ray is not installed."""

from tests.hidden import run


def test_without_ray_the_error_names_the_extra():
    script = """
import lightning_adpsgd
try:
    import lightning_adpsgd.ray
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'lightning-adpsgd[ray]'" in run(script, "ray")
