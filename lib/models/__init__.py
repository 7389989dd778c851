"""The MoE layer and the models that it sits in."""
