"""Inference engines: one session protocol (session.py), one folder a library, chosen in open.py."""

from mope_deploy.engines.open import (
    CACHE_MB,
    ENGINES,
    Providers,
    Session,
    built_engines,
    engines_not_run,
    open_built,
    open_session,
    providers_here,
)

__all__ = [
    "CACHE_MB",
    "ENGINES",
    "Providers",
    "Session",
    "built_engines",
    "engines_not_run",
    "open_built",
    "open_session",
    "providers_here",
]
