"""`python -m jax_wideep.bench exchange|layer|decode`; `--help` lists the options of each."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import tyro
    except ModuleNotFoundError as missing:
        sys.exit(f"jax_wideep.bench needs {missing.name}: pip install 'jax_wideep[examples]'")
    from jax_wideep.bench import decode, exchange, layer
    from jax_wideep.bench.settings import ExchangeSettings

    def run_exchange(settings: ExchangeSettings) -> None:
        exchange.run(settings)

    def run_layer(settings: layer.LayerSettings) -> None:
        layer.run(settings)

    def run_decode(settings: decode.DecodeSettings) -> None:
        decode.run(settings)

    run_exchange.__doc__, run_layer.__doc__, run_decode.__doc__ = (
        exchange.__doc__,
        layer.__doc__,
        decode.__doc__,
    )
    tyro.extras.subcommand_cli_from_dict(
        {"exchange": run_exchange, "layer": run_layer, "decode": run_decode},
        prog="python -m jax_wideep.bench",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
