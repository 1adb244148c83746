# The package has no type information; its names are checked by running the builder.
from typing import Any

def __getattr__(name: str) -> Any: ...
