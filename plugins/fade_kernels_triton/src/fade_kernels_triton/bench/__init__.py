"""``fade bench kernels`` and ``fade bench tune``: the decode kernel beside torch's own attention, and its launches."""
