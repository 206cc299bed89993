"""Where tokens live: a window of full-precision tokens over tiers of packed tiles, reached through a table.

Five rules hold for everything in here, growing and compiled decode alike:

1. A tile is written once between its allocation and its release. Rows of a beam share tiles; only a reserved, unwritten
   tile is a row's own.
2. A decode step writes only into reserved tiles and the window. It allocates nothing and reads nothing back to the host.
   (A prompt is packed right after its own attention, within its pass, so that the model's keys and values are never held
   twice; it may allocate.)
3. Everything else (reserving, ranking, demoting, evicting, growing, freeing) happens between passes, in
   ``TieredLayer.maintain``.
4. The host's copy of lengths (``Mirror``) is a function of when it was last read back and of the steps since; buffers only
   change their addresses in ``maintain`` or in a prompt.
5. A pass begins, and commits or rolls back as a whole over all layers. What it did not commit is undone before anything
   else is done with the cache.

``max_cache_len`` means: reserve so that addresses never change, and refuse beyond. It never changes an answer.
"""
