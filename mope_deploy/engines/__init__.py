"""Inference engines: one session protocol (session.py), one folder a library, chosen in open.py."""

from mope_deploy.engines.listing import built_engines, engines_not_run
from mope_deploy.engines.open import CACHE_MB, ENGINES, Providers, open_built, open_session
from mope_deploy.engines.session import Session

__all__ = [
    "CACHE_MB",
    "ENGINES",
    "Providers",
    "Session",
    "built_engines",
    "engines_not_run",
    "open_built",
    "open_session",
]
