"""`python -m jax_wideep.bench exchange|layer|decode|placement|trace`; `--help` lists the options of each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the arguments name; those of the process if None."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import tyro
    except ModuleNotFoundError as missing:
        sys.exit(f"jax_wideep.bench needs {missing.name}: pip install 'jax_wideep[examples]'")
    from jax_wideep.bench import decode, exchange, layer, placement, trace
    from jax_wideep.bench.settings import ExchangeSettings

    benchmarks = {
        "exchange": (ExchangeSettings, exchange),
        "layer": (layer.LayerSettings, layer),
        "decode": (decode.DecodeSettings, decode),
        "placement": (placement.PlacementSettings, placement),
        "trace": (trace.TraceSettings, trace),
    }
    subcommands = tuple(
        Annotated[kind, tyro.conf.subcommand(name, description=module.__doc__)]
        for name, (kind, module) in benchmarks.items()
    )
    choice: Any = Union[subcommands]  # noqa: UP007
    settings = tyro.cli(
        choice,
        prog="python -m jax_wideep.bench",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    for kind, module in benchmarks.values():
        if type(settings) is kind:
            module.run(settings)


if __name__ == "__main__":
    main()
