"""What every room may use: validation, checks of what comes in, memory accounting, transfers to the device."""
