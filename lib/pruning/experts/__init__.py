"""Whole experts: how they are scored, dropped and merged."""
