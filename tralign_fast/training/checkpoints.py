"""Checkpoints that are whole or not there: where each part of that is.

`manifest.py` (what makes one whole), `runs.py` (a run's folder, identity and lock), `resume.py`
(what a resume may change), `resumable.py` (the trainer's side), `digest.py` (of what data).
"""

from tralign_fast.training.digest import digest
from tralign_fast.training.manifest import check_manifest
from tralign_fast.training.runs import check_output_dir, check_writable, newest_checkpoint

__all__ = ["check_manifest", "check_output_dir", "check_writable", "digest", "newest_checkpoint"]
