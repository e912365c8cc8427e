"""What is measured: its data is verified before it is timed."""
