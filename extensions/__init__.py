"""The optional labs: their notebooks, and what only they need.

`python -m extensions` makes their records under `assets/runs`.
"""

from __future__ import annotations
