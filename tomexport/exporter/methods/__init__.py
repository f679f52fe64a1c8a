"""Reduction methods, one file each."""

from tomexport.exporter.methods.tome import TOME

METHODS = (TOME,)
