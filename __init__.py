"""Not a package. Python sees one in the folder above a clone that is called `appo`; it is sent on to appo/.

Without this file `import appo` would be an empty namespace package there: a folder without `__init__.py`
is found before the finder of an editable install is asked.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "appo":
    _package = Path(__file__).resolve().parent / "appo"
    _spec = spec_from_file_location(
        "appo", _package / "__init__.py", submodule_search_locations=[str(_package)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["appo"] = _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
