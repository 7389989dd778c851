"""Routers: which tokens go to which experts. One file a router; `base` is the contract that each
fulfils, `ROUTER_CLASSES` says which class a word of `lib.spec.ROUTERS` means."""

from .all import AllExperts
from .base import Router
from .expert_choice import ExpertChoiceRouter
from .manual import ManualRouter
from .priority import PriorityRouter
from .soft import SoftRouter
from .top_k import TopKRouter

ROUTER_CLASSES: dict[str, type[Router]] = {
    "token": TopKRouter,
    "image": TopKRouter,
    "all": AllExperts,
    "expert_choice": ExpertChoiceRouter,
    "priority": PriorityRouter,
    "manual": ManualRouter,
    "soft": SoftRouter,
}
