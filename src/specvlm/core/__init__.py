"""What every room stands on: settings, errors, trees, checks that need no torch."""
