"""Files and folders that are whole or not there, who may work where, and hashes."""

from mope_deploy.files.content import json_bytes, reason, sha256
from mope_deploy.files.locks import claim, locked
from mope_deploy.files.place import flush
from mope_deploy.files.whole import recover, whole_file, whole_folder, write_file

__all__ = [
    "claim",
    "flush",
    "json_bytes",
    "locked",
    "reason",
    "recover",
    "sha256",
    "whole_file",
    "whole_folder",
    "write_file",
]
