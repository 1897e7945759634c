"""The strategy names registered with Lightning, and their settings."""

from typing import Any

from lightning_adpsgd.periods import AdaptivePeriod


def int4_settings() -> dict[str, Any]:
    """The settings of "adpsgd_int4": 4-bit rounds, initially twice as often as by default, and estimated moments."""
    return {
        "period": AdaptivePeriod(initial=2, growth="proportional"),
        "optimizer_state": "estimate",
        "reduce_dtype": "int4",
    }


def register(strategy: type, registry: Any, elastic: bool = False) -> None:
    """Register the names of a strategy class, with that of ``elastic`` workers if it has them; may be called again."""
    launches = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
    what = "Adaptive periodic parameter averaging (ADPSGD)"
    for ending, start_method in launches.items():
        for name, told, settings in (("adpsgd", what, {}), ("adpsgd_int4", f"{what} in 4 bits", int4_settings())):
            description = f"{told} with `start_method` '{start_method}'"
            _register(registry, name + ending, strategy, description, start_method=start_method, **settings)
    if elastic:
        _register(registry, "adpsgd_elastic", strategy, f"{what} among workers that come and go", elastic=True)
    _register(registry, "adaptive_local_sgd", strategy, f"{what}, by another name", start_method="popen")


def _register(registry: Any, name: str, strategy: type, description: str, **settings: Any) -> None:
    registry.register(name, strategy, description=description, override=True, **settings)
