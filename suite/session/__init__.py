"""What one run of pytest holds: selection, record, verdicts, waivers, environment."""
