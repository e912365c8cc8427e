"""What one run of pytest holds: options, selection, needs, record, verdicts, waivers, environment."""
