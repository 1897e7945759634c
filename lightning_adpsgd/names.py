"""The names under which Lightning knows the strategy, and what each stands for."""

from typing import Any

from lightning_adpsgd.periods import AdaptivePeriod


def int4_settings() -> dict[str, Any]:
    """Rounds in 4 bits, twice as often as by default at first, with moments that follow from the drift."""
    return {
        "period": AdaptivePeriod(initial=2, growth="proportional"),
        "optimizer_state": "estimate",
        "reduce_dtype": "int4",
    }


def register(strategy: type, registry: Any) -> None:
    """Register a strategy among Lightning's own; a second time changes nothing.

    Args:
        strategy: the class.
        registry: where.
    """
    launches = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
    what = "Adaptive periodic parameter averaging (ADPSGD)"
    for ending, start_method in launches.items():
        for name, told, settings in (("adpsgd", what, {}), ("adpsgd_int4", f"{what} in 4 bits", int4_settings())):
            description = f"{told} with `start_method` '{start_method}'"
            _register(registry, name + ending, strategy, description, start_method=start_method, **settings)
    _register(registry, "adaptive_local_sgd", strategy, f"{what}, by another name", start_method="popen")


def _register(registry: Any, name: str, strategy: type, description: str, **settings: Any) -> None:
    registry.register(name, strategy, description=description, override=True, **settings)
