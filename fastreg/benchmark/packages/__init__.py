"""Peers that come from packages; each module offers ``methods()`` and imports its package only to prepare a step."""
