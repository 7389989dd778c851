"""Offers the package `lib` under a name of its own, for folders that have a `lib` already.

    import moe_vision as lib
    from moe_vision.spec import RunSpec

It is the package that lies beside this folder, found by its path: the name `lib` is not imported,
and whatever else is called so does not matter. All modules of a program should use one of the two
names: `lib.MoESpec` and `moe_vision.MoESpec` are classes of their own.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent / "lib"
_spec = spec_from_file_location(
    __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
sys.modules[__name__] = module_from_spec(_spec)  # `import moe_vision` returns what stands here
_spec.loader.exec_module(sys.modules[__name__])
