"""What a deployed model is on disk: one folder, one manifest, a SHA-256 for every file.

docs/bundle.md describes the format for those who read it without this library. A bundle is either exactly what its
manifest says or refused: nothing here repairs, guesses or ignores.
"""

from mope_deploy.bundle.open import ENGINES, Bundle
from mope_deploy.bundle.write import check_target, write_bundle
from mope_deploy.manifest import MANIFEST

__all__ = ["ENGINES", "MANIFEST", "Bundle", "check_target", "write_bundle"]
