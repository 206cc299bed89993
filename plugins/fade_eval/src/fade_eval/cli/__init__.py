"""What ``fade`` offers with this distribution: ``demo``, ``eval`` and ``bench``."""
