"""The comparison of the methods, its ablations, and the audit of the documents: makes and reads run records.

`python -m study` makes the records under `assets/runs`; 04 and the pages in `docs/` read them.
"""

from __future__ import annotations
