"""Model families, one file each."""

from __future__ import annotations

from torch import nn

from tomexport.errors import RewriteError
from tomexport.exporter.families.beit import BEIT
from tomexport.exporter.families.cvt import CVT
from tomexport.exporter.families.eva import EVA
from tomexport.exporter.families.family import Family
from tomexport.exporter.families.lvvit import LVVIT
from tomexport.exporter.families.naflex import NAFLEX
from tomexport.exporter.families.parallel import PARALLEL
from tomexport.exporter.families.pvt import PVT
from tomexport.exporter.families.relpos import RELPOS
from tomexport.exporter.families.signal import SIGNAL
from tomexport.exporter.families.sret import SRET
from tomexport.exporter.families.vit import VIT

FAMILIES = (PARALLEL, VIT, EVA, BEIT, RELPOS, NAFLEX, LVVIT, SRET, PVT, CVT, SIGNAL)


def family_of(model: nn.Module) -> Family:
    """Return the family that can reduce a model.

    Raises: RewriteError naming the class or the part of it that no family can reduce.
    """
    for family in FAMILIES:
        if family.accepts(model):
            if reason := family.refusal(model):
                raise RewriteError(f"This model cannot be reduced correctly: {reason}")
            return family
    raise RewriteError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model that tomexport "
        "reduces; supported are models of the modules "
        + ", ".join(module for family in FAMILIES for module in family.modules)
        + "."
    )
