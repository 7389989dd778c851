"""Routers: which tokens go to which experts. One file a router; `base` is the contract that each
fulfils."""
