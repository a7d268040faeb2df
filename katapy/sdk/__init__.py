"""Untrusted code in a VM of its own, from Python: see ``sandbox``."""
