"""Everything after the file exists: run it, verify it. No torch, no exporter."""

from tomexport.runtime.load import load

__all__ = ["load"]
