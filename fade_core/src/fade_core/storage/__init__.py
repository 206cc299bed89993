"""Where tokens live: pools of tiles, the stores of packed tokens, the window, and the codec between them."""
