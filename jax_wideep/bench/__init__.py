"""The benchmarks: `python -m jax_wideep.bench exchange|layer|decode`. Not imported by the library."""
