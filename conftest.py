"""What all tests share, the agent's among them."""

from __future__ import annotations

from hypothesis import settings

# A machine may stall for as long as it likes: no example is wrong for that.
settings.register_profile("katapy", deadline=None)
settings.load_profile("katapy")
