"""``python -m train``, the same as ``mope-train``."""

import sys

try:
    from train.cli import main
except ModuleNotFoundError as error:  # another Python than the one it was installed for
    print(
        f"error: the package {error.name!r} is not installed for {sys.executable}; "
        "activate the environment that make made (. .venv/bin/activate), or run: pip install 'mope-deploy[train]'",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
