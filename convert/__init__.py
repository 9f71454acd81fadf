"""Checkpoints in and out: tables of tensor names, and one strict engine."""

from convert.folder import convert_folder, converted

__all__ = ["convert_folder", "converted"]
