"""Device code. Importing any module in here needs Triton."""
