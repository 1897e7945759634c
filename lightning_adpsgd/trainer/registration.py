"""The strategy names registered with Lightning, and their settings."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_adpsgd.periods import AdaptivePeriod


def int4_settings() -> dict[str, Any]:
    """The settings of "adpsgd_int4": 4-bit rounds, initially twice as often as by default, and estimated moments."""
    return {
        "period": AdaptivePeriod(initial=2, growth="proportional"),
        "optimizer_state": "estimate",
        "reduce_dtype": "int4",
    }


def register(strategy: type, registry: Any = StrategyRegistry) -> None:
    """Register the names of a strategy class; may be called again."""
    launches = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
    what = "Adaptive periodic parameter averaging (ADPSGD)"
    names: list[tuple[str, str, dict[str, Any]]] = [
        ("adaptive_local_sgd", f"{what}, by another name", {"start_method": "popen"}),
    ]
    for ending, method in launches.items():
        for name, told, settings in (("adpsgd", what, {}), ("adpsgd_int4", f"{what} in 4 bits", int4_settings())):
            described = f"{told} with `start_method` '{method}'"
            names.append((name + ending, described, {"start_method": method, **settings}))
    for name, described, settings in names:
        registry.register(name, strategy, description=described, override=True, **settings)
