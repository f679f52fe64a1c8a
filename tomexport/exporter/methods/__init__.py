"""Reduction methods, one file each."""

from tomexport.exporter.methods.bound import BOUND
from tomexport.exporter.methods.tome import TOME

METHODS = (TOME, BOUND)
