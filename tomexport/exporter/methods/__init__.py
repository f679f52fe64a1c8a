"""Reduction methods, one file each."""

from __future__ import annotations

from tomexport.errors import pick
from tomexport.exporter.methods.adaptive import refuse_adaptive
from tomexport.exporter.methods.ats import ATS
from tomexport.exporter.methods.bound import bound_of
from tomexport.exporter.methods.diffrate import DIFFRATE
from tomexport.exporter.methods.dtem import DTEM
from tomexport.exporter.methods.dtps import DTPS
from tomexport.exporter.methods.dynamicvit import DYNAMICVIT
from tomexport.exporter.methods.etps import ETPS
from tomexport.exporter.methods.evit import EVIT
from tomexport.exporter.methods.evo_vit import EVO_VIT
from tomexport.exporter.methods.method import Method
from tomexport.exporter.methods.pitome import PITOME
from tomexport.exporter.methods.random import RANDOM
from tomexport.exporter.methods.tofu import TOFU
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.methods.topk import TOPK

METHODS = (
    TOME,
    DTEM,
    PITOME,
    TOFU,
    DIFFRATE,
    EVIT,
    DYNAMICVIT,
    DTPS,
    ETPS,
    EVO_VIT,
    ATS,
    TOPK,
    RANDOM,
)
_BOUND = "bound"


def method_of(text: str) -> Method:
    """Return a method by its name and options: "evit", "evit:fuse=no", "tome:metric=q,combine=max".

    "bound:…" is the free-merge bound of a method, "bound" alone that of ToMe.

    Raises: UnknownNameError for a name, option or value that there is not, RewriteError for a
        method whose counts depend on the image.
    """
    name, _, rest = text.partition(":")
    if name == _BOUND:
        return bound_of(method_of(rest or TOME.name))
    refuse_adaptive(name)
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    return pick("method", METHODS, name).configured({key: value for key, _, value in pairs})
