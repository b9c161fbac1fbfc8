"""Print the folder of jaxlib's FFI headers, without importing jax or jaxlib."""

import importlib.util
import pathlib
import sys

spec = importlib.util.find_spec("jaxlib")
if spec is None or not spec.submodule_search_locations:
    sys.exit("jaxlib is not installed in the building Python: pip install 'jaxlib==0.10.2'")
include = pathlib.Path(spec.submodule_search_locations[0]) / "include"
if not (include / "xla/ffi/api/ffi.h").is_file():
    sys.exit(f"{include} holds no xla/ffi/api/ffi.h: install jaxlib 0.10.2 or newer")
print(include)
