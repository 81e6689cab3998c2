"""Imported first: says which packages of the extra ``rl`` are missing, and what installs them."""

import importlib.util

import hypergrad

#: What the package cannot be imported without.
NEEDED = ("filelock", "gymnasium", "safetensors", "tqdm")

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    raise hypergrad.MissingPackageError(
        f"hypergrad_rl needs packages that are not installed: {', '.join(missing)}. They come with "
        'its extra: pip install "hypergrad-torch[rl]", or pip install ".[rl]" in a clone.'
    )
